-- The contents of the rows of relay $1 with the keys $2 (a JSON array), if they are to be retried.
SELECT p.epoch::bigint, p.mark, p.ordinal, p.sub, p.route, p.part::bigint, p.state,
       coalesce(p.last_kind, p.kind), coalesce(p.last_error, p.error), p.attempts, p.event_id,
       p.source, p.key, (extract(epoch FROM p.committed_at) * 1000000)::bigint, p.lanes,
       p.table_lane, p.barrier, p.event::text, p.routing_key, p.properties, p.body, p.lanes_keyed,
       p.rules
FROM watership.parked AS p
JOIN json_to_recordset($2::text::json) AS k (epoch integer, mark bigint, ordinal bigint,
    sub bigint, route text, part integer)
  ON (p.epoch, p.mark, p.ordinal, p.sub, p.route, p.part)
   = (k.epoch, k.mark, k.ordinal, k.sub, k.route, k.part)
WHERE p.name = $1 AND p.state = 'retrying'
ORDER BY p.epoch, p.mark, p.ordinal, p.sub, p.route, p.part
