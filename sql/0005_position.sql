-- Watership 0005: what the relay compares to be sure of its position: the publication as it was
-- when it was last agreed to, the canary, and the gaps that a person accepted.

SET ROLE watership_owner;

-- The publication and the tables in it as each relay last accepted them: oids, operations, row
-- filters, column lists. Apart from the checkpoint, whose row is rewritten ten times a second.
CREATE TABLE watership.publication_seen (
    name    text        PRIMARY KEY REFERENCES watership.checkpoint ON DELETE CASCADE,
    facts   jsonb       NOT NULL,
    seen_at timestamptz NOT NULL DEFAULT now()
);

-- How the stream described each captured table at the checkpoint: written with it. An older
-- description than today's catalog is read with the key that it had.
CREATE TABLE watership.described (
    name         text        NOT NULL REFERENCES watership.checkpoint ON DELETE CASCADE,
    relation     oid         NOT NULL,
    -- Hash of the description.
    version      bigint      NOT NULL,
    schema_name  text        NOT NULL,
    table_name   text        NOT NULL,
    -- Columns of the key; none where the table has none, or its key was not known.
    key          text[]      NOT NULL,
    described_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (name, relation)
);

-- One row per relay, in the publication: the relay raises the number every few seconds and expects
-- to see it in its stream. A stream that moves past a number without bringing it is deaf.
CREATE TABLE watership.canary (
    name       text        PRIMARY KEY,
    number     bigint      NOT NULL,
    -- Up to this one they may be missing: somebody accepted the gap.
    accepted   bigint      NOT NULL DEFAULT 0,
    written_at timestamptz NOT NULL
) WITH (fillfactor = 10);

-- Gaps that somebody accepted with `watership resync`. Never deleted by the relay.
CREATE TABLE watership.resync (
    id           bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name         text        NOT NULL,
    at           timestamptz NOT NULL DEFAULT now(),
    -- The database role, and the person that the command line names.
    role         text        NOT NULL DEFAULT session_user,
    who          text        NOT NULL,
    reason       text        NOT NULL,
    -- The verdicts that were accepted.
    verdicts     text[]      NOT NULL,
    -- What was committed between these two may not have been published.
    gap_from     pg_lsn      NOT NULL,
    gap_to       pg_lsn      NOT NULL,
    -- checkpoint, slot or now: where the stream began again.
    resumed_from text        NOT NULL,
    resumed_at   pg_lsn      NOT NULL,
    slot         text        NOT NULL,
    slot_created boolean     NOT NULL,
    timeline     integer     NOT NULL,
    epoch        integer     NOT NULL
);

GRANT SELECT, INSERT, UPDATE ON watership.publication_seen, watership.described, watership.canary
    TO watership_relay;
GRANT SELECT, INSERT ON watership.resync TO watership_relay;

INSERT INTO watership.migration (version, name) VALUES (5, '0005_position');

RESET ROLE;
