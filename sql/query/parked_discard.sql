-- Gives up row $2 of relay $1 for the reason $3. Returns how many unreleased rows share its lanes.
WITH gone AS (
    UPDATE watership.parked
    SET state = 'discarded', changed_at = now(), changed_by = session_user, note = $3
    WHERE name = $1 AND id = $2 AND state IN ('parked', 'retrying')
    RETURNING id, lanes
)
SELECT (SELECT count(*) FROM watership.parked AS p
    WHERE p.name = $1 AND p.state IN ('parked', 'retrying') AND p.lanes && gone.lanes
        AND p.id <> gone.id)
FROM gone
