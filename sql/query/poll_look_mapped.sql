-- As poll_look.sql, of an outbox table that is the application's; `source/outbox` fills in the
-- names, and `source/poll` the settings that keep the plan to the index on transaction and place.
-- count(*) keeps the planner from answering min() by reading all of the index on the place.
SELECT pg_current_snapshot()::text, found.rows + late.rows,
    least(found.first_place, late.first_place), found.first_place, found.last_place,
    (extract(epoch FROM now()) * 1000000)::bigint
FROM (
    SELECT count(*) AS rows, min(o.:order)::bigint AS first_place,
        max(o.:order)::bigint AS last_place
    FROM :outbox AS o
    WHERE o.:transaction >= pg_snapshot_xmax($1::text::pg_snapshot)
        AND o.:transaction < pg_snapshot_xmax(pg_current_snapshot())
        AND pg_visible_in_snapshot(o.:transaction, pg_current_snapshot())
) AS found, (
    SELECT count(*) AS rows, min(o.:order)::bigint AS first_place
    FROM :outbox AS o
    WHERE o.:transaction = ANY (
        watership.poll_late($1::text::pg_snapshot, pg_current_snapshot()))
) AS late
