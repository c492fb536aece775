-- Forgets relay $1: its parked rows, its canary, its batches, and its checkpoint with what belongs
-- to it.
WITH parked AS (DELETE FROM watership.parked WHERE name = $1),
    canary AS (DELETE FROM watership.canary WHERE name = $1),
    batches AS (DELETE FROM watership.poll_batch WHERE name = $1)
DELETE FROM watership.checkpoint WHERE name = $1
