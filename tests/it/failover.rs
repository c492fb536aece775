//! A real primary with a real standby, promoted under a running relay.

use watership::dev::{Postgres, StopMode};

use crate::support::inbox::Message;
use crate::support::servers::{database_of, own_vhost, private_postgres};
use crate::support::stage::{Running, Setup, Stage};
use crate::support::waiting::until;

/// A relay on a primary, and its standby.
struct Pair {
    primary: Postgres,
    standby: Postgres,
    stage: Stage,
    relay: Running,
}

impl Pair {
    async fn new(settings: &str, conf: &str) -> Self {
        let mut primary = private_postgres(&[], None).await;
        let mut standby = primary.standby(conf).await.expect("a standby");
        standby.start_again().await.expect("the standby starts");
        let setup = Setup { settings, ..Setup::default() };
        let stage = Stage::on(database_of(&primary), own_vhost().await, setup).await;
        let relay = stage.start().await;
        Self { primary, standby, stage, relay }
    }

    async fn emit(&self, kind: &str) {
        self.stage.execute(&format!("SELECT watership.emit('t', '1', '{kind}', '1')")).await;
    }

    /// Waits until the standby has a copy of the slot that has passed `lsn`.
    async fn synchronised(&self, lsn: &str) {
        let standby = database_of(&self.standby).connect().await;
        let synced = format!(
            "SELECT count(*) FROM pg_replication_slots WHERE synced AND NOT temporary \
             AND invalidation_reason IS NULL AND confirmed_flush_lsn > '{lsn}'::pg_lsn"
        );
        until("the slot is synchronised", async || {
            // The primary's slot has to move before the standby can keep its copy.
            self.stage.execute("SELECT pg_log_standby_snapshot()").await;
            self.emit("before").await;
            standby.query_one(&synced, &[]).await.expect("a count").get::<_, i64>(0) == 1
        })
        .await;
    }

    /// The primary dies, the standby is promoted and takes its address.
    async fn fail_over(&mut self) {
        self.fail_over_with("SELECT").await;
    }

    /// The same; `sql` is run on the promoted standby before the relay sees it.
    async fn fail_over_with(&mut self, sql: &str) {
        self.standby.stop(StopMode::Fast).await.expect("the standby stops");
        for n in 0..PHANTOMS {
            self.emit(&format!("phantom-{n}")).await;
        }
        let published = |all: &[Message]| {
            all.iter().filter(|m| m.kind().starts_with("phantom")).count() == PHANTOMS
        };
        self.stage.inbox.wait("what the standby does not have", published).await;
        self.primary.stop(StopMode::Immediate).await.expect("the primary dies");
        self.standby.start_again().await.expect("the standby is there");
        self.standby.execute("SELECT pg_promote()").await.expect("it is promoted");
        let promoted = database_of(&self.standby).connect().await;
        promoted.batch_execute(sql).await.expect("the SQL of the test");
        drop(promoted);
        self.standby.stop(StopMode::Fast).await.expect("it stops");
        self.standby.move_to(self.primary.port()).expect("it moves");
        self.standby.start_again().await.expect("it is the primary");
        self.stage.sql = self.stage.database.connect().await;
    }
}

const PHANTOMS: usize = 5;

