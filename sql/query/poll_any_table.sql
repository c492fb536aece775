-- Lets relay :relay go on with another table of the same name, for the owner of the schema: one
-- with the same rows, numbers and transactions, as after a restore in the same cluster.
UPDATE watership.poll_batch SET outbox_oid = NULL, order_attnum = NULL, xid_attnum = NULL
WHERE name = :relay
