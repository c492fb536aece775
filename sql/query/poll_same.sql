-- Whether the names of an outbox table that is the application's still lead to what the session
-- found: the table, the column of the order and that of the transaction. Asked after a query in the
-- same transaction: its lock lets nobody change a name before the answer.
SELECT count(*) = 2
FROM pg_attribute AS a
WHERE a.attrelid = to_regclass(:named)::oid AND a.attrelid = :oid AND NOT a.attisdropped
    AND (a.attname, a.attnum) IN ((:order_name, :order_number), (:xid_name, :xid_number))
