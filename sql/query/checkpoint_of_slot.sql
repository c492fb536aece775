-- Another relay than $2 whose checkpoint belongs to slot $1.
SELECT name FROM watership.checkpoint WHERE slot = $1 AND name <> $2
