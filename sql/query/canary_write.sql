-- Raises the canary of relay $1. Returns its number.
INSERT INTO watership.canary AS c (name, number, written_at)
VALUES ($1, 1, now())
ON CONFLICT (name) DO UPDATE SET number = c.number + 1, written_at = excluded.written_at
RETURNING number
