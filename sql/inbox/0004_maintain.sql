-- Watership inbox 0004: maintain, which lets the window move on; and views for operators.
--
-- The helpers call maintain() once an hour; so may any scheduler, or `watership inbox maintain`. It
-- needs a transaction of its own. A wrong clock cannot empty the window: what claims or
-- `occurred_at` show to be over is passed at once, and by the clock alone one day an hour.

SET ROLE watership_inbox_owner;

-- True when no snapshot is left from before `mover` committed. Call it in a transaction that sees
-- that commit. A transaction that read the state from before, and has no snapshot any more, has
-- written what it wanted to write, and holds a lock on that table.
CREATE FUNCTION watership_inbox.seen_by_all(mover xid8) RETURNS boolean
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    passed CONSTANT bigint :=
        pg_snapshot_xmax(pg_current_snapshot())::text::bigint - mover::text::bigint;
BEGIN
    -- Not committed yet: it is this very transaction.
    IF mover = pg_current_xact_id_if_assigned() THEN
        RETURN false;
    END IF;
    -- From another cluster, whose counter was ahead: restored from a dump.
    IF passed <= 0 THEN
        RETURN true;
    END IF;
    -- The list of backends must be newer than the commit.
    PERFORM pg_stat_clear_snapshot();
    -- Of other roles' sessions only some columns are shown; autovacuum has no user. age() compares
    -- 32 bits: what is older than half of their range counts as that old.
    RETURN NOT EXISTS (
        SELECT FROM pg_stat_activity AS a JOIN pg_database AS d ON d.oid = a.datid
        WHERE d.datname = current_database() AND a.pid <> pg_backend_pid()
            AND a.backend_xmin IS NOT NULL AND a.usesysid IS NOT NULL
            AND age(a.backend_xmin) >=
                CASE WHEN passed > 1000000000 THEN 1000000000 ELSE age(mover::xid) END);
END
$$;

CREATE FUNCTION watership_inbox.empty_slots(table_name text, slots integer[]) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    slot integer;
BEGIN
    FOREACH slot IN ARRAY slots LOOP
        EXECUTE format('TRUNCATE watership_inbox.%I', table_name || '_' || slot);
    END LOOP;
END
$$;

-- `today` is the clock's; `seen` the day of a message that claims could not take, or NULL.
CREATE FUNCTION watership_inbox.turn_ring(
    today date, seen date DEFAULT NULL, OUT done text[], OUT postponed text[]
)
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    state watership_inbox.ring%ROWTYPE;
    slots integer[];
    next_day date;
    -- What the messages say: the window may move on to the newest of them.
    newest date := seen;
    by_clock boolean := false;
BEGIN
    done := '{}'; postponed := '{}';
    SELECT * INTO state FROM watership_inbox.ring FOR UPDATE;
    IF state.emptied_before < state.first_day THEN
        IF NOT watership_inbox.seen_by_all(state.moved_by) THEN
            postponed := ARRAY[format('emptying days before %s: a transaction is older than the '
                'move', state.first_day)];
            RETURN;
        END IF;
        -- Days as numbers: a series of times would depend on the session's time zone.
        SELECT array_agg((state.emptied_before + n - date '2000-01-01') % 40) INTO slots
        FROM generate_series(0, state.first_day - state.emptied_before - 1) AS n;
        BEGIN
            PERFORM watership_inbox.empty_slots('claimed', slots);
            PERFORM watership_inbox.empty_slots('duplicate', slots);
        EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
            postponed := ARRAY[format('emptying days before %s: %s', state.first_day, SQLERRM)];
            RETURN;
        END;
        UPDATE watership_inbox.ring SET emptied_before = state.first_day;
        done := ARRAY[format('emptied days before %s', state.first_day)];
    END IF;
    FOR ahead IN REVERSE 39..0 LOOP
        EXIT WHEN newest >= state.first_day + ahead;
        IF EXISTS (SELECT FROM watership_inbox.claimed AS c
            WHERE c.slot = (state.first_day + ahead - date '2000-01-01') % 40)
        THEN
            newest := state.first_day + ahead;
        END IF;
    END LOOP;
    next_day := state.first_day;
    WHILE next_day < today - state.window_days LOOP
        IF (newest IS NULL OR next_day >= newest - state.window_days)
            AND EXISTS (SELECT FROM watership_inbox.claimed AS c
                WHERE c.slot = (next_day - date '2000-01-01') % 40)
        THEN
            EXIT WHEN by_clock OR clock_timestamp() BETWEEN
                state.passed_at - interval '1 hour' AND state.passed_at + interval '1 hour';
            by_clock := true;
        END IF;
        next_day := next_day + 1;
        -- One turn of the ring is as far as it can go before something is emptied.
        EXIT WHEN next_day - state.first_day >= 40;
    END LOOP;
    IF next_day > state.first_day THEN
        UPDATE watership_inbox.ring SET first_day = next_day, moved_by = pg_current_xact_id(),
            passed_at = CASE WHEN by_clock THEN clock_timestamp() ELSE state.passed_at END;
        done := done || format('messages before %s are beyond the window', next_day);
    END IF;
