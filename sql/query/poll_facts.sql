-- What a relay that polls from snapshot $1 needs to know of the database: whether the snapshot is
-- of its future, and the first two columns of each valid index on the outbox.
SELECT coalesce(pg_snapshot_xmax($1::text::pg_snapshot)
           > pg_snapshot_xmax(pg_current_snapshot()), false),
       ARRAY(SELECT pg_get_indexdef(i.indexrelid, 1, true) || coalesce(', '
               || nullif(pg_get_indexdef(i.indexrelid, 2, true), ''), '')
           FROM pg_catalog.pg_index AS i
           WHERE i.indrelid = 'watership.outbox'::regclass AND i.indisvalid
               AND i.indpred IS NULL)::text[]
