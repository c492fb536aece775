-- What relay $2, which polls from snapshot $1, needs to know of the database: whether the snapshot
-- is of its future, and how many seconds ago the checkpoint was stored, and the oldest batch found
-- that is not settled.
SELECT coalesce(pg_snapshot_xmax($1::text::pg_snapshot)
        > pg_snapshot_xmax(pg_current_snapshot()), false),
    (SELECT extract(epoch FROM now() - updated_at)::bigint
        FROM watership.checkpoint WHERE name = $2),
    (SELECT extract(epoch FROM now() - min(b.made_at))::bigint
        FROM watership.checkpoint AS c
        JOIN watership.poll_batch AS b ON b.name = c.name AND b.number > c.flush_mark
        WHERE c.name = $2)
