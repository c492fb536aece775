-- One bounded piece of partition work; rows older than $1 seconds are retired.
SELECT created, skipped, postponed, detached, dropped, more
FROM watership.maintain(make_interval(secs => $1::bigint::double precision))
