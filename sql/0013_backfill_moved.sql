-- Watership 0013: rows that changed their key while a backfill ran.

SET ROLE watership_owner;

-- Changes that gave a row another key without carrying all of its values (unchanged TOAST) while a
-- run of the table was open. The run may be past the new key and may never reach the old one, so it
-- reads these rows again at its end.
CREATE TABLE watership.backfill_moved (
    run      uuid NOT NULL REFERENCES watership.backfill ON DELETE CASCADE,
    -- Of the change.
    position text NOT NULL,
    -- The new key: the text of each column by its name; null where it is not UTF-8.
    key      jsonb,
    PRIMARY KEY (run, position)
);

GRANT SELECT, INSERT, DELETE ON watership.backfill_moved TO watership_relay;

INSERT INTO watership.migration (version, name) VALUES (13, '0013_backfill_moved');

RESET ROLE;
