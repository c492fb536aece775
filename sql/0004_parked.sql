-- Watership 0004: parked, the messages that could not be published, in the order of their keys.
--
-- Only the relay inserts, in the same transaction as the checkpoint that passes the rows. People
-- change `state` alone, with `watership parked retry` and `discard`; they never publish.
--
--     parked --> retrying --> released          order within a lane is by position, never by id
--        +----------+-------> discarded

SET ROLE watership_owner;

CREATE TABLE watership.parked (
    -- For people, to name a row. It says nothing about order.
    id           bigint      GENERATED ALWAYS AS IDENTITY UNIQUE,
    name         text        NOT NULL,
    -- The event's position; see watership.checkpoint.
    epoch        integer     NOT NULL,
    mark         bigint      NOT NULL,
    ordinal      bigint      NOT NULL,
    sub          bigint      NOT NULL,
    -- The route, or '' when no route selected the event.
    route        text        NOT NULL,
    -- Which of the messages that the event has on the route.
    part         integer     NOT NULL DEFAULT 0,
    state        text        NOT NULL
        CHECK (state IN ('parked', 'retrying', 'released', 'discarded')),
    -- Why it was parked, and why its last retry failed.
    kind         text        NOT NULL,
    error        text        NOT NULL,
    last_kind    text,
    last_error   text,
    attempts     integer     NOT NULL DEFAULT 1,
    event_id     uuid        NOT NULL,
    source       text        NOT NULL,
    key          text        NOT NULL,
    committed_at timestamptz NOT NULL,
    -- What keeps the order: hashes of the keys (two when the key changed), of the captured table,
    -- and whether this is a truncate, which waits for its whole table.
    lanes        bigint[]    NOT NULL,
    table_lane   bigint,
    barrier      boolean     NOT NULL,
    -- The raw row, when no message could be made of it ...
    event        json,
    -- ... or the message, when the broker did not take it: routing key, AMQP properties, body.
    routing_key  text,
    properties   bytea,
    body         bytea,
    -- Bytes of these in memory.
    size         bigint      NOT NULL,
    parked_at    timestamptz NOT NULL DEFAULT now(),
    changed_at   timestamptz NOT NULL DEFAULT now(),
    changed_by   text,
    note         text,
    PRIMARY KEY (name, epoch, mark, ordinal, sub, route, part),
    CHECK (num_nulls(last_kind, last_error) IN (0, 2)),
    CHECK ((event IS NULL) = (body IS NOT NULL)),
    CHECK (num_nulls(routing_key, properties, body) IN (0, 3))
);

-- What the relay looks at every second while there is something.
CREATE INDEX parked_unreleased ON watership.parked (name, epoch, mark, ordinal, sub, route, part)
    INCLUDE (state) WHERE state IN ('parked', 'retrying');

-- Released and discarded rows stay until the checkpoint has passed them and they are old: a replay
-- finds them and neither parks nor publishes again.
GRANT SELECT, INSERT, UPDATE, DELETE ON watership.parked TO watership_relay;

INSERT INTO watership.migration (version, name) VALUES (4, '0004_parked');

RESET ROLE;
