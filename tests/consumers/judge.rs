//! Compares the effects with what the applications committed.

use tokio_postgres::Client;

/// What came of the run.
#[derive(Debug, PartialEq, Eq)]
pub struct Verdict {
    pub committed: i64,
    pub effects: i64,
    pub lost: i64,
    pub twice: i64,
    /// Effects of events that were never committed.
    pub invented: i64,
    /// Effects that came after a later one of their key.
    pub out_of_order: i64,
    /// Innocent messages that a consumer gave up.
    pub parked: i64,
}

impl Verdict {
    /// Each event once, in order.
    pub fn good(events: i64) -> Self {
        Self {
            committed: events,
            effects: events,
            lost: 0,
            twice: 0,
            invented: 0,
            out_of_order: 0,
            parked: 0,
        }
    }
}

async fn number(client: &Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).await.expect("an answer").get(0)
}

/// Different events that had an effect. Postgres may be away at that moment.
pub async fn effects(client: &Client) -> i64 {
    const SQL: &str = "SELECT count(DISTINCT message_id) FROM watership_torture.effect";
    client.query_one(SQL, &[]).await.map_or(-1, |row| row.get(0))
}

pub async fn judge(client: &Client, consumer: &str, ordered: bool) -> Verdict {
    const LOST: &str = "SELECT count(*) FROM emitted AS e WHERE NOT EXISTS \
        (SELECT FROM watership_torture.effect AS x WHERE x.message_id = e.id::text)";
    const TWICE: &str = "SELECT count(*) - count(DISTINCT message_id) \
        FROM watership_torture.effect";
    const INVENTED: &str = "SELECT count(*) FROM watership_torture.effect AS x WHERE NOT EXISTS \
        (SELECT FROM emitted AS e WHERE e.id::text = x.message_id \
            AND e.key = x.key AND e.number = x.number)";
    const OUT_OF_ORDER: &str = "SELECT count(*) FROM (SELECT number < max(number) OVER \
        (PARTITION BY key ORDER BY id) AS late FROM watership_torture.effect) AS x WHERE late";
    let parked = "SELECT count(*) FROM watership_inbox.parked_messages WHERE consumer = $1";
    let parked = client.query_one(parked, &[&consumer]).await.expect("an answer").get(0);
    Verdict {
        committed: number(client, "SELECT count(*) FROM emitted").await,
        effects: effects(client).await,
        lost: number(client, LOST).await,
        twice: number(client, TWICE).await,
        invented: number(client, INVENTED).await,
        out_of_order: if ordered { number(client, OUT_OF_ORDER).await } else { 0 },
        parked,
    }
}
