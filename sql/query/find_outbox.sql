-- Outbox rows with the id $2, or of the key $3 ("type/id"), the newest first, at most $4.
-- `later`: of a relay $1 that reads the WAL, the transaction got its number after the one that
-- wrote the checkpoint, so it was committed later; the other way round nothing follows. The numbers
-- are compared by their lower 32 bits, as Postgres does. Of a relay that polls it is known: its
-- last settled batch shows the row, or it does not.
SELECT o.id::text, o.aggregate_type || '/' || o.aggregate_id, o.aggregate_type, o.event_type,
    o.created_at::text,
    coalesce(CASE c.kind
        WHEN 'poll' THEN NOT pg_visible_in_snapshot(o.xid, b.snapshot)
        ELSE ((o.xid::text::numeric % 4294967296)::bigint - c.xmin::text::bigint + 4294967296)
            % 4294967296 BETWEEN 1 AND 2147483647 END, false) AS later,
    coalesce(CASE c.kind
        WHEN 'poll' THEN pg_visible_in_snapshot(o.xid, b.snapshot)
        ELSE c.flush_lsn >= pg_current_wal_insert_lsn() END, false) AS passed,
    pg_current_wal_insert_lsn()::text
FROM watership.outbox AS o
LEFT JOIN watership.checkpoint AS c ON c.name = $1
LEFT JOIN watership.poll_batch AS b ON b.name = c.name AND b.number = c.flush_mark
WHERE o.id = $2 OR o.aggregate_type || '/' || o.aggregate_id = $3
ORDER BY o.created_at DESC, o.seq DESC
LIMIT $4
