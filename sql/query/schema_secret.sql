-- The secret of the database.
SELECT value FROM watership.secret
