-- The batches of relay $1 from number $2 on.
SELECT number, since::text, snapshot::text, first_seq, new_first, new_last,
       (extract(epoch FROM made_at) * 1000000)::bigint, outbox,
       outbox_oid, order_attnum, xid_attnum
FROM watership.poll_batch
WHERE name = $1 AND number >= $2
ORDER BY number
