-- The columns of table $1 as the stream describes them: those of the column list $2 (null: all),
-- and generated ones only if $3 says that they are published.
SELECT attname::text, atttypid, atttypmod, attnum
FROM pg_catalog.pg_attribute
WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped AND (attgenerated = '' OR $3)
  AND (attname::text = ANY ($2) OR $2 IS NULL)
ORDER BY attnum
