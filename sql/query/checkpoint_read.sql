-- The checkpoint of relay $1.
SELECT epoch::bigint, commit_lsn, ordinal, flush_lsn, session_no, slot, system_identifier,
       timeline::bigint, publication, publication_oid
FROM watership.checkpoint
WHERE name = $1
