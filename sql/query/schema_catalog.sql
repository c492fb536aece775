-- The columns of table $1 as the stream describes them: those of the column list $2; without one
-- (null) all, generated ones only if they are stored and $3 says that they are published.
SELECT attname::text, atttypid, atttypmod, attnum
FROM pg_catalog.pg_attribute
WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped
  AND CASE WHEN $2::text[] IS NOT NULL THEN attname::text = ANY ($2)
      ELSE attgenerated = '' OR (attgenerated = 's' AND $3) END
ORDER BY attnum
