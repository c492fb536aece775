-- The first checkpoint of a relay that polls: $1 name, $2 system identifier, $3 timeline; it begins
-- behind what is visible now in the outbox $5, whose OID is $6, by its columns $7 (order) and $8
-- (transaction). Unless $4, only if that has no rows. No row: there
-- are some, or there is a checkpoint.
WITH made AS (
    INSERT INTO watership.checkpoint
        (name, kind, epoch, mark, ordinal, flush_mark, system_identifier, timeline)
    -- After every epoch that an earlier row of the name has had, and those of other relays, and
    -- with a number that grows with the database: positions never go back.
    SELECT $1, 'poll', 1 + greatest(0,
            (SELECT max(epoch) FROM watership.resync WHERE name = $1),
            (SELECT max(epoch) FROM watership.parked WHERE name = $1),
            (SELECT max(epoch) FROM watership.checkpoint)),
        now.number, 0, now.number, $2, $3::bigint::integer
    FROM (SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint AS number) AS now
    WHERE $4 OR NOT EXISTS (SELECT FROM :outbox)
    ON CONFLICT (name) DO NOTHING
    RETURNING name, mark
), left_behind AS (
    DELETE FROM watership.poll_batch WHERE name IN (SELECT name FROM made)
        AND number <> (SELECT mark FROM made)
)
INSERT INTO watership.poll_batch AS b (name, number, since, snapshot, first_seq, made_at, outbox,
    outbox_oid, order_attnum, xid_attnum)
SELECT name, mark, pg_current_snapshot(), pg_current_snapshot(), 0, now(), $5, $6, $7, $8 FROM made
ON CONFLICT (name, number) DO UPDATE SET since = excluded.since, snapshot = excluded.snapshot,
    made_at = excluded.made_at, outbox = excluded.outbox, outbox_oid = excluded.outbox_oid,
    order_attnum = excluded.order_attnum, xid_attnum = excluded.xid_attnum
RETURNING b.number
