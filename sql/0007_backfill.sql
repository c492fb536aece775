-- Watership 0007: backfills: what is asked for, how far each one is, and why it waits.

SET ROLE watership_owner;

CREATE TABLE watership.backfill (
    run           uuid        NOT NULL DEFAULT gen_random_uuid() PRIMARY KEY,
    name          text        NOT NULL REFERENCES watership.checkpoint ON DELETE CASCADE,
    -- As source.tables has it.
    table_name    text        NOT NULL,
    -- Of the snapshot that is taken once for a table and a slot; null for one that was asked for.
    initial_slot  text,
    -- Which rows are wanted, as SQL; null for all.
    condition     text,
    -- The key at which it begins; null for the first one.
    first_key     text[],
    state         text        NOT NULL DEFAULT 'requested'
        CHECK (state IN ('requested', 'running', 'paused', 'done', 'failed', 'cancelled')),
    -- Why it does not go on now, and why it failed.
    waits         text,
    error         text,
    -- The table as it was when the run began; a run ends when that changes.
    relation      oid,
    version       bigint,
    -- The key of the last row that is settled, written with the checkpoint.
    last_key      text[],
    rows_read     bigint      NOT NULL DEFAULT 0,
    -- Rows that were read and not sent: a later change told everything of them, or they were not
    -- wanted.
    rows_left_out bigint      NOT NULL DEFAULT 0,
    -- How many rows the table had about; null when nobody knows.
    rows_total    bigint,
    requested_at  timestamptz NOT NULL DEFAULT now(),
    started_at    timestamptz,
    ended_at      timestamptz,
    updated_at    timestamptz NOT NULL DEFAULT now()
);

-- One at a time for a table; the snapshot of a slot once.
CREATE UNIQUE INDEX backfill_open ON watership.backfill (name, table_name)
    WHERE state IN ('requested', 'running', 'paused');
CREATE UNIQUE INDEX backfill_initial ON watership.backfill (name, table_name, initial_slot)
    WHERE initial_slot IS NOT NULL;

GRANT SELECT, INSERT, UPDATE, DELETE ON watership.backfill TO watership_relay;

INSERT INTO watership.migration (version, name) VALUES (7, '0007_backfill');

RESET ROLE;
