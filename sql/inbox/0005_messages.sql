-- Watership inbox 0005: a consumer handles a message with a few calls, so that the decisions are
-- made here and not again in every language.
--
--     SELECT * FROM watership_inbox.begin_message(...);     -- if redelivered, or without an id
--     BEGIN;
--     SELECT * FROM watership_inbox.receive_message(...);   -- 'handle': go on; else COMMIT
--     SAVEPOINT watership_handler;
--     -- the work
--     RELEASE SAVEPOINT watership_handler;   -- an error if it ended the transaction, or hid one
--     SELECT watership_inbox.end_message(...);              -- if begun, or failed before
--     COMMIT;
--
-- After a failure: ROLLBACK TO SAVEPOINT watership_handler, or ROLLBACK where that is an error;
-- then fail_message and COMMIT. (So nothing of the key passes before the message is parked.)
-- Handlers must not use this name: ROLLBACK TO goes to the latest savepoint of a name, so half of
-- the handler's work would be committed.
--
-- They return `next`:
-- 'handle':      call the handler;
-- 'again':       wait, then try it again, from BEGIN on;
-- 'parked':      it is stored (`reason`), and later messages of its key follow it: acknowledge;
-- 'duplicate':   it was handled or parked before: acknowledge;
-- 'dead_letter': publish it elsewhere, then call end_message, and acknowledge;
-- 'kept':        of a retry: it stays parked, or it is done.
--
-- next_retry returns a parked message that an operator marked for retry. It goes the same way, with
-- its number for `retried`, and counts as redelivered.
--
-- All of them lock the key first, and rows of the message after it.

SET ROLE watership_inbox_owner;

