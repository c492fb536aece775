-- Removes rows of relay $1 that were released or discarded more than $2 seconds ago and that the
-- checkpoint has passed; at most 1,000.
DELETE FROM watership.parked AS p
USING watership.checkpoint AS c
WHERE c.name = $1 AND p.name = $1 AND p.id IN (
    SELECT q.id FROM watership.parked AS q
    WHERE q.name = $1 AND q.state IN ('released', 'discarded')
      AND q.changed_at < now() - make_interval(secs => $2::bigint::double precision)
      AND (q.epoch, q.commit_lsn, q.ordinal) <= (c.epoch, c.commit_lsn, c.ordinal)
    LIMIT 1000)
