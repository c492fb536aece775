-- The next rows of the batch that $2 shows and $1 does not, whose new rows have seq $3 to $4: those
-- behind seq $5 and id $6, at most $7, and up to about $8 bytes. A body of more than $9 bytes is
-- not sent, only its length.
SELECT o.seq, o.id, o.xid::text, o.aggregate_type, o.aggregate_id, o.event_type,
       CASE WHEN octet_length(o.payload::text) <= $9 THEN o.payload::text END,
       octet_length(o.payload::text)::bigint,
       CASE WHEN octet_length(o.data) <= $9 THEN '\x' || encode(o.data, 'hex') END,
       octet_length(o.data)::bigint,
       o.content_type, o.headers::text, o.traceparent,
       (extract(epoch FROM o.created_at) * 1000000)::bigint
FROM watership.poll_read($1::text::pg_snapshot, $2::text::pg_snapshot, $3, $4, $5, $6::text::uuid,
    $7::bigint::integer, $8) AS o
