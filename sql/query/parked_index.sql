-- The unreleased rows of relay $1, without their contents.
SELECT epoch::bigint, mark, ordinal, sub, route, part::bigint, state, kind, lanes, table_lane,
       barrier, coalesce(pg_column_size(event), 0) + coalesce(pg_column_size(body), 0)
           + coalesce(pg_column_size(properties), 0),
       extract(epoch FROM parked_at)::float8
FROM watership.parked
WHERE name = $1 AND state IN ('parked', 'retrying')
ORDER BY epoch, mark, ordinal, sub, route, part
