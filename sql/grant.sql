-- Watership: opens the outbox to applications. The last step of `watership init`.
--
-- Not numbered, because it comes after the replication slot: a row that is written before the slot
-- exists is never streamed. May be run again. Then give the role to your application's user:
--     GRANT watership_app TO shop;

GRANT USAGE ON SCHEMA watership TO watership_app;

-- All columns but those for polling. created_at chooses the partition, so it is best left alone;
-- but frameworks set it. They also read back what the server made of a new row, and name the
-- primary key in ON CONFLICT, which needs the right to read these two columns.
GRANT INSERT (id, aggregate_type, aggregate_id, event_type, payload, data, content_type, headers,
    traceparent, created_at), SELECT (id, created_at) ON watership.outbox TO watership_app;
GRANT USAGE ON SEQUENCE watership.outbox_seq TO watership_app;

-- Every form of these: emit and the like have one for each type of aggregate_id and payload.
DO $$
DECLARE
    form regprocedure;
BEGIN
    FOR form IN
        SELECT oid FROM pg_catalog.pg_proc
        WHERE pronamespace = 'watership'::regnamespace
            AND proname IN ('fits_a_message', 'append_event', 'emit', 'emit_bytes',
                'append_message', 'emit_wal', 'emit_wal_bytes')
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO watership_app', form);
    END LOOP;
END
$$;
