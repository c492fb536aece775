//! `watership inbox`: the consumer's side. Needs no configuration file, only the database.

use clap::Subcommand;
use serde::Serialize;
use tokio::sync::watch;
use tokio_postgres::Client;

use super::{End, Out, print_warning};
use crate::config::load;
use crate::error::{Error, Result};
use crate::pg::client::{SqlConnection, sql};
use crate::pg::connect::Options;
use crate::pg::migrate::INBOX;
use crate::pg::sqlstate::{INSUFFICIENT_PRIVILEGE, postgres_error};
use crate::secret::Secret;

pub(super) mod check;
mod parked;
mod torture;

/// Options of `inbox`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    watership inbox install --url 'postgres://postgres:${PW}@127.0.0.1/billing'\n  \
    watership inbox parked --url 'postgres://billing:${PW}@127.0.0.1/billing' list\n\n\
    The schema watership_inbox lives in the database of the consumer; see docs/consuming.md.")]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Install the schema watership_inbox, or bring it up to date. May be run again.
    Install {
        #[command(flatten)]
        database: Database,
        /// Print the SQL of the steps that are missing, and change nothing.
        #[arg(long)]
        print_sql: bool,
    },
    /// Advance the deduplication window once. The helpers do it by themselves, once an hour.
    Maintain {
        #[command(flatten)]
        database: Database,
    },
    /// Show what the inbox remembers, and what is parked.
    Status {
        #[command(flatten)]
        database: Database,
    },
    /// List, show, retry or discard what a consumer has parked.
    Parked {
        #[command(flatten)]
        database: Database,
        #[command(subcommand)]
        command: parked::Command,
    },
    /// Kill a consumer at random, and judge whether each effect happened once and in order.
    Torture(torture::Args),
}

/// The option of these commands that names the database.
const URL: &str = "--url";

/// Where the inbox is.
#[derive(Debug, clap::Args)]
struct Database {
    /// The consumer's database. ${NAME} and ${file:/path} are filled in.
    #[arg(long, value_name = "URL")]
    url: String,
}

impl Database {
    /// The options of the URL, and the URL with its variables filled in.
    /// `option` is the name of the option that has the URL.
    fn options(&self, option: &str) -> Result<(Options, String)> {
        let filled = load::fill_in_url(&self.url).map_err(|e| e.context(option))?;
        let options = Options::parse(&Secret::new(&*filled)).map_err(|e| e.context(option))?;
        if options.password.is_some() && self.url == filled {
            print_warning(&format!(
                "a password on the command line is visible to every user of this machine; \
                 use '${{NAME}}' or '${{file:/path}}' in {option}"
            ));
        }
        Ok((options, filled))
    }

    async fn connect(&self, option: &str) -> Result<SqlConnection> {
        sql(&self.options(option)?.0).await
    }

    /// A connection to a database that has the inbox.
    async fn inbox(&self, option: &str) -> Result<SqlConnection> {
        let connection = self.connect(option).await?;
        let there = "SELECT has_schema_privilege(n.oid, 'USAGE'), current_database()::text, \
            current_user::text, format('GRANT watership_consumer TO %I', current_user) \
            FROM (SELECT pg_catalog.to_regnamespace('watership_inbox')::oid) AS n (oid)";
        let row = connection.client.query_one(there, &[]).await.map_err(postgres_error)?;
        let [database, user, grant] = [1, 2, 3].map(|at| row.get::<_, String>(at));
        let Some(allowed) = row.get::<_, Option<bool>>(0) else {
            return Err(Error::refused(format!("database {database:?} has no inbox"))
                .hint("install it: watership inbox install --url …"));
        };
        if !allowed {
            let text = format!("user {user:?} may not use the inbox of database {database:?}");
            return Err(Error::refused(text).hint(format!("run as a superuser: {grant}")));
        }
        Ok(connection)
    }
}

pub(super) async fn execute(
    args: &Args,
    watch_signals: impl FnOnce() -> Result<watch::Receiver<bool>>,
    out: Out,
) -> Result<End> {
    match &args.command {
        Command::Install { database, print_sql: true } => print_sql(database).await,
        Command::Install { database, print_sql: false } => install(database, out).await,
        Command::Maintain { database } => maintain(database, out).await.map_err(granting),
        Command::Status { database } => status(database, out).await.map_err(granting),
        Command::Parked { database, command } => {
            let SqlConnection { client, closed: _closed } = database.inbox(URL).await?;
            parked::execute(&client, command, out).await.map_err(granting)
        }
        Command::Torture(args) => torture::execute(args, watch_signals, out).await,
    }
}

/// The hint of the table is for the relay.
fn granting(error: Error) -> Error {
    match error.sqlstate() {
        Some(INSUFFICIENT_PRIVILEGE) if error.hint_text().is_none_or(|h| !h.contains("GRANT")) => {
            error.hint("run as a superuser: GRANT watership_consumer TO the user of --url")
        }
        _ => error,
    }
}

#[derive(Serialize)]
struct Installed {
    applied: Vec<&'static str>,
    newest: &'static str,
}

