-- Watership 0001: roles, schema, outbox, checkpoint, and the notes that maintenance keeps.
--
-- Run by `watership init`, or by hand, in order, each file in one transaction:
--     psql --single-transaction -v ON_ERROR_STOP=1 -f sql/0001_schema.sql
-- The user needs CREATEROLE (or superuser) and CREATE on the database. Each file registers itself
-- in watership.migration, so `watership init` afterwards finds it done.
-- After the last numbered file: create the publication and the slot, and only then run grant.sql.

-- Roles belong to the cluster: another database may have made them, perhaps at this very moment.
DO $$
DECLARE
    role_name text;
BEGIN
    FOREACH role_name IN ARRAY ARRAY['watership_owner', 'watership_app', 'watership_relay'] LOOP
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
            EXECUTE format('GRANT watership_owner TO %I', current_user);
        EXCEPTION WHEN insufficient_privilege THEN
            NULL;
        END;
    END IF;
END
$$;

CREATE SCHEMA watership AUTHORIZATION watership_owner;

SET ROLE watership_owner;

-- What ran here. `checksum` is the SHA-256 of the file, written by `watership init`; it is NULL
-- for a file that was run by hand.
CREATE TABLE watership.migration (
    version    integer     PRIMARY KEY,
    name       text        NOT NULL,
    checksum   text,
    applied_at timestamptz NOT NULL DEFAULT now()
);

