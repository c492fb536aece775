-- Gives up rows of relay $1 for the reason $6: those with the ids $2, with the key $3 or of the
-- route $4, or all if $5. Returns their ids, how many of them were being retried, and how many
-- other unreleased rows share their lanes.
WITH chosen AS (
    SELECT id, state, lanes FROM watership.parked
    WHERE name = $1 AND state IN ('parked', 'retrying')
      AND ($5 OR id = ANY ($2) OR key = $3 OR route = $4)
    FOR UPDATE
), gone AS (
    UPDATE watership.parked AS p
    SET state = 'discarded', changed_at = now(), changed_by = session_user, note = $6
    FROM chosen WHERE p.id = chosen.id
    RETURNING p.id
)
SELECT array(SELECT id FROM gone ORDER BY id),
    (SELECT count(*) FROM chosen WHERE state = 'retrying'),
    (SELECT count(*) FROM watership.parked AS p
     WHERE p.name = $1 AND p.state IN ('parked', 'retrying')
       AND p.id NOT IN (SELECT id FROM chosen)
       AND p.lanes && (SELECT array_agg(DISTINCT lane) FROM chosen, unnest(chosen.lanes) AS lane))
