//! A schema in the database: which files of `sql/` ran there, and running the others. There are
//! two, which know nothing of each other: a producer's [`OUTBOX`] and a consumer's [`INBOX`].
//!
//! Invariant: a numbered file never changes once released. Its SHA-256 is stored with its version,
//! and a difference stops everything. Files run in order, all in one transaction, under an advisory
//! lock, so two `watership init` at once are one after the other. A file that was run by hand
//! registered itself without a checksum and counts as done.
//!
//! Publication, slot and checkpoint row are not made here but by `watership init`, before it calls
//! [`grant_applications`].

use sha2::{Digest, Sha256};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, GenericClient, Transaction};

use crate::error::{Error, Result};
use crate::pg::sqlstate::postgres_error;
use crate::pg::unnamed;
use crate::verdict::Verdict;

/// One numbered file of `sql/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Migration {
    /// The number in the file's name; counts up from 1 without a gap.
    pub version: i32,
    /// The file's name without `.sql`.
    pub name: &'static str,
    /// The file.
    pub sql: &'static str,
}

/// The file of this number, folder and name.
macro_rules! migration {
    ($version:literal, $folder:literal, $name:literal) => {
        Migration {
            version: $version,
            name: $name,
            sql: include_str!(concat!("../../", $folder, "/", $name, ".sql")),
        }
    };
}

/// A migration that `apply` ran.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// Its number.
    pub version: i32,
    /// The file's name without `.sql`.
    pub name: &'static str,
}

/// A schema that numbered files make.
#[derive(Debug, Clone, Copy)]
pub struct Schema {
    /// Its name in the database.
    pub name: &'static str,
    /// The role that owns it.
    pub owner: &'static str,
    /// Where its files are.
    folder: &'static str,
    /// Its files, in order.
    pub migrations: &'static [Migration],
    /// Taken while migrations or grants run. The first number is "WSTP"; 2 and 3 are those of
    /// `watership.maintain` and `watership_inbox.maintain`.
    lock: &'static str,
}

/// Outbox, checkpoint and parked rows: `sql/`, for the producer's database.
pub const OUTBOX: Schema = Schema {
    name: "watership",
    owner: "watership_owner",
    folder: "sql",
    migrations: &[
        migration!(1, "sql", "0001_schema"),
        migration!(2, "sql", "0002_emit"),
        migration!(3, "sql", "0003_maintain"),
        migration!(4, "sql", "0004_parked"),
        migration!(5, "sql", "0005_position"),
        migration!(6, "sql", "0006_partitions"),
        migration!(7, "sql", "0007_backfill"),
        migration!(8, "sql", "0008_poll"),
        migration!(9, "sql", "0009_emit_wal"),
        migration!(10, "sql", "0010_schema_history"),
        migration!(11, "sql", "0011_poll_mapped"),
        migration!(12, "sql", "0012_poll_made_with"),
        migration!(13, "sql", "0013_backfill_moved"),
        migration!(14, "sql", "0014_signed_messages"),
        migration!(15, "sql", "0015_checkpoint_canary"),
        migration!(16, "sql", "0016_limits_in_utf8"),
    ],
    lock: "SELECT pg_catalog.pg_advisory_xact_lock(1465079888, 1)",
};

/// What a consumer has handled and parked: `sql/inbox/`, for the consumer's database.
pub const INBOX: Schema = Schema {
    name: "watership_inbox",
    owner: "watership_inbox_owner",
    folder: "sql/inbox",
    migrations: &[
        migration!(1, "sql/inbox", "0001_schema"),
        migration!(2, "sql/inbox", "0002_claim"),
        migration!(3, "sql/inbox", "0003_receive"),
        migration!(4, "sql/inbox", "0004_maintain"),
        migration!(5, "sql/inbox", "0005_messages"),
    ],
    lock: "SELECT pg_catalog.pg_advisory_xact_lock(1465079888, 4)",
};

/// The last step of `watership init`: what applications may do.
pub const GRANT: &str = include_str!("../../sql/grant.sql");
/// The same beside an outbox table of the application's: only logical messages.
pub const GRANT_MESSAGES: &str = include_str!("../../sql/grant_messages.sql");

/// Nothing of `public` is found by an unqualified name.
const SEARCH_PATH: &str = "SET LOCAL search_path = pg_catalog, pg_temp";

