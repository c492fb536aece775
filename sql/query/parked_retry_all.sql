-- Marks rows of relay $1 to be tried again: all, or those of route $2. Lanes belong to one route,
-- so whole lanes are marked.
UPDATE watership.parked
SET state = 'retrying', changed_at = now(), changed_by = session_user
WHERE name = $1 AND state = 'parked' AND route = coalesce($2, route)
RETURNING id
