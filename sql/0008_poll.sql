-- Watership 0008: polling, for relays that read the outbox with SQL instead of the WAL.
--
-- A batch is what one snapshot shows and the one before it did not: nothing is missed when a
-- transaction commits late, and nothing waits for a transaction that stays open. A batch is stored
-- before anything of it is published, so a place in it means the same on every attempt.
-- The two indexes that this needs cost every INSERT, so only `watership init` with
-- source.mode = "poll" makes them: on (xid, seq) and on (seq).

SET ROLE watership_owner;

-- The batches that are not passed yet, and the last one that is. No foreign key: it would lock the
-- checkpoint's row with every batch.
CREATE TABLE watership.poll_batch (
    name      text        NOT NULL,
    -- The mark of its events.
    number    bigint      NOT NULL CHECK (number >= 0),
    -- Its rows: visible in `snapshot`, not visible in `since`.
    since     pg_snapshot NOT NULL,
    snapshot  pg_snapshot NOT NULL,
    -- The lowest seq of its rows. An event's ordinal is its distance from here, so a row that
    -- somebody deletes moves no other.
    first_seq bigint      NOT NULL,
    -- The range of seq of its rows whose transactions began after `since`; null without such rows.
    -- The others are found by their xid.
    new_first bigint,
    new_last  bigint,
    made_at   timestamptz NOT NULL,
    PRIMARY KEY (name, number)
);

GRANT SELECT, INSERT, DELETE ON watership.poll_batch TO watership_relay;

-- A gap in polling is not a range of the WAL.
ALTER TABLE watership.resync
    ALTER COLUMN gap_from DROP NOT NULL,
    ALTER COLUMN gap_to DROP NOT NULL,
    ALTER COLUMN resumed_at DROP NOT NULL,
    ALTER COLUMN slot DROP NOT NULL,
    ADD COLUMN resumed_batch bigint;

-- Transactions that were open in `since` and have committed in `snapshot`.
CREATE FUNCTION watership.poll_late(since pg_snapshot, snapshot pg_snapshot) RETURNS xid8[]
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT coalesce(array_agg(x), '{}') FROM pg_snapshot_xip(since) AS x
    WHERE pg_visible_in_snapshot(x, snapshot) AND pg_xact_status(x) IS DISTINCT FROM 'aborted'
$$;

-- What is there now and was not visible in `since`: how many rows, and where they are.
--
-- The settings of this and the next functions are about plans: one for all calls, and always by
-- the index on (xid, seq) with a lower bound. Rows that are dead and cannot be removed yet, and
-- those of a transaction that stays open, lie below that bound from the second call on.
CREATE FUNCTION watership.poll_look(
    since pg_snapshot, OUT snapshot pg_snapshot, OUT rows bigint, OUT first_seq bigint,
    OUT new_first bigint, OUT new_last bigint
) LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET row_security = off
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET jit = off
AS $$
DECLARE
    late xid8[];
    late_rows bigint;
    late_first bigint;
BEGIN
    snapshot := pg_current_snapshot();
    rows := 0;
    IF snapshot::text = since::text THEN
        RETURN;
    END IF;
    IF pg_snapshot_xmax(snapshot) > pg_snapshot_xmax(since) THEN
        -- count(*) keeps the planner from answering min(seq) by reading all of the index on seq.
        SELECT count(*), min(o.seq), max(o.seq) INTO rows, new_first, new_last
        FROM watership.outbox AS o
        WHERE o.xid >= pg_snapshot_xmax(since) AND o.xid < pg_snapshot_xmax(snapshot)
            AND pg_visible_in_snapshot(o.xid, snapshot);
    END IF;
    first_seq := new_first;
    late := watership.poll_late(since, snapshot);
    IF late <> '{}' THEN
        SELECT count(*), min(o.seq) INTO late_rows, late_first
        FROM watership.outbox AS o WHERE o.xid = ANY (late);
        rows := rows + late_rows;
        first_seq := least(first_seq, late_first);
    END IF;
END
$$;

