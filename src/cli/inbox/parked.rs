//! `watership inbox parked`: what a consumer could not handle. Nothing is handled from here: keys
//! are marked, and the running consumer does the rest, in their order.

use clap::Subcommand;
use clap::builder::NonEmptyStringValueParser;
use serde::Serialize;
use tokio_postgres::Client;
use tokio_postgres::types::ToSql;

use crate::cli::parked::{age, hex, print_content};
use crate::cli::printable::one_line;
use crate::cli::{End, Out};
use crate::error::{Error, Result};
use crate::pg::sqlstate::postgres_error;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List parked keys, the oldest first.
    List {
        /// Only this consumer.
        #[arg(long)]
        consumer: Option<String>,
        /// Maximum number of keys.
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(i64).range(1..))]
        limit: i64,
    },
    /// Show one message with its body.
    Show {
        #[arg(long)]
        consumer: String,
        /// The id in the list.
        message_id: String,
    },
    /// Have the consumer handle parked messages again, each key in its order.
    #[command(group = clap::ArgGroup::new("which").required(true).multiple(false)
        .args(["message_id", "key", "all"]))]
    Retry {
        #[arg(long)]
        consumer: String,
        /// The key of this message.
        message_id: Option<String>,
        /// This key, such as order/42.
        #[arg(long, allow_hyphen_values = true)]
        key: Option<String>,
        /// All keys of the consumer.
        #[arg(long)]
        all: bool,
        /// Also handle messages that came after the window: if they were handled before they came
        /// here, they are handled twice.
        #[arg(long)]
        beyond_window: bool,
    },
    /// Give messages up: they count as handled from now on. What is parked behind them stays.
    #[command(group = clap::ArgGroup::new("which").required(true).multiple(false)
        .args(["message_id", "key", "all"]))]
    Discard {
        #[arg(long)]
        consumer: String,
        /// This message.
        message_id: Option<String>,
        /// All messages of this key.
        #[arg(long, allow_hyphen_values = true)]
        key: Option<String>,
        /// All messages of the consumer.
        #[arg(long)]
        all: bool,
        /// Why; stored with the messages.
        #[arg(long, value_parser = NonEmptyStringValueParser::new())]
        reason: String,
    },
}

#[derive(Serialize)]
struct Listed {
    consumer: String,
    key: Option<String>,
    message_id: String,
    reason: String,
    error: Option<String>,
    attempts: i32,
    /// Messages of the key, this one included.
    waiting: i64,
    age_seconds: f64,
    retrying: bool,
}

#[derive(Serialize)]
struct Shown {
    consumer: String,
    message_id: String,
    key: Option<String>,
    reason: String,
    error: Option<String>,
    last_error: Option<String>,
    attempts: i32,
    parked_at: String,
    occurred_at: Option<String>,
    properties: serde_json::Value,
    body: Option<String>,
    body_hex: Option<String>,
}

#[derive(Serialize)]
struct Marked {
    /// Keys that the consumer will retry.
    keys: i64,
    /// Keys that were left alone because their first message arrived after the deduplication window
    /// had passed.
    beyond_window: i64,
}

#[derive(Serialize)]
struct Discarded {
    messages: i64,
}

pub(super) async fn execute(client: &Client, command: &Command, out: Out) -> Result<End> {
    match command {
        Command::List { consumer, limit } => list(client, consumer.as_deref(), *limit, out).await?,
        Command::Show { consumer, message_id } => show(client, consumer, message_id, out).await?,
        Command::Retry { consumer, message_id, key, all, beyond_window } => {
            const RETRY: &str = include_str!("../../../sql/query/inbox_parked_retry.sql");
            const LEFT: &str = include_str!("../../../sql/query/inbox_parked_left.sql");
            known(client, consumer).await?;
            let which: &[&(dyn ToSql + Sync)] = &[consumer, key, message_id, all, beyond_window];
            let keys = client.query_one(RETRY, which).await.map_err(postgres_error)?;
            let left = client.query_one(LEFT, &which[..4]).await.map_err(postgres_error)?;
            let (keys, left): (i64, i64) = (keys.get(0), left.get(0));
            out.line(&format!("the consumer will retry {keys} keys"));
            if left > 0 {
                out.line(&format!(
                    "{left} keys were left alone: their first message arrived after the \
                     deduplication window had passed, so it may have been handled before; \
                     --beyond-window retries them"
                ));
            }
            out.data(&Marked { keys, beyond_window: left })?;
            if keys == 0 && left == 0 {
                return Err(nothing(consumer));
            }
        }
        Command::Discard { consumer, message_id, key, all, reason } => {
            const SQL: &str = include_str!("../../../sql/query/inbox_parked_discard.sql");
            known(client, consumer).await?;
            let messages = if *all {
                discard_all(client, consumer, reason).await?
            } else {
                let messages = client.query_one(SQL, &[consumer, reason, key, message_id]).await;
                messages.map_err(postgres_error)?.get(0)
            };
            if messages == 0 {
                return Err(nothing(consumer));
            }
            out.line(&format!("discarded {messages} messages"));
            out.data(&Discarded { messages })?;
        }
    }
    Ok(End::Fine)
}

