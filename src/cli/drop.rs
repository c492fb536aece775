//! `watership drop`: removes what `init` made in the database, all or nothing. The slot cannot be
//! restored by a rollback, so it goes last, when every lock is held and nothing else can fail.

use std::time::Duration;

use serde::Serialize;
use tokio_postgres::{Client, GenericClient, Transaction};

use super::{End, Out, init};
use crate::config::Config;
use crate::error::{Error, Kind, Result};
use crate::pg::client::{SqlConnection, sql};
use crate::pg::connect::Settings;
use crate::pg::publication::{drop_publication, read_publication};
use crate::pg::slot::{SlotState, drop_slot, end_reader, read_slot};
use crate::pg::sqlstate::{DEPENDENT_OBJECTS, LOCK_NOT_AVAILABLE, OBJECT_IN_USE, postgres_error};
use crate::pg::unnamed;
use crate::source::SourceKind;

/// Options of `drop`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  watership --config shop.toml drop          # shows what would go\n  \
    watership --config shop.toml drop --yes --admin-url 'postgres://postgres:${PW}@127.0.0.1/shop'\
    \n\nEvents that are in the outbox, in the slot or parked are gone with it. Roles are kept, \
    because\nthey belong to the cluster; exchanges and queues are kept, too. It may be run again.\n\
    Exit codes: 0 removed, or nothing is there; 1 refused, or --yes is missing."
)]
pub(super) struct Args {
    /// Remove it. Without this, only show what would be removed.
    #[arg(long)]
    yes: bool,
    /// Also end the session of a relay that is running.
    #[arg(long)]
    force: bool,
    /// The role that removes the objects: their owner or a superuser. ${NAME} and ${file:/path} are
    /// filled in. Default: source.url.
    #[arg(long, value_name = "URL")]
    admin_url: Option<String>,
}

/// One thing that goes, or has gone.
#[derive(Debug, Serialize)]
struct Part {
    what: &'static str,
    name: String,
    removed: bool,
}

/// What there is to remove.
struct Plan {
    slot: Option<SlotState>,
    /// The publication, with the tables in it.
    publication: Option<String>,
    /// The rows of this relay.
    relay: bool,
    /// Whether the schema is there.
    schema: bool,
    /// Other relays that have a checkpoint; they keep the schema.
    others: Vec<String>,
}

pub(super) async fn execute(config: &Config, args: &Args, out: Out) -> Result<End> {
    let admin = init::admin_options(config, args.admin_url.as_deref())?;
    let SqlConnection { mut client, closed: _closed } = sql(&admin).await?;
    if admin.settings == Settings::Relay {
        // Do not wait for a standby that is down, or for the relay that is being dropped.
        let settings = "SET synchronous_commit = local";
        client.batch_execute(settings).await.map_err(postgres_error)?;
    }
    let plan = plan(&client, config).await?;
    let mut parts = parts(&plan, config);
    if parts.is_empty() {
        out.line("nothing of this relay is in the database");
        out.data(&serde_json::json!({ "parts": parts }))?;
        return Ok(End::Fine);
    }
    may_remove(&client, &plan, config).await?;
    let reader = plan.slot.as_ref().and_then(|slot| slot.active_pid);
    if !args.yes {
        for part in &parts {
            out.line(&format!("would remove {:<12} {}", part.what, part.name));
        }
        keeps(&plan, out);
        if let Some(pid) = reader {
            out.line(&format!("the slot is in use by pid {pid}: stop the relay first"));
        }
        out.line("\nNothing was changed. Pass --yes to remove it.");
        out.data(&serde_json::json!({ "parts": parts }))?;
        return Ok(End::Failed);
    }
    if let Some(pid) = reader.filter(|_| !args.force) {
        let text = format!("slot {:?} is in use by pid {pid}", config.relay.slot);
        return Err(Error::new(Kind::Busy, text)
            .hint("stop the relay first, or pass --force to end its session"));
    }
    remove(&mut client, config, &plan, args.force).await?;
    for what in ["slot", "publication", "relay", "schema"] {
        done(&mut parts, what, out);
    }
    keeps(&plan, out);
    out.data(&serde_json::json!({ "parts": parts }))?;
    Ok(End::Fine)
}

