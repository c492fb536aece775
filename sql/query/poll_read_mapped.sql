-- As poll_read.sql, of an outbox table that is the application's; `source/outbox` fills in the
-- names, and `source/poll` the columns and the settings. Rows of one place are told apart by the
-- text of their id. A portion ends by the sizes that are known without unpacking a value. The types
-- of the columns come along: another than before would be read as what it is not.
SELECT k.place, k.tie, k.xid, k.bytes, :too_large, :types, :texts
FROM (
    SELECT f.*,
        sum(f.bytes) OVER (ORDER BY f.place, f.tie ROWS UNBOUNDED PRECEDING) - f.bytes AS before
    FROM (
        (SELECT :columns FROM :outbox AS o
        WHERE o.:order >= greatest($5::bigint, $3::bigint) AND o.:order <= $4::bigint
            AND (o.:order > $5::bigint OR :tie > $6::text)
            AND o.:transaction >= pg_snapshot_xmax($1::text::pg_snapshot)
            AND o.:transaction < pg_snapshot_xmax($2::text::pg_snapshot)
            AND pg_visible_in_snapshot(o.:transaction, $2::text::pg_snapshot)
        ORDER BY o.:order, :tie LIMIT $7::bigint)
        UNION ALL
        (SELECT l.* FROM unnest(watership.poll_late(
            $1::text::pg_snapshot, $2::text::pg_snapshot)) AS late (xid)
        CROSS JOIN LATERAL (
            SELECT :columns FROM :outbox AS o
            WHERE o.:transaction = late.xid AND o.:order >= $5::bigint
                AND (o.:order > $5::bigint OR :tie > $6::text)
            ORDER BY o.:order, :tie LIMIT $7::bigint) AS l
        ORDER BY l.place, l.tie LIMIT $7::bigint)
        ORDER BY place, tie LIMIT $7::bigint
    ) AS f
) AS k
WHERE k.before < $8::bigint
ORDER BY k.place, k.tie
