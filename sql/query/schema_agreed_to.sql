-- The last agreement of relay $1; 0 without any.
SELECT coalesce(max(id), 0) FROM watership.schema_history WHERE name = $1 AND kind = 'agreed'