async fn plan(client: &Client, config: &Config) -> Result<Plan> {
    const RELAYS: &str = include_str!("../../sql/query/drop_relays.sql");
    let relay = &config.relay;
    let there = "SELECT EXISTS (SELECT FROM pg_catalog.pg_namespace WHERE nspname = 'watership'), \
        EXISTS (SELECT FROM pg_catalog.pg_class AS c \
            JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace \
            WHERE n.nspname = 'watership' AND c.relname = 'checkpoint'), current_database()::text";
    let row = unnamed::query_one(client, there, &[]).await.map_err(postgres_error)?;
    let (schema, checkpoints, database): (bool, bool, String) =
        (row.get(0), row.get(1), row.get(2));
    let relays = match checkpoints {
        true => unnamed::query(client, RELAYS, &[]).await.map_err(postgres_error)?,
        false => Vec::new(),
    };
    let (mut others, mut mine, mut shared) = (Vec::new(), false, false);
    for row in &relays {
        let (name, slot): (String, Option<String>) = (row.get(0), row.get(1));
        if name == relay.name {
            mine = true;
            continue;
        }
        if slot.as_ref() == Some(&relay.slot) && relay.kind == SourceKind::Wal {
            let text =
                format!("slot {:?} belongs to relay {name:?}, not to {:?}", relay.slot, relay.name);
            return Err(Error::config(text).hint("set name and source.slot to those of the relay"));
        }
        shared |= row.get::<_, Option<&str>>(2) == Some(&relay.publication);
        others.push(name);
    }
    let (schema, relay_is_there) = (schema && others.is_empty(), mine);
    if relay.kind == SourceKind::Poll {
        let (slot, publication) = (None, None);
        return Ok(Plan { slot, publication, relay: relay_is_there, schema, others });
    }
    let slot = read_slot(client, &relay.slot).await?;
    let is_ours = |slot: &SlotState| {
        slot.plugin.as_deref() == Some("pgoutput") && slot.database.as_ref() == Some(&database)
    };
    if let Some(slot) = slot.as_ref().filter(|slot| !is_ours(slot)) {
        let text = format!("slot {:?} is not one of Watership's ({})", slot.name, slot.kind());
        return Err(Error::refused(text).hint("set source.slot to the slot of this relay"));
    }
    let publication = match shared {
        true => None,
        false => read_publication(client, &relay.publication).await?.map(|publication| {
            let names: Vec<_> = publication.tables.iter().map(|t| t.table.to_string()).collect();
            format!("{} for {}", publication.name, names.join(", "))
        }),
    };
    Ok(Plan { slot, publication, relay: relay_is_there, schema, others })
}

/// Refuses a role that could remove the slot and not the rest.
async fn may_remove(client: &Client, plan: &Plan, config: &Config) -> Result<()> {
    let sql = "SELECT current_user::text, \
        coalesce((SELECT pg_has_role(nspowner, 'USAGE') FROM pg_catalog.pg_namespace \
            WHERE nspname = 'watership'), true), \
        coalesce((SELECT pg_has_role(pubowner, 'USAGE') FROM pg_catalog.pg_publication \
            WHERE pubname = $1::text), true)";
    let row = unnamed::query_one(client, sql, &[&config.relay.publication])
        .await
        .map_err(postgres_error)?;
    let lacking = match (row.get(1), row.get(2)) {
        (false, _) if plan.schema || plan.relay => "the schema watership",
        (_, false) if plan.publication.is_some() => "the publication",
        (_, _) => return Ok(()),
    };
    let text = format!("role {:?} does not own {lacking}", row.get::<_, String>(0));
    Err(Error::refused(text).hint("set --admin-url to a URL of a superuser or the owner"))
}

fn parts(plan: &Plan, config: &Config) -> Vec<Part> {
    let slot = plan
        .slot
        .as_ref()
        .map(|slot| format!("{}, {} MiB of WAL behind", slot.name, slot.lag_bytes >> 20));
    let relay = plan.relay.then(|| format!("{}: checkpoint and parked rows", config.relay.name));
    let schema = plan.schema.then(|| "watership: outbox, emit and all else in it".to_owned());
    let all = [
        ("slot", slot),
        ("publication", plan.publication.clone()),
        ("relay", relay),
        ("schema", schema),
    ];
    let part = |(what, name): (_, Option<String>)| Some(Part { what, name: name?, removed: false });
    all.into_iter().filter_map(part).collect()
}

