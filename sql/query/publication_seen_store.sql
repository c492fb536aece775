-- Relay $1 accepts its publication as it is now, $2.
INSERT INTO watership.publication_seen (name, facts) VALUES ($1, $2)
ON CONFLICT (name) DO UPDATE SET facts = excluded.facts, seen_at = now()
