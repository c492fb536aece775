-- What the routes of relay $1 are agreed with.
SELECT DISTINCT ON (route, table_name) route, table_name, mark, description, id
FROM watership.schema_history
WHERE name = $1 AND kind = 'agreed'
ORDER BY route, table_name, id DESC
