//! The replication slot and the server it lives on, through ordinary SQL: reads both, creates and
//! drops slots for `init`, `resync` and the demo.
//!
//! For Postgres 15 and later: columns that came later (`invalidation_reason`, `failover`, `synced`)
//! are read through JSON, so one query fits every version. Only what the server says: whether a
//! slot may be used is decided in `relay/check/position`, what may soon go wrong with one in
//! `relay/check/slot_risk`.

use std::str::FromStr;
use std::time::Duration;

use tokio_postgres::types::PgLsn;
use tokio_postgres::{GenericClient, Row};

use crate::error::{Error, Result};
use crate::pg::client::column;
use crate::pg::sqlstate::postgres_error;
use crate::pg::unnamed;
use crate::position::Lsn;

/// How much of the WAL that a slot needs is still there.
///
/// <https://www.postgresql.org/docs/current/view-pg-replication-slots.html>
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WalStatus {
    /// Within `max_wal_size`.
    Reserved,
    /// More than `max_wal_size` is kept for the slot.
    Extended,
    /// Over `max_slot_wal_keep_size`: the next checkpoint may remove what the slot needs.
    Unreserved,
    /// Removed: the slot is unusable.
    Lost,
}

impl WalStatus {
    /// The server's word.
    pub fn as_str(self) -> &'static str {
        match self {
            WalStatus::Reserved => "reserved",
            WalStatus::Extended => "extended",
            WalStatus::Unreserved => "unreserved",
            WalStatus::Lost => "lost",
        }
    }
}

impl FromStr for WalStatus {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        [WalStatus::Reserved, WalStatus::Extended, WalStatus::Unreserved, WalStatus::Lost]
            .into_iter()
            .find(|status| status.as_str() == text)
            .ok_or_else(|| {
                Error::protocol(format!(
                    "wal_status is {text:?}; expected reserved, extended, unreserved or lost"
                ))
            })
    }
}

/// A row of `pg_replication_slots`, with what follows from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotState {
    /// The slot's name.
    pub name: String,
    /// The output plugin; absent for a physical slot.
    pub plugin: Option<String>,
    /// The database; absent for a physical slot.
    pub database: Option<String>,
    /// Whether the slot ends with its session.
    pub temporary: bool,
    /// Whether prepared transactions are decoded at PREPARE.
    pub two_phase: bool,
    /// Process id of the walsender that reads it now.
    pub active_pid: Option<i32>,
    /// Address and port of the reader; absent for a unix socket, or when the role may not see it.
    pub active_client: Option<String>,
    /// Whether commits wait for the reader: `synchronous_standby_names` chooses it. Absent when the
    /// role may not see that, which takes `pg_read_all_stats`.
    pub synchronous: Option<bool>,
    /// Where a reader starts.
    pub confirmed_flush_lsn: Option<Lsn>,
    /// Oldest WAL that the slot needs; absent when it is lost.
    pub restart_lsn: Option<Lsn>,
    /// Absent when the slot reserves no WAL.
    pub wal_status: Option<WalStatus>,
    /// Bytes that may still be written before the slot may be lost; absent without a limit.
    pub safe_wal_size: Option<i64>,
    /// Why the slot is lost; from Postgres 17, and on 16 for a conflict on a standby.
    pub invalidation_reason: Option<String>,
    /// Whether standbys may take the slot over; from Postgres 17.
    pub failover: bool,
    /// Whether this is a standby's copy; from Postgres 17.
    pub synced: bool,
    /// Standbys' slots in `synchronized_standby_slots` that have no reader: the server sends
    /// nothing from a failover slot until they have it. From Postgres 17.
    pub waits_for: Vec<String>,
    /// Transactions decoded since the slot was made or the server crashed; 0 where nothing is
    /// known.
    pub decoded: i64,
    /// Bytes between `confirmed_flush_lsn` and the end of WAL.
    pub lag_bytes: u64,
    /// Bytes between `restart_lsn` and the end of WAL.
    pub retained_bytes: u64,
}