END
$$;

CREATE FUNCTION watership_inbox.turn_generation(
    moment timestamptz, OUT done text[], OUT postponed text[]
)
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    state watership_inbox.generation%ROWTYPE;
    half_window interval;
BEGIN
    done := '{}'; postponed := '{}';
    SELECT * INTO state FROM watership_inbox.generation FOR UPDATE;
    IF state.opening THEN
        -- First: nobody is left who will write into the current generation alone. Then: all
        -- who have written so have ended, so that their rows are seen by every later reader. Their
        -- numbers are below that of a transaction that begins after the first is known, which is
        -- why this takes three calls. The first leaves horizon = changed_by.
        IF state.horizon IS NULL THEN
            IF watership_inbox.seen_by_all(state.changed_by) THEN
                UPDATE watership_inbox.generation
                SET horizon = pg_current_xact_id(), changed_by = pg_current_xact_id();
                done := ARRAY[format('generation %s is open to all', state.current + 1)];
            ELSE
                postponed := ARRAY[format('generation %s: a transaction is older than its opening',
                    state.current + 1)];
            END IF;
        ELSIF state.horizon = pg_current_xact_id() THEN
            postponed := ARRAY[format('generation %s: maintain needs a transaction of its own',
                state.current + 1)];
        ELSIF state.horizon = state.changed_by THEN
            UPDATE watership_inbox.generation SET horizon = pg_current_xact_id();
            done := ARRAY[format('generation %s has a horizon', state.current + 1)];
        ELSIF pg_snapshot_xmin(pg_current_snapshot()) >= state.horizon
            OR state.horizon > pg_snapshot_xmax(pg_current_snapshot())
        THEN
            UPDATE watership_inbox.generation SET current = state.current + 1, opening = false,
                opened_at = moment, horizon = NULL, changed_by = pg_current_xact_id();
            done := ARRAY[format('generation %s is current', state.current + 1)];
        ELSE
            postponed := ARRAY[format('generation %s: a transaction that wrote into the one before '
                'is still open', state.current + 1)];
        END IF;
        RETURN;
    END IF;
    -- Live are the current one and the two before.
    IF state.emptied_before < state.current - 2 THEN
        IF NOT watership_inbox.seen_by_all(state.changed_by) THEN
            postponed := ARRAY[format('emptying generation %s: a transaction is older than its end',
                state.current - 3)];
            RETURN;
        END IF;
        BEGIN
            PERFORM watership_inbox.empty_slots('claimed_in_generation',
                ARRAY[((state.current - 3) % 4)::integer]);
        EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
            postponed := ARRAY[format('emptying generation %s: %s', state.current - 3, SQLERRM)];
            RETURN;
        END;
        UPDATE watership_inbox.generation SET emptied_before = state.current - 2;
        done := ARRAY[format('emptied generation %s', state.current - 3)];
    END IF;
    SELECT make_interval(hours => r.window_days * 12) INTO half_window
    FROM watership_inbox.ring AS r;
    IF moment - state.opened_at >= half_window THEN
        UPDATE watership_inbox.generation SET opening = true, horizon = NULL,
            changed_by = pg_current_xact_id();
        done := done || format('generation %s is opening', state.current + 1);
    END IF;
END
$$;

-- `done` says what it did, `postponed` what must wait and for what, `more` whether another call can
-- do something now. After WI003 pass the message's `occurred_at`: it is the proof that the clock is
-- right and that the window has to move.
CREATE FUNCTION watership_inbox.maintain(
    occurred_at timestamptz DEFAULT NULL, OUT done text[], OUT postponed text[], OUT more boolean
)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '100ms'
AS $$
DECLARE
    part record;
    cutoff timestamptz;
BEGIN
    done := '{}'; postponed := '{}'; more := false;
    IF NOT pg_try_advisory_xact_lock(1465079888, 3) THEN
        postponed := ARRAY['all: maintenance is running in another session'];
        RETURN;
    END IF;
    part := watership_inbox.turn_ring((now() AT TIME ZONE 'UTC')::date,
        (occurred_at AT TIME ZONE 'UTC')::date);
    done := done || part.done; postponed := postponed || part.postponed;
    part := watership_inbox.turn_generation(now());
    done := done || part.done; postponed := postponed || part.postponed;
    more := done <> '{}';
    -- A few rows each, in batches: attempts that nobody ended, and old reports.
    SELECT now() - make_interval(days => r.window_days) INTO cutoff FROM watership_inbox.ring AS r;
    DELETE FROM watership_inbox.attempt WHERE ctid = ANY (ARRAY(
        SELECT a.ctid FROM watership_inbox.attempt AS a
        WHERE a.last_at < cutoff ORDER BY a.last_at LIMIT 1000));
    DELETE FROM watership_inbox.body_mismatch WHERE ctid = ANY (ARRAY(
        SELECT m.ctid FROM watership_inbox.body_mismatch AS m WHERE m.last_at < cutoff LIMIT 1000));
