-- What relay $1 last accepted of its publication.
SELECT facts FROM watership.publication_seen WHERE name = $1
