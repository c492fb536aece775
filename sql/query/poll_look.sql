-- What the outbox has that snapshot $1 does not show, and the time in microseconds since 1970.
SELECT l.snapshot::text, l.rows, l.first_seq, l.new_first, l.new_last,
       (extract(epoch FROM now()) * 1000000)::bigint
FROM watership.poll_look($1::text::pg_snapshot) AS l
