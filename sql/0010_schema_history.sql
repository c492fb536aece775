-- Watership 0010: what routes are agreed with, how captured tables have changed since, and the
-- secret that keeps what is computed of hidden values from being guessed.

SET ROLE watership_owner;

-- One row. Lanes of masked keys, ids of events whose identity is masked, and hashes of columns are
-- keyed with it. If it is lost, all of these are others from then on, and order per key is kept
-- only from then on.
CREATE TABLE watership.secret (
    only_one boolean PRIMARY KEY DEFAULT true CHECK (only_one),
    -- 244 random bits: Postgres has no other source of strong ones without an extension.
    value    bytea   NOT NULL DEFAULT decode(
        replace(gen_random_uuid()::text || gen_random_uuid()::text, '-', ''), 'hex')
);
INSERT INTO watership.secret DEFAULT VALUES;

-- Never deleted by the relay. The last row of kind `agreed` of a route and table is in force.
CREATE TABLE watership.schema_history (
    id          bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name        text        NOT NULL REFERENCES watership.checkpoint ON DELETE CASCADE,
    -- changed: the stream described the table otherwise; written with the checkpoint that covers
    -- it. agreed: from here on the route sends the columns of this description.
    kind        text        NOT NULL CHECK (kind IN ('changed', 'agreed')),
    -- As the configuration names it; what it was called then is in the description.
    table_name  text        NOT NULL,
    relation    oid         NOT NULL,
    route       text,
    -- changed: where in the stream; see watership.checkpoint. agreed: where the WAL ended, and
    -- descriptions from before that are agreed to as well.
    epoch       integer,
    mark        bigint      NOT NULL,
    ordinal     bigint,
    sub         bigint,
    -- Names, types, key and replica identity.
    description jsonb       NOT NULL,
    -- changed: what is different, in words.
    changes     text[]      NOT NULL DEFAULT '{}',
    -- changed: routes that promised what is gone.
    broken      text[]      NOT NULL DEFAULT '{}',
    recorded_at timestamptz NOT NULL DEFAULT now(),
    recorded_by text        NOT NULL DEFAULT session_user,
    CHECK ((kind = 'agreed') = (route IS NOT NULL)),
    CHECK ((kind = 'agreed') = (ordinal IS NULL))
);
CREATE INDEX schema_history_of_table ON watership.schema_history (name, table_name, id);

-- A parked row says which rules hid values in it, and whether the hashes of its lanes are keyed.
ALTER TABLE watership.parked ADD rules text, ADD lanes_keyed boolean NOT NULL DEFAULT false;

GRANT SELECT ON watership.secret TO watership_relay;
GRANT SELECT, INSERT ON watership.schema_history TO watership_relay;

INSERT INTO watership.migration (version, name) VALUES (10, '0010_schema_history');

RESET ROLE;
