-- Relay $1, last written by session $2, follows a failover slot to timeline $3: a new epoch begins
-- at mark $4, ordinal $5, sub $6, and flush mark $7. No row: another session has taken over. Where
-- the slot is ahead of the row, it has passed canaries that the row does not know.
UPDATE watership.checkpoint
SET epoch = epoch + 1, timeline = $3::bigint::integer, mark = $4, ordinal = $5, sub = $6,
    canary = CASE WHEN $7 <= flush_mark THEN canary END, flush_mark = $7, updated_at = now()
WHERE name = $1 AND session_no = $2
RETURNING epoch::bigint
