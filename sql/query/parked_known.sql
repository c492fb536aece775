-- Rows of relay $1 in the transaction at $2 or later, of any state: a replay finds them done.
SELECT event_id, route, commit_lsn FROM watership.parked WHERE name = $1 AND commit_lsn >= $2
