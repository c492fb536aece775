-- Watership inbox 0001: roles, schema, and the tables that remember which messages were handled.
--
-- For a consumer's own database. Run by `watership inbox install`, or by hand, in order, each file
-- in one transaction:
--     psql --single-transaction -v ON_ERROR_STOP=1 -f sql/inbox/0001_schema.sql
-- The user needs CREATEROLE (or superuser) and CREATE on the database. Each file registers itself
-- in watership_inbox.migration. Then give the role to your consumer's user:
--     GRANT watership_consumer TO billing;
--
-- The schema needs nothing of the outbox, and may stand beside it in one database.

-- Roles belong to the cluster: another database may have made them, perhaps at this very moment.
DO $$
DECLARE
    role_name text;
BEGIN
    FOREACH role_name IN ARRAY ARRAY['watership_inbox_owner', 'watership_consumer'] LOOP
        IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = role_name) THEN
            BEGIN
                EXECUTE format('CREATE ROLE %I NOLOGIN', role_name);
            EXCEPTION WHEN duplicate_object OR unique_violation THEN
                NULL;
            END;
        END IF;
    END LOOP;
    -- To make objects for the owner, a user other than a superuser must be its member. Where the
    -- grant is refused the user may be a member already; if not, CREATE SCHEMA below says so.
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = current_user AND rolsuper) THEN
        BEGIN
            EXECUTE format('GRANT watership_inbox_owner TO %I', current_user);
        EXCEPTION WHEN insufficient_privilege THEN
            NULL;
        END;
    END IF;
END
$$;

CREATE SCHEMA watership_inbox AUTHORIZATION watership_inbox_owner;

SET ROLE watership_inbox_owner;

-- What ran here. `checksum` is the SHA-256 of the file, written by `watership inbox install`; it is
-- NULL for a file that was run by hand.
CREATE TABLE watership_inbox.migration (
    version    integer     PRIMARY KEY,
    name       text        NOT NULL,
    checksum   text,
    applied_at timestamptz NOT NULL DEFAULT now()
);

-- A name per handler: two services, or two handlers of one service, each handle a message once.
CREATE TABLE watership_inbox.consumer (
    id   integer PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    name text    NOT NULL UNIQUE CHECK (octet_length(name) BETWEEN 1 AND 255)
);

-- Messages with a time of their own: a ring of 40 slots, one for each UTC day of that time.
--
-- Invariant: a slot holds claims of one day only. Days before `first_day` are refused (the window
-- has passed them), days from `emptied_before` + 40 on have no slot yet. `first_day` is stored, and
-- never computed from now() inside a claim, so that every claim of a moment agrees on it.
CREATE TABLE watership_inbox.ring (
    one            boolean PRIMARY KEY DEFAULT true CHECK (one),
    -- How long a message is remembered, in days after its own. At most 35: the ring also needs
    -- today, tomorrow, a slot being emptied, and some in reserve for when nobody calls maintain.
    window_days    integer NOT NULL DEFAULT 7 CHECK (window_days BETWEEN 1 AND 35),
    first_day      date    NOT NULL,
    emptied_before date    NOT NULL CHECK (emptied_before <= first_day),
    -- The transaction that moved first_day. A slot is emptied only when nobody can still have the
    -- value from before, because TRUNCATE empties it for old snapshots too.
    moved_by       xid8    NOT NULL,
    -- When first_day passed a day with claims by the clock alone.
    passed_at      timestamptz NOT NULL DEFAULT '-infinity'
);
INSERT INTO watership_inbox.ring (first_day, emptied_before, moved_by)
SELECT day, day, pg_current_xact_id() FROM (SELECT (now() AT TIME ZONE 'UTC')::date - 7) AS d (day);

-- A row: this message was handled, or parked, by this consumer.
CREATE TABLE watership_inbox.claimed (
    claimed_at timestamptz NOT NULL DEFAULT now(),
    day        date        NOT NULL,
    consumer   integer     NOT NULL,
    slot       smallint    NOT NULL,
    message_id text        NOT NULL,
    body_hash  bytea,
    PRIMARY KEY (message_id, consumer, slot)
) PARTITION BY LIST (slot);

-- A message of `claimed` that came again, for operators: how often, and how late.
CREATE TABLE watership_inbox.duplicate (
    claimed_at timestamptz NOT NULL,
    first_at   timestamptz NOT NULL DEFAULT now(),
    last_at    timestamptz NOT NULL DEFAULT now(),
    day        date        NOT NULL,
    consumer   integer     NOT NULL,
    times      integer     NOT NULL DEFAULT 1,
    slot       smallint    NOT NULL,
    message_id text        NOT NULL,
    PRIMARY KEY (message_id, consumer, slot)
) PARTITION BY LIST (slot);

