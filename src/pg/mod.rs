//! Speaks Postgres; knows no event, no broker, no config.