END
$$;

-- What a message is remembered by.
CREATE VIEW watership_inbox.remembered AS
SELECT r.window_days, r.first_day, r.emptied_before + 39 AS last_day,
    r.first_day - r.emptied_before AS days_to_empty, g.current AS generation,
    g.opening AS generation_opening, g.opened_at AS generation_opened_at
FROM watership_inbox.ring AS r, watership_inbox.generation AS g;

-- Reads the claims of the last day: seconds with many millions of them.
CREATE VIEW watership_inbox.processed_per_hour AS
SELECT c.name AS consumer, date_trunc('hour', x.claimed_at) AS hour, count(*) AS messages
FROM (
    SELECT consumer, claimed_at FROM watership_inbox.claimed
    UNION ALL
    SELECT consumer, claimed_at FROM watership_inbox.claimed_in_generation
) AS x JOIN watership_inbox.consumer AS c ON c.id = x.consumer
WHERE x.claimed_at > now() - interval '1 day'
GROUP BY 1, 2;

-- For a reconcile: what was handled or parked. `day` is the day of the message; NULL for one
-- without a time, which is in two generations if it came while the second was opening.
CREATE VIEW watership_inbox.seen AS
SELECT c.name AS consumer, x.message_id, x.day, x.claimed_at,
    EXISTS (SELECT FROM watership_inbox.parked AS p
        WHERE p.consumer = x.consumer AND p.message_id = x.message_id) AS parked
FROM (
    SELECT consumer, message_id, day, claimed_at FROM watership_inbox.claimed
    UNION ALL
    SELECT consumer, message_id, NULL, min(claimed_at) FROM watership_inbox.claimed_in_generation
    GROUP BY consumer, message_id
) AS x JOIN watership_inbox.consumer AS c ON c.id = x.consumer;

-- `age`: how long after the first delivery the last one came. Near window_days, raise that.
CREATE VIEW watership_inbox.duplicates AS
SELECT c.name AS consumer, d.message_id, d.day, d.times, d.claimed_at, d.first_at, d.last_at,
    d.last_at - d.claimed_at AS age
FROM watership_inbox.duplicate AS d JOIN watership_inbox.consumer AS c ON c.id = d.consumer;

CREATE VIEW watership_inbox.body_mismatches AS
SELECT c.name AS consumer, m.message_id, m.day, m.first_hash, m.other_hash, m.times, m.first_at,
    m.last_at
FROM watership_inbox.body_mismatch AS m JOIN watership_inbox.consumer AS c ON c.id = m.consumer;

-- `killed` includes an attempt that is running now.
CREATE VIEW watership_inbox.unfinished_attempts AS
SELECT c.name AS consumer, a.message_id, a.started, a.failed, a.started - a.failed AS killed,
    a.first_at, a.last_at, a.last_error
FROM watership_inbox.attempt AS a JOIN watership_inbox.consumer AS c ON c.id = a.consumer;

-- A row for each parked key: what its first message waits for, and how many wait behind it.
CREATE VIEW watership_inbox.parked_keys AS
SELECT c.name AS consumer, head.key, head.message_id, head.reason, head.error, head.attempts,
    head.last_error, k.parked_at, k.retry_at, all_of.waiting
FROM watership_inbox.parked_key AS k
JOIN watership_inbox.consumer AS c ON c.id = k.consumer
CROSS JOIN LATERAL (SELECT p.* FROM watership_inbox.parked AS p
    WHERE p.consumer = k.consumer AND p.lane = k.lane ORDER BY p.id LIMIT 1) AS head
CROSS JOIN LATERAL (SELECT count(*) AS waiting FROM watership_inbox.parked AS p
    WHERE p.consumer = k.consumer AND p.lane = k.lane) AS all_of;

CREATE VIEW watership_inbox.parked_messages AS
SELECT p.id, c.name AS consumer, p.key, p.message_id, p.occurred_at, p.reason, p.error, p.attempts,
    p.last_error, p.parked_at, p.tried_at, k.retry_at, octet_length(p.body) AS body_bytes,
    p.properties, p.body
FROM watership_inbox.parked AS p
JOIN watership_inbox.consumer AS c ON c.id = p.consumer
JOIN watership_inbox.parked_key AS k ON k.consumer = p.consumer AND k.lane = p.lane;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA watership_inbox FROM PUBLIC;
GRANT EXECUTE ON FUNCTION watership_inbox.maintain(timestamptz) TO watership_consumer;
GRANT SELECT ON watership_inbox.remembered, watership_inbox.processed_per_hour,
    watership_inbox.seen, watership_inbox.duplicates, watership_inbox.body_mismatches,
    watership_inbox.unfinished_attempts, watership_inbox.parked_keys,
    watership_inbox.parked_messages TO watership_consumer;

INSERT INTO watership_inbox.migration (version, name) VALUES (4, '0004_maintain');

RESET ROLE;
