-- The last position of a row that changed its key while run $1 was open; null for none.
SELECT max(position COLLATE "C") FROM watership.backfill_moved WHERE run = $1
