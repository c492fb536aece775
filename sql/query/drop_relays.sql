-- The relays that have a checkpoint, with their slots and publications.
SELECT name, slot, publication FROM watership.checkpoint ORDER BY name