-- True, or an error that says which limit of a message the event breaks. One function and not a
-- CHECK for each limit, because Postgres prepares every CHECK again for every statement: eleven of
-- them made an INSERT of one row four times as expensive.
CREATE FUNCTION watership.fits_a_message(
    aggregate_type text, aggregate_id text, event_type text,
    content_type text, headers jsonb, traceparent text, created_at timestamptz
) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    wrong text;
BEGIN
    IF aggregate_type = '' OR event_type = '' THEN
        wrong := 'aggregate_type and event_type must not be empty';
    -- An AMQP routing key is at most 255 bytes, and the default one is "type.event".
    ELSIF octet_length(aggregate_type) + octet_length(event_type) > 254 THEN
        wrong := 'aggregate_type and event_type may have 254 bytes together';
    ELSIF octet_length(aggregate_id) NOT BETWEEN 1 AND 1024 THEN
        wrong := 'aggregate_id must have 1 to 1024 bytes';
    ELSIF octet_length(content_type) NOT BETWEEN 1 AND 255 THEN
        wrong := 'content_type must have 1 to 255 bytes';
    ELSIF octet_length(traceparent) NOT BETWEEN 1 AND 255 THEN
        wrong := 'traceparent must have 1 to 255 bytes';
    -- It becomes an AMQP timestamp, and chooses the partition.
    ELSIF created_at NOT BETWEEN '1970-01-01 00:00:00+00' AND '9999-12-31 00:00:00+00' THEN
        wrong := 'created_at must lie between the years 1970 and 9999';
    ELSIF headers IS NOT NULL THEN
        IF jsonb_typeof(headers) <> 'object' THEN
            wrong := 'headers must be a JSON object';
        -- All headers must fit into one frame (60 KiB), beside up to 4 KiB of the relay's own and
        -- of AMQP properties. As AMQP fields in UTF-8 they are never more than three times as long
        -- as the text, so only long ones are counted: two bytes for the length of a name and the
        -- type, four for the length of a text; an integer of 64 bits has eight.
        ELSIF octet_length(headers::text) > 16384 AND 57344 < (
            SELECT sum(2 + octet_length(key) + CASE jsonb_typeof(value)
                WHEN 'null' THEN 0
                WHEN 'boolean' THEN 1
                WHEN 'number' THEN greatest(8, 4 + octet_length(value::text))
                ELSE 4 + octet_length(convert_to(value #>> '{}', 'UTF8')) END)
            FROM jsonb_each(headers))
        THEN
            wrong := 'headers may have 57344 bytes as AMQP fields';
        -- CC and BCC make RabbitMQ deliver to further queues, x-* are its own, ws-* the relay's.
        ELSIF jsonb_path_exists(headers, '$.keyvalue().key ? (@ like_regex "^(CC$|BCC$|x-|ws-)")')
        THEN
            wrong := 'headers must not have the reserved names CC, BCC, x-* and ws-*';
        -- A header's name is an AMQP short string. (A regex that counts to 255 is slow.)
        ELSIF jsonb_path_exists(headers, '$.keyvalue().key ? (@ like_regex "^$|[^!-~]")')
            OR octet_length(headers::text) > 255 AND EXISTS (
                SELECT FROM jsonb_object_keys(headers) AS name WHERE octet_length(name) > 255)
        THEN
            wrong := 'names of headers must have 1 to 255 printable ASCII characters';
        END IF;
    END IF;
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION 'watership.outbox: %', wrong USING ERRCODE = 'check_violation';
    END IF;
    RETURN true;
END
$$;

-- The order of inserts, for polling. Not cached: a session with numbers in stock would insert later
-- and count earlier.
CREATE SEQUENCE watership.outbox_seq CACHE 1;

-- The outbox: one row per event, INSERT only, never updated. The relay reads the rows from the WAL
-- and finds the columns by name. Partitions are days in UTC; the default partition catches what
-- has no day, so an INSERT never fails for want of a partition.
--
-- seq and xid are what a polling relay needs: the order of inserts, and the transaction, to tell
-- what a snapshot shows. They are here from the start because columns with such defaults cannot be
-- added later without rewriting every partition. Applications leave them alone.
CREATE TABLE watership.outbox (
    id             uuid        NOT NULL DEFAULT gen_random_uuid(),
    aggregate_type text        NOT NULL,
    aggregate_id   text        NOT NULL,
    event_type     text        NOT NULL,
    payload        json,
    data           bytea,
    content_type   text,
    headers        jsonb,
    traceparent    text,
    created_at     timestamptz NOT NULL DEFAULT now(),
    seq            bigint      NOT NULL DEFAULT nextval('watership.outbox_seq'),
    xid            xid8        NOT NULL DEFAULT pg_current_xact_id(),
    PRIMARY KEY (id, created_at),
    CONSTRAINT outbox_either_payload_or_data CHECK (num_nonnulls(payload, data) = 1),
    CONSTRAINT outbox_fits_a_message CHECK (watership.fits_a_message(
        aggregate_type, aggregate_id, event_type, content_type, headers, traceparent, created_at))
) PARTITION BY RANGE (created_at);

CREATE TABLE watership.outbox_default PARTITION OF watership.outbox DEFAULT;

-- Only here, where rows are rare: finds the rows of a day, and the rows to delete.
CREATE INDEX outbox_default_created_at ON watership.outbox_default (created_at);

-- Where each relay stands. Never in the publication: it would be a change that makes changes.
-- Updated up to ten times a second, so pages keep room for HOT updates and nothing that changes
-- is indexed.
CREATE TABLE watership.checkpoint (
    name              text        PRIMARY KEY CHECK (octet_length(name) BETWEEN 1 AND 63),
    -- What its marks are: LSNs of the WAL, or batches of a poll.
    kind              text        NOT NULL DEFAULT 'wal' CHECK (kind IN ('wal', 'poll')),
    -- Raised by init, resync and an accepted failover; it only sorts.
    epoch             integer     NOT NULL CHECK (epoch >= 0),
    -- The last settled event: the mark of its transaction (its commit LSN, or its batch), its
    -- number there, and the number of the thing at it. Skips on start.
    mark              bigint      NOT NULL CHECK (mark >= 0),
    ordinal           bigint      NOT NULL CHECK (ordinal >= 0),
    sub               bigint      NOT NULL DEFAULT 0 CHECK (sub >= 0),
    -- The highest mark ever authorised for feedback to the source. Never goes back.
    flush_mark        bigint      NOT NULL CHECK (flush_mark >= 0),
    -- Both marks as Postgres writes them, for people and for maintenance.
    commit_lsn        pg_lsn      GENERATED ALWAYS AS
        (CASE WHEN kind = 'wal' THEN '0/0'::pg_lsn + mark::numeric END) STORED,
    flush_lsn         pg_lsn      GENERATED ALWAYS AS
        (CASE WHEN kind = 'wal' THEN '0/0'::pg_lsn + flush_mark::numeric END) STORED,
    -- Raised by each session; a relay whose number is no longer here has been replaced.
    session_no        bigint      NOT NULL DEFAULT 0,
    -- An unsigned 64-bit number, which bigint cannot hold.
    system_identifier text        NOT NULL,
    -- Of a relay that reads the WAL.
    slot              text,
    timeline          integer,
    publication       text,
    publication_oid   oid,
    updated_at        timestamptz NOT NULL DEFAULT now(),
    CHECK (kind <> 'wal' OR num_nulls(slot, timeline, publication, publication_oid) = 0)
) WITH (fillfactor = 10);

-- Partitions that were detached and wait to be dropped: every row that was ever written to them
-- lies before `lsn` in the WAL, and was written before `range_to`.
CREATE TABLE watership.retired_partition (
    name        text        PRIMARY KEY,
    range_to    timestamptz NOT NULL,
    lsn         pg_lsn      NOT NULL,
    detached_at timestamptz NOT NULL DEFAULT now()
);

-- At most one row: default-partition rows older than `cutoff` whose transaction had ended when
-- the note was taken (its xid is before `xid`) lie before `lsn` in the WAL.
CREATE TABLE watership.default_retirement (
    one      boolean     PRIMARY KEY DEFAULT true CHECK (one),
    cutoff   timestamptz NOT NULL,
    xid      xid8        NOT NULL,
    lsn      pg_lsn      NOT NULL,
    noted_at timestamptz NOT NULL DEFAULT now()
);

-- The relay reads, and moves its checkpoint. It owns nothing and makes no rows.
GRANT USAGE ON SCHEMA watership TO watership_relay;
GRANT SELECT ON watership.outbox, watership.checkpoint, watership.migration,
    watership.retired_partition, watership.default_retirement TO watership_relay;
GRANT UPDATE (kind, epoch, mark, ordinal, sub, flush_mark, session_no, slot, system_identifier,
    timeline, publication, publication_oid, updated_at)
    ON watership.checkpoint TO watership_relay;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA watership FROM PUBLIC;

INSERT INTO watership.migration (version, name) VALUES (1, '0001_schema');

RESET ROLE;