-- The next rows of these transactions, each by itself in the order of seq.
CREATE FUNCTION watership.poll_read_late(
    late xid8[], after_seq bigint, after_id uuid, most integer
) RETURNS SETOF watership.outbox LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET row_security = off
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
SET jit = off
AS $$
BEGIN
    IF late = '{}' THEN
        RETURN;
    END IF;
    RETURN QUERY SELECT o.* FROM unnest(late) AS l (xid) CROSS JOIN LATERAL (
        SELECT * FROM watership.outbox AS o
        WHERE o.xid = l.xid AND o.seq >= after_seq AND (o.seq, o.id) > (after_seq, after_id)
        ORDER BY o.seq, o.id LIMIT most) AS o
    ORDER BY o.seq, o.id LIMIT most;
END
$$;

-- The next rows of a batch in the order of seq: at most `most`, and no more after the one with
-- which their bodies reach `most_bytes`. New rows come by the index on seq, whose range they fill
-- almost alone; sorting what the other index finds would sort the whole batch for each portion.
CREATE FUNCTION watership.poll_read(
    since pg_snapshot, snapshot pg_snapshot, new_first bigint, new_last bigint,
    after_seq bigint, after_id uuid, most integer, most_bytes bigint
) RETURNS SETOF watership.outbox LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET row_security = off
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
SET enable_incremental_sort = on
SET jit = off
AS $$
DECLARE
    late xid8[] := watership.poll_late(since, snapshot);
    o watership.outbox;
    bytes bigint := 0;
BEGIN
    FOR o IN
        SELECT * FROM (
            (SELECT n.* FROM watership.outbox AS n
            WHERE n.seq >= greatest(after_seq, new_first) AND n.seq <= new_last
                AND (n.seq, n.id) > (after_seq, after_id)
                AND n.xid >= pg_snapshot_xmax(since) AND n.xid < pg_snapshot_xmax(snapshot)
                AND pg_visible_in_snapshot(n.xid, snapshot)
            ORDER BY n.seq, n.id LIMIT most)
            UNION ALL
            SELECT * FROM watership.poll_read_late(late, after_seq, after_id, most)) AS found
        ORDER BY found.seq, found.id LIMIT most
    LOOP
        RETURN NEXT o;
        bytes := bytes + coalesce(octet_length(o.payload::text), 0)
            + coalesce(octet_length(o.data), 0);
        EXIT WHEN bytes >= most_bytes;
    END LOOP;
END
$$;

-- What every relay that polls has published: a row is passed when it is visible in all of these.
-- NULL where the batch that a relay stands at is missing: then nothing is passed.
CREATE FUNCTION watership.polled_snapshots() RETURNS pg_snapshot[]
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE WHEN count(*) = count(b.snapshot)
        THEN coalesce(array_agg(b.snapshot) FILTER (WHERE b.snapshot IS NOT NULL), '{}') END
    FROM watership.checkpoint AS c
    LEFT JOIN watership.poll_batch AS b ON b.name = c.name AND b.number = c.flush_mark
    WHERE c.kind = 'poll'
$$;

-- Whether every relay that polls has passed all rows of a partition.
CREATE FUNCTION watership.is_polled(leaf text, snapshots pg_snapshot[]) RETURNS boolean
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    snapshot pg_snapshot;
    unread boolean;
BEGIN
    IF snapshots IS NULL THEN
        RETURN false;
    END IF;
    FOREACH snapshot IN ARRAY snapshots LOOP
        EXECUTE format('SELECT EXISTS (SELECT FROM ONLY watership.%I '
            'WHERE xid >= pg_snapshot_xmin($1) AND NOT pg_visible_in_snapshot(xid, $1))', leaf)
        INTO unread USING snapshot;
        IF unread THEN
            RETURN false;
        END IF;
    END LOOP;
    RETURN true;
END
$$;

