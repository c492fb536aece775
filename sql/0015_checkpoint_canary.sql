-- Watership 0015: the checkpoint has the number of the last canary that came before it.
--
-- A relay that finds a gap between two canaries stops; one that is started afterwards may begin
-- past the first of them, and would not know that any are missing.

SET ROLE watership_owner;

ALTER TABLE watership.checkpoint
    ADD COLUMN canary bigint,
    -- Where its transaction ended.
    ADD COLUMN canary_lsn pg_lsn,
    -- The session that keeps them: one of an older version does not, and they count no more.
    ADD COLUMN canary_session bigint;
GRANT UPDATE (canary, canary_lsn, canary_session) ON watership.checkpoint TO watership_relay;

INSERT INTO watership.migration (version, name) VALUES (15, '0015_checkpoint_canary');

RESET ROLE;
