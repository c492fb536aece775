-- Rides on the checkpoint of relay $1, session $2, at epoch $3, mark $4, ordinal $5, sub $6, which
-- was written before in this transaction; if it was not, nothing is.
-- The last canary that came: $7, a JSON array with its number and where its transaction ended.
UPDATE watership.checkpoint
SET canary = ($7::text::json ->> 0)::bigint, canary_lsn = ($7::text::json ->> 1)::pg_lsn
WHERE name = $1 AND session_no = $2
  AND (epoch, mark, ordinal, sub) = ($3::bigint::integer, $4, $5, $6)
