-- Relay $1, last written by session $2, starts again after what is visible now, in a new epoch,
-- on system $3, timeline $4, of the outbox $5, whose OID is $6, by its columns $7 (order) and $8
-- (transaction). The old session can write no more. No row: another
-- session has taken over.
WITH moved AS (
    UPDATE watership.checkpoint AS c
    SET epoch = epoch + 1, session_no = session_no + 1, mark = next.number, ordinal = 0, sub = 0,
        flush_mark = next.number, system_identifier = $3, timeline = $4::bigint::integer,
        updated_at = now()
    FROM (SELECT 1 + greatest((SELECT max(number) FROM watership.poll_batch WHERE name = $1),
        (SELECT greatest(mark, flush_mark) FROM watership.checkpoint WHERE name = $1)) AS number
    ) AS next
    WHERE c.name = $1 AND c.session_no = $2
    RETURNING c.name, c.mark, c.epoch
), passed AS (
    DELETE FROM watership.poll_batch WHERE name IN (SELECT name FROM moved)
), made AS (
    INSERT INTO watership.poll_batch (name, number, since, snapshot, first_seq, made_at, outbox,
        outbox_oid, order_attnum, xid_attnum)
    SELECT name, mark, pg_current_snapshot(), pg_current_snapshot(), 0, now(), $5, $6, $7, $8
    FROM moved
)
SELECT epoch::bigint, mark FROM moved
