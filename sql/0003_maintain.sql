-- Watership 0003: maintain, which makes and retires the partitions of the outbox.
--
-- The relay calls it once an hour and at start, and again at once while it returns more = true.
-- A call is one transaction, and what it locks stays locked to its end; so a call does little:
--   1. days ahead: all that are missing, or one while the default partition has rows (blocks
--      nobody who writes to a day). If the default partition has grown beyond 8 MiB, because days
--      were missing for long, an empty one takes its place first, and it is detached;
--   2. detached partitions that every relay has passed and whose rows are old: drops up to 4;
--   3. old rows in the default partition that every relay has passed: deletes up to 1,000;
--   4. only when it did none of these: detaches one old partition.
-- Detaching alone stops writers, for at most 100 ms of waiting for each lock, then it gives up and
-- names it in `postponed`.
-- Passed means: the smallest flush_lsn of watership.checkpoint has reached the WAL position that
-- was noted in an earlier call. Without a checkpoint row nothing is dropped or deleted.

SET ROLE watership_owner;

-- Puts an empty default partition in the place of one that is too large to attach days beside it.
-- Nothing is read for that, and writers wait only for the locks. The old one is retired like a day
-- that was detached: its rows were written before now, and are read from the WAL.
CREATE FUNCTION watership.renew_default(OUT renewed text, OUT postponed text)
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    old text := 'outbox_default_' || to_char(clock_timestamp(), 'YYYYMMDDHH24MISSUS');
BEGIN
    -- The root comes last: a session that waits for it has nothing else left to wait for.
    LOCK TABLE ONLY watership.outbox_default IN ACCESS EXCLUSIVE MODE;
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

-- The first day is today (UTC), the last today + days.
CREATE FUNCTION watership.create_days_ahead(
    days integer, OUT created text[], OUT renewed text, OUT skipped text[], OUT postponed text[]
) LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    -- To attach a day, Postgres reads all of the default partition, and locks it to the end of the
    -- transaction. Empty, that is nothing; small, one day a call is enough; larger, it would keep
    -- writers waiting. (A CHECK that spares the reading would refuse rows of that day meanwhile.)
    read_most CONSTANT bigint := 8 * 1024 * 1024;
    day date;
    missing date[] := '{}';
    leaf text;
    there bigint;
    later text;
    crowded boolean;
BEGIN
    created := '{}'; skipped := '{}'; postponed := '{}';
    FOR i IN 0..days LOOP
        day := (now() AT TIME ZONE 'UTC')::date + i;
        leaf := 'outbox_' || to_char(day, 'YYYYMMDD');
        CONTINUE WHEN EXISTS (SELECT FROM pg_inherits
            WHERE inhparent = 'watership.outbox'::regclass
                AND inhrelid = to_regclass('watership.' || leaf));
        missing := missing || day;
    END LOOP;
    IF missing = '{}' THEN
        RETURN;
    END IF;
    IF pg_relation_size('watership.outbox_default') > read_most THEN
        SELECT * INTO renewed, later FROM watership.renew_default();
        IF renewed IS NULL THEN
            postponed := postponed || later;
            RETURN;
        END IF;
    END IF;
    crowded := EXISTS (SELECT FROM ONLY watership.outbox_default);
    FOREACH day IN ARRAY missing LOOP
        leaf := 'outbox_' || to_char(day, 'YYYYMMDD');
        SELECT count(*) INTO there FROM (
            SELECT FROM ONLY watership.outbox_default
            WHERE created_at >= day AND created_at < day + 1 LIMIT 1000) AS rows;
        IF there > 0 THEN
            skipped := skipped || format('%s: %s%s rows of that day are in the default partition',
                leaf, there, CASE WHEN there = 1000 THEN ' or more' ELSE '' END);
            CONTINUE;
        END IF;
        BEGIN
            -- Made alone and then attached, it needs no lock that conflicts with writers.
            EXECUTE format('CREATE TABLE watership.%I (LIKE watership.outbox INCLUDING DEFAULTS '
                'INCLUDING CONSTRAINTS INCLUDING INDEXES INCLUDING STORAGE)', leaf);
            EXECUTE format('ALTER TABLE watership.outbox ATTACH PARTITION watership.%I '
                'FOR VALUES FROM (%L) TO (%L)', leaf, day::timestamptz, (day + 1)::timestamptz);
            created := created || leaf;
            EXIT WHEN crowded;
        EXCEPTION
            WHEN lock_not_available OR deadlock_detected THEN
                postponed := postponed || format('creating %s: %s', leaf, SQLERRM);
                EXIT;  -- the next day would wait for the same lock
            WHEN check_violation OR invalid_object_definition OR duplicate_table THEN
                skipped := skipped || format('%s: %s', leaf, SQLERRM);
        END;
    END LOOP;
