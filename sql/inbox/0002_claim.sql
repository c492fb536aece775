-- Watership inbox 0002: claim, claim_many, forget. Called inside the handler's transaction.
--
--     BEGIN;
--     SELECT watership_inbox.claim('billing', $message_id, $timestamp);
--     -- true:  handle the message, then COMMIT and acknowledge
--     -- false: it was handled before; COMMIT and acknowledge
--
-- `occurred_at` is AMQP's `timestamp` property, and nothing else: it belongs to the event and is
-- the same on every delivery. Only its UTC day counts. A message without one: claim(consumer, id).
-- A second claim of the same message waits for the first one's transaction. A duplicate is never an
-- error; under REPEATABLE READ and SERIALIZABLE, 40001 and 40P01 are for the caller to retry.
--
-- Errors of its own: WI001 the message is older than the window; WI002 it is from the future; WI003
-- nobody called maintain for weeks; WI004 another body under the same id (strict only).

SET ROLE watership_inbox_owner;

-- The consumer's number. A new name is stored in the caller's transaction; `register` it at start,
-- so that the first handlers do not wait for each other.
CREATE FUNCTION watership_inbox.register(consumer text) RETURNS integer
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    found_id integer;
BEGIN
    IF octet_length(consumer) NOT BETWEEN 1 AND 255 OR consumer IS NULL THEN
        RAISE EXCEPTION 'consumer is %, and must be a name of 1 to 255 bytes',
            coalesce(quote_literal(left(consumer, 40)), 'NULL')
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    LOOP
        SELECT c.id INTO found_id FROM watership_inbox.consumer AS c WHERE c.name = consumer;
        EXIT WHEN FOUND;
        INSERT INTO watership_inbox.consumer (name) VALUES (consumer)
        ON CONFLICT DO NOTHING RETURNING id INTO found_id;
        EXIT WHEN FOUND;
    END LOOP;
    RETURN found_id;
END
$$;

CREATE FUNCTION watership_inbox.check_message_id(message_id text) RETURNS void
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF octet_length(message_id) NOT BETWEEN 1 AND 1024 OR message_id IS NULL THEN
        RAISE EXCEPTION 'message_id is %, and must be a text of 1 to 1024 bytes',
            coalesce(quote_literal(left(message_id, 40)), 'NULL')
            USING ERRCODE = 'invalid_parameter_value',
                HINT = 'pass the AMQP property message_id; a message without one cannot be told '
                    'from its duplicates';
    END IF;
END
$$;

-- Why a day cannot be claimed.
CREATE FUNCTION watership_inbox.refuse_day(message_id text, day date, first_day date, last_day date)
RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    today CONSTANT date := (clock_timestamp() AT TIME ZONE 'UTC')::date;
BEGIN
    IF day < first_day THEN
        RAISE EXCEPTION 'message % is of %, and the inbox remembers messages from % on',
            quote_literal(left(message_id, 100)), day, first_day
            USING ERRCODE = 'WI001',
                DETAIL = 'beyond_window: it cannot be known whether it was handled before.',
                HINT = 'park it (watership_inbox.receive does), then decide: '
                    'watership inbox parked retry --beyond-window';
    ELSIF day > today + 1 THEN
        RAISE EXCEPTION 'message % is of %, but today is % (UTC)',
            quote_literal(left(message_id, 100)), day, today
            USING ERRCODE = 'WI002',
                DETAIL = 'beyond_tomorrow: its time lies more than a day ahead.',
                HINT = 'correct the clock of its producer or of this database; pass AMQP''s '
                    'timestamp in seconds';
    ELSIF day > last_day THEN
        RAISE EXCEPTION 'message % is of %, and the inbox has slots to % only',
            quote_literal(left(message_id, 100)), day, last_day
            USING ERRCODE = 'WI003',
                HINT = 'call watership_inbox.maintain() once an hour; now, with the message''s '
                    'time, until it returns more = false';
    END IF;
END
$$;

