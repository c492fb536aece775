-- A person accepts a gap for relay $1, last written by session $2: a new epoch begins at mark $3,
-- with flush mark $4, on system $5, timeline $6, publication $7 with oid $8. The old session can
-- write no more. No row: another session has taken over.
UPDATE watership.checkpoint
SET epoch = epoch + 1, session_no = session_no + 1, mark = $3, ordinal = 0, sub = 0,
    flush_mark = $4, system_identifier = $5, timeline = $6::bigint::integer, publication = $7,
    publication_oid = $8, updated_at = now()
WHERE name = $1 AND session_no = $2
RETURNING epoch::bigint
