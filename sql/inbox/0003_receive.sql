-- Watership inbox 0003: receive, park and retry, which keep the order of each key at the consumer;
-- and attempts.
--
--     BEGIN;
--     SELECT watership_inbox.receive('billing', $message_id, $timestamp, $key, $body, $properties);
--     -- 'handle':    handle the message, COMMIT, acknowledge
--     -- 'duplicate': it was handled before; COMMIT, acknowledge
--     -- 'parked':    it is stored behind an earlier message of its key; COMMIT, acknowledge
--
-- A handler that failed for good: roll back, then park(...) in a transaction of its own; or, to let
-- nothing of the key pass in between, ROLLBACK TO a savepoint made after receive, park(...) and
-- COMMIT. Then acknowledge. Later messages of the key are parked behind it by receive.
--
-- `properties` is a JSON object with what the handler needs to see the message again: "exchange",
-- "routing_key", "content_type", "type", "app_id", "headers" and others, under AMQP's names.

SET ROLE watership_inbox_owner;

-- A key that an index does not take counts by its hash.
CREATE FUNCTION watership_inbox.lane(key text, message_id text) RETURNS text
LANGUAGE sql IMMUTABLE
RETURN CASE WHEN key IS NULL THEN 'm' || message_id
    WHEN octet_length(key) > 1024 THEN 'h' || encode(sha256(convert_to(key, 'UTF8')), 'hex')
    ELSE 'k' || key END;

-- Handlers, parking and retries of one key take turns, to the end of their transactions. A number
-- that two keys share costs some waiting.
CREATE FUNCTION watership_inbox.lane_lock(consumer text, lane text) RETURNS bigint
LANGUAGE sql IMMUTABLE
RETURN hashtextextended(lane, hashtextextended(consumer, 1465079888));

-- Locks the key. True if it is parked.
CREATE FUNCTION watership_inbox.lock_lane(consumer text, consumer_id integer, lane text)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
BEGIN
    PERFORM pg_advisory_xact_lock(watership_inbox.lane_lock(consumer, lane));
    IF EXISTS (SELECT FROM watership_inbox.parked_key AS k
        WHERE k.consumer = consumer_id AND k.lane = lane)
    THEN
        -- It may show a key that lives again since. Locking its row raises 40001 then.
        IF current_setting('transaction_isolation') <> 'read committed' THEN
            PERFORM FROM watership_inbox.parked_key AS k
            WHERE k.consumer = consumer_id AND k.lane = lane FOR SHARE;
        END IF;
        RETURN true;
    END IF;
    -- A snapshot from before the lock does not show a key that was parked since. A row of the same
    -- key does: the conflict raises 40001.
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        INSERT INTO watership_inbox.parked_key (consumer, lane) VALUES (consumer_id, lane)
        ON CONFLICT DO NOTHING;
        DELETE FROM watership_inbox.parked_key AS k
        WHERE k.consumer = consumer_id AND k.lane = lane;
    END IF;
    RETURN false;
END
$$;

-- Records the message as seen: `first` is true the first time. `unknown` says why nobody can know.
CREATE FUNCTION watership_inbox.record(
    consumer text, consumer_id integer, message_id text, occurred_at timestamptz, body_hash bytea,
    OUT first boolean, OUT unknown text
)
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    day CONSTANT date := (occurred_at AT TIME ZONE 'UTC')::date;
BEGIN
    first := true;
    IF occurred_at IS NULL THEN
        first := watership_inbox.claim_in_generation(consumer_id, message_id, body_hash, false);
    ELSIF isfinite(day) AND day < (SELECT r.first_day FROM watership_inbox.ring AS r) THEN
        unknown := 'beyond_window';
    ELSIF isfinite(day) AND day > (clock_timestamp() AT TIME ZONE 'UTC')::date + 1 THEN
        unknown := 'beyond_tomorrow';
    ELSE
        first := watership_inbox.claim(consumer, message_id, occurred_at, body_hash);
    END IF;
