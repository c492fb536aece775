-- The history of table $2 of relay $1, the latest rows first; at most $3.
SELECT id, kind, route, coalesce(epoch::bigint, 0), mark, coalesce(ordinal, 0), coalesce(sub, 0),
    description, changes, broken, recorded_at::text, recorded_by
FROM watership.schema_history
WHERE name = $1 AND table_name = $2
ORDER BY id DESC
LIMIT $3
