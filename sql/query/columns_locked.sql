-- Whether a transaction may be altering the table with OID $1. It keeps its lock until it is
-- visible to others, which is later than its commit in the WAL.
SELECT EXISTS (
    SELECT FROM pg_catalog.pg_locks
    WHERE locktype = 'relation' AND relation = $1 AND granted AND mode = 'AccessExclusiveLock'
      AND database = (SELECT d.oid FROM pg_catalog.pg_database AS d
          WHERE d.datname = current_database())
)
