//! Two relays of one name: who works, that the other takes over, and that the one which lost
//! its place can neither publish nor write the checkpoint.
//!
//! The two differ only in the name of their route, which is in a header of every message: so it is
//! seen which of them published it, while the ids stay the same.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;
use watership::dev::Signal;
use watership::error::Kind;
use watership::position::{Mark, Position};
use watership::relay::checkpoint::rider::Rider;
use watership::relay::checkpoint::{PostgresStore, Store, take_session};
use watership::relay::parking::row::{Changed, ParkedKey, ParkedRow, Raw, RowState, Why};
use watership::route::LaneKeys;

use crate::support::inbox::Message;
use crate::support::servers::{database_of, own_vhost, private_postgres};
use crate::support::stage::{Running, Setup, Stage};
use crate::support::waiting::until;

const KEYS: u64 = 50;
/// Rows of one transaction, and the pause between two.
const ROWS: u64 = 20;
const PAUSE: Duration = Duration::from_millis(20);

/// Writes numbered events until it is told to end.
struct Writer {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<()>,
}

impl Writer {
    async fn start(stage: &Stage) -> Self {
        let sql = stage.database.connect().await;
        let (stop, written) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (ended, count) = (Arc::clone(&stop), Arc::clone(&written));
        let task = tokio::spawn(async move {
            let mut again = tokio::time::interval(PAUSE);
            let mut next = 1;
            while !ended.load(Ordering::Relaxed) {
                again.tick().await;
                let last = next + ROWS - 1;
                let insert = format!(
                    "INSERT INTO watership.outbox \
                     (aggregate_type, aggregate_id, event_type, payload) \
                     SELECT 't', (n % {KEYS})::text, 'e', n::text::json \
                     FROM generate_series({next}, {last}) AS n"
                );
                sql.batch_execute(&insert).await.expect("events are written");
                count.store(last, Ordering::Relaxed);
                next = last + 1;
            }
        });
        Self { stop, written, task }
    }

    async fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.expect("the writer does not fail");
        self.written.load(Ordering::Relaxed)
    }
}

fn routes(ordering: &str) -> String {
    format!(
        "[[route]]\nname = \"first\"\noutbox = {{ aggregate_type = \"t\" }}\n\
         exchange = \"watership\"\nrouting_key = \"t\"\nordering = \"{ordering}\""
    )
}

async fn stage(ordering: &str) -> Stage {
    let routes = routes(ordering);
    Stage::new(Setup { routes: &routes, ..Setup::default() }).await
}

/// The standby relay, which has seen that it is one.
async fn stand_by(stage: &Stage) -> Running {
    let second = stage.spawn_other(|text| text.replace("name = \"first\"", "name = \"second\""));
    until("it is on standby", async || second.status().await["state"] == "standing_by").await;
    second
}

/// What went wrong, counted over everything that arrived.
#[derive(Debug, Default, PartialEq, Eq)]
struct Wrong {
    lost: u64,
    inversions: u64,
    /// Messages of the first relay behind one of the second.
    late: u64,
}

fn judge(got: &[Message], count: u64) -> (Wrong, usize) {
    let mut wrong = Wrong::default();
    let (mut seen, mut last) = (HashSet::new(), HashMap::new());
    let mut second = false;
    for message in got {
        second |= message.text("ws-route") == "second";
        wrong.late += u64::from(second && message.text("ws-route") == "first");
        if !seen.insert(message.id()) {
            continue;
        }
        let n: u64 = message.body.parse().expect("a number");
        let before = last.insert(n % KEYS, n).unwrap_or(0);
        wrong.inversions += u64::from(n < before);
    }
    wrong.lost = count.saturating_sub(seen.len() as u64);
    (wrong, got.len() - seen.len())
}

fn from_second(messages: &[Message]) -> bool {
    messages.iter().any(|m| m.header("ws-route").is_some() && m.text("ws-route") == "second")
}

