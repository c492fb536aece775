-- The parked message $2 of the consumer $1.
SELECT key, reason, error, last_error, attempts, parked_at::text, occurred_at::text,
    jsonb_pretty(properties), body
FROM watership_inbox.parked_messages
WHERE consumer = $1 AND message_id = $2
