-- The columns of table $1 as the stream describes them: those of the column list $2; without one
-- (null) all, generated ones only if they are stored and $3 says that they are published. With the
-- name of a type that its own is made of (as a domain, an array, a range or a row type), and of
-- which the binary form is only the number of a thing in the catalog: regclass and the like. Then
-- the type as it is written; and of the type under all domains over it the OID, the category and
-- the modifier that its values have.
WITH RECURSIVE part (attnum, type) AS (
    SELECT attnum, atttypid FROM pg_catalog.pg_attribute
    WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped
    UNION
    SELECT part.attnum, inner_part.type
    FROM part JOIN pg_catalog.pg_type AS t ON t.oid = part.type
    CROSS JOIN LATERAL (
        SELECT t.typbasetype WHERE t.typtype = 'd'
        UNION ALL
        SELECT t.typelem WHERE t.typoutput = 'pg_catalog.array_out'::regproc
        UNION ALL
        SELECT r.rngsubtype FROM pg_catalog.pg_range AS r
        WHERE r.rngtypid = t.oid OR r.rngmultitypid = t.oid
        UNION ALL
        SELECT f.atttypid FROM pg_catalog.pg_attribute AS f
        WHERE t.typtype = 'c' AND f.attrelid = t.typrelid AND f.attnum > 0
          AND NOT f.attisdropped
    ) AS inner_part (type)
)
SELECT attname::text, atttypid, atttypmod, attnum, (
    SELECT t.typname::text FROM part JOIN pg_catalog.pg_type AS t ON t.oid = part.type
    WHERE part.attnum = a.attnum AND t.oid < 10000 AND t.typtype = 'b' AND t.typname LIKE 'reg%'
    ORDER BY t.oid LIMIT 1),
    pg_catalog.format_type(atttypid, atttypmod), base.oid, base.typcategory, base.modifier
FROM pg_catalog.pg_attribute AS a
CROSS JOIN LATERAL (
    WITH RECURSIVE under (oid, typtype, typbasetype, typcategory, typtypmod, modifier) AS (
        SELECT oid, typtype, typbasetype, typcategory, typtypmod, a.atttypmod
        FROM pg_catalog.pg_type WHERE pg_type.oid = a.atttypid
        UNION ALL
        SELECT t.oid, t.typtype, t.typbasetype, t.typcategory, t.typtypmod, under.typtypmod
        FROM under JOIN pg_catalog.pg_type AS t ON t.oid = under.typbasetype
        WHERE under.typtype = 'd'
    )
    SELECT oid, typcategory, modifier FROM under WHERE typtype <> 'd'
) AS base
WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped
  AND CASE WHEN $2::text[] IS NOT NULL THEN attname::text = ANY ($2)
      ELSE attgenerated = '' OR (attgenerated = 's' AND $3) END
ORDER BY attnum