#[tokio::test]
async fn a_stand_by_says_what_it_waits_for_and_who_holds_it() {
    let stage = stage("keyed").await;
    let first = stage.start().await;
    let second = stand_by(&stage).await;
    until("the holder is seen", async || {
        second.status().await["standing_by"]["slot_holder"]["pid"].is_i64()
    })
    .await;
    let pid = stage
        .text(
            &"SELECT active_pid FROM pg_replication_slots WHERE slot_name = 'SLOT'"
                .replace("SLOT", &stage.slot),
        )
        .await;
    let status = second.status().await;
    let holder = &status["standing_by"]["slot_holder"];
    assert_eq!(holder["pid"].to_string(), pid, "{status}");
    assert!(holder["client"].as_str().unwrap().starts_with("127.0.0.1:"), "{status}");
    let because = status["standing_by"]["because"].as_str().unwrap();
    assert!(because.contains("another relay named \"shop\" holds the lock queue"), "{because}");
    // The circuit of a standby relay is open or, for a moment, half-open; the other is closed.
    assert_eq!(status["circuit"]["cause"], "busy", "{status}");
    assert!(status["circuit"]["tries"].as_u64().unwrap() > 0, "{status}");
    assert_eq!(first.status().await["circuit"]["state"], "closed");
    assert_eq!(first.status().await["standing_by"], serde_json::Value::Null);
    let closed = first.metric("watership_circuit_state{state=\"closed\"}").await;
    let open = first.metric("watership_circuit_state{state=\"open\"}").await;
    assert_eq!((closed, open), (Some(1.0), Some(0.0)));
    assert!(second.metric("watership_busy_total{what=\"lock\"}").await.unwrap() >= 1.0);
    assert!(second.metric("watership_session_tries").await.unwrap() >= 1.0);
    let (code, body) = second.get("/readyz").await;
    assert_eq!(code, 503);
    for text in ["on standby", "holds the lock queue", &format!("pid {pid} from 127.0.0.1:")] {
        assert!(body.contains(text), "{text} is missing from {body}");
    }
    assert_eq!(second.get("/livez").await.0, 200);
}

#[tokio::test]
async fn a_stand_by_asks_nothing_of_postgres_but_its_upkeep() {
    let stage = stage("keyed").await;
    let _first = stage.start().await;
    let second = stand_by(&stage).await;
    until("it has tried some times", async || {
        second.metric("watership_busy_total{what=\"lock\"}").await.unwrap_or(0.0) >= 3.0
    })
    .await;
    let sessions = stage.text("SELECT session_no FROM watership.checkpoint").await;
    assert_eq!(sessions, "1", "a standby relay takes no session");
    let ended = second.stop().await;
    ended.expect_code(0);
}

#[tokio::test]
async fn a_relay_that_lost_its_place_reports_nothing_of_the_session_that_ended() {
    let routes = routes("keyed");
    let settings = "broker.heartbeat = \"2s\"";
    let stage = Stage::new(Setup { routes: &routes, settings, ..Setup::default() }).await;
    let mut first = stage.start().await;
    // No route selects it: it is parked. The other's route has no queue: it is held.
    stage.execute("SELECT watership.emit('unknown', '1', 'e', '1')").await;
    stage
        .channel
        .queue_unbind("all".into(), "watership".into(), "#".into(), Default::default())
        .await
        .expect("unbound");
    stage.execute("SELECT watership.emit('t', '1', 'e', '1')").await;
    let held = "watership_route_held{route=\"first\",owner=\"\"}";
    until("it reports both", async || {
        let metrics = (first.metric("watership_parked").await, first.metric(held).await);
        metrics == (Some(1.0), Some(1.0))
    })
    .await;
    let second = stand_by(&stage).await;

    first.signal(Signal::Stop);
    let walsender = format!(
        "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots \
         WHERE slot_name = '{}' AND active_pid IS NOT NULL",
        stage.slot
    );
    stage.execute(&walsender).await;
    until("the second works", async || second.status().await["state"] == "streaming").await;
    first.signal(Signal::Cont);
    until("the first is on standby", async || first.status().await["state"] == "standing_by").await;

    let status = first.status().await;
    assert_eq!(status["held"].as_array().map(Vec::len), Some(0), "{status}");
    for series in [held, "watership_parked", "watership_in_flight_messages"] {
        assert_eq!(first.metric(series).await, Some(0.0), "{series}");
    }
    // The other one knows what is parked; the queue was bound again by its start.
    assert_eq!(second.metric("watership_parked").await, Some(1.0));
    assert_eq!(stage.inbox.count(1).await[0].text("ws-route"), "second");
}

