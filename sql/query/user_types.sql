-- Types that have OIDs of their own in this database: base type of a domain, name of the send
-- function, and subtype of a range or multirange. Row types have no renderer, but are known. A type
-- without a send function is sent as text.
SELECT t.oid, nullif(t.typbasetype, 0), coalesce(p.proname::text, ''),
    coalesce(r.rngsubtype, m.rngsubtype)
FROM pg_catalog.pg_type AS t
LEFT JOIN pg_catalog.pg_proc AS p ON p.oid = t.typsend
LEFT JOIN pg_catalog.pg_range AS r ON r.rngtypid = t.oid
LEFT JOIN pg_catalog.pg_range AS m ON m.rngmultitypid = t.oid
WHERE t.oid >= 16384 AND t.typtype IN ('b', 'c', 'd', 'e', 'r', 'm')