async fn install(database: &Database, out: Out) -> Result<End> {
    let SqlConnection { mut client, closed: _closed } = database.connect(URL).await?;
    let applied = match INBOX.apply(&mut client).await {
        Ok(applied) => applied,
        Err(error) => return Err(installing(&client, error).await),
    };
    let applied: Vec<_> = applied.iter().map(|one| one.name).collect();
    match &*applied {
        [] => out.line(&format!("exists  schema watership_inbox, at {}", INBOX.newest())),
        names => out.line(&format!("created schema watership_inbox: {}", names.join(", "))),
    }
    out.line("\nNext: give the role to the consumer's user (GRANT watership_consumer TO …).");
    out.data(&Installed { applied, newest: INBOX.newest() })?;
    Ok(End::Fine)
}

/// What the user lacks to install. Roles belong to the cluster: the owner may be there already.
async fn installing(client: &Client, error: Error) -> Error {
    if error.sqlstate() != Some(INSUFFICIENT_PRIVILEGE) {
        return error;
    }
    let owner = INBOX.owner;
    let probe = format!("SET ROLE {owner}; RESET ROLE");
    let probed = client.batch_execute(&probe).await.map_err(postgres_error);
    if probed.is_err_and(|e| e.sqlstate() == Some(INSUFFICIENT_PRIVILEGE)) {
        let grant = format!("SELECT format('GRANT {owner} TO %I', current_user)");
        if let Ok(row) = client.query_one(&grant, &[]).await {
            return error.hint(format!("run as a superuser: {}", row.get::<_, String>(0)));
        }
    }
    error.hint(
        "install as a superuser, or as a role with CREATEROLE and with CREATE on the database",
    )
}

async fn print_sql(database: &Database) -> Result<End> {
    let SqlConnection { client, closed: _closed } = database.connect(URL).await?;
    let pending = match INBOX.pending(&client).await {
        Ok(pending) => pending,
        Err(error) => return Err(installing(&client, error).await),
    };
    let text = match &*pending {
        [] => "-- nothing is missing\n".to_owned(),
        pending => INBOX.script(pending),
    };
    // Data for psql, whatever --json says.
    Out { json: false }.line(text.trim_end());
    Ok(End::Fine)
}

#[derive(Serialize)]
struct Maintained {
    done: Vec<String>,
    postponed: Vec<String>,
    more: bool,
}

async fn maintain(database: &Database, out: Out) -> Result<End> {
    const SQL: &str = include_str!("../../sql/query/inbox_maintain.sql");
    let SqlConnection { client, closed: _closed } = database.inbox(URL).await?;
    let row = client.query_one(SQL, &[]).await.map_err(postgres_error)?;
    let result = Maintained { done: row.get(0), postponed: row.get(1), more: row.get(2) };
    if result.done.is_empty() && result.postponed.is_empty() {
        out.line("nothing to do");
    }
    result.done.iter().for_each(|what| out.line(what));
    result.postponed.iter().for_each(|what| out.line(&format!("postponed: {what}")));
    if result.more {
        out.line("there may be more to do: run it again");
    }
    out.data(&result)?;
    Ok(End::Fine)
}

/// What the inbox remembers.
#[derive(Debug, Serialize)]
struct Remembered {
    window_days: i32,
    /// Claims of earlier days are refused.
    first_day: String,
    last_day: String,
    /// Days until claims fail if nobody calls `maintain`.
    days_left: i32,
    parked: i64,
    /// Seconds since the last attempt that did not end.
    unfinished_seconds: f64,
}

async fn remembered(client: &Client) -> Result<Remembered> {
    const SQL: &str = include_str!("../../sql/query/inbox_remembered.sql");
    let row = client.query_one(SQL, &[]).await.map_err(postgres_error)?;
    Ok(Remembered {
        window_days: row.get(0),
        first_day: row.get(1),
        last_day: row.get(2),
        days_left: row.get(3),
        parked: row.get(4),
        unfinished_seconds: row.get(5),
    })
}

/// With fewer days left nobody has called `maintain` for weeks.
const DAYS_LEFT_MIN: i32 = 3;
const MAINTAIN_HINT: &str = "run a helper, or `watership inbox maintain` once an hour";

impl Remembered {
    /// Claims fail soon, or already.
    fn problem(&self) -> Option<String> {
        let text = "watership_inbox.maintain() is not being called";
        (self.days_left < DAYS_LEFT_MIN)
            .then(|| format!("claims fail for messages after {}: {text}", self.last_day))
    }
}

async fn status(database: &Database, out: Out) -> Result<End> {
    let SqlConnection { client, closed: _closed } = database.inbox(URL).await?;
    let now = remembered(&client).await?;
    let Remembered { window_days, first_day, last_day, parked, .. } = &now;
    out.line(&format!("window       {window_days} days: messages from {first_day} on"));
    out.line(&format!("slots        up to {last_day}"));
    out.line(&format!("parked       {parked} messages; see: watership inbox parked list"));
    let problem = now.problem();
    if let Some(problem) = &problem {
        out.line(&format!("problem      {problem}; {MAINTAIN_HINT}"));
    }
    out.data(&now)?;
    Ok(if problem.is_none() { End::Fine } else { End::Failed })
}
