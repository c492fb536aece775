-- The row $2 of relay $1, in any state, with the columns of parked_list.sql.
SELECT id, state, kind, route, key, source, epoch::bigint, mark, ordinal, sub::bigint,
       attempts, error, event_id::text,
       extract(epoch FROM now() - parked_at)::float8, changed_by, note, last_kind, last_error
FROM watership.parked
WHERE name = $1 AND id = $2
