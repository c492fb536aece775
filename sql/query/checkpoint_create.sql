-- The first checkpoint of a relay that reads the WAL: $1 name, $2 consistent point of the slot,
-- $3 slot, $4 system identifier, $5 timeline, $6 publication, $7 its oid.
INSERT INTO watership.checkpoint
    (name, kind, epoch, mark, ordinal, flush_mark, slot, system_identifier, timeline,
     publication, publication_oid)
-- After every epoch that an earlier row of the name has had: positions never go back.
SELECT $1, 'wal', 1 + greatest(0,
        (SELECT max(epoch) FROM watership.resync WHERE name = $1),
        (SELECT max(epoch) FROM watership.parked WHERE name = $1)),
    $2, 0, $2, $3, $4, $5::bigint::integer, $6, $7
ON CONFLICT (name) DO NOTHING
