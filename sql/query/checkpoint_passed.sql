-- Whether every relay has passed $1, as its checkpoint is stored. One that does not read the WAL
-- passes no position in it.
SELECT coalesce(min(coalesce(flush_lsn, '0/0')) >= $1::text::pg_lsn, false)
FROM watership.checkpoint
