-- Aborts this script if the outbox has rows that the relay would not see. The names, and what is to
-- be undone, were filled in by `watership init --print-sql`.
DO $$
BEGIN
    IF EXISTS (SELECT FROM :outbox) THEN
        :undo
        RAISE EXCEPTION USING MESSAGE = :message,
            HINT = 'empty the outbox, or print the script with --skip-existing';
    END IF;
END
$$;
