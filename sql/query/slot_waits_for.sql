-- For whom session $1 waits while it creates a slot, as text; null if for nobody. Pid 0 stands for
-- prepared transactions, in whatever database.
SELECT string_agg(CASE b.pid
    WHEN 0 THEN coalesce('prepared transactions ' || (
            SELECT string_agg(quote_literal(p.gid), ', ') FROM pg_catalog.pg_prepared_xacts AS p),
        'a prepared transaction')
    ELSE format('pid %s (%s in database %s)', b.pid, coalesce(a.usename, '?'),
        coalesce(a.datname, '?'))
    END, ', ')
FROM (SELECT DISTINCT u.pid FROM unnest(pg_catalog.pg_blocking_pids($1::integer)) AS u (pid)) AS b
LEFT JOIN pg_catalog.pg_stat_activity AS a ON a.pid = b.pid
