-- Run $1 does not go on now, because of $2; null: it does.
UPDATE watership.backfill SET waits = $2, updated_at = now()
WHERE run = $1 AND state IN ('requested', 'running') AND waits IS DISTINCT FROM $2
