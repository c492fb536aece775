-- Takes rows that were copied from another cluster for rows of transaction :by.
UPDATE :outbox SET :transaction = :by
WHERE :transaction >= pg_snapshot_xmax(pg_current_snapshot())
