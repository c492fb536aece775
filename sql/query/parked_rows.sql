-- The contents of the rows of relay $1 with the keys $2 (a JSON array), if they are to be retried.
SELECT p.epoch::bigint, p.commit_lsn, p.ordinal, p.sub::bigint, p.route, p.state, p.kind, p.error,
       p.attempts, p.event_id, p.source, p.key,
       (extract(epoch FROM p.committed_at) * 1000000)::bigint, p.lanes, p.table_lane, p.barrier,
       p.event::text, p.routing_key, p.properties, p.body
FROM watership.parked AS p
JOIN json_to_recordset($2::text::json) AS k (epoch integer, commit_lsn pg_lsn, ordinal bigint,
    sub integer, route text)
  ON (p.epoch, p.commit_lsn, p.ordinal, p.sub, p.route)
   = (k.epoch, k.commit_lsn, k.ordinal, k.sub, k.route)
WHERE p.name = $1 AND p.state = 'retrying'
ORDER BY p.epoch, p.commit_lsn, p.ordinal, p.sub, p.route
