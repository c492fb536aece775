-- Marks rows of relay $1 to be tried again: those with the ids $2 or the key $3, and all that
-- share a lane with them or with each other, because a lane is published in order or not at all.
-- The recursion is over lanes, not rows: the thousands of rows of one key are one step of it.
WITH RECURSIVE chosen (lanes, table_lane, barrier) AS (
    SELECT lanes, table_lane, barrier FROM watership.parked
    WHERE name = $1 AND state IN ('parked', 'retrying') AND (id = ANY ($2) OR key = $3)
    UNION
    SELECT p.lanes, p.table_lane, p.barrier
    FROM chosen AS c
    JOIN watership.parked AS p ON p.lanes && c.lanes
        OR p.table_lane = c.table_lane AND (p.barrier OR c.barrier)
    WHERE p.name = $1 AND p.state IN ('parked', 'retrying')
)
UPDATE watership.parked AS p
SET state = 'retrying', changed_at = now(), changed_by = session_user
WHERE p.name = $1 AND p.state = 'parked'
  AND EXISTS (
    SELECT FROM chosen AS c
    WHERE c.lanes = p.lanes AND c.barrier = p.barrier
      AND c.table_lane IS NOT DISTINCT FROM p.table_lane)
  -- Rows without a lane have nothing in common.
  AND (p.lanes <> '{}' OR p.barrier OR p.id = ANY ($2) OR p.key = $3)
RETURNING p.id
