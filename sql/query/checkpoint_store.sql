-- Progress of relay $1, session $2: epoch $3, mark $4, ordinal $5, sub $6, flush mark $7. No row:
-- another session has taken over, or the stored position is later than this one. Returns about
-- where in the WAL this write ended.
UPDATE watership.checkpoint
SET epoch = $3::bigint::integer, mark = $4, ordinal = $5, sub = $6, flush_mark = $7,
    updated_at = now()
WHERE name = $1 AND session_no = $2
  AND (epoch, mark, ordinal, sub) <= ($3::bigint::integer, $4, $5, $6) AND flush_mark <= $7
RETURNING pg_current_wal_insert_lsn()
