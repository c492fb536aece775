-- How many unreleased rows relay $1 has: parked, retrying.
SELECT count(*) FILTER (WHERE state = 'parked'), count(*) FILTER (WHERE state = 'retrying')
FROM watership.parked
WHERE name = $1 AND state IN ('parked', 'retrying')