END
$$;

CREATE FUNCTION watership.drop_passed(
    flush_lsn pg_lsn, retain interval, most integer, OUT dropped text[], OUT postponed text[]
) LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    leaf text;
BEGIN
    dropped := '{}'; postponed := '{}';
    FOR leaf IN SELECT name FROM watership.retired_partition AS r
        WHERE r.lsn <= drop_passed.flush_lsn AND r.range_to <= now() - retain
        ORDER BY r.lsn LIMIT most LOOP
        -- Somebody attached it again: it is live, not ours to drop.
        IF EXISTS (SELECT FROM pg_inherits WHERE inhrelid = to_regclass('watership.' || leaf)) THEN
            DELETE FROM watership.retired_partition WHERE name = leaf;
            CONTINUE;
        END IF;
        BEGIN
            EXECUTE format('DROP TABLE IF EXISTS watership.%I', leaf);
            DELETE FROM watership.retired_partition WHERE name = leaf;
            dropped := dropped || leaf;
        -- Whatever keeps this one (a lock, a view, another owner) must not keep the others.
        EXCEPTION WHEN OTHERS THEN
            postponed := postponed || format('dropping %s: %s', leaf, SQLERRM);
        END;
    END LOOP;
END
$$;

-- Deletes the rows of the note that every relay has passed; with no note left, takes a new one.
-- A row counts only if its transaction had ended when the note was taken: an open transaction may
-- still add a row with an old created_at, and that row lies behind the noted position.
CREATE FUNCTION watership.delete_passed_default_rows(
    flush_lsn pg_lsn, retain interval, most integer, OUT deleted bigint
) LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    note watership.default_retirement%ROWTYPE;
    horizon xid8 := pg_snapshot_xmin(pg_current_snapshot());
BEGIN
    deleted := 0;
    SELECT * INTO note FROM watership.default_retirement;
    -- age() compares 32-bit xids, so a note must not be older than half of their range.
    IF note.one AND horizon::text::numeric - note.xid::text::numeric > 1000000000 THEN
        DELETE FROM watership.default_retirement;
        note := NULL;
    END IF;
    IF note.one AND note.lsn <= flush_lsn THEN
        DELETE FROM ONLY watership.outbox_default WHERE ctid = ANY (ARRAY(
            SELECT d.ctid FROM ONLY watership.outbox_default AS d
            WHERE d.created_at < note.cutoff AND age(d.xmin) > age(note.xid::xid) LIMIT most));
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

CREATE FUNCTION watership.detach_oldest(
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
    BEGIN
        -- The root comes last: a session that waits for it has nothing else left to wait for.
        EXECUTE format('LOCK TABLE ONLY watership.%I IN ACCESS EXCLUSIVE MODE', leaf);
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

-- retain: how long events stay in the outbox after their transaction began.
-- created, skipped, postponed, dropped, detached: partitions, with the reason where one is due;
-- postponed means that a lock was not available, try later. default_left counts to 100,000.
-- more: this call did something, so call again.
CREATE FUNCTION watership.maintain(
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
        -- A relay that does not read the WAL passes no WAL position, and holds everything back.
        SELECT min(coalesce(c.flush_lsn, '0/0')) INTO flush_lsn FROM watership.checkpoint AS c;
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
GRANT EXECUTE ON FUNCTION watership.maintain(interval) TO watership_relay;

-- The first days are there before the first row.
DO $$
BEGIN
    PERFORM watership.maintain(interval '14 days');
END
$$;

INSERT INTO watership.migration (version, name) VALUES (3, '0003_maintain');

RESET ROLE;
