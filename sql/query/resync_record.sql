-- Records what a person accepted for relay $1.
INSERT INTO watership.resync (name, who, reason, verdicts, gap_from, gap_to, resumed_from,
    resumed_at, slot, slot_created, timeline, epoch)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11::bigint::integer,
    $12::bigint::integer)
RETURNING at::text, role
