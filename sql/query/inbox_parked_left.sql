-- Parked keys of the consumer $1 whose first message came after the window (or from the future) and
-- that are not marked for retry: the key $2, or that of the message $3, or all ($4).
SELECT count(*)
FROM watership_inbox.parked_keys AS k
WHERE k.consumer = $1 AND k.retry_at IS NULL AND k.reason IN ('beyond_window', 'beyond_tomorrow')
    AND ($4 OR k.key = $2 OR EXISTS (SELECT FROM watership_inbox.parked_messages AS m
        WHERE m.consumer = $1 AND m.message_id = $3 AND m.key IS NOT DISTINCT FROM k.key))