-- As in 0003, but it always writes a new version of the key's row. So a retry whose snapshot does
-- not show this message gets 40001 when it removes the key, instead of leaving the message without
-- one.
CREATE OR REPLACE FUNCTION watership_inbox.store_parked(
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
    ON CONFLICT ON CONSTRAINT parked_key_pkey DO UPDATE SET parked_at = parked_key.parked_at;
    -- Beyond the window the same message may come again while it waits here: it is stored once.
    INSERT INTO watership_inbox.parked (consumer, lane, key, message_id, occurred_at, recorded,
        reason, error, body, properties)
    VALUES (consumer_id, lane, key, message_id, occurred_at, recorded,
        reason, left(error, 8192), body, properties)
    ON CONFLICT ON CONSTRAINT parked_consumer_message_id_key DO NOTHING;
END
$$;

-- The attempt failed, for the `failed`th time. `reason` is 'failed', which counts; another one, as
-- 'killed', gives up at once, as `is_final` does. A message without an id is parked in any case.
-- Given the SQLSTATE of the error, conflicts of transactions are no failures in the first ten
-- `tries`, nor is WI003, for which it calls maintain: then call it after ROLLBACK, not ROLLBACK TO.
CREATE FUNCTION watership_inbox.fail_message(
    consumer text, message_id text, occurred_at timestamptz, key text, body bytea,
    properties jsonb, retried bigint, error text, is_final boolean DEFAULT false,
    max_failures integer DEFAULT 5, dead_letters boolean DEFAULT false,
    state text DEFAULT NULL, tries integer DEFAULT 0, INOUT reason text DEFAULT 'failed',
    OUT next text, OUT failed integer
)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    consumer_id CONSTANT integer := watership_inbox.register(consumer);
BEGIN
    IF state IN ('40001', '40P01') AND tries < 10 OR state = 'WI003' THEN
        IF state = 'WI003' THEN
            PERFORM watership_inbox.maintain(occurred_at);
        END IF;
        next := 'again';
        RETURN;
    END IF;
    PERFORM watership_inbox.check_message_id(message_id);
    -- First, as when a message is handled.
    PERFORM watership_inbox.lock_lane(consumer, consumer_id,
        watership_inbox.lane(key, message_id));
    IF reason = 'failed' THEN
        failed := watership_inbox.attempt_failed(consumer, message_id, error);
    ELSE
        failed := coalesce((SELECT a.failed FROM watership_inbox.attempt AS a
            WHERE a.consumer = consumer_id AND a.message_id = message_id), 0);
    END IF;
    IF retried IS NOT NULL THEN
        next := 'kept';
        PERFORM watership_inbox.retry_failed(retried, error);
    ELSIF reason = 'failed' AND NOT is_final AND failed < max_failures THEN
        next := 'again';
    ELSIF dead_letters AND reason <> 'no_message_id' THEN
        next := 'dead_letter';
    ELSIF watership_inbox.park(consumer, message_id, occurred_at, key, reason, error, body,
        properties)
    THEN
        next := 'parked';
        RETURN;
    ELSE
        next := 'duplicate';
        PERFORM watership_inbox.attempt_ended(consumer, message_id);
        RETURN;
    END IF;
    -- It had no effect: remove the claim of this transaction, in either table.
    IF watership_inbox.claimed_here(consumer_id, message_id, occurred_at) THEN
        DELETE FROM watership_inbox.claimed AS c
        WHERE c.consumer = consumer_id AND c.message_id = message_id
            AND c.slot = ((occurred_at AT TIME ZONE 'UTC')::date - date '2000-01-01') % 40;
    END IF;
    IF watership_inbox.claimed_here(consumer_id, message_id, NULL) THEN
        DELETE FROM watership_inbox.claimed_in_generation AS g
        WHERE g.consumer = consumer_id AND g.message_id = message_id;
    END IF;
END
$$;

-- An attempt begins, at a message that came back or has no id. In a transaction of its own.
CREATE FUNCTION watership_inbox.begin_message(
    consumer text, message_id text, occurred_at timestamptz, key text, body bytea,
    properties jsonb, retried bigint DEFAULT NULL, has_id boolean DEFAULT true,
    max_kills integer DEFAULT 10, dead_letters boolean DEFAULT false,
    OUT next text, OUT reason text, OUT error text, OUT failed integer
)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    killed integer;
BEGIN
    next := 'handle';
    -- First, as everywhere. A process that dies while it waits has not attempted the message.
    PERFORM pg_advisory_xact_lock(watership_inbox.lane_lock(consumer,
        watership_inbox.lane(key, message_id)));
    IF has_id THEN
        SELECT a.failed, a.killed INTO failed, killed
        FROM watership_inbox.attempt_started(consumer, message_id) AS a;
        IF killed >= max_kills THEN
            reason := 'killed';
            error := format('%s attempts neither failed nor ended: the process or its connection '
                'to the database did not survive', killed);
        END IF;
    ELSE
        reason := 'no_message_id';
    END IF;
    IF reason IS NOT NULL THEN
        SELECT f.next, f.failed INTO next, failed
        FROM watership_inbox.fail_message(consumer, message_id, occurred_at, key, body, properties,
            retried, error, reason => reason, dead_letters => dead_letters) AS f;
    END IF;
END
$$;

-- Locks the key of a parked message that was marked for retry. True if it is to be handled now.
CREATE FUNCTION watership_inbox.take_retry(consumer text, retried bigint) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    consumer_id CONSTANT integer := watership_inbox.register(consumer);
    head record;
BEGIN
    PERFORM pg_advisory_xact_lock(watership_inbox.lane_lock(consumer, p.lane))
    FROM watership_inbox.parked AS p WHERE p.id = retried AND p.consumer = consumer_id;
    -- It may have been handled, discarded, or have failed before we got the lock.
    SELECT p.lane, p.message_id, p.occurred_at, p.recorded, k.beyond_window INTO head
    FROM watership_inbox.parked AS p JOIN watership_inbox.parked_key AS k
        ON k.consumer = p.consumer AND k.lane = p.lane
    WHERE p.id = retried AND p.consumer = consumer_id AND k.retry_at IS NOT NULL
        AND NOT EXISTS (SELECT FROM watership_inbox.parked AS b
            WHERE b.consumer = p.consumer AND b.lane = p.lane AND b.id < p.id);
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF head.recorded OR head.beyond_window
        AND watership_inbox.claim_unrecorded(consumer_id, head.message_id, head.occurred_at)
    THEN
        RETURN true;
    END IF;
    IF head.beyond_window THEN
        PERFORM watership_inbox.retry_done(retried);
    ELSE
        UPDATE watership_inbox.parked_key AS k SET retry_at = NULL
        WHERE k.consumer = consumer_id AND k.lane = head.lane;
    END IF;
    RETURN false;
END
$$;

-- As receive, in the transaction of the handler; with the reason if it is parked.
CREATE FUNCTION watership_inbox.receive_message(
    consumer text, message_id text, occurred_at timestamptz, key text, body bytea,
    properties jsonb, retried bigint DEFAULT NULL, OUT next text, OUT reason text
)
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_variable
BEGIN
    IF retried IS NULL THEN
        next := watership_inbox.receive(consumer, message_id, occurred_at, key, body, properties);
    ELSIF watership_inbox.take_retry(consumer, retried) THEN
        next := 'handle';
    ELSE
        next := 'kept';
    END IF;
    IF next <> 'handle' THEN
        PERFORM watership_inbox.attempt_ended(consumer, message_id);
    END IF;
    IF next = 'parked' THEN
        SELECT p.reason INTO reason FROM watership_inbox.parked_messages AS p
        WHERE p.consumer = consumer AND p.message_id = message_id;
    END IF;
END
$$;

-- The message was handled, in this transaction.
CREATE FUNCTION watership_inbox.end_message(
    consumer text, message_id text, retried bigint DEFAULT NULL
) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    IF retried IS NULL THEN
        PERFORM watership_inbox.attempt_ended(consumer, message_id);
    ELSE
        PERFORM watership_inbox.retry_done(retried);
    END IF;
END
$$;

-- True if an attempt at the message neither failed nor ended. Begin it while nothing else is
-- handled, or one such message at a time: so only its own count of such attempts rises.
CREATE FUNCTION watership_inbox.suspect(consumer text, message_id text) RETURNS boolean
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
    SELECT EXISTS (
        SELECT FROM watership_inbox.attempt AS a
        JOIN watership_inbox.consumer AS c ON c.id = a.consumer
        WHERE c.name = suspect.consumer AND a.message_id = suspect.message_id
            AND a.started > a.failed)
$$;

-- A parked message that is to be handled, if there is one: the first of a key that was marked for
-- retry and that nobody has in hand. In a transaction of its own. `seconds` is its time.
CREATE FUNCTION watership_inbox.next_retry(consumer text)
RETURNS TABLE (
    retried bigint, message_id text, seconds bigint, key text, body bytea, properties jsonb
)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    consumer_id CONSTANT integer := watership_inbox.register(consumer);
    candidate text;
BEGIN
    -- One by one: each lock occupies shared memory until the end of the transaction.
    FOR candidate IN
        SELECT k.lane FROM watership_inbox.parked_key AS k
        WHERE k.consumer = consumer_id AND k.retry_at IS NOT NULL ORDER BY k.retry_at LIMIT 100
    LOOP
        CONTINUE WHEN NOT pg_try_advisory_xact_lock(
            watership_inbox.lane_lock(consumer, candidate));
        -- Look again, now that we hold the lock.
        RETURN QUERY
            SELECT p.id, p.message_id, extract(epoch FROM p.occurred_at)::bigint, p.key, p.body,
                p.properties
            FROM watership_inbox.parked_key AS k JOIN watership_inbox.parked AS p
                ON p.consumer = k.consumer AND p.lane = k.lane
            WHERE k.consumer = consumer_id AND k.lane = candidate AND k.retry_at IS NOT NULL
            ORDER BY p.id LIMIT 1;
        IF FOUND THEN
            RETURN;
        END IF;
    END LOOP;
END
$$;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA watership_inbox FROM PUBLIC;
GRANT EXECUTE ON FUNCTION
    watership_inbox.fail_message(text, text, timestamptz, text, bytea, jsonb, bigint, text,
        boolean, integer, boolean, text, integer, text),
    watership_inbox.begin_message(text, text, timestamptz, text, bytea, jsonb, bigint, boolean,
        integer, boolean),
    watership_inbox.take_retry(text, bigint),
    watership_inbox.receive_message(text, text, timestamptz, text, bytea, jsonb, bigint),
    watership_inbox.end_message(text, text, bigint),
    watership_inbox.suspect(text, text),
    watership_inbox.next_retry(text)
    TO watership_consumer;

INSERT INTO watership_inbox.migration (version, name) VALUES (5, '0005_messages');

RESET ROLE;
