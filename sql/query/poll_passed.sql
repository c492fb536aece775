-- What every relay that polls the outbox $1 has published: a row is passed when it is visible in
-- all of these. NULL where the batch that a relay stands at is missing: then nothing is passed.
SELECT CASE WHEN count(*) = count(b.snapshot)
    THEN coalesce(array_agg(b.snapshot::text) FILTER (WHERE b.outbox = $1), '{}') END
FROM watership.checkpoint AS c
LEFT JOIN watership.poll_batch AS b ON b.name = c.name AND b.number = c.flush_mark
WHERE c.kind = 'poll'
