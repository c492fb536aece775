-- Lets relay $1 go on with its outbox under the name $2, for the owner of the schema.
UPDATE watership.poll_batch SET outbox = $2 WHERE name = $1
