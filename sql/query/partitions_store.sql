-- Route $2 of relay $1 publishes to $4 partitions of queue $3 from now on.
INSERT INTO watership.partitions (name, route, queue, count) VALUES ($1, $2, $3, $4)
ON CONFLICT (name, route) DO UPDATE
SET queue = excluded.queue, count = excluded.count, changed_at = now()
