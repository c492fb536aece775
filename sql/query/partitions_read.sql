-- The partitions in force of relay $1, by route.
SELECT route, queue, count FROM watership.partitions WHERE name = $1 ORDER BY route
