-- Lets all relays go on with the outbox :old under the name :new, for the owner of the schema: of
-- one that kept the old name, the others would not know what it has not read.
UPDATE watership.poll_batch SET outbox = :new WHERE outbox = :old
