-- Rows that changed their key while run $1 was open, the first $2 by their position.
SELECT position, key::text FROM watership.backfill_moved
WHERE run = $1 ORDER BY position COLLATE "C" LIMIT $2
