-- Sets the open backfills of relay $1 to state $3: all, or those of table or run $2. Returns them.
WITH set AS (
UPDATE watership.backfill
SET state = $3, waits = NULL, updated_at = now(),
    last_key = CASE WHEN $3 <> 'cancelled' THEN last_key END,
    ended_at = CASE WHEN $3 = 'cancelled' THEN now() END
WHERE name = $1 AND ($2::text IS NULL OR table_name = $2 OR run::text = $2)
  AND (state IN ('requested', 'running') OR state = 'paused' AND $3 <> 'paused')
RETURNING run, table_name
), moved AS (
DELETE FROM watership.backfill_moved AS m USING set WHERE m.run = set.run AND $3 = 'cancelled'
)
SELECT run, table_name FROM set
