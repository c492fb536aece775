-- The migrations that ran in this database.
SELECT version, name, checksum
FROM watership.migration
ORDER BY version
