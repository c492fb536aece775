-- Removes rows of relay $1 that were released or discarded more than $2 seconds ago and that the
-- checkpoint has passed; at most 1,000.
WITH old AS (
    SELECT q.id
    FROM watership.parked AS q
    JOIN watership.checkpoint AS c ON c.name = q.name
    WHERE q.name = $1 AND q.state IN ('released', 'discarded')
      AND q.changed_at < now() - make_interval(secs => $2::bigint::double precision)
      AND (q.epoch, q.mark, q.ordinal, q.sub) <= (c.epoch, c.mark, c.ordinal, c.sub)
    LIMIT 1000
)
DELETE FROM watership.parked WHERE id IN (SELECT id FROM old)
