-- Watership 0012: what a batch was made with, and when the outbox was last looked at.
--
-- A batch is read by the columns that found it. A name in the configuration may come to mean
-- another column, and a name in the database another table; these numbers do not.

SET ROLE watership_owner;

-- Of an outbox table of the application's, in pg_class and pg_attribute; null for watership.outbox,
-- and where it is not known.
ALTER TABLE watership.poll_batch
    ADD COLUMN outbox_oid   oid,
    ADD COLUMN order_attnum integer,
    ADD COLUMN xid_attnum   integer;

-- When a polling relay last found nothing new, to about a minute; only if `outbox.retained_for` is
-- set.
ALTER TABLE watership.checkpoint ADD COLUMN polled_at timestamptz;
GRANT UPDATE (polled_at) ON watership.checkpoint TO watership_relay;

INSERT INTO watership.migration (version, name) VALUES (12, '0012_poll_made_with');

RESET ROLE;