END
$$;

-- True if this transaction claimed the message itself, in whatever savepoint.
CREATE FUNCTION watership_inbox.claimed_here(
    consumer_id integer, message_id text, occurred_at timestamptz
) RETURNS boolean
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    own CONSTANT bigint := pg_current_xact_id()::text::bigint;
    low bigint;
BEGIN
    -- A row that is visible and whose transaction is in progress is our own.
    IF occurred_at IS NULL THEN
        SELECT g.xmin::text::bigint INTO low FROM watership_inbox.claimed_in_generation AS g
        WHERE g.consumer = consumer_id AND g.message_id = message_id
        ORDER BY g.claimed_at DESC LIMIT 1;
    ELSIF isfinite(occurred_at) THEN
        SELECT c.xmin::text::bigint INTO low FROM watership_inbox.claimed AS c
        WHERE c.consumer = consumer_id AND c.message_id = message_id
            AND c.slot = ((occurred_at AT TIME ZONE 'UTC')::date - date '2000-01-01') % 40;
    END IF;
    IF low IS NULL THEN
        RETURN false;
    END IF;
    -- xmin has the low 32 bits; a savepoint's is a little above the transaction's own.
    low := (low - own % 4294967296 + 4294967296 + 2147483648) % 4294967296 - 2147483648;
    -- NULL: it is so old that Postgres has forgotten it.
    RETURN coalesce(pg_xact_status((own + low)::text::xid8) = 'in progress', false);
END
$$;

-- Claims a message that was parked without a claim, because its time was out of bounds. In its day,
-- where that has a slot by now: there its next delivery would look.
CREATE FUNCTION watership_inbox.claim_unrecorded(
    consumer_id integer, message_id text, occurred_at timestamptz
) RETURNS boolean
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    day CONSTANT date := (occurred_at AT TIME ZONE 'UTC')::date;
BEGIN
    IF day BETWEEN (SELECT r.first_day FROM watership_inbox.ring AS r)
        AND (SELECT r.emptied_before + 39 FROM watership_inbox.ring AS r)
    THEN
        INSERT INTO watership_inbox.claimed (slot, day, consumer, message_id)
        VALUES ((day - date '2000-01-01') % 40, day, consumer_id, message_id)
        ON CONFLICT DO NOTHING;
        RETURN FOUND;
    END IF;
    RETURN watership_inbox.claim_in_generation(consumer_id, message_id, NULL, false);
END
$$;

CREATE FUNCTION watership_inbox.store_parked(
    consumer_id integer, lane text, key text, message_id text, occurred_at timestamptz,
    recorded boolean, reason text, error text, body bytea, properties jsonb
) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
BEGIN
    IF jsonb_typeof(properties) IS DISTINCT FROM 'object' OR body IS NULL THEN
        RAISE EXCEPTION 'message % cannot be parked without body and a JSON object of properties',
            quote_literal(left(message_id, 100))
            USING ERRCODE = 'invalid_parameter_value',
                HINT = 'pass body and properties to watership_inbox.receive and park';
    END IF;
    INSERT INTO watership_inbox.parked_key (consumer, lane) VALUES (consumer_id, lane)
    ON CONFLICT DO NOTHING;
    -- Beyond the window the same message may come again while it waits here: it is stored once.
    INSERT INTO watership_inbox.parked (consumer, lane, key, message_id, occurred_at, recorded,
        reason, error, body, properties)
    VALUES (consumer_id, lane, key, message_id, occurred_at, recorded,
        reason, left(error, 8192), body, properties)
    ON CONFLICT ON CONSTRAINT parked_consumer_message_id_key DO NOTHING;
END
$$;

