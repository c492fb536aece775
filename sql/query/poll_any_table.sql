-- For the owner of the schema: lets relay :relay continue with another table of the same name that
-- has the same rows, numbers and transactions, as after a restore in the same cluster.
UPDATE watership.poll_batch SET outbox_oid = NULL, order_attnum = NULL, xid_attnum = NULL
WHERE name = :relay
