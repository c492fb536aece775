-- Rides on the checkpoint of relay $1, session $2, at epoch $3, mark $4, ordinal $5, sub $6, which
-- was written before in this transaction; if it was not, nothing is.
-- Captured tables that are described differently than before: $7, a JSON array.
INSERT INTO watership.schema_history (name, kind, table_name, relation, epoch, mark, ordinal, sub,
    description, changes, broken)
SELECT mine.name, 'changed', r.table_name, r.relation, r.epoch, r.mark, r.ordinal, r.sub,
    r.description, r.changes, r.broken
FROM json_to_recordset($7::text::json) AS r (table_name text, relation oid, epoch integer,
    mark bigint, ordinal bigint, sub bigint, description jsonb, changes text[], broken text[]),
    watership.checkpoint AS mine
WHERE mine.name = $1 AND mine.session_no = $2
  AND (mine.epoch, mine.mark, mine.ordinal, mine.sub) = ($3::bigint::integer, $4, $5, $6)
