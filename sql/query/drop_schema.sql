-- Drops the schema with everything that Watership made in it. No CASCADE: what others made of it,
-- such as a view, is in the way and is named in the error.
DO $$
DECLARE
    names text;
BEGIN
    -- First those that return rows of a table: tables depend on others.
    SELECT string_agg(p.oid::regprocedure::text, ', ') INTO names
    FROM pg_catalog.pg_proc AS p
    JOIN pg_catalog.pg_class AS c ON c.reltype = p.prorettype
    WHERE p.pronamespace = 'watership'::regnamespace AND p.proowner = 'watership_owner'::regrole;
    IF names IS NOT NULL THEN
        EXECUTE 'DROP FUNCTION ' || names;
    END IF;
    SELECT string_agg(format('watership.%I', relname), ', ') INTO names
    FROM pg_catalog.pg_class
    WHERE relnamespace = 'watership'::regnamespace AND relowner = 'watership_owner'::regrole
        AND relkind IN ('r', 'p') AND NOT relispartition;
    IF names IS NOT NULL THEN
        EXECUTE 'DROP TABLE ' || names;
    END IF;
    SELECT string_agg(format('watership.%I', relname), ', ') INTO names
    FROM pg_catalog.pg_class
    WHERE relnamespace = 'watership'::regnamespace AND relowner = 'watership_owner'::regrole
        AND relkind = 'S';
    IF names IS NOT NULL THEN
        EXECUTE 'DROP SEQUENCE ' || names;
    END IF;
    SELECT string_agg(oid::regprocedure::text, ', ') INTO names
    FROM pg_catalog.pg_proc
    WHERE pronamespace = 'watership'::regnamespace AND proowner = 'watership_owner'::regrole;
    IF names IS NOT NULL THEN
        EXECUTE 'DROP FUNCTION ' || names;
    END IF;
    DROP SCHEMA watership;
END
$$
