-- Rides on the checkpoint of relay $1, session $2, at epoch $3, mark $4, ordinal $5, sub $6, which
-- was written before in this transaction; if it was not, nothing is.
-- New parked rows: $7, a JSON array; bytes are in base64.
INSERT INTO watership.parked (name, epoch, mark, ordinal, sub, route, part, state, kind, error,
    attempts, event_id, source, key, committed_at, lanes, table_lane, barrier,
    lanes_keyed, rules, event, routing_key, properties, body, size)
SELECT mine.name, r.epoch, r.mark, r.ordinal, r.sub, r.route, r.part, r.state, r.kind, r.error,
    r.attempts, r.event_id, r.source, r.key,
    to_timestamp(0) + r.committed_at_us * interval '1 us', r.lanes, r.table_lane, r.barrier,
    r.lanes_keyed, r.rules, r.event, r.routing_key, decode(r.properties, 'base64'),
    decode(r.body, 'base64'),
    coalesce(octet_length(r.event::text), 0)
        + (coalesce(length(r.properties), 0)::bigint + coalesce(length(r.body), 0)) * 3 / 4
FROM json_to_recordset($7::text::json) AS r (epoch integer, mark bigint, ordinal bigint,
    sub bigint, route text, part integer, state text, kind text, error text, attempts integer,
    event_id uuid, source text, key text, committed_at_us bigint, lanes bigint[],
    table_lane bigint, barrier boolean, lanes_keyed boolean, rules text, event json,
    routing_key text, properties text, body text),
    watership.checkpoint AS mine
WHERE mine.name = $1 AND mine.session_no = $2
  AND (mine.epoch, mine.mark, mine.ordinal, mine.sub) = ($3::bigint::integer, $4, $5, $6)
ON CONFLICT DO NOTHING
