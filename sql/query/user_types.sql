-- Types that have OIDs of their own in this database, and those that initdb makes (domains of
-- information_schema, row types): base type of a domain, element type of an array, what stands
-- between elements in text, name of the send function, subtype of a range or multirange, and the
-- type modifier that a domain gives its base type. A type without a send function is sent as text.
SELECT t.oid, CASE WHEN t.typtype = 'd' THEN t.typbasetype END,
    CASE WHEN t.typoutput = 'pg_catalog.array_out'::regproc THEN nullif(t.typelem, 0) END,
    t.typdelim, coalesce(p.proname::text, ''), coalesce(r.rngsubtype, m.rngsubtype),
    t.typtypmod
FROM pg_catalog.pg_type AS t
LEFT JOIN pg_catalog.pg_proc AS p ON p.oid = t.typsend
LEFT JOIN pg_catalog.pg_range AS r ON r.rngtypid = t.oid
LEFT JOIN pg_catalog.pg_range AS m ON m.rngmultitypid = t.oid
WHERE t.typtype IN ('b', 'c', 'd', 'e', 'r', 'm') AND (t.oid >= 10000 OR t.typtype = 'c')
