-- The description of each captured table of relay $1 that was recorded last.
SELECT DISTINCT ON (table_name) table_name, description
FROM watership.schema_history
WHERE name = $1
ORDER BY table_name, id DESC
