-- What a relay of kind $2 needs of its own schema and does not have: role $1 (null: the connected
-- one), and the applications' role for the outbox. Privileges that are lacking, and whether
-- row-level security stands in the way (check_enable_rls in rls.c decides in the same way).
-- `vital`: without it the relay cannot run. Of tables that do not exist, only vital ones are named;
-- the outbox may be another.
WITH needed (app, name, privilege, columns, vital) AS (VALUES
    (false, 'migration', 'SELECT', NULL, false),
    (false, 'checkpoint', 'SELECT', NULL, true),
    (false, 'checkpoint', 'UPDATE', '{epoch, mark, ordinal, sub, flush_mark, session_no,
        system_identifier, timeline, publication, publication_oid, updated_at, polled_at,
        canary, canary_lsn, canary_session}', true),
    (false, 'publication_seen', 'SELECT', NULL, true),
    (false, 'publication_seen', 'INSERT', NULL, true),
    (false, 'publication_seen', 'UPDATE', NULL, true),
    (false, 'described', 'SELECT', NULL, true),
    (false, 'described', 'INSERT', NULL, true),
    (false, 'described', 'UPDATE', NULL, true),
    (false, 'parked', 'SELECT', NULL, true),
    (false, 'parked', 'INSERT', NULL, true),
    (false, 'parked', 'UPDATE', NULL, true),
    (false, 'parked', 'DELETE', NULL, false),
    (false, 'canary', 'SELECT', NULL, true),
    (false, 'canary', 'INSERT', NULL, true),
    (false, 'canary', 'UPDATE', NULL, true),
    (false, 'partitions', 'SELECT', NULL, true),
    (false, 'partitions', 'INSERT', NULL, true),
    (false, 'partitions', 'UPDATE', NULL, true),
    (false, 'partitions', 'DELETE', NULL, true),
    (false, 'backfill', 'SELECT', NULL, true),
    (false, 'backfill', 'INSERT', NULL, true),
    (false, 'backfill', 'UPDATE', NULL, true),
    (false, 'backfill_moved', 'SELECT', NULL, true),
    (false, 'backfill_moved', 'INSERT', NULL, true),
    (false, 'backfill_moved', 'DELETE', NULL, true),
    (false, 'secret', 'SELECT', NULL, true),
    (false, 'schema_history', 'SELECT', NULL, true),
    (false, 'schema_history', 'INSERT', NULL, true),
    (false, 'resync', 'SELECT', NULL, false),
    (false, 'resync', 'INSERT', NULL, false),
    (true, 'outbox', 'INSERT', '{id, aggregate_type, aggregate_id, event_type, payload, data,
        content_type, headers, traceparent, created_at}', false)
    UNION ALL
    SELECT false, name, privilege, NULL, true FROM (VALUES
        ('outbox', 'SELECT'),
        ('poll_batch', 'SELECT'),
        ('poll_batch', 'INSERT'),
        ('poll_batch', 'DELETE')) AS polled (name, privilege)
    WHERE $2 = 'poll'
), role AS (
    SELECT oid, rolname, rolsuper OR rolbypassrls AS sees_all, rolname = 'watership_app' AS app
    FROM pg_catalog.pg_roles
    WHERE rolname IN ('watership_app', coalesce($1::text, current_user::text))
), held AS (
    SELECT r.rolname::text AS role, n.app, 'watership.' || n.name AS object, n.privilege, n.vital,
        c.oid IS NULL AND n.vital AND n.name <> 'outbox' AS missing,
        CASE WHEN c.oid IS NULL THEN true
            WHEN n.columns IS NULL THEN has_table_privilege(r.oid, c.oid, n.privilege)
            -- A schema that `init` has still to bring up to date lacks some.
            ELSE (SELECT bool_and(has_column_privilege(r.oid, c.oid, a.attnum, n.privilege))
                FROM pg_catalog.pg_attribute AS a
                WHERE a.attrelid = c.oid AND a.attname = ANY (n.columns::text[]))
        END AS granted,
        c.oid IS NOT NULL AND c.relrowsecurity AND NOT r.sees_all
            AND (c.relforcerowsecurity OR NOT pg_has_role(r.oid, c.relowner, 'USAGE'))
            -- What applications insert may be allowed by a policy; what the relay reads may be
            -- hidden by one.
            AND NOT (n.app AND EXISTS (SELECT FROM pg_catalog.pg_policy AS p
                WHERE p.polrelid = c.oid AND p.polpermissive AND p.polcmd IN ('a', '*')))
            AS hidden
    FROM needed AS n
    JOIN role AS r ON r.app = n.app
    JOIN pg_catalog.pg_namespace AS s ON s.nspname = 'watership'
    LEFT JOIN pg_catalog.pg_class AS c ON c.relname = n.name AND c.relnamespace = s.oid
    UNION ALL
    SELECT r.rolname, r.app, 'SCHEMA watership', 'USAGE', NOT r.app, false,
        has_schema_privilege(r.oid, s.oid, 'USAGE'), false
    FROM role AS r
    JOIN pg_catalog.pg_namespace AS s ON s.nspname = 'watership'
    UNION ALL
    SELECT r.rolname, r.app, 'FUNCTION watership.maintain(interval)', 'EXECUTE', false, false,
        has_function_privilege(r.oid, f.oid, 'EXECUTE'), false
    FROM role AS r
    JOIN pg_catalog.pg_proc AS f ON f.proname = 'maintain' AND NOT r.app
        AND f.pronamespace = (SELECT oid FROM pg_catalog.pg_namespace WHERE nspname = 'watership')
)
SELECT role, app, object,
    coalesce(array_agg(privilege ORDER BY privilege) FILTER (WHERE NOT granted), '{}'),
    bool_or(hidden), bool_or(vital AND (missing OR hidden OR NOT granted)), bool_or(missing)
FROM held
WHERE missing OR hidden OR NOT granted
GROUP BY role, app, object
ORDER BY app, object