-- As before, and not while a relay that polls has rows of it to read: it reads what is attached.
CREATE OR REPLACE FUNCTION watership.renew_default(OUT renewed text, OUT postponed text)
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    old text := 'outbox_default_' || to_char(clock_timestamp(), 'YYYYMMDDHH24MISSUS');
BEGIN
    -- Before the lock as well, because it stops writers.
    IF NOT watership.is_polled('outbox_default', watership.polled_snapshots()) THEN
        postponed := 'replacing outbox_default: a relay that polls has not read all of it yet';
        RETURN;
    END IF;
    -- The root comes last: a session that waits for it has nothing else left to wait for.
    LOCK TABLE ONLY watership.outbox_default IN ACCESS EXCLUSIVE MODE;
    IF NOT watership.is_polled('outbox_default', watership.polled_snapshots()) THEN
        RAISE EXCEPTION 'a relay that polls has not read all of it yet';
    END IF;
    ALTER TABLE watership.outbox DETACH PARTITION watership.outbox_default;
    EXECUTE format('ALTER TABLE watership.outbox_default RENAME TO %I', old);
    EXECUTE format('ALTER INDEX watership.outbox_default_created_at RENAME TO %I',
        old || '_created_at');
    CREATE TABLE watership.outbox_default PARTITION OF watership.outbox DEFAULT;
    CREATE INDEX outbox_default_created_at ON watership.outbox_default (created_at);
    INSERT INTO watership.retired_partition (name, range_to, lsn)
    VALUES (old, now(), pg_current_wal_insert_lsn());
    -- It was about rows of the old one.
    DELETE FROM watership.default_retirement;
    renewed := old;
EXCEPTION WHEN OTHERS THEN
    postponed := format('replacing outbox_default: %s', SQLERRM);
END
$$;

-- As before, and of the rows only those that every relay that polls has passed.
CREATE OR REPLACE FUNCTION watership.delete_passed_default_rows(
    flush_lsn pg_lsn, retain interval, most integer, OUT deleted bigint
) LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    note watership.default_retirement%ROWTYPE;
    horizon xid8 := pg_snapshot_xmin(pg_current_snapshot());
    snapshots pg_snapshot[] := watership.polled_snapshots();
BEGIN
    deleted := 0;
    SELECT * INTO note FROM watership.default_retirement;
    -- age() compares 32-bit xids, so a note must not be older than half of their range.
    IF note.one AND horizon::text::numeric - note.xid::text::numeric > 1000000000 THEN
        DELETE FROM watership.default_retirement;
        note := NULL;
    END IF;
    IF note.one AND note.lsn <= flush_lsn AND snapshots IS NOT NULL THEN
        DELETE FROM ONLY watership.outbox_default WHERE ctid = ANY (ARRAY(
            SELECT d.ctid FROM ONLY watership.outbox_default AS d
            WHERE d.created_at < note.cutoff AND age(d.xmin) > age(note.xid::xid)
                AND NOT EXISTS (SELECT FROM unnest(snapshots) AS s (snapshot)
                    WHERE NOT pg_visible_in_snapshot(d.xid, s.snapshot))
            LIMIT most));
        GET DIAGNOSTICS deleted = ROW_COUNT;
        IF deleted < most THEN
            DELETE FROM watership.default_retirement;
            note := NULL;
        END IF;
    END IF;
    IF note.one IS NULL THEN
        -- The snapshot is older than the position, so what it shows as ended lies before it.
        INSERT INTO watership.default_retirement (cutoff, xid, lsn)
        SELECT now() - retain, horizon, pg_current_wal_insert_lsn()
        WHERE EXISTS (SELECT FROM ONLY watership.outbox_default
            WHERE created_at < now() - retain);
    END IF;
END
$$;

-- As before, and not while a relay that polls has rows of it to read: it reads what is attached.
CREATE OR REPLACE FUNCTION watership.detach_oldest(
    retain interval, OUT detached text[], OUT postponed text[]
) LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    leaf text;
    upper_bound timestamptz;
