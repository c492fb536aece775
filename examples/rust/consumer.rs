//! A consumer: inserts a row for each message, once, in the order of its key.
//!
//! It reads `AMQP_URL`, `DATABASE_URL`, `QUEUE` (or several, separated by commas), `CONSUMER` and
//! `ORDERED` from its environment, and runs until SIGTERM or Ctrl-C. This is also what
//! `watership inbox torture` kills:
//!
//! ```text
//! cargo run --example inbox_consumer --no-default-features --features inbox
//! ```

use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use watership::inbox::{HandlerError, Inbox, Message, Transaction};

/// The effect: one row. It commits together with the claim of the message, or not at all.
async fn handle(message: &Message, tx: &Transaction<'_>) -> Result<(), HandlerError> {
    let body: Value = serde_json::from_slice(&message.body).map_err(HandlerError::permanent)?;
    let (Some(key), Some(number)) = (body["key"].as_str(), body["number"].as_i64()) else {
        return Err(HandlerError::permanent("the body has no key or no number"));
    };
    let insert = "INSERT INTO watership_torture.effect (message_id, key, number) \
                  VALUES ($1, $2, $3::text::bigint)";
    tx.execute(insert, &[&message.id, &key, &number.to_string()]).await?;
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let setting = |name: &str| std::env::var(name).map_err(|e| format!("{name}: {e}"));
    let mut terminated = signal(SignalKind::terminate())?;
    let (stopping, stop) = watch::channel(false);
    tokio::spawn(async move {
        tokio::select! {
            _ = terminated.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
        stopping.send_replace(true);
    });
    // Several queues are the partitions of a route: each key is in one of them. They run side by
    // side, so each does with few connections to the database. To share them among processes,
    // subscribe to those of this process first: docs/consuming.md.
    let names = setting("QUEUE")?;
    let queues: Vec<_> = names.split(',').collect();
    let mut running = JoinSet::new();
    for queue in &queues {
        let mut stop = stop.clone();
        let inbox = Inbox::new(setting("CONSUMER")?)
            .queue(*queue)
            .postgres(setting("DATABASE_URL")?)
            .amqp(setting("AMQP_URL")?)
            .concurrency(if queues.len() > 1 { 2 } else { 8 })
            .ordered(setting("ORDERED")? == "true");
        let stop = async move { stop.wait_for(|stop| *stop).await.map(drop).unwrap_or_default() };
        running.spawn(inbox.run(|message, tx| Box::pin(handle(message, tx)), stop));
    }
    while let Some(ended) = running.join_next().await {
        ended??;
    }
    Ok(())
}
