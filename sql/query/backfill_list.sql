-- The backfills of relay $1, the oldest first; $2: only those that have not ended.
SELECT run, table_name, condition, first_key, state, waits, error, relation, version, last_key,
    rows_read, rows_left_out, rows_total, initial_slot IS NOT NULL,
    extract(epoch FROM requested_at)::double precision,
    extract(epoch FROM started_at)::double precision,
    extract(epoch FROM ended_at)::double precision
FROM (
    SELECT * FROM watership.backfill
    WHERE name = $1 AND (NOT $2 OR state IN ('requested', 'running', 'paused'))
    ORDER BY requested_at DESC, run DESC LIMIT 1000
) AS latest
ORDER BY requested_at, run
