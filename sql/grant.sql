-- Watership: opens the outbox to applications. The last step of `watership init`.
--
-- Not numbered, because it comes after the replication slot: a row that is written before the slot
-- exists is never streamed. May be run again. Then give the role to your application's user:
--     GRANT watership_app TO shop;

GRANT USAGE ON SCHEMA watership TO watership_app;

-- All columns but created_at, which chooses the partition, and those for polling.
GRANT INSERT (id, aggregate_type, aggregate_id, event_type, payload, data, content_type, headers,
    traceparent) ON watership.outbox TO watership_app;
GRANT USAGE ON SEQUENCE watership.outbox_seq TO watership_app;

GRANT EXECUTE ON FUNCTION
    watership.fits_a_message(text, text, text, text, jsonb, text),
    watership.append_event(uuid, text, text, text, json, bytea, text, jsonb),
    watership.emit(text, text, text, text, jsonb, uuid),
    watership.emit(text, text, text, json, jsonb, uuid),
    watership.emit(text, text, text, jsonb, jsonb, uuid),
    watership.emit_bytes(text, text, text, bytea, text, jsonb, uuid)
    TO watership_app;