-- A duplicate was seen: counts it, and reports another body.
CREATE FUNCTION watership_inbox.note_duplicate(
    consumer_id integer, message_id text, day date, claimed_at timestamptz,
    first_hash bytea, other_hash bytea, strict boolean
) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF day IS NOT NULL THEN
        INSERT INTO watership_inbox.duplicate AS d (slot, day, consumer, message_id, claimed_at)
        VALUES ((day - date '2000-01-01') % 40, day, consumer_id, message_id, claimed_at)
        ON CONFLICT ON CONSTRAINT duplicate_pkey DO UPDATE SET times = d.times + 1, last_at = now();
    END IF;
    IF first_hash <> other_hash THEN
        IF strict THEN
            RAISE EXCEPTION 'message % came with another body under the same id',
                quote_literal(left(message_id, 100))
                USING ERRCODE = 'WI004',
                    DETAIL = format('The first was handled at %s.', claimed_at),
                    HINT = 'its producer gave one id to two messages: find it and correct it';
        END IF;
        INSERT INTO watership_inbox.body_mismatch AS m (consumer, message_id, day, first_hash,
            other_hash)
        VALUES (consumer_id, message_id, day, first_hash, other_hash)
        ON CONFLICT ON CONSTRAINT body_mismatch_pkey DO UPDATE
        SET times = m.times + 1, last_at = now(), other_hash = excluded.other_hash;
    END IF;
END
$$;

-- What claim does when its one statement made no row: says what is wrong, registers the consumer,
-- or finds the earlier claim.
CREATE FUNCTION watership_inbox.claim_with_care(
    consumer text, message_id text, occurred_at timestamptz, body_hash bytea, strict boolean
) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    ring record;
    earlier record;
    day CONSTANT date := (occurred_at AT TIME ZONE 'UTC')::date;
BEGIN
    SELECT c.id, r.first_day, r.emptied_before + 39 AS last_day INTO ring
    FROM watership_inbox.ring AS r LEFT JOIN watership_inbox.consumer AS c ON c.name = consumer;
    IF ring.id IS NULL THEN
        ring.id := watership_inbox.register(consumer);
    END IF;
    PERFORM watership_inbox.check_message_id(message_id);
    IF day IS NULL OR NOT isfinite(day) THEN
        RAISE EXCEPTION 'occurred_at of message % is %, and must be a time',
            quote_literal(left(message_id, 100)), coalesce(occurred_at::text, 'NULL')
            USING ERRCODE = 'invalid_parameter_value',
                HINT = 'pass AMQP''s timestamp; for messages that have none, call '
                    'claim(consumer, message_id)';
    END IF;
    IF day < ring.first_day OR day > ring.last_day
        OR day > (clock_timestamp() AT TIME ZONE 'UTC')::date + 1
    THEN
        PERFORM watership_inbox.refuse_day(message_id, day, ring.first_day, ring.last_day);
    END IF;
    LOOP
        INSERT INTO watership_inbox.claimed (slot, day, consumer, message_id, body_hash)
        VALUES ((day - date '2000-01-01') % 40, day, ring.id, message_id, body_hash)
        ON CONFLICT DO NOTHING;
        IF FOUND THEN
            RETURN true;
        END IF;
        SELECT c.claimed_at, c.body_hash INTO earlier FROM watership_inbox.claimed AS c
        WHERE c.slot = (day - date '2000-01-01') % 40 AND c.consumer = ring.id
            AND c.message_id = message_id;
        -- Not there: it was forgotten in between.
        EXIT WHEN FOUND;
    END LOOP;
    PERFORM watership_inbox.note_duplicate(ring.id, message_id, day, earlier.claimed_at,
        earlier.body_hash, body_hash, strict);
    RETURN false;
END
$$;

