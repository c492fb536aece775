-- Rides on the checkpoint of relay $1, session $2, at epoch $3, mark $4, ordinal $5, sub $6, which
-- was written before in this transaction; if it was not, nothing is.
-- What became of parked rows that are there: $7, a JSON array. The first reason stays beside that
-- of the last retry; that it follows another row was none.
UPDATE watership.parked AS p
SET state = c.state,
    kind = CASE p.kind WHEN 'follows' THEN coalesce(c.kind, p.kind) ELSE p.kind END,
    error = CASE p.kind WHEN 'follows' THEN coalesce(c.error, p.error) ELSE p.error END,
    last_kind = coalesce(c.kind, p.last_kind), last_error = coalesce(c.error, p.last_error),
    attempts = p.attempts + (c.kind IS NOT NULL)::integer, changed_at = now(),
    changed_by = 'relay'
FROM json_to_recordset($7::text::json) AS c (epoch integer, mark bigint, ordinal bigint,
    sub bigint, route text, part integer, state text, kind text, error text),
    watership.checkpoint AS mine
WHERE mine.name = $1 AND mine.session_no = $2
  AND (mine.epoch, mine.mark, mine.ordinal, mine.sub) = ($3::bigint::integer, $4, $5, $6)
  AND p.name = mine.name AND p.state IN ('parked', 'retrying')
  AND (p.epoch, p.mark, p.ordinal, p.sub, p.route, p.part)
    = (c.epoch, c.mark, c.ordinal, c.sub, c.route, c.part)
