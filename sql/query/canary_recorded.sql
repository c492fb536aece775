-- Of relay $1: the last canary that came before its checkpoint, where its transaction ended, and
-- the number up to which canaries may be missing.
SELECT mine.canary, mine.canary_lsn, c.accepted
FROM watership.checkpoint AS mine LEFT JOIN watership.canary AS c USING (name)
WHERE mine.name = $1
