-- Stores the checksum $2 of the migration $1, which registered itself without one.
UPDATE watership.migration SET checksum = $2 WHERE version = $1
