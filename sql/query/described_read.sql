-- How the tables of relay $1 were described at its checkpoint.
SELECT relation, version, key FROM watership.described WHERE name = $1