/// A row of the schema's table `migration`.
struct Record {
    version: i32,
    name: String,
    /// Absent when the file was run by hand.
    checksum: Option<String>,
}

impl Schema {
    /// Runs every migration that the database does not have yet, all or none.
    ///
    /// The client's user needs CREATEROLE (or superuser) and CREATE on the database.
    ///
    /// # Errors
    /// [`crate::error::Kind::Verdict`] when a file differs from what was run, or when the database
    /// is newer than this program; otherwise what the server says, with the file's name.
    pub async fn apply(&self, client: &mut Client) -> Result<Vec<Applied>> {
        let store = self.own(include_str!("../../sql/query/migration_checksum.sql"));
        let owner = format!("SET LOCAL ROLE {}", self.owner);
        let tx = self.locked(client).await?;
        let mut applied = Vec::new();
        for migration in self.pending(&tx).await? {
            let failed = |e| postgres_error(e).context(self.file(migration.name));
            tx.batch_execute(migration.sql).await.map_err(failed)?;
            // The table is the owner's, and a member need not inherit the owner's rights.
            tx.batch_execute(&owner).await.map_err(failed)?;
            let values: &[&(dyn ToSql + Sync)] = &[&migration.version, &checksum(migration.sql)];
            unnamed::execute(&tx, &store, values).await.map_err(failed)?;
            tx.batch_execute("RESET ROLE").await.map_err(failed)?;
            applied.push(Applied { version: migration.version, name: migration.name });
        }
        tx.commit().await.map_err(postgres_error)?;
        Ok(applied)
    }

    /// The same as [`Schema::apply`] with these migrations, as a script for psql.
    pub fn script(&self, pending: &[Migration]) -> String {
        let store = self.own(include_str!("../../sql/query/migration_checksum.sql"));
        let mut text = format!("BEGIN;\n{SEARCH_PATH};\n{};\n\n", self.lock);
        for migration in pending {
            let checksum = format!("'{}'", checksum(migration.sql));
            let store = store.replace("= $2", &format!("= {checksum}"));
            let store = store.replace("= $1", &format!("= {}", migration.version));
            let (sql, store, owner) = (migration.sql, store.trim_end(), self.owner);
            text += &format!("{sql}\nSET LOCAL ROLE {owner};\n{store};\nRESET ROLE;\n\n");
        }
        text + "COMMIT;\n\n"
    }

    /// The migrations that the database does not have yet; needs SELECT on the table `migration`.
    ///
    /// # Errors
    /// As [`Schema::apply`].
    pub async fn pending(&self, client: &impl GenericClient) -> Result<Vec<Migration>> {
        let done = self.records(client).await?;
        self.verify(&done)?;
        let is_new = |m: &&Migration| done.iter().all(|d| d.version != m.version);
        Ok(self.migrations.iter().filter(is_new).copied().collect())
    }

    /// The name of the newest file.
    pub fn newest(&self) -> &'static str {
        self.migrations.last().map_or("", |m| m.name)
    }

    /// A statement of `sql/query`, which name the outbox's schema, for this one.
    fn own(&self, statement: &str) -> String {
        statement.replace("watership.", &format!("{}.", self.name))
    }

    fn file(&self, name: &str) -> String {
        format!("{}/{name}.sql", self.folder)
    }

    async fn locked<'a>(&self, client: &'a mut Client) -> Result<Transaction<'a>> {
        let tx = client.transaction().await.map_err(postgres_error)?;
        let start = format!("{SEARCH_PATH}; {}", self.lock);
        tx.batch_execute(&start).await.map_err(postgres_error)?;
        Ok(tx)
    }

    async fn records(&self, client: &impl GenericClient) -> Result<Vec<Record>> {
        let table = format!("SELECT pg_catalog.to_regclass('{}.migration') IS NOT NULL", self.name);
        let there: bool =
            unnamed::query_one(client, &table, &[]).await.map_err(postgres_error)?.get(0);
        if !there {
            return Ok(Vec::new());
        }
        let read = self.own(include_str!("../../sql/query/migration_read.sql"));
        let rows = unnamed::query(client, &read, &[]).await.map_err(postgres_error)?;
        let record = |row: tokio_postgres::Row| Record {
            version: row.get(0),
            name: row.get(1),
            checksum: row.get(2),
        };
        Ok(rows.into_iter().map(record).collect())
    }

    fn verify(&self, done: &[Record]) -> Result<()> {
        for record in done {
            let file = self.file(&record.name);
            let Some(known) = self.migrations.iter().find(|m| m.version == record.version) else {
                let newest = self.migrations.last().map_or(0, |m| m.version);
                let text = format!(
                    "the schema in the database is at version {} ({file}), but this program only \
                     knows versions up to {newest}",
                    record.version
                );
                return Err(Error::named(Verdict::SchemaUnknown, text)
                    .hint("use the newer watership that installed this schema"));
            };
            let ours = checksum(known.sql);
            let differs = record.checksum.as_ref().is_some_and(|theirs| *theirs != ours);
            if differs || record.name != known.name {
                let text = format!(
                    "{file} was run in this database with checksum {}, but this program has {} \
                     with checksum {ours}",
                    record.checksum.as_deref().unwrap_or("unknown"),
                    known.name
                );
                return Err(Error::named(Verdict::SchemaUnknown, text).hint(
                    "a migration never changes after its release: use the watership that installed \
                     this schema, or compare the file with the database by hand",
                ));
            }
        }
        Ok(())
    }
}