impl SlotState {
    /// Plugin, database and lifetime in words.
    pub fn kind(&self) -> String {
        let plugin = self.plugin.as_deref().unwrap_or("none (physical slot)");
        let database = self.database.as_deref().unwrap_or("none");
        let (temporary, two_phase) = (self.temporary, self.two_phase);
        format!(
            "plugin {plugin}, database {database}, temporary {temporary}, two-phase {two_phase}"
        )
    }
}

/// The end of WAL on a primary and, in recovery, what was replayed.
const END_OF_WAL: &str = "CASE WHEN pg_catalog.pg_is_in_recovery() \
    THEN pg_catalog.pg_last_wal_replay_lsn() ELSE pg_catalog.pg_current_wal_lsn() END";

/// <https://www.postgresql.org/docs/current/runtime-config-replication.html>,
/// `synchronized_standby_slots`: a list of names.
const WAITS_FOR: &str = "ARRAY(SELECT btrim(name, ' \"') FROM pg_catalog.unnest( \
        pg_catalog.string_to_array( \
            pg_catalog.current_setting('synchronized_standby_slots', true), ',')) AS name \
    WHERE btrim(name, ' \"') <> '' AND NOT EXISTS (SELECT FROM pg_catalog.pg_replication_slots \
        AS standby WHERE standby.slot_name = btrim(name, ' \"') AND standby.active))";

/// The slot of that name in this cluster, whichever database it is for.
///
/// # Errors
/// What the server says.
pub async fn read_slot(client: &impl GenericClient, name: &str) -> Result<Option<SlotState>> {
    let sql = format!(
        "SELECT slot_name::text, plugin::text, database::text, temporary, two_phase, active_pid, \
         confirmed_flush_lsn, restart_lsn, wal_status, safe_wal_size, \
         coalesce(j->>'invalidation_reason', \
             CASE WHEN (j->>'conflicting')::boolean THEN 'conflict' END), \
         coalesce((j->>'failover')::boolean, false), coalesce((j->>'synced')::boolean, false), \
         {END_OF_WAL}, host(r.client_addr) || ':' || r.client_port, \
         coalesce((SELECT total_txns \
             FROM pg_catalog.pg_stat_replication_slots AS t WHERE t.slot_name = s.slot_name), 0), \
         CASE WHEN (j->>'failover')::boolean THEN {WAITS_FOR} ELSE '{{}}' END, \
         CASE WHEN r.pid IS NULL THEN false ELSE r.sync_state IN ('sync', 'quorum') END \
         FROM pg_catalog.pg_replication_slots AS s \
         CROSS JOIN LATERAL pg_catalog.to_jsonb(s) AS j \
         LEFT JOIN pg_catalog.pg_stat_replication AS r ON r.pid = s.active_pid \
         WHERE s.slot_name = $1::text"
    );
    let row = unnamed::query_opt(client, &sql, &[&name]).await.map_err(postgres_error)?;
    row.map(|row| slot_from(&row)).transpose()
}

fn slot_from(row: &Row) -> Result<SlotState> {
    let confirmed_flush_lsn = lsn(row, 6)?;
    let restart_lsn = lsn(row, 7)?;
    let end = lsn(row, 13)?.unwrap_or(Lsn::ZERO);
    let wal_status = column::<Option<&str>>(row, 8)?.map(str::parse).transpose()?;
    Ok(SlotState {
        name: column(row, 0)?,
        plugin: column(row, 1)?,
        database: column(row, 2)?,
        temporary: column(row, 3)?,
        two_phase: column(row, 4)?,
        active_pid: column(row, 5)?,
        active_client: column(row, 14)?,
        synchronous: column(row, 17)?,
        confirmed_flush_lsn,
        restart_lsn,
        wal_status,
        safe_wal_size: column(row, 9)?,
        invalidation_reason: column(row, 10)?,
        failover: column(row, 11)?,
        synced: column(row, 12)?,
        waits_for: column(row, 16)?,
        decoded: column(row, 15)?,
        lag_bytes: confirmed_flush_lsn.map_or(0, |lsn| end.bytes_since(lsn)),
        retained_bytes: restart_lsn.map_or(0, |lsn| end.bytes_since(lsn)),
    })
}