-- What receive does when its one statement made no row.
CREATE FUNCTION watership_inbox.receive_with_care(
    consumer text, message_id text, occurred_at timestamptz, key text,
    body bytea, properties jsonb, body_hash bytea
) RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    consumer_id CONSTANT integer := watership_inbox.register(consumer);
    lane CONSTANT text := watership_inbox.lane(key, message_id);
    is_parked boolean;
    seen record;
BEGIN
    PERFORM watership_inbox.check_message_id(message_id);
    is_parked := watership_inbox.lock_lane(consumer, consumer_id, lane);
    seen := watership_inbox.record(consumer, consumer_id, message_id, occurred_at, body_hash);
    IF NOT seen.first THEN
        RETURN 'duplicate';
    END IF;
    IF NOT is_parked AND seen.unknown IS NULL THEN
        RETURN 'handle';
    END IF;
    PERFORM watership_inbox.store_parked(consumer_id, lane, key, message_id, occurred_at,
        seen.unknown IS NULL, coalesce(seen.unknown, 'behind'), NULL, body, properties);
    RETURN 'parked';
END
$$;

-- As claim: one statement in the usual case, with the caller's rights. Only under READ COMMITTED
-- does that statement see what was committed before the lock was taken.
CREATE FUNCTION watership_inbox.receive(
    consumer text, message_id text, occurred_at timestamptz, key text,
    body bytea, properties jsonb DEFAULT '{}', body_hash bytea DEFAULT NULL
) RETURNS text
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_variable
BEGIN
    IF current_setting('transaction_isolation') = 'read committed' THEN
        PERFORM pg_advisory_xact_lock(watership_inbox.lane_lock(consumer,
            watership_inbox.lane(key, message_id)));
        INSERT INTO watership_inbox.claimed (slot, day, consumer, message_id, body_hash)
        SELECT (d.day - date '2000-01-01') % 40, d.day, c.id, message_id, body_hash
        FROM watership_inbox.ring AS r, watership_inbox.consumer AS c,
            (SELECT CASE WHEN isfinite(occurred_at)
                THEN (occurred_at AT TIME ZONE 'UTC')::date END) AS d (day)
        WHERE c.name = consumer AND octet_length(message_id) BETWEEN 1 AND 1024
            AND d.day BETWEEN r.first_day AND r.emptied_before + 39
            AND d.day <= (clock_timestamp() AT TIME ZONE 'UTC')::date + 1
            AND NOT EXISTS (SELECT FROM watership_inbox.parked_key AS k
                WHERE k.consumer = c.id AND k.lane = watership_inbox.lane(key, message_id))
        ON CONFLICT DO NOTHING;
        IF FOUND THEN
            RETURN 'handle';
        END IF;
    END IF;
    RETURN watership_inbox.receive_with_care(consumer, message_id, occurred_at, key, body,
        properties, body_hash);
END
$$;

-- Parks a message whose handler failed. False if it was handled or parked meanwhile.
-- `reason` is one word for machines, as 'failed' or 'crashed'; `error` is for people.
CREATE FUNCTION watership_inbox.park(
    consumer text, message_id text, occurred_at timestamptz, key text,
    reason text, error text, body bytea, properties jsonb DEFAULT '{}'
) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    consumer_id CONSTANT integer := watership_inbox.register(consumer);
    lane CONSTANT text := watership_inbox.lane(key, message_id);
    seen record;
    unknown text;
BEGIN
    PERFORM watership_inbox.check_message_id(message_id);
    IF octet_length(reason) NOT BETWEEN 1 AND 255 OR reason IS NULL THEN
        RAISE EXCEPTION 'reason is %, and must have 1 to 255 bytes',
            coalesce(quote_literal(left(reason, 40)), 'NULL')
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    PERFORM watership_inbox.lock_lane(consumer, consumer_id, lane);
    IF NOT watership_inbox.claimed_here(consumer_id, message_id, occurred_at) THEN
        seen := watership_inbox.record(consumer, consumer_id, message_id, occurred_at, NULL);
        IF NOT seen.first THEN
            RETURN false;
        END IF;
        unknown := seen.unknown;
    END IF;
    PERFORM watership_inbox.store_parked(consumer_id, lane, key, message_id, occurred_at,
        unknown IS NULL, reason, error, body, properties);
    DELETE FROM watership_inbox.attempt AS a
    WHERE a.consumer = consumer_id AND a.message_id = message_id;
    RETURN true;
