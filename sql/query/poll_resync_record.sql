-- Records what a person accepted for relay $1, which polls.
INSERT INTO watership.resync (name, who, reason, verdicts, resumed_from, resumed_batch,
    slot_created, timeline, epoch)
VALUES ($1, $2, $3, $4, $5, $6, false, $7::bigint::integer, $8::bigint::integer)
RETURNING at::text, role
