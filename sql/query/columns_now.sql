-- The names and numbers of the columns of the tables with OIDs $1, and the snapshot that shows
-- them.
SELECT c.oid, a.names, a.numbers, pg_current_snapshot()::text
FROM unnest($1::oid[]) AS c (oid)
CROSS JOIN LATERAL (
    SELECT coalesce(array_agg(attname::text ORDER BY attnum), '{}') AS names,
        coalesce(array_agg(attnum ORDER BY attnum), '{}') AS numbers
    FROM pg_catalog.pg_attribute
    WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped
) AS a
