-- Asks relay $1 for a backfill of table $2, of the rows for which $3 holds, from key $4; $5 is the
-- slot whose snapshot it is. No row: that one was asked for before.
INSERT INTO watership.backfill (name, table_name, condition, first_key, initial_slot)
VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (name, table_name, initial_slot) WHERE initial_slot IS NOT NULL DO NOTHING
RETURNING run
