-- Of relay $1: the last canary that came before its checkpoint, and the number up to which
-- canaries may be missing.
SELECT mine.canary, c.accepted
FROM watership.checkpoint AS mine LEFT JOIN watership.canary AS c USING (name)
WHERE mine.name = $1
