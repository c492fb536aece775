-- Parked keys of the consumer $1 (NULL: of all), at most $2: what each first message waits for.
SELECT consumer, key, message_id, reason, coalesce(last_error, error), attempts, waiting,
    extract(epoch FROM now() - parked_at)::double precision, retry_at IS NOT NULL
FROM watership_inbox.parked_keys
WHERE $1::text IS NULL OR consumer = $1
ORDER BY parked_at
LIMIT $2
