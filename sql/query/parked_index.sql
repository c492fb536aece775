-- The unreleased rows of relay $1, without their contents.
SELECT epoch::bigint, mark, ordinal, sub, route, part::bigint, state, coalesce(last_kind, kind),
       lanes, table_lane, barrier, size,
       extract(epoch FROM parked_at)::float8
FROM watership.parked
WHERE name = $1 AND state IN ('parked', 'retrying')
ORDER BY epoch, mark, ordinal, sub, route, part