END
$$;

-- The next parked message to handle, of a key that an operator marked for retry: at most one row,
-- locked with its key for the caller's transaction. Handle it, call retry_done(id), COMMIT. On
-- failure ROLLBACK, then retry_failed(id, error) in a transaction of its own. COMMIT without a row,
-- too: what turned out to be a duplicate is removed by then.
CREATE FUNCTION watership_inbox.retry_next(consumer text)
RETURNS TABLE (
    id bigint, message_id text, occurred_at timestamptz, key text, body bytea, properties jsonb,
    reason text, attempts integer
)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    consumer_id CONSTANT integer := watership_inbox.register(consumer);
    candidate record;
    head record;
BEGIN
    FOR candidate IN
        SELECT k.lane FROM watership_inbox.parked_key AS k
        WHERE k.consumer = consumer_id AND k.retry_at IS NOT NULL ORDER BY k.retry_at LIMIT 100
    LOOP
        CONTINUE WHEN NOT pg_try_advisory_xact_lock(
            watership_inbox.lane_lock(consumer, candidate.lane));
        LOOP
            -- Again, now that the key is ours.
            SELECT p.id, p.message_id, p.occurred_at, p.key, p.body, p.properties, p.reason,
                p.attempts, p.recorded, k.beyond_window
            INTO head
            FROM watership_inbox.parked_key AS k JOIN watership_inbox.parked AS p
                ON p.consumer = k.consumer AND p.lane = k.lane
            WHERE k.consumer = consumer_id AND k.lane = candidate.lane AND k.retry_at IS NOT NULL
            ORDER BY p.id LIMIT 1;
            IF NOT FOUND THEN
                DELETE FROM watership_inbox.parked_key AS k
                WHERE k.consumer = consumer_id AND k.lane = candidate.lane
                    AND k.retry_at IS NOT NULL
                    AND NOT EXISTS (SELECT FROM watership_inbox.parked AS p
                        WHERE p.consumer = k.consumer AND p.lane = k.lane);
                EXIT;
            END IF;
            IF NOT head.recorded THEN
                IF NOT head.beyond_window THEN
                    UPDATE watership_inbox.parked_key AS k SET retry_at = NULL
                    WHERE k.consumer = consumer_id AND k.lane = candidate.lane;
                    EXIT;
                END IF;
                IF NOT watership_inbox.claim_unrecorded(
                    consumer_id, head.message_id, head.occurred_at)
                THEN
                    PERFORM watership_inbox.retry_done(head.id);
                    CONTINUE;
                END IF;
            END IF;
            RETURN QUERY SELECT head.id, head.message_id, head.occurred_at, head.key, head.body,
                head.properties, head.reason, head.attempts;
            RETURN;
        END LOOP;
    END LOOP;
END
$$;

-- The parked message was handled, in this transaction. Returns how many of its key still wait; with
-- the last one the key is live again.
CREATE FUNCTION watership_inbox.retry_done(id bigint) RETURNS bigint
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    done record;
    waiting bigint;
BEGIN
    DELETE FROM watership_inbox.parked AS p WHERE p.id = id
    RETURNING p.consumer, p.lane, p.message_id INTO done;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no message is parked under %', id
            USING ERRCODE = 'no_data_found',
                HINT = 'somebody discarded or handled it meanwhile: roll back';
    END IF;
    DELETE FROM watership_inbox.attempt AS a
    WHERE a.consumer = done.consumer AND a.message_id = done.message_id;
    SELECT count(*) INTO waiting FROM watership_inbox.parked AS p
    WHERE p.consumer = done.consumer AND p.lane = done.lane;
    IF waiting = 0 THEN
        DELETE FROM watership_inbox.parked_key AS k
        WHERE k.consumer = done.consumer AND k.lane = done.lane;
    END IF;
    RETURN waiting;
