-- Whether somebody may be altering the table with OID $1. The lock is kept until the transaction is
-- visible to others, which comes after its place in the WAL.
SELECT EXISTS (
    SELECT FROM pg_catalog.pg_locks
    WHERE locktype = 'relation' AND relation = $1 AND granted AND mode = 'AccessExclusiveLock'
      AND database = (SELECT d.oid FROM pg_catalog.pg_database AS d
          WHERE d.datname = current_database())
)