-- Runs with the caller's rights and settings, and its usual way is one statement: a function with
-- SET or SECURITY DEFINER, or a second statement, costs about as much again as the row itself.
CREATE FUNCTION watership_inbox.claim(
    consumer text, message_id text, occurred_at timestamptz,
    body_hash bytea DEFAULT NULL, strict boolean DEFAULT false
) RETURNS boolean
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_variable
BEGIN
    INSERT INTO watership_inbox.claimed (slot, day, consumer, message_id, body_hash)
    SELECT (d.day - date '2000-01-01') % 40, d.day, c.id, message_id, body_hash
    FROM watership_inbox.ring AS r, watership_inbox.consumer AS c,
        (SELECT CASE WHEN isfinite(occurred_at)
            THEN (occurred_at AT TIME ZONE 'UTC')::date END) AS d (day)
    WHERE c.name = consumer AND octet_length(message_id) BETWEEN 1 AND 1024
        AND d.day BETWEEN r.first_day AND r.emptied_before + 39
        AND d.day <= (clock_timestamp() AT TIME ZONE 'UTC')::date + 1
    ON CONFLICT DO NOTHING;
    IF FOUND THEN
        RETURN true;
    END IF;
    RETURN watership_inbox.claim_with_care(consumer, message_id, occurred_at, body_hash, strict);
END
$$;

-- The new ones among these messages; each is returned once. All of them are claimed, or none.
CREATE FUNCTION watership_inbox.claim_many(consumer text, ids text[], times timestamptz[])
RETURNS SETOF text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    ring record;
    wrong record;
    new_ids text[];
BEGIN
    IF cardinality(ids) IS DISTINCT FROM cardinality(times) THEN
        RAISE EXCEPTION 'ids has % elements and times has %: each id needs its time',
            coalesce(cardinality(ids)::text, 'NULL'), coalesce(cardinality(times)::text, 'NULL')
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    SELECT c.id, r.first_day, r.emptied_before + 39 AS last_day INTO ring
    FROM watership_inbox.ring AS r LEFT JOIN watership_inbox.consumer AS c ON c.name = consumer;
    IF ring.id IS NULL THEN
        ring.id := watership_inbox.register(consumer);
    END IF;
    SELECT m.id, m.at, (m.at AT TIME ZONE 'UTC')::date AS day INTO wrong
    FROM unnest(ids, times) AS m (id, at)
    WHERE octet_length(m.id) NOT BETWEEN 1 AND 1024 OR m.id IS NULL
        OR m.at IS NULL OR NOT isfinite(m.at)
        OR (m.at AT TIME ZONE 'UTC')::date < ring.first_day
        OR (m.at AT TIME ZONE 'UTC')::date > ring.last_day
        OR (m.at AT TIME ZONE 'UTC')::date > (clock_timestamp() AT TIME ZONE 'UTC')::date + 1
    LIMIT 1;
    IF FOUND THEN
        -- One call that says what is wrong with it.
        PERFORM watership_inbox.claim_with_care(consumer, wrong.id, wrong.at, NULL, false);
    END IF;
    -- In one order everywhere, or two batches wait for each other.
    WITH claimed_now AS (
        INSERT INTO watership_inbox.claimed AS c (slot, day, consumer, message_id)
        SELECT (m.day - date '2000-01-01') % 40, m.day, ring.id, m.id
        FROM (SELECT u.id, (u.at AT TIME ZONE 'UTC')::date AS day
            FROM unnest(ids, times) AS u (id, at)) AS m
        ORDER BY m.day, m.id
        ON CONFLICT DO NOTHING
        RETURNING c.message_id
    )
    SELECT array_agg(n.message_id) INTO new_ids FROM claimed_now AS n;
    IF coalesce(cardinality(new_ids), 0) < cardinality(ids) THEN
        INSERT INTO watership_inbox.duplicate AS d (slot, day, consumer, message_id, claimed_at)
        SELECT c.slot, c.day, c.consumer, c.message_id, c.claimed_at
        FROM (SELECT DISTINCT u.id, (u.at AT TIME ZONE 'UTC')::date AS day
            FROM unnest(ids, times) AS u (id, at)) AS m
        JOIN watership_inbox.claimed AS c ON c.message_id = m.id AND c.consumer = ring.id
            AND c.slot = (m.day - date '2000-01-01') % 40
        WHERE m.id <> ALL (coalesce(new_ids, '{}'))
        ORDER BY c.day, c.message_id
        ON CONFLICT ON CONSTRAINT duplicate_pkey DO UPDATE
        SET times = d.times + 1, last_at = now();
    END IF;
    RETURN QUERY SELECT unnest(new_ids);
END
$$;

