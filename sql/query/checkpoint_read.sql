-- The checkpoint of relay $1.
SELECT epoch::bigint, mark, ordinal, sub, flush_mark, session_no, kind, slot, system_identifier,
       timeline::bigint, publication, publication_oid
FROM watership.checkpoint
WHERE name = $1
