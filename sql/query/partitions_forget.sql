-- Route $2 of relay $1 has no partitions any more.
DELETE FROM watership.partitions WHERE name = $1 AND route = $2