fn lsn(row: &Row, index: usize) -> Result<Option<Lsn>> {
    Ok(column::<Option<PgLsn>>(row, index)?.map(|lsn| Lsn(u64::from(lsn))))
}

/// Creates a permanent logical slot for pgoutput and returns its consistent point: what commits
/// after it is streamed.
///
/// The server waits for every transaction that is open now, for five minutes at most. The user
/// needs REPLICATION. With `failover` (Postgres 17 and later) standbys may keep a copy of it.
///
/// # Errors
/// What the server says: the name is taken, no slot is free, `wal_level` is not logical.
pub async fn create_slot(client: &impl GenericClient, name: &str, failover: bool) -> Result<Lsn> {
    let sql = &*create_statement(failover);
    let failed = |e| postgres_error(e).context(format!("creating the replication slot {name}"));
    // Waiting for a transaction counts as waiting for a lock.
    let patient = "SET statement_timeout = '5min'; SET lock_timeout = '5min'";
    client.batch_execute(patient).await.map_err(failed)?;
    let made = unnamed::query_one(client, sql, &[&name]).await;
    client.batch_execute("RESET statement_timeout; RESET lock_timeout").await.map_err(failed)?;
    let row = made.map_err(failed)?;
    lsn(&row, 0)?.ok_or_else(|| Error::protocol("a new slot has no consistent point"))
}

/// The statement of [`create_slot`], with the slot's name as its parameter.
pub fn create_statement(failover: bool) -> String {
    let further = if failover { ", failover => true" } else { "" };
    format!(
        "SELECT lsn FROM pg_catalog.pg_create_logical_replication_slot($1::text, \
         'pgoutput'{further})"
    )
}

/// Ends the session that reads the slot, if there is one.
///
/// # Errors
/// What the server says: the role may not.
pub async fn end_reader(client: &impl GenericClient, name: &str) -> Result<()> {
    let sql = "SELECT pg_catalog.pg_terminate_backend(active_pid) \
        FROM pg_catalog.pg_replication_slots WHERE slot_name = $1::text AND active";
    unnamed::execute(client, sql, &[&name]).await.map(drop).map_err(postgres_error)
}

/// Drops a slot.
///
/// # Errors
/// What the server says: the slot has a reader, or does not exist.
pub async fn drop_slot(client: &impl GenericClient, name: &str) -> Result<()> {
    let sql = "SELECT pg_catalog.pg_drop_replication_slot($1::text)";
    let dropped = unnamed::execute(client, sql, &[&name]).await;
    let failed = |e| postgres_error(e).context(format!("dropping the replication slot {name}"));
    dropped.map(drop).map_err(failed)
}

/// What the server is and how it is set, as far as the relay depends on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerFacts {
    /// As `server_version_num`: 150018 is 15.18.
    pub version_num: i32,
    /// The version as the server writes it.
    pub version: String,
    /// `minimal`, `replica` or `logical`.
    pub wal_level: String,
    /// Slots that the server allows.
    pub max_replication_slots: u32,
    /// Slots that exist.
    pub used_replication_slots: u32,
    /// Walsenders that the server allows.
    pub max_wal_senders: u32,
    /// Walsenders that run.
    pub used_wal_senders: u32,
    /// Whether this is a standby.
    pub in_recovery: bool,
    /// End of WAL; in recovery, what was replayed.
    pub wal_lsn: Lsn,
    /// The timeline of the end of WAL; in recovery, of the last checkpoint.
    pub timeline: u32,
    /// Names the cluster; a copy made by base backup has the same.
    pub system_identifier: u64,
    /// Bytes of WAL that a slot may keep; absent without a limit.
    pub max_slot_wal_keep_size: Option<u64>,
    /// After how long without a reader a slot is lost (from Postgres 18); absent for never.
    pub idle_replication_slot_timeout: Option<Duration>,
    /// After how long without an answer the server disconnects a reader; absent for never.
    pub wal_sender_timeout: Option<Duration>,
    /// The database of the session.
    pub database: String,
    /// The role of the session.
    pub user: String,
    /// The setting of that name: whose confirmation commits wait for.
    pub synchronous_standby_names: String,
}