BEGIN
    detached := '{}'; postponed := '{}';
    -- A bound reads: FOR VALUES FROM ('2026-01-01 00:00:00+00') TO ('2026-01-02 00:00:00+00').
    SELECT c.relname, b.upper_bound INTO leaf, upper_bound
    FROM pg_inherits AS i
    JOIN pg_class AS c ON c.oid = i.inhrelid
    CROSS JOIN LATERAL (SELECT substring(pg_get_expr(c.relpartbound, c.oid)
        FROM ' TO \(''([^'']+)''\)$')::timestamptz AS upper_bound) AS b
    WHERE i.inhparent = 'watership.outbox'::regclass
        AND c.relnamespace = 'watership'::regnamespace
        AND b.upper_bound <= now() - retain
    ORDER BY b.upper_bound LIMIT 1;
    IF leaf IS NULL THEN
        RETURN;
    END IF;
    -- Before the lock as well, because it stops writers.
    IF NOT watership.is_polled(leaf, watership.polled_snapshots()) THEN
        postponed := postponed
            || format('detaching %s: a relay that polls has not read all of it yet', leaf);
        RETURN;
    END IF;
    BEGIN
        -- The root comes last: a session that waits for it has nothing else left to wait for.
        EXECUTE format('LOCK TABLE ONLY watership.%I IN ACCESS EXCLUSIVE MODE', leaf);
        IF NOT watership.is_polled(leaf, watership.polled_snapshots()) THEN
            RAISE EXCEPTION 'a relay that polls has not read all of it yet';
        END IF;
        LOCK TABLE ONLY watership.outbox_default IN ACCESS EXCLUSIVE MODE;
        EXECUTE format('ALTER TABLE watership.outbox DETACH PARTITION watership.%I', leaf);
        -- The lock is held: every writer of this partition has ended, before this position.
        INSERT INTO watership.retired_partition (name, range_to, lsn)
        VALUES (leaf, upper_bound, pg_current_wal_insert_lsn());
        detached := detached || leaf;
    EXCEPTION WHEN OTHERS THEN
        postponed := postponed || format('detaching %s: %s', leaf, SQLERRM);
    END;
END
$$;

-- How far every relay that reads the WAL has passed it; all of it where none reads the WAL, nothing
-- where there is no relay at all, or it cannot be said where one that polls is.
CREATE FUNCTION watership.passed_lsn() RETURNS pg_lsn
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE WHEN count(*) > 0 AND watership.polled_snapshots() IS NOT NULL
        THEN coalesce(min(coalesce(c.flush_lsn, '0/0')) FILTER (WHERE c.kind = 'wal'),
            'FFFFFFFF/FFFFFFFF') END
    FROM watership.checkpoint AS c
$$;

-- As before, but for `passed_lsn`: a relay that polls passes no position in the WAL.
CREATE OR REPLACE FUNCTION watership.maintain(
    retain interval,
    OUT created text[], OUT skipped text[], OUT postponed text[], OUT dropped text[],
    OUT detached text[], OUT default_deleted bigint, OUT default_left bigint, OUT more boolean
) LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '100ms'
SET TimeZone = 'UTC'
SET DateStyle = 'ISO, YMD'
AS $$
DECLARE
    days_ahead CONSTANT integer := 14;
    drop_most CONSTANT integer := 4;
    delete_most CONSTANT integer := 1000;
    count_most CONSTANT integer := 100000;
    flush_lsn pg_lsn;
    renewed text;
    later text[];
BEGIN
    IF retain IS NULL OR retain < interval '0' THEN
        RAISE EXCEPTION 'retain is %, and must be an interval of 0 or more', retain
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    dropped := '{}'; detached := '{}'; default_deleted := 0;
    IF pg_try_advisory_xact_lock(1465079888, 2) THEN
        flush_lsn := watership.passed_lsn();
        SELECT * INTO created, renewed, skipped, postponed
        FROM watership.create_days_ahead(days_ahead);
        SELECT * INTO dropped, later FROM watership.drop_passed(flush_lsn, retain, drop_most);
        postponed := postponed || later;
        default_deleted := watership.delete_passed_default_rows(flush_lsn, retain, delete_most);
        more := created <> '{}' OR dropped <> '{}' OR default_deleted > 0;
        IF NOT more THEN
            SELECT * INTO detached, later FROM watership.detach_oldest(retain);
            postponed := postponed || later;
            more := detached <> '{}';
        END IF;
        IF renewed IS NOT NULL THEN
            detached := detached || renewed;
        END IF;
    ELSE
        created := '{}'; skipped := '{}'; more := false;
        postponed := ARRAY['all: maintenance is running in another session'];
    END IF;
    SELECT count(*) INTO default_left FROM (
        SELECT FROM ONLY watership.outbox_default LIMIT count_most) AS rows;
END
$$;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA watership FROM PUBLIC;
GRANT EXECUTE ON FUNCTION watership.poll_late, watership.poll_look, watership.poll_read_late,
    watership.poll_read TO watership_relay;

INSERT INTO watership.migration (version, name) VALUES (8, '0008_poll');

RESET ROLE;