/// An error for a name that no consumer has registered.
async fn known(client: &Client, consumer: &str) -> Result<()> {
    const SQL: &str = include_str!("../../../sql/query/inbox_consumers.sql");
    let row = client.query_one(SQL, &[&consumer]).await.map_err(postgres_error)?;
    let (is_known, names): (bool, String) = (row.get(0), row.get(1));
    if is_known {
        return Ok(());
    }
    let error = Error::refused(format!("the inbox knows no consumer {consumer:?}"));
    Err(error.hint(match &*names {
        "" => "no consumer has started yet".to_owned(),
        names => format!("it knows these: {names}"),
    }))
}

/// How many messages the consumer has parked, and the number of the newest.
async fn count(client: &Client, consumer: &str) -> Result<(i64, i64)> {
    const SQL: &str = include_str!("../../../sql/query/inbox_parked_count.sql");
    let row = client.query_one(SQL, &[&consumer]).await.map_err(postgres_error)?;
    Ok((row.get(0), row.get(1)))
}

pub(super) async fn is_parked(client: &Client, consumer: &str) -> Result<bool> {
    Ok(count(client, consumer).await?.0 > 0)
}

/// Gives up all that is parked by now, and returns how many messages that were.
pub(super) async fn discard_all(client: &Client, consumer: &str, reason: &str) -> Result<i64> {
    const SQL: &str = include_str!("../../../sql/query/inbox_parked_discard_all.sql");
    let (mut found, newest) = count(client, consumer).await?;
    let mut discarded = 0;
    while found > 0 {
        let row = client.query_one(SQL, &[&consumer, &reason, &newest]).await;
        let row = row.map_err(postgres_error)?;
        found = row.get(0);
        discarded += row.get::<_, i64>(1);
    }
    Ok(discarded)
}

fn nothing(consumer: &str) -> Error {
    Error::refused(format!("consumer {consumer:?} has no such parked message"))
        .hint("`watership inbox parked list` lists what is parked")
}

async fn list(client: &Client, consumer: Option<&str>, limit: i64, out: Out) -> Result<()> {
    const SQL: &str = include_str!("../../../sql/query/inbox_parked_list.sql");
    let rows = client.query(SQL, &[&consumer, &limit]).await.map_err(postgres_error)?;
    let listed: Vec<_> = rows
        .iter()
        .map(|row| Listed {
            consumer: row.get(0),
            key: row.get(1),
            message_id: row.get(2),
            reason: row.get(3),
            error: row.get(4),
            attempts: row.get(5),
            waiting: row.get(6),
            age_seconds: row.get(7),
            retrying: row.get(8),
        })
        .collect();
    if listed.is_empty() {
        out.line("nothing is parked");
    } else {
        out.line(&format!(
            "{:<16} {:<24} {:<36} {:<13} {:>7} {:>8}  error",
            "consumer", "key", "first message", "reason", "waiting", "age"
        ));
    }
    for row in &listed {
        let key = row.key.as_deref().unwrap_or("-");
        let reason = if row.retrying { "retrying" } else { &row.reason };
        let error = row.error.as_deref().unwrap_or_default();
        let [consumer, key, id, reason, error] =
            [&row.consumer, key, &row.message_id, reason, error].map(one_line);
        out.line(&format!(
            "{consumer:<16} {key:<24} {id:<36} {reason:<13} {:>7} {:>8}  {error:.100}",
            row.waiting,
            age(row.age_seconds)
        ));
    }
    out.data(&listed)
}

async fn show(client: &Client, consumer: &str, message_id: &str, out: Out) -> Result<()> {
    const SQL: &str = include_str!("../../../sql/query/inbox_parked_show.sql");
    let row = client.query_opt(SQL, &[&consumer, &message_id]).await.map_err(postgres_error)?;
    let Some(row) = row else {
        known(client, consumer).await?;
        return Err(nothing(consumer));
    };
    let (properties, body): (String, Vec<u8>) = (row.get(7), row.get(8));
    let text = std::str::from_utf8(&body).ok();
    let shown = Shown {
        consumer: consumer.to_owned(),
        message_id: message_id.to_owned(),
        key: row.get(0),
        reason: row.get(1),
        error: row.get(2),
        last_error: row.get(3),
        attempts: row.get(4),
        parked_at: row.get(5),
        occurred_at: row.get(6),
        properties: serde_json::from_str(&properties).unwrap_or_default(),
        body: text.map(str::to_owned),
        body_hex: text.is_none().then(|| hex(&body)),
    };
    let line = |name: &str, value: &str| out.line(&format!("{name:<12} {}", one_line(value)));
    line("consumer", consumer);
    line("message id", message_id);
    line("reason", &shown.reason);
    line("retries", &shown.attempts.to_string());
    line("parked", &shown.parked_at);
    let optional = [
        ("key", &shown.key),
        ("occurred", &shown.occurred_at),
        ("error", &shown.error),
        ("last retry", &shown.last_error),
    ];
    for (name, value) in optional {
        value.iter().for_each(|value| line(name, value));
    }
    let bytes = |text: &str| i32::try_from(text.len()).unwrap_or(i32::MAX);
    print_content("properties", &properties, properties.len(), bytes(&properties), out);
    let size = i32::try_from(body.len()).unwrap_or(i32::MAX);
    match (&shown.body, &shown.body_hex) {
        (Some(text), _) => print_content("body", text, body.len(), size, out),
        (_, Some(digits)) => print_content("body (hex)", digits, body.len(), size, out),
        (None, None) => {}
    }
    out.data(&shown)
}
