-- What a backfill has to know of the table with OID $1, as publication $2 sends it; no row when it
-- is gone. Columns in the order of the stream; of the key, which is the primary key or else the
-- index of the replica identity, also what its index compares by: a cast for the values, a
-- collation, and the operators <, =, >= and >.
SELECT n.nspname::text, c.relname::text, c.relkind = 'p', row_security_active(c.oid),
    has_table_privilege(c.oid, 'SELECT'), a.names, a.types, a.modifiers,
    k.names, k.casts, k.collations, k.less, k.equal, k.at_least, k.greater,
    pg_get_expr(r.prqual, r.prrelid),
    -- Whether its changes come under its name.
    r.oid IS NOT NULL OR coalesce(p.puballtables, false)
    OR EXISTS (SELECT FROM pg_catalog.pg_publication_namespace AS ps
        WHERE ps.pnpubid = p.oid AND ps.pnnspid = c.relnamespace)
    OR NOT p.pubviaroot AND EXISTS (SELECT FROM pg_catalog.pg_publication_rel AS pr
        WHERE pr.prpubid = p.oid
          AND pr.prrelid IN (SELECT relid FROM pg_catalog.pg_partition_ancestors(c.oid))),
    a.numbers
FROM pg_catalog.pg_class AS c
JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
LEFT JOIN pg_catalog.pg_publication AS p ON p.pubname = $2
LEFT JOIN pg_catalog.pg_publication_rel AS r ON r.prpubid = p.oid AND r.prrelid = c.oid
CROSS JOIN LATERAL (
    SELECT array_agg(a.attname::text ORDER BY a.attnum) AS names,
        array_agg(a.atttypid ORDER BY a.attnum) AS types,
        array_agg(a.atttypmod ORDER BY a.attnum) AS modifiers,
        array_agg(a.attnum ORDER BY a.attnum) AS numbers
    FROM pg_catalog.pg_attribute AS a
    WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
      AND CASE WHEN r.prattrs IS NOT NULL THEN a.attnum = ANY (r.prattrs::int2[])
          -- Postgres before 18 has no pubgencols.
          ELSE a.attgenerated = '' OR a.attgenerated = 's'
              AND coalesce(to_jsonb(p) ->> 'pubgencols', 'n') = 's' END
) AS a
LEFT JOIN LATERAL (
    SELECT i.* FROM pg_catalog.pg_index AS i
    WHERE i.indrelid = c.oid AND (i.indisprimary OR i.indisreplident) AND i.indisvalid
    ORDER BY i.indisprimary DESC LIMIT 1
) AS i ON true
CROSS JOIN LATERAL (
    SELECT array_agg(ka.attname::text ORDER BY ic.place) AS names,
        array_agg(CASE WHEN t.typtype = 'p' THEN format_type(ka.atttypid, -1)
            ELSE format_type(oc.opcintype, -1) END ORDER BY ic.place) AS casts,
        array_agg(CASE WHEN co.oid IS NOT NULL
            THEN format('COLLATE %I.%I', cn.nspname, co.collname) ELSE '' END ORDER BY ic.place)
            AS collations,
        array_agg(o.less ORDER BY ic.place) AS less,
        array_agg(o.equal ORDER BY ic.place) AS equal,
        array_agg(o.at_least ORDER BY ic.place) AS at_least,
        array_agg(o.greater ORDER BY ic.place) AS greater
    FROM unnest(i.indkey::int2[], i.indclass::oid[], i.indcollation::oid[])
        WITH ORDINALITY AS ic (attnum, opclass, sorted, place)
    JOIN pg_catalog.pg_attribute AS ka ON ka.attrelid = c.oid AND ka.attnum = ic.attnum
    JOIN pg_catalog.pg_opclass AS oc ON oc.oid = ic.opclass
    JOIN pg_catalog.pg_type AS t ON t.oid = oc.opcintype
    LEFT JOIN pg_catalog.pg_collation AS co ON co.oid = ic.sorted
    LEFT JOIN pg_catalog.pg_namespace AS cn ON cn.oid = co.collnamespace
    CROSS JOIN LATERAL (
        SELECT max(s.op) FILTER (WHERE am.amopstrategy = 1) AS less,
            max(s.op) FILTER (WHERE am.amopstrategy = 3) AS equal,
            max(s.op) FILTER (WHERE am.amopstrategy = 4) AS at_least,
            max(s.op) FILTER (WHERE am.amopstrategy = 5) AS greater
        FROM pg_catalog.pg_amop AS am
        JOIN pg_catalog.pg_operator AS op ON op.oid = am.amopopr
        JOIN pg_catalog.pg_namespace AS opn ON opn.oid = op.oprnamespace
        CROSS JOIN LATERAL (SELECT format('OPERATOR(%I.%s)', opn.nspname, op.oprname) AS op) AS s
        WHERE am.amopfamily = oc.opcfamily AND am.amoplefttype = oc.opcintype
          AND am.amoprighttype = oc.opcintype
    ) AS o
    WHERE ic.place <= i.indnkeyatts
) AS k
WHERE c.oid = $1 AND c.relkind IN ('r', 'p')
