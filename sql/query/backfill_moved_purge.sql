-- Deletes what ended runs of relay $1 no longer need: a change that was under way when its run was
-- cancelled may have been recorded after that.
DELETE FROM watership.backfill_moved AS m USING watership.backfill AS b
WHERE b.run = m.run AND b.name = $1 AND b.state NOT IN ('requested', 'running', 'paused')
