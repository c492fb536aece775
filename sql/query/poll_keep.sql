-- Relay $1, last written by session $2, continues where it is, in a new epoch, on system $3,
-- timeline $4. The old session can write no more. No row: another session has taken over.
UPDATE watership.checkpoint
SET epoch = epoch + 1, session_no = session_no + 1, system_identifier = $3,
    timeline = $4::bigint::integer, updated_at = now()
WHERE name = $1 AND session_no = $2
RETURNING epoch::bigint, mark
