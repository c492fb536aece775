-- Marks rows of relay $1 to be tried again: those with the ids $2 or the key $3, and all that
-- share a lane with them or with each other, because a lane is published in order or not at all.
WITH RECURSIVE chosen (id, lanes, table_lane, barrier) AS (
    SELECT id, lanes, table_lane, barrier FROM watership.parked
    WHERE name = $1 AND state IN ('parked', 'retrying') AND (id = ANY ($2) OR key = $3)
    UNION
    SELECT p.id, p.lanes, p.table_lane, p.barrier
    FROM chosen AS c
    JOIN watership.parked AS p ON p.lanes && c.lanes
        OR p.table_lane = c.table_lane AND (p.barrier OR c.barrier)
    WHERE p.name = $1 AND p.state IN ('parked', 'retrying')
)
UPDATE watership.parked AS p
SET state = 'retrying', changed_at = now(), changed_by = session_user
FROM chosen AS c
WHERE p.id = c.id AND p.state = 'parked'
RETURNING p.id
