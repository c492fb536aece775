#!/bin/sh
# Run once by the Postgres image when it makes its data directory (docker-compose.yml).
#
# The role that the relay logs in with. `watership init` gives it what it needs inside of the
# database; the attributes LOGIN and REPLICATION and the password are the administrator's.
set -eu

psql -v ON_ERROR_STOP=1 -v "password=$RELAY_PASSWORD" \
    --username "${POSTGRES_USER:-postgres}" --dbname "$POSTGRES_DB" <<'SQL'
CREATE ROLE watership_relay LOGIN REPLICATION PASSWORD :'password';
SQL
