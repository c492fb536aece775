-- Run $1 has begun: of the relation $2 in version $3, which has about $4 rows.
UPDATE watership.backfill
SET state = 'running', relation = $2, version = $3, rows_total = coalesce($4, rows_total),
    started_at = coalesce(started_at, now()), updated_at = now()
WHERE run = $1 AND state IN ('requested', 'running')
