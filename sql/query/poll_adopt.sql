-- Takes rows that were copied from another cluster for rows that are passed.
UPDATE watership.outbox SET xid = '3'
WHERE xid >= pg_snapshot_xmax(pg_current_snapshot())
