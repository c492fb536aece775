-- What the server makes of each text in $1 as a value of the type in $2 with the modifier in $3, as
-- the output function of the type writes it. Null where that is not asked: the type is made of
-- others (domains, row types, ranges of users) whose owners can have functions run for it.
--
-- array_in finds the input function by the OID of the type. So no name is looked up, no right on
-- the type is needed, and neither casts nor the checks of domains run: only functions in C, which
-- superusers alone can make.
SELECT CASE WHEN one.typtype = 'e' OR (one.typtype IN ('r', 'm') AND one.oid < 16384)
        OR (one.typtype = 'b' AND NOT EXISTS (
            SELECT FROM pg_catalog.pg_proc AS p
            JOIN pg_catalog.pg_language AS l ON l.oid = p.prolang
            WHERE p.oid IN (one.typinput, one.typoutput) AND l.lanname NOT IN ('internal', 'c')))
    THEN pg_catalog.array_to_string(pg_catalog.array_in(pg_catalog.textout(
        '{"' || pg_catalog.regexp_replace(wanted.text, '(["\\])', '\\\1', 'g') || '"}'
    ), wanted.type, wanted.modifier), '') END
FROM unnest($1::text[], $2::oid[], $3::int4[]) WITH ORDINALITY
    AS wanted (text, type, modifier, place)
LEFT JOIN pg_catalog.pg_type AS t ON t.oid = wanted.type
LEFT JOIN pg_catalog.pg_type AS one
    ON one.oid = CASE t.typinput WHEN 'pg_catalog.array_in'::regproc THEN t.typelem ELSE t.oid END
ORDER BY wanted.place
