-- Under which table names rows of relay $1 are parked and unreleased, by the hash of the table, and
-- whether the hashes of their keys are keyed.
SELECT DISTINCT table_lane, source, lanes_keyed FROM watership.parked
WHERE name = $1 AND state IN ('parked', 'retrying') AND table_lane IS NOT NULL
