-- Watership 0006: the partitions in force: the queues that each route spreads its keys over.

SET ROLE watership_owner;

-- As the relay published last. Messages that were queued under another number may be of keys that
-- go elsewhere now, so a change is compared with what the queues hold.
CREATE TABLE watership.partitions (
    name       text        NOT NULL REFERENCES watership.checkpoint ON DELETE CASCADE,
    route      text        NOT NULL,
    -- The queues are `<queue>.00`, `<queue>.01` and so on.
    queue      text        NOT NULL,
    count      integer     NOT NULL CHECK (count > 0),
    changed_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (name, route)
);

GRANT SELECT, INSERT, UPDATE, DELETE ON watership.partitions TO watership_relay;

INSERT INTO watership.migration (version, name) VALUES (6, '0006_partitions');

RESET ROLE;
