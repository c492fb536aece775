-- Watership 0009: emit_wal and emit_wal_bytes, an outbox without a table.
--
--     SELECT watership.emit_wal('order', 42, 'created', '{"total": 12.5}');
--
-- The event is a logical message in the WAL and nothing else: no row, no index, nothing to delete,
-- and nothing to read again. It takes the place in its transaction where it is emitted, and is
-- there exactly when the transaction commits. Arguments and limits are those of emit.

SET ROLE watership_owner;

-- What all of them share. Not for direct use: its parameters may change. The content, version 1:
--     1 byte   version, 1
--     1 byte   'j' for JSON, 'b' for bytes
--     16 bytes id
--     8 bytes  created_at: microseconds since 2000-01-01 UTC
--     6 texts  aggregate_type, aggregate_id, event_type, content_type, traceparent, headers: four
--              bytes with the length (-1 for null), and then the bytes in UTF-8
--     the rest is the body
-- Numbers are big-endian.
CREATE FUNCTION watership.append_message(
    id uuid, aggregate_type text, aggregate_id text, event_type text,
    payload json, data bytea, content_type text, headers jsonb
) RETURNS uuid
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    traceparent text;
    part text;
    content bytea;
BEGIN
    -- What the columns and the check of the outbox say.
    IF aggregate_type IS NULL OR aggregate_id IS NULL OR event_type IS NULL THEN
        RAISE EXCEPTION 'watership.emit_wal: aggregate_type, aggregate_id and event_type must not '
            'be null' USING ERRCODE = 'not_null_violation';
    ELSIF num_nonnulls(payload, data) <> 1 THEN
        RAISE EXCEPTION 'watership.emit_wal: exactly one of payload and data must be set'
            USING ERRCODE = 'check_violation';
    ELSIF current_setting('wal_level') <> 'logical' THEN
        RAISE EXCEPTION 'watership.emit_wal: wal_level is %, so nobody could read the event',
            current_setting('wal_level') USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    IF jsonb_typeof(headers) = 'object' THEN
        traceparent := headers ->> 'traceparent';
        headers := nullif(headers - 'traceparent', '{}');
    END IF;
    PERFORM watership.fits_a_message(
        aggregate_type, aggregate_id, event_type, content_type, headers, traceparent, now());
    id := coalesce(id, gen_random_uuid());
    content := '\x01'::bytea || CASE WHEN data IS NULL THEN '\x6a'::bytea ELSE '\x62'::bytea END
        || uuid_send(id) || timestamptz_send(now());
    FOREACH part IN ARRAY ARRAY[
        aggregate_type, aggregate_id, event_type, content_type, traceparent, headers::text]
    LOOP
        content := content || CASE WHEN part IS NULL THEN int4send(-1) ELSE
            int4send(octet_length(convert_to(part, 'UTF8'))) || convert_to(part, 'UTF8') END;
    END LOOP;
    PERFORM pg_logical_emit_message(true, 'watership',
        content || coalesce(data, convert_to(payload::text, 'UTF8')));
    RETURN id;
END
$$;

-- The forms of emit and emit_bytes.
DO $$
DECLARE
    id_type text;
    payload_type text;
BEGIN
    FOREACH id_type IN ARRAY ARRAY['text', 'bigint', 'uuid'] LOOP
        FOREACH payload_type IN ARRAY ARRAY['json', 'text', 'jsonb'] LOOP
            EXECUTE format('
                CREATE FUNCTION watership.emit_wal(
                    aggregate_type text, aggregate_id %s, event_type text, payload %s,
                    headers jsonb DEFAULT NULL, id uuid DEFAULT NULL
                ) RETURNS uuid LANGUAGE sql VOLATILE
                RETURN watership.append_message(id, aggregate_type, aggregate_id::text, event_type,
                    payload::json, NULL, NULL, headers)', id_type, payload_type);
        END LOOP;
        EXECUTE format('
            CREATE FUNCTION watership.emit_wal_bytes(
                aggregate_type text, aggregate_id %s, event_type text, data bytea,
                content_type text, headers jsonb DEFAULT NULL, id uuid DEFAULT NULL
            ) RETURNS uuid LANGUAGE sql VOLATILE
            RETURN watership.append_message(id, aggregate_type, aggregate_id::text, event_type,
                NULL, data, content_type, headers)', id_type);
    END LOOP;
END
$$;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA watership FROM PUBLIC;

INSERT INTO watership.migration (version, name) VALUES (9, '0009_emit_wal');

RESET ROLE;
