-- Takes rows that were copied from another cluster for rows that are passed.
UPDATE :outbox SET :transaction = '3'
WHERE :transaction >= pg_snapshot_xmax(pg_current_snapshot())
