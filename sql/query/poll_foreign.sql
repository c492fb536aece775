-- Whether the outbox has rows of transactions that this cluster has not had yet.
SELECT EXISTS (
    SELECT FROM :outbox WHERE :transaction >= pg_snapshot_xmax(pg_current_snapshot()))
