-- Gives up, for the reason $2, the next 1000 parked messages of the consumer $1 whose number is at
-- most $3: how many there were, and how many were given up. Not all at once, because each key is
-- locked until the end of the transaction.
SELECT count(*),
    coalesce(sum(watership_inbox.discard($1, $2, NULL, m.message_id)), 0)::bigint AS discarded
FROM (
    SELECT message_id FROM watership_inbox.parked_messages
    WHERE consumer = $1 AND id <= $3 ORDER BY id LIMIT 1000
) AS m