#[tokio::test]
async fn the_stand_by_takes_over_from_one_that_ends_in_order_without_a_duplicate() {
    for ordering in ["keyed", "pipelined"] {
        let stage = stage(ordering).await;
        let first = stage.start().await;
        let mut second = stand_by(&stage).await;
        let writer = Writer::start(&stage).await;
        stage.inbox.count(1_000).await;
        first.stop().await.expect_code(0);
        let ended = Instant::now();
        second.ready().await;
        let took = ended.elapsed();
        stage.inbox.wait("the second publishes", from_second).await;
        let count = writer.end().await;
        let (wrong, duplicates) = judge(&stage.settled().await, count);
        println!("{ordering}: clean exit, took over after {took:?}, {duplicates} duplicates");
        assert_eq!((wrong, duplicates), (Wrong::default(), 0));
    }
}

#[tokio::test]
async fn the_stand_by_takes_over_from_one_that_was_killed() {
    for ordering in ["keyed", "pipelined"] {
        let stage = stage(ordering).await;
        let first = stage.start().await;
        let mut second = stand_by(&stage).await;
        let writer = Writer::start(&stage).await;
        stage.inbox.count(1_000).await;
        first.kill();
        let killed = Instant::now();
        second.ready().await;
        let took = killed.elapsed();
        stage.inbox.wait("the second publishes", from_second).await;
        let count = writer.end().await;
        let (wrong, duplicates) = judge(&stage.settled().await, count);
        println!("{ordering}: kill -9, took over after {took:?}, {duplicates} duplicates");
        assert_eq!(wrong, Wrong::default());
    }
}

