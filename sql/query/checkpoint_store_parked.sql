-- As checkpoint_store.sql, with what was parked, released and parked again on the way: all of it
-- or nothing. $8 holds the new rows, $9 the changes of rows that are there, both as JSON arrays;
-- bytes are in base64.
WITH mine AS (
    UPDATE watership.checkpoint
    SET epoch = $3::bigint::integer, mark = $4, ordinal = $5, sub = $6, flush_mark = $7,
        updated_at = now()
    WHERE name = $1 AND session_no = $2
      AND (epoch, mark, ordinal, sub) <= ($3::bigint::integer, $4, $5, $6) AND flush_mark <= $7
    RETURNING name
), parked AS (
    INSERT INTO watership.parked (name, epoch, mark, ordinal, sub, route, part, state, kind, error,
        attempts, event_id, source, key, committed_at, lanes, table_lane, barrier, event,
        routing_key, properties, body)
    SELECT mine.name, r.epoch, r.mark, r.ordinal, r.sub, r.route, r.part, r.state, r.kind, r.error,
        r.attempts, r.event_id, r.source, r.key,
        to_timestamp(0) + r.committed_at_us * interval '1 us', r.lanes, r.table_lane, r.barrier,
        r.event, r.routing_key, decode(r.properties, 'base64'), decode(r.body, 'base64')
    FROM mine, json_to_recordset($8::text::json) AS r (epoch integer, mark bigint,
        ordinal bigint, sub bigint, route text, part integer, state text, kind text, error text,
        attempts integer, event_id uuid, source text, key text, committed_at_us bigint,
        lanes bigint[], table_lane bigint, barrier boolean, event json, routing_key text,
        properties text, body text)
    ON CONFLICT DO NOTHING
), changed AS (
    UPDATE watership.parked AS p
    SET state = c.state, kind = coalesce(c.kind, p.kind), error = coalesce(c.error, p.error),
        attempts = p.attempts + (c.kind IS NOT NULL)::integer, changed_at = now(),
        changed_by = 'relay'
    FROM mine, json_to_recordset($9::text::json) AS c (epoch integer, mark bigint,
        ordinal bigint, sub bigint, route text, part integer, state text, kind text, error text)
    WHERE p.name = mine.name AND p.state IN ('parked', 'retrying') AND p.route = c.route AND p.part = c.part
      AND (p.epoch, p.mark, p.ordinal, p.sub) = (c.epoch, c.mark, c.ordinal, c.sub)
)
SELECT pg_current_wal_insert_lsn() FROM mine