-- Messages without a time of their own: four generations of claims, of which three are live. A new
-- one begins every half window, so a message is remembered for one window at least.
--
-- Invariant: a claim looks into every live generation, and while `opening` it also writes into the
-- next one. So two claims of one message always meet in one table, whichever state each has read.
CREATE TABLE watership_inbox.generation (
    one            boolean     PRIMARY KEY DEFAULT true CHECK (one),
    current        bigint      NOT NULL,
    opened_at      timestamptz NOT NULL DEFAULT now(),
    opening        boolean     NOT NULL DEFAULT false,
    -- Generations before this one are empty.
    emptied_before bigint      NOT NULL,
    -- The transaction that made the last change.
    changed_by     xid8        NOT NULL,
    -- While opening: every transaction before this one must have ended. NULL until it is known.
    horizon        xid8
);
INSERT INTO watership_inbox.generation (current, emptied_before, changed_by)
VALUES (10, 8, pg_current_xact_id());

CREATE TABLE watership_inbox.claimed_in_generation (
    claimed_at timestamptz NOT NULL DEFAULT now(),
    consumer   integer     NOT NULL,
    slot       smallint    NOT NULL,
    message_id text        NOT NULL,
    body_hash  bytea,
    PRIMARY KEY (message_id, consumer, slot)
) PARTITION BY LIST (slot);

DO $$
DECLARE
    kept CONSTANT text[] := ARRAY['claimed', 'duplicate'];
    kept_table text;
BEGIN
    FOREACH kept_table IN ARRAY kept LOOP
        FOR slot IN 0..39 LOOP
            EXECUTE format('CREATE TABLE watership_inbox.%I PARTITION OF watership_inbox.%I '
                'FOR VALUES IN (%s)', kept_table || '_' || slot, kept_table, slot);
        END LOOP;
    END LOOP;
    FOR slot IN 0..3 LOOP
        EXECUTE format('CREATE TABLE watership_inbox.%I '
            'PARTITION OF watership_inbox.claimed_in_generation FOR VALUES IN (%s)',
            'claimed_in_generation_' || slot, slot);
    END LOOP;
END
$$;

-- The same id with another body: somebody gave an id twice. The first one was handled.
CREATE TABLE watership_inbox.body_mismatch (
    consumer   integer     NOT NULL,
    message_id text        NOT NULL,
    day        date,
    first_hash bytea       NOT NULL,
    other_hash bytea       NOT NULL,
    times      integer     NOT NULL DEFAULT 1,
    first_at   timestamptz NOT NULL DEFAULT now(),
    last_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer, message_id)
);

-- Attempts at messages that came back or failed. `started` without `failed` is a process that died.
CREATE TABLE watership_inbox.attempt (
    consumer   integer     NOT NULL,
    message_id text        NOT NULL,
    started    integer     NOT NULL,
    failed     integer     NOT NULL,
    first_at   timestamptz NOT NULL DEFAULT now(),
    last_at    timestamptz NOT NULL DEFAULT now(),
    last_error text,
    PRIMARY KEY (consumer, message_id)
);
CREATE INDEX attempt_by_age ON watership_inbox.attempt (last_at);

-- A key with parked messages: later messages of it are parked behind them, so its order is kept.
-- `lane` is 'k' and the key, or 'h' and the hash of a long one; or, for a message without a key,
-- 'm' and its id.
CREATE TABLE watership_inbox.parked_key (
    consumer      integer     NOT NULL,
    lane          text        NOT NULL,
    -- Set: the helper handles its messages in order, and the key is live again after the last.
    retry_at      timestamptz,
    -- A retry may handle messages that came after the window.
    beyond_window boolean     NOT NULL DEFAULT false,
    parked_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer, lane)
);
CREATE INDEX parked_key_retry ON watership_inbox.parked_key (consumer, retry_at)
    WHERE retry_at IS NOT NULL;

-- Parked messages, in the order of their key.
CREATE TABLE watership_inbox.parked (
    id          bigint      PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    consumer    integer     NOT NULL,
    lane        text        NOT NULL,
    key         text,
    message_id  text        NOT NULL,
    occurred_at timestamptz,
    -- False: it came after the window (or from the future), so nobody knows whether it was handled.
    recorded    boolean     NOT NULL,
    reason      text        NOT NULL,
    error       text,
    attempts    integer     NOT NULL DEFAULT 0,
    last_error  text,
    parked_at   timestamptz NOT NULL DEFAULT now(),
    tried_at    timestamptz,
    properties  jsonb       NOT NULL,
    body        bytea       NOT NULL,
    UNIQUE (consumer, message_id)
);
CREATE INDEX parked_in_order ON watership_inbox.parked (consumer, lane, id);

-- Parked messages that a person gave up, and why.
CREATE TABLE watership_inbox.discarded (
    id           bigint      PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    consumer     integer     NOT NULL,
    key          text,
    message_id   text        NOT NULL,
    occurred_at  timestamptz,
    parked_for   text        NOT NULL,
    reason       text        NOT NULL,
    discarded_by text        NOT NULL DEFAULT session_user,
    discarded_at timestamptz NOT NULL DEFAULT now()
);

REVOKE ALL ON ALL TABLES IN SCHEMA watership_inbox FROM PUBLIC;
GRANT USAGE ON SCHEMA watership_inbox TO watership_consumer;

INSERT INTO watership_inbox.migration (version, name) VALUES (1, '0001_schema');

RESET ROLE;
