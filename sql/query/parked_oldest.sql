-- Days since the oldest unreleased row of relay $1 was committed; no row without one.
SELECT (now() AT TIME ZONE 'UTC')::date - (min(committed_at) AT TIME ZONE 'UTC')::date
FROM watership.parked
WHERE name = $1 AND state IN ('parked', 'retrying')
HAVING count(*) > 0
