-- A new session of relay $1 takes the row over; writes of an older session match no row from here.
-- The last canary is forgotten where a session in between did not keep it.
-- With another publication ($2 is its oid; null for a relay that polls) the ordinals of the
-- interrupted transaction may differ, so it is resumed from its start.
UPDATE watership.checkpoint
SET session_no = session_no + 1,
    canary = CASE WHEN canary_session = session_no THEN canary END,
    canary_session = session_no + 1,
    ordinal = CASE WHEN publication_oid IS NOT DISTINCT FROM $2 THEN ordinal ELSE 0 END,
    sub = CASE WHEN publication_oid IS NOT DISTINCT FROM $2 THEN sub ELSE 0 END,
    publication_oid = $2
WHERE name = $1
RETURNING epoch::bigint, mark, ordinal, sub, flush_mark, session_no, kind, slot, system_identifier,
          timeline::bigint, publication, publication_oid