END
$$;

-- The handler failed again: its key stays parked, and waits for a person. The first reason stays.
CREATE FUNCTION watership_inbox.retry_failed(id bigint, error text) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    tried record;
BEGIN
    UPDATE watership_inbox.parked AS p
    SET attempts = p.attempts + 1, last_error = left(error, 8192), tried_at = now()
    WHERE p.id = id
    RETURNING p.consumer, p.lane, p.message_id INTO tried;
    UPDATE watership_inbox.parked_key AS k SET retry_at = NULL
    WHERE k.consumer = tried.consumer AND k.lane = tried.lane;
    DELETE FROM watership_inbox.attempt AS a
    WHERE a.consumer = tried.consumer AND a.message_id = tried.message_id;
END
$$;

-- For operators. Marks keys for retry, and returns how many: the key, or the key of the message, or
-- all. Keys whose first message came after the window are left alone unless `beyond_window`.
CREATE FUNCTION watership_inbox.retry(
    consumer text, key text DEFAULT NULL, message_id text DEFAULT NULL,
    all_keys boolean DEFAULT false, beyond_window boolean DEFAULT false
) RETURNS bigint
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    consumer_id CONSTANT integer := watership_inbox.register(consumer);
    marked bigint;
BEGIN
    IF (key IS NOT NULL)::integer + (message_id IS NOT NULL)::integer + all_keys::integer <> 1 THEN
        RAISE EXCEPTION 'choose what to retry: key, message_id or all_keys'
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    UPDATE watership_inbox.parked_key AS k
    SET retry_at = clock_timestamp(), beyond_window = k.beyond_window OR beyond_window
    WHERE k.consumer = consumer_id
        AND (all_keys OR k.lane = watership_inbox.lane(key, NULL) OR k.lane IN (SELECT p.lane
            FROM watership_inbox.parked AS p
            WHERE p.consumer = consumer_id AND p.message_id = message_id))
        AND (beyond_window OR k.beyond_window OR (SELECT p.recorded FROM watership_inbox.parked AS p
            WHERE p.consumer = consumer_id AND p.lane = k.lane ORDER BY p.id LIMIT 1));
    GET DIAGNOSTICS marked = ROW_COUNT;
    RETURN marked;
END
$$;

-- For operators. Gives parked messages up: the key's, or one message. They count as handled from
-- now on. Returns how many. Waits for a retry of the key that is going on.
CREATE FUNCTION watership_inbox.discard(
    consumer text, reason text, key text DEFAULT NULL, message_id text DEFAULT NULL
) RETURNS bigint
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    consumer_id CONSTANT integer := watership_inbox.register(consumer);
    lane text;
    gone record;
    discarded bigint := 0;
BEGIN
    IF (key IS NULL) = (message_id IS NULL) THEN
        RAISE EXCEPTION 'choose what to discard: key or message_id'
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF coalesce(reason, '') = '' THEN
        RAISE EXCEPTION 'a reason is needed: it is kept in watership_inbox.discarded'
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF key IS NOT NULL THEN
        lane := watership_inbox.lane(key, NULL);
    ELSE
        SELECT p.lane INTO lane FROM watership_inbox.parked AS p
        WHERE p.consumer = consumer_id AND p.message_id = message_id;
    END IF;
    IF lane IS NULL THEN
        RETURN 0;
    END IF;
    PERFORM watership_inbox.lock_lane(consumer, consumer_id, lane);
    FOR gone IN
        DELETE FROM watership_inbox.parked AS p
        WHERE p.consumer = consumer_id AND p.lane = lane
            AND (message_id IS NULL OR p.message_id = message_id)
        RETURNING p.key, p.message_id, p.occurred_at, p.reason, p.recorded
    LOOP
        IF NOT gone.recorded THEN
            PERFORM watership_inbox.claim_unrecorded(consumer_id, gone.message_id,
                gone.occurred_at);
        END IF;
        INSERT INTO watership_inbox.discarded (consumer, key, message_id, occurred_at, parked_for,
            reason)
        VALUES (consumer_id, gone.key, gone.message_id, gone.occurred_at, gone.reason, reason);
        discarded := discarded + 1;
    END LOOP;
    DELETE FROM watership_inbox.parked_key AS k
    WHERE k.consumer = consumer_id AND k.lane = lane AND NOT EXISTS (
        SELECT FROM watership_inbox.parked AS p WHERE p.consumer = consumer_id AND p.lane = lane);
    RETURN discarded;
