-- Lets all relays go on with the outbox $1 under the name $2, for the owner of the schema: of one
-- that kept the old name, the others would not know what it has not read.
UPDATE watership.poll_batch SET outbox = $2 WHERE outbox = $1
