-- Emits the rows that were made between $1 and $2 again, under the same ids, in the order in which
-- they were inserted. `watership resync` prints it. Not with watership.emit, which would forget the
-- content type of a JSON payload.
INSERT INTO watership.outbox (id, aggregate_type, aggregate_id, event_type, payload, data,
        content_type, headers, traceparent)
    SELECT id, aggregate_type, aggregate_id, event_type, payload, data,
        content_type, headers, traceparent
    FROM watership.outbox
    WHERE created_at >= $1 AND created_at <= $2
    ORDER BY seq
    ON CONFLICT DO NOTHING
