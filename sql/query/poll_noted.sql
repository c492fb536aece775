-- Relay $1, session $2, has looked at the outbox now and found nothing.
UPDATE watership.checkpoint SET polled_at = now() WHERE name = $1 AND session_no = $2
