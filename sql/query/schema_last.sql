-- Descriptions of the captured tables of relay $1: the change of each that was recorded last, and
-- what was agreed to, in the order of the stream.
SELECT table_name, epoch::bigint, mark, ordinal, sub, description
FROM (
    (SELECT DISTINCT ON (table_name) *
     FROM watership.schema_history
     WHERE name = $1 AND kind = 'changed'
     ORDER BY table_name, id DESC)
    UNION ALL
    (SELECT DISTINCT ON (table_name, mark) *
     FROM watership.schema_history
     WHERE name = $1 AND kind = 'agreed'
     ORDER BY table_name, mark, id DESC)
) AS h
ORDER BY table_name, mark
