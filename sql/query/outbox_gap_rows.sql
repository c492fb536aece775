-- How many rows the outbox has that were made since $1, and the time now, in UTC, as text. Counting
-- stops at $2.
SELECT count(*), to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US"Z"')
FROM (SELECT FROM watership.outbox WHERE created_at >= $1::text::timestamptz LIMIT $2) AS rows
