-- Rows of relay $1, in any state, of an event or message with one of the ids $2, or of the key $3,
-- with the columns of parked_list.sql; the newest first, at most $4.
SELECT id, state, kind, route, key, source, epoch::bigint, mark, ordinal, sub,
       attempts, error, event_id::text,
       extract(epoch FROM now() - parked_at)::float8, changed_by, note, last_kind, last_error
FROM watership.parked
WHERE name = $1 AND (event_id = ANY ($2) OR key = $3)
ORDER BY epoch DESC, mark DESC, ordinal DESC, sub DESC, route, part
LIMIT $4
