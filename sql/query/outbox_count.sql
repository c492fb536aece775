-- How many rows the outbox has; counting stops at $1.
SELECT count(*) FROM (SELECT FROM watership.outbox LIMIT $1) AS rows