#[tokio::test]
async fn after_a_failover_the_stream_goes_on_from_a_synchronised_slot_and_counts_phantoms() {
    // Earlier versions synchronise no logical slots: see the test below.
    if private_postgres(&[], None).await.major() < 17 {
        return;
    }
    let mut pair = Pair::new("source.failover = true", "sync_replication_slots = on").await;
    pair.synchronised("0/0").await;
    let standby = database_of(&pair.standby).connect().await;
    pair.emit("last").await;
    let passed = pair.stage.text("pg_current_wal_insert_lsn()").await;
    until("the standby has it", async || {
        let sql = format!("SELECT pg_last_wal_replay_lsn() >= '{passed}'::pg_lsn");
        standby.query_one(&sql, &[]).await.expect("a row").get(0)
    })
    .await;
    drop(standby);
    pair.fail_over().await;
    pair.emit("after").await;
    let arrived = |all: &[Message]| all.iter().any(|m| m.kind() == "after");
    let got = pair.stage.inbox.wait("the event on the new timeline", arrived).await;
    let of = |kind: &str| got.iter().filter(|m| m.kind() == kind).count();
    assert_eq!((of("after"), of("last") >= 1), (1, true));
    let after = got.iter().find(|m| m.kind() == "after").expect("it is there");
    assert!(after.text("ws-position").starts_with("00000002-"), "{after:?}");
    let row = "SELECT concat(epoch, ' ', timeline) FROM watership.checkpoint";
    assert_eq!(pair.stage.text(row).await, "2 2");
    let phantoms = pair.relay.metric("watership_phantom_suspected_total").await;
    assert_eq!(phantoms, Some(PHANTOMS as f64));
    pair.relay.stop().await.expect_code(0).expect_text(&["a standby was promoted"]);
    pair.stage.start().await.stop().await.expect_code(0);
}

#[tokio::test]
async fn parked_rows_that_an_asynchronous_failover_loses_are_counted_and_named() {
    if private_postgres(&[], None).await.major() < 17 {
        return;
    }
    let settings = "source.failover = true\nbroker.max_message_size = \"64KiB\"";
    let mut pair = Pair::new(settings, "sync_replication_slots = on").await;
    pair.emit("before").await;
    pair.stage.settled().await;
    let row = "SELECT format('mark = %s, ordinal = %s, flush_mark = %s', mark, ordinal, \
        flush_mark) FROM watership.checkpoint";
    let earlier = pair.stage.text(row).await;
    let large = "SELECT watership.emit('t', '9', 'large', to_json(repeat('x', 100000)))";
    pair.stage.execute(large).await;
    until("it is parked", async || {
        pair.stage.holds("SELECT count(*) = 1 FROM watership.parked").await
    })
    .await;
    let position = pair.stage.text("SELECT pg_current_wal_insert_lsn()").await;
    pair.synchronised(&position).await;
    // As if the standby had the slot's last position and not the checkpoint before it.
    let lost = format!("DELETE FROM watership.parked; UPDATE watership.checkpoint SET {earlier}");
    pair.fail_over_with(&lost).await;
    pair.emit("after").await;
    let arrived = |all: &[Message]| all.iter().any(|m| m.kind() == "after");
    pair.stage.inbox.wait("the event on the new timeline", arrived).await;
    assert_eq!(pair.relay.metric("watership_parked_lost_total").await, Some(1.0));
    let recorded = "SELECT count(*) FROM watership.resync WHERE verdicts = '{timeline_changed}' \
        AND gap_from < gap_to";
    assert_eq!(pair.stage.text(recorded).await, "1");
    let texts = ["a parked row was lost by the failover", "are not in watership.parked"];
    pair.relay.stop().await.expect_code(0).expect_text(&texts);
}

#[tokio::test]
async fn after_a_failover_without_the_slot_a_person_decides() {
    let mut pair = Pair::new("", "").await;
    pair.emit("before").await;
    pair.stage.settled().await;
    let standby = database_of(&pair.standby).connect().await;
    let passed = pair.stage.text("pg_current_wal_insert_lsn()").await;
    until("the standby has it", async || {
        let sql = format!("SELECT pg_last_wal_replay_lsn() >= '{passed}'::pg_lsn");
        standby.query_one(&sql, &[]).await.expect("a row").get(0)
    })
    .await;
    drop(standby);
    pair.fail_over().await;
    let texts = ["timeline_changed: ", "a failover, and slot", "watership resync"];
    pair.relay.ended().await.expect_code(3).expect_text(&texts);
    let resync = ["resync", "--accept-gap", "--reason", "failover"];
    pair.stage.run(&resync).await.expect_code(0).expect_text(&["recreated"]);
    let relay = pair.stage.start().await;
    let sql = "SELECT watership.emit('t', '1', 'after', '1')";
    pair.stage.execute(sql).await;
    let got = pair.stage.settled().await;
    assert_eq!(got.iter().filter(|m| m.kind() == "after").count(), 1);
    relay.stop().await.expect_code(0);
}
