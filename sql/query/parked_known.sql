-- Rows of relay $1 in the transaction at mark $2 or later, of any state: a replay finds them done.
SELECT event_id, route, part::bigint, mark FROM watership.parked WHERE name = $1 AND mark >= $2
