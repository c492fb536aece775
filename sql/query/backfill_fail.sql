-- Run $1 has ended: $2 says why.
WITH moved AS (DELETE FROM watership.backfill_moved WHERE run = $1)
UPDATE watership.backfill
SET state = 'failed', error = $2, waits = NULL, last_key = NULL,
    ended_at = now(), updated_at = now()
WHERE run = $1 AND state IN ('requested', 'running', 'paused')
