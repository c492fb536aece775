-- Watership: lets applications emit logical messages, and nothing else. The last step of
-- `watership init` where the outbox is a table of the application's: the schema has an outbox of
-- its own then too, which no relay reads, so nobody is let into it.
--
-- Not numbered, because it comes after the replication slot; may be run again. Then, for events
-- without a table:
--     GRANT watership_app TO shop;

GRANT USAGE ON SCHEMA watership TO watership_app;

DO $$
DECLARE
    form regprocedure;
BEGIN
    FOR form IN
        SELECT oid FROM pg_catalog.pg_proc
        WHERE pronamespace = 'watership'::regnamespace
            AND proname IN ('fits_a_message', 'append_message', 'emit_wal', 'emit_wal_bytes')
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO watership_app', form);
    END LOOP;
END
$$;
