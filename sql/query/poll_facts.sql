-- What relay $2, which polls from snapshot $1, needs to know of the database: whether the snapshot
-- is of its future, and for how many seconds rows may have gone unread: since the last look, or
-- since the oldest batch that is not settled was found.
SELECT coalesce(pg_snapshot_xmax($1::text::pg_snapshot)
        > pg_snapshot_xmax(pg_current_snapshot()), false),
    (SELECT extract(epoch FROM now() - least(greatest(max(c.polled_at), max(b.made_at)),
            min(b.made_at) FILTER (WHERE b.number > c.flush_mark)))::bigint
        FROM watership.checkpoint AS c
        JOIN watership.poll_batch AS b ON b.name = c.name AND b.number >= c.flush_mark
        WHERE c.name = $2)