END
$$;

-- An attempt begins, at a message that came back. Call it in a transaction of its own, before the
-- handler's: what the process does not survive is then told apart from what the handler refuses.
-- `killed` attempts neither failed nor ended: started - failed, without this one.
CREATE FUNCTION watership_inbox.attempt_started(
    consumer text, message_id text, OUT started integer, OUT failed integer, OUT killed integer
)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
BEGIN
    INSERT INTO watership_inbox.attempt AS a (consumer, message_id, started, failed)
    VALUES (watership_inbox.register(consumer), message_id, 1, 0)
    ON CONFLICT ON CONSTRAINT attempt_pkey DO UPDATE
    SET started = a.started + 1, last_at = now()
    RETURNING a.started, a.failed INTO started, failed;
    killed := started - failed - 1;
END
$$;

-- The handler failed; in a transaction of its own, after the rollback. Returns how often it has.
CREATE FUNCTION watership_inbox.attempt_failed(consumer text, message_id text, error text)
RETURNS integer
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    failed integer;
BEGIN
    INSERT INTO watership_inbox.attempt AS a (consumer, message_id, started, failed, last_error)
    VALUES (watership_inbox.register(consumer), message_id, 1, 1, left(error, 8192))
    ON CONFLICT ON CONSTRAINT attempt_pkey DO UPDATE
    SET failed = a.failed + 1, started = greatest(a.started, a.failed + 1), last_at = now(),
        last_error = excluded.last_error
    RETURNING a.failed INTO failed;
    RETURN failed;
END
$$;

-- The message was handled: call it in the handler's transaction, if an attempt was recorded.
CREATE FUNCTION watership_inbox.attempt_ended(consumer text, message_id text) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    consumer_id CONSTANT integer := watership_inbox.register(consumer);
BEGIN
    DELETE FROM watership_inbox.attempt AS a
    WHERE a.consumer = consumer_id AND a.message_id = message_id;
END
$$;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA watership_inbox FROM PUBLIC;
GRANT SELECT (consumer, lane) ON watership_inbox.parked_key TO watership_consumer;
GRANT EXECUTE ON FUNCTION
    watership_inbox.lane(text, text),
    watership_inbox.lane_lock(text, text),
    watership_inbox.receive_with_care(text, text, timestamptz, text, bytea, jsonb, bytea),
    watership_inbox.receive(text, text, timestamptz, text, bytea, jsonb, bytea),
    watership_inbox.park(text, text, timestamptz, text, text, text, bytea, jsonb),
    watership_inbox.retry_next(text),
    watership_inbox.retry_done(bigint),
    watership_inbox.retry_failed(bigint, text),
    watership_inbox.retry(text, text, text, boolean, boolean),
    watership_inbox.discard(text, text, text, text),
    watership_inbox.attempt_started(text, text),
    watership_inbox.attempt_failed(text, text, text),
    watership_inbox.attempt_ended(text, text)
    TO watership_consumer;

INSERT INTO watership_inbox.migration (version, name) VALUES (3, '0003_receive');

RESET ROLE;
