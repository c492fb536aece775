-- Whether every relay has passed $1, as its checkpoint is stored; where $2, every one that reads
-- the WAL, because one that polls passes no position in it.
SELECT coalesce(min(coalesce(flush_lsn, '0/0')) >= $1::text::pg_lsn, $2)
FROM watership.checkpoint
WHERE NOT $2 OR kind = 'wal'