/// Freezes the first under load, lets the second take over, and wakes the first.
async fn zombie(ordering: &str) {
    let server = private_postgres(&["wal_sender_timeout = '10s'"], None).await;
    let routes = routes(ordering);
    // At the freeze there is much that is confirmed and not stored, and much that is on its way.
    let setup = Setup {
        routes: &routes,
        settings: "relay.checkpoint_interval = \"2s\"",
        ..Setup::default()
    };
    let stage = Stage::on(database_of(&server), own_vhost().await, setup).await;
    let mut first = stage.start().await;
    let mut second = stand_by(&stage).await;
    let writer = Writer::start(&stage).await;
    stage.inbox.count(1_000).await;
    first.signal(Signal::Stop);
    let frozen = Instant::now();
    second.ready().await;
    let took = frozen.elapsed();
    stage.inbox.wait("the second publishes", from_second).await;
    let session = stage.text("SELECT session_no FROM watership.checkpoint").await;
    let flushed = stage.text("SELECT flush_lsn FROM watership.checkpoint").await;

    first.signal(Signal::Cont);
    until("the zombie sees what became of it", async || {
        first.status().await["state"] == "standing_by"
    })
    .await;
    // A few more of its sessions, while the second works on.
    until("the zombie has tried again", async || {
        first.metric("watership_busy_total{what=\"lock\"}").await.unwrap_or(0.0) >= 3.0
    })
    .await;
    let count = writer.end().await;
    let (wrong, duplicates) = judge(&stage.settled().await, count);
    println!("{ordering}: SIGSTOP, took over after {took:?}, {duplicates} duplicates, {wrong:?}");
    assert_eq!(wrong, Wrong::default());
    assert_eq!(stage.text("SELECT session_no FROM watership.checkpoint").await, session);
    assert!(
        stage.holds(&format!("(SELECT flush_lsn FROM watership.checkpoint) >= '{flushed}'")).await
    );
    second.stop().await.expect_code(0);
    // Now the zombie is the standby, and works when it is its turn.
    first.ready().await;
    first.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_zombie_of_a_keyed_route_publishes_nothing_and_stores_nothing() {
    zombie("keyed").await;
}

#[tokio::test]
async fn a_zombie_of_a_pipelined_route_publishes_nothing_and_stores_nothing() {
    zombie("pipelined").await;
}

#[tokio::test]
async fn a_session_that_was_taken_over_can_write_neither_checkpoint_nor_parking_nor_retries() {
    let stage = stage("keyed").await;
    let oid = stage.text("SELECT oid FROM pg_publication").await.parse().expect("an oid");
    let client = Arc::new(stage.database.connect().await);
    let old = take_session(&client, "shop", Some(oid)).await.expect("a session");
    let store = async |session_no| {
        let own = Arc::default();
        let store = PostgresStore::new(Arc::clone(&client), "shop", session_no, own).await;
        store.expect("a store")
    };
    let at = |lsn: u64| {
        let position = Position { mark: Mark(old.flush_lsn.0 + lsn), ..old.position };
        (position, Mark(old.flush_lsn.0 + lsn))
    };
    let first = store(old.session_no).await;
    let write = async |store: &PostgresStore, lsn| {
        let (position, flush) = at(lsn);
        store.store(position, flush, Vec::new()).await
    };
    write(&first, 10).await.expect("the session is the latest");
    let new = take_session(&client, "shop", Some(oid)).await.expect("a session");
    assert_eq!(new.session_no, old.session_no + 1);
    let error = write(&first, 20).await.expect_err("it was taken over");
    assert_eq!(error.kind(), Kind::Busy, "{error}");
    let row = stage.text("SELECT flush_lsn FROM watership.checkpoint").await;
    assert_eq!(row, at(10).1.lsn().to_string());
    // Nor what goes with a checkpoint: a row is parked, and a retry ends.
    let row = parked_row(at(15).0);
    let parks = |row: &ParkedRow| vec![Rider::Parked(vec![row.clone()])];
    let (key, state) = (row.key.clone(), RowState::Released);
    let released = vec![Rider::Unparked(vec![Changed { key, state, why: None }])];
    let states = "SELECT coalesce(string_agg(state, ','), 'none') FROM watership.parked";
    let error = first.store(at(30).0, at(30).1, parks(&row)).await.expect_err("taken over");
    assert_eq!((error.kind(), &*stage.text(states).await), (Kind::Busy, "none"));
    let second = store(new.session_no).await;
    second.store(at(30).0, at(30).1, parks(&row)).await.expect("the new one may");
    let error = first.store(at(40).0, at(40).1, released.clone()).await.expect_err("taken over");
    assert_eq!((error.kind(), &*stage.text(states).await), (Kind::Busy, "parked"));
    second.store(at(40).0, at(40).1, released).await.expect("the new one may");
    assert_eq!(stage.text(states).await, "released");
}

fn parked_row(position: Position) -> ParkedRow {
    ParkedRow {
        key: ParkedKey { position, route: "orders".into(), part: 0 },
        state: RowState::Parked,
        why: Why::Unroutable,
        error: "no queue".into(),
        attempts: 1,
        id: uuid::Uuid::nil(),
        source: "watership.outbox".into(),
        key_text: "order/1".into(),
        committed_at_us: 0,
        lanes: LaneKeys::One { lane: 1, group: None },
        lanes_keyed: false,
        rules: None,
        raw: Raw::Message { routing_key: "k".into(), properties: vec![0, 0], body: vec![1] },
    }
}
