-- The first checkpoint of a relay, where its slot begins, as `watership init --print-sql` shows it,
-- which fills in the three names.
INSERT INTO watership.checkpoint
    (name, kind, epoch, mark, ordinal, flush_mark, slot, system_identifier, timeline,
     publication, publication_oid)
SELECT :name, 'wal', 1, s.confirmed_flush_lsn - '0/0'::pg_lsn, 0,
    s.confirmed_flush_lsn - '0/0'::pg_lsn, s.slot_name,
    -- An unsigned number, which the server shows as a signed one.
    mod(c.system_identifier::numeric + 18446744073709551616, 18446744073709551616),
    ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::integer,
    p.pubname, p.oid
FROM pg_catalog.pg_replication_slots AS s, pg_catalog.pg_control_system() AS c,
    pg_catalog.pg_publication AS p
WHERE s.slot_name = :slot AND p.pubname = :publication
ON CONFLICT (name) DO NOTHING;
