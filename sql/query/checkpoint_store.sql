-- Progress of relay $1, session $2. No row: another session has taken over, or this position is
-- behind the stored one. Returns about where in the WAL this write ended.
UPDATE watership.checkpoint
SET epoch = $3::bigint::integer, commit_lsn = $4, ordinal = $5, flush_lsn = $6, updated_at = now()
WHERE name = $1 AND session_no = $2
  AND (epoch, commit_lsn, ordinal) <= ($3::bigint::integer, $4, $5) AND flush_lsn <= $6
RETURNING pg_current_wal_insert_lsn()
