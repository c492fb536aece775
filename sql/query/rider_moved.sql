-- Rides on the checkpoint of relay $1, session $2, at epoch $3, mark $4, ordinal $5, sub $6, which
-- was written before in this transaction; if it was not, nothing is.
-- Rows that have another key, of which the change does not carry all: $7, a JSON array.
INSERT INTO watership.backfill_moved (run, position, key)
SELECT b.run, r.position, r.key
FROM json_to_recordset($7::text::json) AS r (relation oid, position text, key jsonb),
    watership.backfill AS b, watership.checkpoint AS mine
WHERE b.relation = r.relation AND b.name = mine.name
  AND b.state IN ('requested', 'running', 'paused')
  AND mine.name = $1 AND mine.session_no = $2
  AND (mine.epoch, mine.mark, mine.ordinal, mine.sub) = ($3::bigint::integer, $4, $5, $6)
ON CONFLICT DO NOTHING
