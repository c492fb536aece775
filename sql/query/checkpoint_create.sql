-- The first checkpoint of a relay that reads the WAL: $1 name, $2 consistent point of the slot,
-- $3 slot, $4 system identifier, $5 timeline, $6 publication, $7 its oid.
INSERT INTO watership.checkpoint
    (name, kind, epoch, mark, ordinal, flush_mark, slot, system_identifier, timeline,
     publication, publication_oid)
VALUES ($1, 'wal', 1, $2, 0, $2, $3, $4, $5::bigint::integer, $6, $7)
ON CONFLICT (name) DO NOTHING