/// Says what stays.
fn keeps(plan: &Plan, out: Out) {
    if !plan.others.is_empty() {
        out.line(&format!("kept: the schema, which other relays use ({})", plan.others.join(", ")));
    }
    out.line("kept: the roles watership_owner, watership_app and watership_relay, and the broker");
}

fn done(parts: &mut [Part], what: &str, out: Out) {
    for part in parts.iter_mut().filter(|part| part.what == what) {
        part.removed = true;
        out.line(&format!("removed {:<12} {}", part.what, part.name));
    }
}

/// Tries of `--force` against a relay that connects again and again.
const TRIES: u32 = 200;
const BETWEEN: Duration = Duration::from_millis(20);

async fn remove_slot(client: &impl GenericClient, name: &str, force: bool) -> Result<()> {
    for _ in 0..TRIES {
        if force {
            end_reader(client, name).await?;
        }
        // Checked first, because an error would abort the transaction; now only a reader that
        // connects in between can cause one.
        match read_slot(client, name).await? {
            Some(slot) if force && slot.active_pid.is_some() => tokio::time::sleep(BETWEEN).await,
            Some(_) => return drop_slot(client, name).await,
            None => return Ok(()),
        }
    }
    Err(Error::new(Kind::Busy, format!("slot {name:?} is read again and again"))
        .hint("stop the relay first"))
}

async fn remove(client: &mut Client, config: &Config, plan: &Plan, force: bool) -> Result<()> {
    let tx = client.transaction().await.map_err(postgres_error)?;
    let removed = remove_in(&tx, config, plan, force).await;
    let ended = match removed {
        Ok(()) => tx.commit().await.map_err(postgres_error),
        Err(error) => {
            drop(tx);
            return Err(kept(client, error).await);
        }
    };
    // A slot is gone at once, whatever becomes of the transaction.
    let is_gone = if plan.slot.is_some() { "the slot is gone; " } else { "" };
    ended.map_err(|e| {
        let hint = e.hint_or_kind().to_owned();
        e.hint(format!("{hint}; {is_gone}run `watership drop` again for the rest"))
    })
}

async fn remove_in(tx: &Transaction<'_>, config: &Config, plan: &Plan, force: bool) -> Result<()> {
    const RELAY: &str = include_str!("../../sql/query/drop_relay.sql");
    const SCHEMA: &str = include_str!("../../sql/query/drop_schema.sql");
    if plan.publication.is_some() {
        drop_publication(tx, &config.relay.publication).await?;
    }
    if plan.relay && !plan.schema {
        unnamed::execute(tx, RELAY, &[&config.relay.name]).await.map_err(postgres_error)?;
    }
    if plan.schema {
        let failed = |e| postgres_error(e).context("dropping the schema watership");
        tx.batch_execute(SCHEMA).await.map_err(failed)?;
    }
    if plan.slot.is_some() {
        remove_slot(tx, &config.relay.slot, force).await?;
    }
    Ok(())
}

/// The error, with what to do: whatever it was, everything is still there.
async fn kept(client: &Client, error: Error) -> Error {
    const LOCKED: &str = "SELECT string_agg(DISTINCT l.pid::text, ', ') \
        FROM pg_catalog.pg_locks AS l \
        JOIN pg_catalog.pg_class AS c ON c.oid = l.relation \
        WHERE c.relnamespace = to_regnamespace('watership') AND l.pid <> pg_backend_pid() \
            AND l.database = (SELECT oid FROM pg_catalog.pg_database \
                WHERE datname = current_database())";
    let hint = match error.sqlstate() {
        Some(LOCK_NOT_AVAILABLE) => {
            let pids = unnamed::query_one(client, LOCKED, &[]).await;
            let pids = pids.ok().and_then(|row| row.try_get::<_, Option<String>>(0).ok().flatten());
            let pids = pids.map_or(String::new(), |pids| format!(" (pid {pids})"));
            format!("wait for the transactions that use these tables{pids}, or end them")
        }
        Some(DEPENDENT_OBJECTS) => "drop or move what depends on it".to_owned(),
        Some(OBJECT_IN_USE) => "stop the relay, or pass --force".to_owned(),
        _ => error.hint_or_kind().to_owned(),
    };
    error.hint(format!("{hint}, then run `watership drop` again; nothing was removed"))
}