/// Lets the role `watership_app` write to the outbox; may be repeated.
///
/// Call it last, when the slot and the checkpoint row exist: a row that is written before the slot
/// is never streamed.
///
/// # Errors
/// What the server says, with the file's name.
pub async fn grant_applications(client: &mut Client) -> Result<()> {
    grant(client, GRANT, "sql/grant.sql").await
}

/// Lets the role `watership_app` emit logical messages, and nothing else; may be repeated.
///
/// # Errors
/// As [`grant_applications`].
pub async fn grant_messages(client: &mut Client) -> Result<()> {
    grant(client, GRANT_MESSAGES, "sql/grant_messages.sql").await
}

async fn grant(client: &mut Client, sql: &str, file: &'static str) -> Result<()> {
    let failed = |e| postgres_error(e).context(file);
    let tx = OUTBOX.locked(client).await?;
    tx.batch_execute(sql).await.map_err(failed)?;
    tx.commit().await.map_err(failed)
}

/// SHA-256 in lower-case hexadecimal.
fn checksum(sql: &str) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(64);
    for byte in Sha256::digest(sql.as_bytes()) {
        write!(text, "{byte:02x}").expect("writing to a String does not fail");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn record(version: i32, name: &str, checksum: Option<&str>) -> Record {
        Record { version, name: name.into(), checksum: checksum.map(str::to_owned) }
    }

    #[test]
    fn each_file_is_numbered_in_order_and_registers_itself() {
        for schema in [OUTBOX, INBOX] {
            for (index, migration) in schema.migrations.iter().enumerate() {
                assert_eq!(migration.version as usize, index + 1);
                assert!(migration.name.starts_with(&format!("{:04}_", migration.version)));
                let table = format!("INSERT INTO {}.migration", schema.name);
                let row = format!("VALUES ({}, '{}')", migration.version, migration.name);
                assert!(migration.sql.contains(&table), "{}", migration.name);
                assert!(migration.sql.contains(&row), "{}", migration.name);
            }
        }
    }

    #[test]
    fn a_file_run_by_hand_counts_as_done() {
        assert!(OUTBOX.verify(&[record(1, "0001_schema", None)]).is_ok());
    }

    #[test]
    fn a_changed_file_is_named_and_needs_a_person() {
        let error = OUTBOX.verify(&[record(2, "0002_emit", Some("00ff"))]).unwrap_err();
        assert_eq!(error.kind(), Kind::Verdict);
        assert!(error.to_string().contains("sql/0002_emit.sql"), "{error}");
        assert!(OUTBOX.verify(&[record(2, "0002_other", None)]).is_err());
    }

    #[test]
    fn a_newer_schema_asks_for_a_newer_program() {
        let error = OUTBOX.verify(&[record(9999, "9999_later", None)]).unwrap_err();
        assert_eq!(error.kind(), Kind::Verdict);
        assert!(error.to_string().contains("version 9999"), "{error}");
        assert!(error.hint_text().unwrap().contains("newer watership"));
    }
}
