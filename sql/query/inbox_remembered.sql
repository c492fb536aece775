-- What the inbox remembers.
SELECT window_days, first_day::text, last_day::text,
    last_day - (now() AT TIME ZONE 'UTC')::date AS days_left,
    (SELECT count(*) FROM watership_inbox.parked_messages) AS parked,
    (SELECT coalesce(max(extract(epoch FROM now() - last_at)), 0)::double precision
        FROM watership_inbox.unfinished_attempts WHERE killed > 0) AS unfinished
FROM watership_inbox.remembered
