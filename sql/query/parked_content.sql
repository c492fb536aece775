-- What row $2 of relay $1 is made of.
SELECT event::text, routing_key, body, committed_at::text, parked_at::text
FROM watership.parked
WHERE name = $1 AND id = $2
