-- Watership 0002: emit and emit_bytes, for applications.
--
--     SELECT watership.emit('order', 42, 'created', '{"total": 12.5}');
--
-- All run with the caller's rights, inside the caller's transaction: the event is there exactly
-- when the transaction commits. Call it after the change of state that it tells of.
-- An `id` that you pass must never be used again; consumers drop a second event with the same id.
-- A header "traceparent" is moved to the column of that name.

SET ROLE watership_owner;

-- What all of them share. Not for direct use: its parameters may change.
CREATE FUNCTION watership.append_event(
    id uuid, aggregate_type text, aggregate_id text, event_type text,
    payload json, data bytea, content_type text, headers jsonb
) RETURNS uuid
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    traceparent text;
BEGIN
    -- What is wrong with other headers, the table's own check says.
    IF jsonb_typeof(headers) = 'object' THEN
        traceparent := headers ->> 'traceparent';
        headers := nullif(headers - 'traceparent', '{}');
    END IF;
    -- No RETURNING: it would need the right to read the outbox.
    id := coalesce(id, gen_random_uuid());
    INSERT INTO watership.outbox (id, aggregate_type, aggregate_id, event_type, payload, data,
        content_type, headers, traceparent)
    VALUES (id, aggregate_type, aggregate_id, event_type, payload, data,
        content_type, headers, traceparent);
    RETURN id;
END
$$;

-- emit, and emit_bytes for bodies that are not JSON. Three types of aggregate_id, because drivers
-- send integers and uuids as such, and Postgres makes no text of them by itself. Three kinds of
-- payload, because one or two of them leave a literal or a jsonb unresolved. A literal or a
-- parameter without a type becomes text, the preferred type of its category, so no call is
-- ambiguous. The payload is sent as it stands; text and json keep white space, key order and
-- digits, jsonb has its own form.
DO $$
DECLARE
    id_type text;
    payload_type text;
BEGIN
    FOREACH id_type IN ARRAY ARRAY['text', 'bigint', 'uuid'] LOOP
        FOREACH payload_type IN ARRAY ARRAY['json', 'text', 'jsonb'] LOOP
            EXECUTE format('
                CREATE FUNCTION watership.emit(
                    aggregate_type text, aggregate_id %s, event_type text, payload %s,
                    headers jsonb DEFAULT NULL, id uuid DEFAULT NULL
                ) RETURNS uuid LANGUAGE sql VOLATILE
                RETURN watership.append_event(id, aggregate_type, aggregate_id::text, event_type,
                    payload::json, NULL, NULL, headers)', id_type, payload_type);
        END LOOP;
        EXECUTE format('
            CREATE FUNCTION watership.emit_bytes(
                aggregate_type text, aggregate_id %s, event_type text, data bytea,
                content_type text, headers jsonb DEFAULT NULL, id uuid DEFAULT NULL
            ) RETURNS uuid LANGUAGE sql VOLATILE
            RETURN watership.append_event(id, aggregate_type, aggregate_id::text, event_type,
                NULL, data, content_type, headers)', id_type);
    END LOOP;
END
$$;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA watership FROM PUBLIC;

INSERT INTO watership.migration (version, name) VALUES (2, '0002_emit');

RESET ROLE;