/// Reads the facts; every role may.
///
/// # Errors
/// What the server says.
pub async fn server_facts(client: &impl GenericClient) -> Result<ServerFacts> {
    let sql = format!(
        "SELECT current_setting('server_version_num')::int, current_setting('server_version'), \
         current_setting('wal_level'), current_setting('max_replication_slots')::int, \
         (SELECT count(*)::int FROM pg_catalog.pg_replication_slots), \
         current_setting('max_wal_senders')::int, \
         (SELECT count(*)::int FROM pg_catalog.pg_stat_replication), \
         pg_is_in_recovery(), {END_OF_WAL}, \
         CASE WHEN pg_is_in_recovery() THEN (SELECT timeline_id FROM pg_control_checkpoint()) \
             ELSE ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int END, \
         (SELECT system_identifier FROM pg_control_system()), \
         current_database()::text, current_user::text, \
         current_setting('synchronous_standby_names')"
    );
    let row = unnamed::query_one(client, &sql, &[]).await.map_err(postgres_error)?;
    let count = |index: usize| Ok::<_, Error>(column::<i32>(&row, index)?.unsigned_abs());
    let max_slot_wal_keep_size = setting(client, "max_slot_wal_keep_size").await?;
    let idle = setting(client, "idle_replication_slot_timeout").await?;
    let wal_sender = setting(client, "wal_sender_timeout").await?;
    Ok(ServerFacts {
        version_num: column(&row, 0)?,
        version: column(&row, 1)?,
        wal_level: column(&row, 2)?,
        max_replication_slots: count(3)?,
        used_replication_slots: count(4)?,
        max_wal_senders: count(5)?,
        used_wal_senders: count(6)?,
        in_recovery: column(&row, 7)?,
        wal_lsn: lsn(&row, 8)?.unwrap_or(Lsn::ZERO),
        timeline: column::<i32>(&row, 9)?.cast_unsigned(),
        system_identifier: column::<i64>(&row, 10)?.cast_unsigned(),
        max_slot_wal_keep_size,
        idle_replication_slot_timeout: idle.filter(|ms| *ms > 0).map(Duration::from_millis),
        wal_sender_timeout: wal_sender.filter(|ms| *ms > 0).map(Duration::from_millis),
        database: column(&row, 11)?,
        user: column(&row, 12)?,
        synchronous_standby_names: column(&row, 13)?,
    })
}

/// Bytes of WAL that a slot may keep; absent without a limit.
///
/// # Errors
/// What the server says.
pub async fn max_slot_wal_keep_size(client: &impl GenericClient) -> Result<Option<u64>> {
    setting(client, "max_slot_wal_keep_size").await
}

/// The end of WAL as it is inserted now.
///
/// # Errors
/// What the server says.
pub async fn insert_lsn(client: &impl GenericClient) -> Result<Lsn> {
    let sql = "SELECT pg_catalog.pg_current_wal_insert_lsn()";
    let row = unnamed::query_one(client, sql, &[]).await.map_err(postgres_error)?;
    lsn(&row, 0)?.ok_or_else(|| Error::protocol("the server reports no end of WAL"))
}

/// A numeric setting in bytes or milliseconds; absent when it is negative or this version has none.
async fn setting(client: &impl GenericClient, name: &str) -> Result<Option<u64>> {
    let sql = "SELECT setting::bigint * CASE unit WHEN 'MB' THEN 1048576 WHEN 'kB' THEN 1024 \
        WHEN 's' THEN 1000 WHEN 'min' THEN 60000 ELSE 1 END \
        FROM pg_catalog.pg_settings WHERE name = $1";
    let row = unnamed::query_opt(client, sql, &[&name]).await.map_err(postgres_error)?;
    let value = row.map(|row| column::<i64>(&row, 0)).transpose()?;
    Ok(value.and_then(|value| u64::try_from(value).ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wal_status_is_one_of_four_words() {
        for word in ["reserved", "extended", "unreserved", "lost"] {
            assert_eq!(word.parse::<WalStatus>().unwrap().as_str(), word);
        }
        assert!("fine".parse::<WalStatus>().is_err());
    }
}
