-- From the end of the WAL $6 on, route $2 of relay $1 is agreed with the description $5 of its
-- table $3, which has the OID $4.
INSERT INTO watership.schema_history (name, kind, route, table_name, relation, description, mark)
VALUES ($1, 'agreed', $2, $3, $4, $5, $6)
