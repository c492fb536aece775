-- As find_outbox.sql, of an outbox table whose columns are mapped; `pg/outbox` fills in the names.
-- The transaction of the row is its xmin: it was inserted and never updated. Of a relay that polls
-- it is known: its last settled batch shows the row, or it does not.
SELECT :id::text, :aggregate_type || '/' || coalesce(:aggregate_id::text, :id::text),
    :aggregate_type, :event_type::text, coalesce(:created_at::text, 'an unknown time'),
    coalesce(CASE c.kind
        WHEN 'poll' THEN NOT :visible
        ELSE (o.xmin::text::bigint - c.xmin::text::bigint + 4294967296)
            % 4294967296 BETWEEN 1 AND 2147483647 END, false) AS later,
    coalesce(CASE c.kind
        WHEN 'poll' THEN :visible
        ELSE c.flush_lsn >= pg_current_wal_insert_lsn() END, false) AS passed,
    pg_current_wal_insert_lsn()::text
FROM :table AS o
LEFT JOIN watership.checkpoint AS c ON c.name = $1
LEFT JOIN watership.poll_batch AS b ON b.name = c.name AND b.number = c.flush_mark
WHERE :same_id
    OR :aggregate_type || '/' || coalesce(:aggregate_id::text, :id::text) = $3
ORDER BY :created_at DESC
LIMIT $4
