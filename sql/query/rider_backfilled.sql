-- Rides on the checkpoint of relay $1, session $2, at epoch $3, mark $4, ordinal $5, sub $6, which
-- was written before in this transaction; if it was not, nothing is.
-- How far the runs of backfills are: $7, a JSON array. A run that was cancelled or that failed
-- meanwhile stays so. Its key may be a hidden one: a run that has ended needs none.
-- Rows that had moved and are sent now need not be read again.
WITH reread AS (
    DELETE FROM watership.backfill_moved AS m
    USING json_to_recordset($7::text::json) AS r (run uuid, reread text[], done boolean),
        watership.backfill AS b, watership.checkpoint AS mine
    WHERE m.run = r.run AND (r.done OR m.position = ANY (r.reread))
      AND b.run = r.run AND b.name = mine.name
      AND mine.name = $1 AND mine.session_no = $2
      AND (mine.epoch, mine.mark, mine.ordinal, mine.sub) = ($3::bigint::integer, $4, $5, $6)
)
UPDATE watership.backfill AS b
SET last_key = CASE WHEN NOT r.done AND b.state IN ('requested', 'running', 'paused')
        THEN coalesce(r.last_key, b.last_key) END,
    rows_read = r.rows, rows_left_out = r.left_out,
    state = CASE WHEN r.done AND b.state IN ('requested', 'running', 'paused') THEN 'done'
        ELSE b.state END,
    waits = CASE WHEN r.done THEN NULL ELSE b.waits END,
    ended_at = CASE WHEN r.done THEN coalesce(b.ended_at, now()) ELSE b.ended_at END,
    updated_at = now()
FROM json_to_recordset($7::text::json) AS r (run uuid, last_key text[], rows bigint,
    left_out bigint, done boolean),
    watership.checkpoint AS mine
WHERE b.run = r.run AND b.name = mine.name
  AND mine.name = $1 AND mine.session_no = $2
  AND (mine.epoch, mine.mark, mine.ordinal, mine.sub) = ($3::bigint::integer, $4, $5, $6)
