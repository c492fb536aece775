-- Ends a script of `watership init --print-sql` where the outbox has rows that the relay would not
-- see, which fills in the names, and what is to be undone.
DO $$
BEGIN
    IF EXISTS (SELECT FROM :outbox) THEN
        :undo
        RAISE EXCEPTION USING MESSAGE = :message,
            HINT = 'empty the outbox, or print the script with --skip-existing';
    END IF;
END
$$;
