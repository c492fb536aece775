-- Rows that changed their key while run $1 was open, up to position $3, the first $2 of them.
SELECT position, key::text FROM watership.backfill_moved
WHERE run = $1 AND position COLLATE "C" <= $3
ORDER BY position COLLATE "C" LIMIT $2
