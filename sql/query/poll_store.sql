-- A new batch of relay $1, session $2: number $3, what $5 shows and $4 does not, with the lowest
-- seq $6, the range $7 to $8 of rows that began after $4, made at $9 in microseconds since 1970, of
-- the outbox $12, whose OID is $13, by its columns $14 (order) and $15 (transaction).
-- No row: another session has taken over. Batches from $10 on and before $11 are passed.
WITH passed AS (
    DELETE FROM watership.poll_batch WHERE name = $1 AND number >= $10 AND number < $11
)
INSERT INTO watership.poll_batch (name, number, since, snapshot, first_seq, new_first, new_last,
    made_at, outbox, outbox_oid, order_attnum, xid_attnum)
SELECT name, $3, $4::text::pg_snapshot, $5::text::pg_snapshot, $6, $7, $8,
    to_timestamp(0) + $9::bigint * interval '1 us', $12, $13, $14, $15
FROM watership.checkpoint
WHERE name = $1 AND session_no = $2
ON CONFLICT DO NOTHING
