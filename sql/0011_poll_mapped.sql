-- Watership 0011: polling of an outbox table of the application's.
--
-- A batch is of one table, and says of which: a place in it means nothing in another, and what is
-- unread in one table holds no partition of another.

SET ROLE watership_owner;

-- "schema.table", as the configuration of the relay names it.
ALTER TABLE watership.poll_batch ADD COLUMN outbox text NOT NULL DEFAULT 'watership.outbox';

-- As before, of relays that poll watership.outbox: a row of it is passed when it is visible in all
-- of these. NULL where the batch that a relay stands at is missing: then nothing is passed.
CREATE OR REPLACE FUNCTION watership.polled_snapshots() RETURNS pg_snapshot[]
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE WHEN count(*) = count(b.snapshot)
        THEN coalesce(array_agg(b.snapshot) FILTER (WHERE b.outbox = 'watership.outbox'), '{}') END
    FROM watership.checkpoint AS c
    LEFT JOIN watership.poll_batch AS b ON b.name = c.name AND b.number = c.flush_mark
    WHERE c.kind = 'poll'
$$;

INSERT INTO watership.migration (version, name) VALUES (11, '0011_poll_mapped');

RESET ROLE;
