-- Rides on the checkpoint of relay $1, session $2, at epoch $3, mark $4, ordinal $5, sub $6, which
-- was written before in this transaction; if it was not, nothing is.
-- How captured tables are described from this position on: $7, a JSON array.
INSERT INTO watership.described (name, relation, version, schema_name, table_name, key)
SELECT mine.name, r.relation, r.version, r.schema_name, r.table_name, r.key
FROM json_to_recordset($7::text::json) AS r (relation oid, version bigint, schema_name text,
    table_name text, key text[]),
    watership.checkpoint AS mine
WHERE mine.name = $1 AND mine.session_no = $2
  AND (mine.epoch, mine.mark, mine.ordinal, mine.sub) = ($3::bigint::integer, $4, $5, $6)
ON CONFLICT (name, relation) DO UPDATE
SET version = excluded.version, schema_name = excluded.schema_name,
    table_name = excluded.table_name, key = excluded.key, described_at = now()
