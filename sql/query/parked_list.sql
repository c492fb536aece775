-- Rows of relay $1 in the states $2, of route $3 and key $4 if they are not null; at most $5.
SELECT id, state, kind, route, key, source, epoch::bigint, mark, ordinal, sub,
       attempts, error, event_id::text,
       extract(epoch FROM now() - parked_at)::float8, changed_by, note, last_kind, last_error
FROM watership.parked
WHERE name = $1 AND state = ANY ($2) AND route = coalesce($3, route) AND key = coalesce($4, key)
ORDER BY epoch, mark, ordinal, sub, route, part
LIMIT $5
