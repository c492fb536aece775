-- What runs of relay $1 that have ended need no longer: a change that was on its way when its run
-- was cancelled can have come after that.
DELETE FROM watership.backfill_moved AS m USING watership.backfill AS b
WHERE b.run = m.run AND b.name = $1 AND b.state NOT IN ('requested', 'running', 'paused')
