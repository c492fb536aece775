-- The first checkpoint of a relay that polls, as `watership init --print-sql` shows it, which fills
-- in the names.
WITH made AS (
    INSERT INTO watership.checkpoint
        (name, kind, epoch, mark, ordinal, flush_mark, system_identifier, timeline)
    SELECT :name, 'poll', 1 + coalesce((SELECT max(epoch) FROM watership.checkpoint), 0),
        now.number, 0, now.number,
        -- An unsigned number, which the server shows as a signed one.
        mod(c.system_identifier::numeric + 18446744073709551616, 18446744073709551616),
        ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::integer
    FROM pg_catalog.pg_control_system() AS c,
        (SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint AS number) AS now
    ON CONFLICT (name) DO NOTHING
    RETURNING name, mark
)
INSERT INTO watership.poll_batch (name, number, since, snapshot, first_seq, made_at, outbox,
    outbox_oid, order_attnum, xid_attnum)
SELECT made.name, made.mark, pg_current_snapshot(), pg_current_snapshot(), 0, now(), :outbox,
    c.oid, o.attnum, x.attnum
FROM made
LEFT JOIN pg_catalog.pg_class AS c ON c.oid = to_regclass(:mapped)
LEFT JOIN pg_catalog.pg_attribute AS o ON o.attrelid = c.oid AND o.attname = :order
LEFT JOIN pg_catalog.pg_attribute AS x ON x.attrelid = c.oid AND x.attname = :transaction;
