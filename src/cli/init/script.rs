//! `init --print-sql`: what `init` would run, for somebody who runs it by hand. What `init` refuses
//! is refused here, too, except for what the connected role cannot do: another one runs the script.

use postgres_protocol::escape::{escape_identifier, escape_literal};
use tokio_postgres::Client;

use super::before::{self, Publish};
use super::slot::{self, Begin, older_rows, rows_before};
use super::{Args, poll, role_of_source};
use crate::cli::{End, print_warning};
use crate::config::Config;
use crate::error::Result;
use crate::pg::client::{SqlConnection, sql};
use crate::pg::connect::Options;
use crate::pg::migrate::{self, Migration};
use crate::pg::outbox::read_indexes;
use crate::pg::publication::{
    Publication, TableName, add_statement, create_statement, read_publication,
};
use crate::pg::slot::{ServerFacts, create_statement as create_slot, server_facts};
use crate::pg::sqlstate::{INSUFFICIENT_PRIVILEGE, postgres_error};
use crate::pg::statement::fill;
use crate::pg::unnamed;
use crate::relay;
use crate::relay::check::polling::{self, Index, missing_indexes};
use crate::source::SourceKind;
use crate::source::outbox::Polled;

/// What is there already.
struct Found {
    pending: Vec<Migration>,
    /// The role that a connection to source.url gets.
    user: String,
    member: bool,
    /// Whether our schema is there, even if it lacks migrations.
    installed: bool,
    publication: Option<Publication>,
    begin: Begin,
    /// Indexes that polling lacks, with their statements.
    indexes: Vec<Index>,
}

fn own_indexes() -> Vec<Index> {
    polling::indexes(&Polled::own(), true).into()
}

impl Found {
    /// As in an empty database.
    fn nothing(config: &Config) -> Self {
        let (pending, indexes) = (migrate::OUTBOX.migrations.to_vec(), own_indexes());
        let user = config.relay.sql.user.clone();
        Self {
            pending,
            user,
            member: false,
            installed: false,
            publication: None,
            begin: Begin::Neither,
            indexes,
        }
    }

    async fn read(client: &Client, config: &Config, server: &ServerFacts) -> Result<Self> {
        let pending = migrate::OUTBOX.pending(client).await?;
        let installed = pending.len() < migrate::OUTBOX.migrations.len();
        let member = "SELECT coalesce(bool_or(pg_has_role(u.oid, g.oid, 'USAGE')), false) \
            FROM pg_catalog.pg_roles AS u, pg_catalog.pg_roles AS g \
            WHERE u.rolname = $1::text AND g.rolname = 'watership_relay'";
        let user = role_of_source(config).await;
        let member =
            unnamed::query_one(client, member, &[&user]).await.map_err(postgres_error)?.get(0);
        let begin = match config.relay.kind {
            SourceKind::Wal => slot::begin(client, config, server, installed).await?,
            SourceKind::Poll if !installed => Begin::Neither,
            SourceKind::Poll => match poll::resumes(client, config).await? {
                Some(row) => Begin::Both { slot: None, checkpoint: row.flush_lsn },
                None => Begin::Neither,
            },
        };
        Ok(Self {
            pending,
            user,
            member,
            installed,
            publication: read_publication(client, &config.relay.publication).await?,
            begin,
            indexes: match installed {
                true => {
                    let there = read_indexes(client, &TableName::outbox()).await?;
                    missing_indexes(&Polled::own(), &there, true)
                }
                false => own_indexes(),
            },
        })
    }

    /// What `init` refuses after its first steps.
    async fn verify(&self, client: &Client, config: &Config, skip: bool) -> Result<()> {
        let relay = &config.relay;
        if self.installed || relay.outbox.is_mapped() {
            let rows = match (relay.kind, self.begin) {
                (SourceKind::Wal, begin) => older_rows(client, config, skip, begin).await,
                (SourceKind::Poll, Begin::Neither) => {
                    rows_before(client, config, skip, poll::FIRST_POLL).await
                }
                (SourceKind::Poll, Begin::Both { .. } | Begin::Slot(_)) => Ok(None),
            };
            match rows {
                Ok(None) => {}
                Ok(Some(rows)) => print_warning(&format!("skipped: {rows}")),
                Err(error) if error.sqlstate() == Some(INSUFFICIENT_PRIVILEGE) => print_warning(
                    &format!("{}: {error}; the script checks for rows", relay.outbox.table),
                ),
                Err(error) => return Err(error),
            }
        }
        if !self.pending.is_empty() {
            return Ok(());
        }
        match relay.kind {
            SourceKind::Poll if !relay.outbox.is_mapped() && !self.indexes.is_empty() => {
                poll::may_index(client).await
            }
            SourceKind::Poll | SourceKind::Wal => Ok(()),
        }
    }
}

/// Prints it, and changes nothing.
///
/// # Errors
/// Where the configuration names no table; what `init` refuses; the server's. A server that cannot
/// be reached is taken for one with an empty database.
pub(super) async fn print(config: &Config, admin: &Options, args: &Args) -> Result<End> {
    let found = match sql(admin).await {
        Ok(SqlConnection { client, closed: _closed }) => {
            let server = server_facts(&client).await?;
            let role = match args.admin_url {
                Some(_) => role_of_source(config).await,
                None => server.user.clone(),
            };
            let publish = Publish { anyway: args.publish_anyway, by_another: true };
            before::verify(&client, config, admin, &server, &role, publish).await?;
            let found = Found::read(&client, config, &server).await?;
            found.verify(&client, config, args.skip_existing).await?;
            found
        }
        Err(error) => {
            print_warning(&format!("{error}; the SQL is that for an empty database"));
            Found::nothing(config)
        }
    };
    let text = script(config, &found, args.skip_existing)?;
    // `head` closes the pipe early; that is not our failure.
    let _ = std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes());
    Ok(End::Fine)
}