-- See the invariant at watership_inbox.generation.
CREATE FUNCTION watership_inbox.claim_in_generation(
    consumer_id integer, message_id text, body_hash bytea, strict boolean
) RETURNS boolean
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    state record;
    earlier record;
    is_new boolean;
BEGIN
    SELECT g.current, g.opening INTO state FROM watership_inbox.generation AS g;
    INSERT INTO watership_inbox.claimed_in_generation (slot, consumer, message_id, body_hash)
    VALUES (state.current % 4, consumer_id, message_id, body_hash)
    ON CONFLICT DO NOTHING;
    is_new := FOUND;
    IF is_new AND state.opening THEN
        INSERT INTO watership_inbox.claimed_in_generation (slot, consumer, message_id, body_hash)
        VALUES ((state.current + 1) % 4, consumer_id, message_id, body_hash)
        ON CONFLICT DO NOTHING;
        is_new := FOUND;
    END IF;
    -- The statement's own snapshot: what waited above for another transaction sees its row.
    SELECT min(g.claimed_at) AS claimed_at,
        (array_agg(g.body_hash ORDER BY g.claimed_at))[1] AS body_hash
    INTO earlier FROM watership_inbox.claimed_in_generation AS g
    WHERE g.message_id = message_id AND g.consumer = consumer_id
        AND (NOT is_new AND g.slot IN (state.current % 4, (state.current + 1) % 4)
            OR g.slot IN ((state.current - 1) % 4, (state.current - 2) % 4));
    IF is_new AND earlier.claimed_at IS NULL THEN
        RETURN true;
    END IF;
    -- A row inserted above stays: so a message that keeps coming is remembered.
    PERFORM watership_inbox.note_duplicate(consumer_id, message_id, NULL, earlier.claimed_at,
        earlier.body_hash, body_hash, strict);
    RETURN false;
END
$$;

-- For a message without a time of its own.
CREATE FUNCTION watership_inbox.claim(consumer text, message_id text) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM watership_inbox.check_message_id(message_id);
    RETURN watership_inbox.claim_in_generation(watership_inbox.register(consumer), message_id,
        NULL, false);
END
$$;

-- Lets a message have its effect a second time, at its next delivery. True if it was known.
CREATE FUNCTION watership_inbox.forget(consumer text, message_id text) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    consumer_id CONSTANT integer := watership_inbox.register(consumer);
    known boolean;
BEGIN
    IF EXISTS (SELECT FROM watership_inbox.parked AS p
        WHERE p.consumer = consumer_id AND p.message_id = message_id)
    THEN
        RAISE EXCEPTION 'message % is parked, so it had no effect yet',
            quote_literal(left(message_id, 100))
            USING ERRCODE = 'object_not_in_prerequisite_state',
                HINT = 'retry or discard it: watership inbox parked';
    END IF;
    DELETE FROM watership_inbox.claimed AS c
    WHERE c.consumer = consumer_id AND c.message_id = message_id;
    known := FOUND;
    DELETE FROM watership_inbox.claimed_in_generation AS g
    WHERE g.consumer = consumer_id AND g.message_id = message_id;
    known := known OR FOUND;
    DELETE FROM watership_inbox.attempt AS a
    WHERE a.consumer = consumer_id AND a.message_id = message_id;
    RETURN known;
END
$$;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA watership_inbox FROM PUBLIC;
-- What claim needs. A consumer can add claims, and take none away but by forget.
GRANT SELECT (first_day, emptied_before) ON watership_inbox.ring TO watership_consumer;
GRANT SELECT (id, name) ON watership_inbox.consumer TO watership_consumer;
GRANT INSERT (slot, day, consumer, message_id, body_hash) ON watership_inbox.claimed
    TO watership_consumer;
GRANT EXECUTE ON FUNCTION
    watership_inbox.register(text),
    watership_inbox.claim(text, text, timestamptz, bytea, boolean),
    watership_inbox.claim_with_care(text, text, timestamptz, bytea, boolean),
    watership_inbox.claim(text, text),
    watership_inbox.claim_many(text, text[], timestamptz[]),
    watership_inbox.forget(text, text)
    TO watership_consumer;

INSERT INTO watership_inbox.migration (version, name) VALUES (2, '0002_claim');

RESET ROLE;
