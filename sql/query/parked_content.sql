-- What row $2 of relay $1 is made of; of event and body at most the first $3 characters and bytes.
SELECT left(event::text, $3), routing_key, substring(body FROM 1 FOR $3), committed_at::text,
       parked_at::text, coalesce(octet_length(event::text), octet_length(body))
FROM watership.parked
WHERE name = $1 AND id = $2
