-- Relay $1, last written by session $2, follows a failover slot to timeline $3: a new epoch begins
-- at $4, ordinal $5, and flush position $6. No row: another session has taken over.
UPDATE watership.checkpoint
SET epoch = epoch + 1, timeline = $3::bigint::integer, commit_lsn = $4, ordinal = $5,
    flush_lsn = $6, updated_at = now()
WHERE name = $1 AND session_no = $2
RETURNING epoch::bigint
