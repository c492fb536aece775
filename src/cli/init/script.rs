//! `init --print-sql`: what `init` would run, for somebody who runs it by hand.

use postgres_protocol::escape::{escape_identifier, escape_literal};
use tokio_postgres::Client;

use super::role_of_source;
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
use crate::pg::slot::{create_statement as create_slot, read_slot};
use crate::pg::sqlstate::postgres_error;
use crate::pg::statement::fill;
use crate::pg::unnamed;
use crate::relay;
use crate::relay::check::polling::{self, Index, missing_indexes};
use crate::relay::checkpoint;
use crate::source::SourceKind;
use crate::source::outbox::Polled;

/// What is there already.
#[derive(Default)]
struct Found {
    pending: Vec<Migration>,
    /// The role that a connection to source.url gets.
    user: String,
    member: bool,
    publication: Option<Publication>,
    slot: bool,
    checkpoint: bool,
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
        Self { pending, user, indexes, ..Self::default() }
    }

    async fn read(client: &Client, config: &Config) -> Result<Self> {
        let pending = migrate::OUTBOX.pending(client).await?;
        let installed = pending.len() < migrate::OUTBOX.migrations.len();
        let member = "SELECT coalesce(bool_or(pg_has_role(u.oid, g.oid, 'USAGE')), false) \
            FROM pg_catalog.pg_roles AS u, pg_catalog.pg_roles AS g \
            WHERE u.rolname = $1::text AND g.rolname = 'watership_relay'";
        let user = role_of_source(config).await;
        let member =
            unnamed::query_one(client, member, &[&user]).await.map_err(postgres_error)?.get(0);
        let name = &config.relay.name;
        Ok(Self {
            pending,
            user,
            member,
            publication: read_publication(client, &config.relay.publication).await?,
            slot: read_slot(client, &config.relay.slot).await?.is_some(),
            checkpoint: installed && checkpoint::read(client, name).await?.is_some(),
            indexes: match installed {
                true => {
                    let there = read_indexes(client, &TableName::outbox()).await?;
                    missing_indexes(&Polled::own(), &there, true)
                }
                false => own_indexes(),
            },
        })
    }
}

/// Prints it, and changes nothing.
///
/// # Errors
/// Where the configuration names no table, or the server's; a server that cannot be reached is
/// taken for one with an empty database.
pub(super) async fn print(config: &Config, admin: &Options) -> Result<End> {
    let found = match sql(admin).await {
        Ok(SqlConnection { client, closed: _closed }) => Found::read(&client, config).await?,
        Err(error) => {
            print_warning(&format!("{error}; the SQL is that for an empty database"));
            Found::nothing(config)
        }
    };
    let text = script(config, &found)?;
    // `head` closes the pipe early; that is not our failure.
    let _ = std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes());
    Ok(End::Fine)
}

fn script(config: &Config, found: &Found) -> Result<String> {
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
        text += &polling(relay, found);
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
    if !found.slot {
        text +=
            "-- Before applications write: a row that is older than the slot is never streamed.\n";
        text += &create_slot(config.failover).replace("$1::text", &escape_literal(&relay.slot));
        text += ";\n\n";
    }
    if !found.checkpoint {
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

/// What a relay that polls needs instead of publication and slot.
fn polling(relay: &relay::Options, found: &Found) -> String {
    const CHECKPOINT: &str = include_str!("../../../sql/query/poll_by_hand.sql");
    let mut text = String::new();
    // Those of a mapped table are the application's to make; init and check ask for them.
    for Index { statement, .. } in found.indexes.iter().filter(|_| !relay.outbox.is_mapped()) {
        text += &format!("{statement};\n\n");
    }
    if !found.checkpoint {
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
