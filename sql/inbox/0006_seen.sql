-- Watership inbox 0006: the view `seen` also shows messages without a time of their own.

SET ROLE watership_inbox_owner;

-- For a reconcile: what was handled or parked. `day` is the day of the message; NULL for one
-- without a time, which is in two generations if it came while the second was opening.
CREATE OR REPLACE VIEW watership_inbox.seen AS
SELECT c.name AS consumer, x.message_id, x.day, x.claimed_at,
    EXISTS (SELECT FROM watership_inbox.parked AS p
        WHERE p.consumer = x.consumer AND p.message_id = x.message_id) AS parked
FROM (
    SELECT consumer, message_id, day, claimed_at FROM watership_inbox.claimed
    UNION ALL
    SELECT consumer, message_id, NULL, min(claimed_at) FROM watership_inbox.claimed_in_generation
    GROUP BY consumer, message_id
) AS x JOIN watership_inbox.consumer AS c ON c.id = x.consumer;

INSERT INTO watership_inbox.migration (version, name) VALUES (6, '0006_seen');

RESET ROLE;