fn script(config: &Config, found: &Found, skip: bool) -> Result<String> {
    const CHECKPOINT: &str = include_str!("../../../sql/query/checkpoint_by_hand.sql");
    let relay = &config.relay;
    let mut text = format!(
        "-- What `watership init` would run for relay {:?} in database {:?}. Nothing was changed.\n\
         -- As a superuser, or as a role with CREATEROLE, REPLICATION and CREATE on the database\n\
         -- that owns the captured tables:  psql -v ON_ERROR_STOP=1 -f FILE\n\n",
        relay.name, relay.sql.database
    );
    if !found.pending.is_empty() {
        text += &migrate::OUTBOX.script(&found.pending);
    }
    if !found.member {
        text += &format!("GRANT watership_relay TO {};\n\n", escape_identifier(&found.user));
    }
    if relay.kind == SourceKind::Poll {
        text += &polling(relay, found, skip);
        return Ok(text + &last(relay));
    }
    let wanted: Vec<TableName> = relay.wanted().iter().map(|t| t.parse()).collect::<Result<_>>()?;
    let publication = &relay.publication;
    match &found.publication {
        None => text += &format!("{};\n\n", create_statement(publication, &wanted)),
        Some(there) => {
            let is_there = |t: &&TableName| there.table(t).is_none();
            let missing: Vec<TableName> = wanted.iter().filter(is_there).cloned().collect();
            if !missing.is_empty() {
                text += &format!("{};\n\n", add_statement(publication, &missing));
            }
        }
    }
    if found.begin == Begin::Neither {
        let slot = escape_literal(&relay.slot);
        text +=
            "-- Before applications write: a row that is older than the slot is never streamed.\n";
        let undo = format!("PERFORM pg_drop_replication_slot({slot});");
        let [before, after] = ["NULL;", &undo].map(|undo| match skip {
            true => String::new(),
            false => guard(relay, "the slot", undo),
        });
        let create = create_slot(config.failover).replace("$1::text", &slot);
        text += &format!("{before}{create};\n\n{after}");
    }
    if !matches!(found.begin, Begin::Both { .. }) {
        let values = [
            ("name", &*escape_literal(&relay.name)),
            ("slot", &escape_literal(&relay.slot)),
            ("publication", &escape_literal(publication)),
        ];
        text += &fill(CHECKPOINT, &values);
        text += "\n";
    }
    Ok(text + &last(relay))
}

/// Aborts the script if there are rows already.
fn guard(relay: &relay::Options, begin: &str, undo: &str) -> String {
    const GUARD: &str = include_str!("../../../sql/query/older_rows_by_hand.sql");
    let table = &relay.outbox.table;
    let message = format!("{table} has rows that are older than {begin}");
    let values =
        [("outbox", &*table.quoted()), ("message", &escape_literal(&message)), ("undo", undo)];
    fill(GUARD, &values) + "\n"
}

/// What a relay that polls needs instead of publication and slot.
fn polling(relay: &relay::Options, found: &Found, skip: bool) -> String {
    const CHECKPOINT: &str = include_str!("../../../sql/query/poll_by_hand.sql");
    let mut text = String::new();
    // Those of a mapped table are the application's to make; init and check ask for them.
    for Index { statement, .. } in found.indexes.iter().filter(|_| !relay.outbox.is_mapped()) {
        text += &format!("{statement};\n\n");
    }
    if found.begin == Begin::Neither {
        if !skip {
            text += &guard(relay, poll::FIRST_POLL, "NULL;");
        }
        text += "-- It begins after what is in the outbox then: existing rows are never sent.\n";
        let table = &relay.outbox.table;
        let mapped = relay.outbox.polled().filter(|_| relay.outbox.is_mapped());
        let or_null =
            |text: Option<String>| text.map_or("NULL".to_owned(), |text| escape_literal(&text));
        let [quoted, order_by, xid] = match mapped {
            Some(polled) => [polled.table.quoted(), polled.order_by, polled.xid].map(Some),
            None => [None, None, None],
        };
        let values = [
            ("name", &*escape_literal(&relay.name)),
            ("outbox", &escape_literal(&table.to_string())),
            ("mapped", &or_null(quoted)),
            ("order", &or_null(order_by)),
            ("transaction", &or_null(xid)),
        ];
        text += &fill(CHECKPOINT, &values);
        text += "\n";
    }
    text
}

fn last(relay: &relay::Options) -> String {
    let grants = match (relay.outbox.is_mapped(), relay.kind) {
        (false, _) => migrate::GRANT,
        (true, SourceKind::Wal) => migrate::GRANT_MESSAGES,
        (true, SourceKind::Poll) => {
            return format!(
                "-- `watership check` prints the statements that {} needs to be polled.\n\
                 -- Exchanges, queues and bindings are declared by `watership run`.\n",
                relay.outbox.table
            );
        }
    };
    format!(
        "{grants}\n-- Then: GRANT watership_app TO the role of your application. Exchanges,\n\
         -- queues and bindings are declared by `watership run`.\n",
    )
}
