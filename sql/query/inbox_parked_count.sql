-- How many messages are parked for the consumer $1, and the number of the newest of them.
SELECT count(*), coalesce(max(id), 0) FROM watership_inbox.parked_messages WHERE consumer = $1
