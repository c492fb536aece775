//! The inbox's claims under concurrency: a claim and a turn of the ring, a switch of generations,
//! old snapshots, time zones, clocks. What is parked is in `inbox_parking`.

use std::collections::BTreeMap;
use tokio_postgres::{Client, NoTls};
use watership::pg::migrate::INBOX;

use crate::support::servers::{Database, database_of, own_database, private_postgres};
use crate::support::waiting::{until, within};

const LEVELS: [&str; 3] = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"];

/// A database with the inbox.
pub struct Installed {
    pub database: Database,
    /// A session of the superuser.
    pub admin: Client,
    /// A session with the rights that the functions of maintenance run with.
    keeper: Client,
    user: String,
}

impl Installed {
    pub async fn new() -> Self {
        Self::on(own_database().await).await
    }

    async fn on(database: Database) -> Self {
        let mut admin = database.connect().await;
        INBOX.apply(&mut admin).await.expect("the inbox");
        let user = format!("consumer_{}", database.name);
        let role = format!("CREATE ROLE {user} LOGIN IN ROLE watership_consumer");
        admin.batch_execute(&role).await.expect("a user");
        admin.execute("SELECT watership_inbox.register('c')", &[]).await.expect("registered");
        let keeper = database.connect().await;
        keeper.batch_execute("SET ROLE watership_inbox_owner").await.expect("the owner");
        Self { database, admin, keeper, user }
    }

    /// A session of a consumer's own user, who has that role and nothing else.
    pub async fn session(&self) -> Client {
        let url = self.database.url.replacen("postgres@", &format!("{}@", self.user), 1);
        let (client, connection) = tokio_postgres::connect(&url, NoTls).await.expect("a session");
        tokio::spawn(connection);
        client
    }

    /// One turn of the ring, as if today were this many days from now, and an hour had passed since
    /// the last one; what was postponed.
    async fn turn(&self, days: i32) -> Vec<String> {
        let hour = "UPDATE watership_inbox.ring SET passed_at = '-infinity'";
        run(&self.keeper, hour).await;
        let sql = "SELECT postponed FROM watership_inbox.turn_ring(\
                   (now() AT TIME ZONE 'UTC')::date + $1::integer)";
        self.keeper.query_one(sql, &[&days]).await.expect("a turn").get(0)
    }

    /// One step of the generations, this many half windows from now.
    async fn step(&self, halves: i32) -> (Vec<String>, Vec<String>) {
        let sql = "SELECT done, postponed FROM watership_inbox.turn_generation(\
                   now() + $1::integer * interval '84 hours')";
        let row = self.keeper.query_one(sql, &[&halves]).await.expect("a step");
        (row.get(0), row.get(1))
    }

    /// One value as text.
    pub async fn text(&self, sql: &str) -> String {
        let row = self.admin.query_one(&format!("SELECT (SELECT {sql})::text"), &[]).await;
        row.unwrap_or_else(|e| panic!("{sql}: {e:?}"))
            .get::<_, Option<String>>(0)
            .unwrap_or_default()
    }
}

/// Runs statements.
pub async fn run(client: &Client, sql: &str) {
    client.batch_execute(sql).await.unwrap_or_else(|e| panic!("{sql}: {e:?}"));
}

/// The SQLSTATE of what must fail.
pub async fn refused(client: &Client, sql: &str) -> String {
    code(client.batch_execute(sql).await.expect_err(sql))
}

pub fn code(error: tokio_postgres::Error) -> String {
    error.code().unwrap_or_else(|| panic!("{error:?}")).code().to_owned()
}

/// Claims a message of `days_ago`.
async fn claim(client: &Client, id: &str, days_ago: i32) -> Result<bool, String> {
    let sql = "SELECT watership_inbox.claim('c', $1, now() - $2::integer * interval '1 day')";
    client.query_one(sql, &[&id, &days_ago]).await.map(|row| row.get(0)).map_err(code)
}

/// Claims a message without a time.
async fn claim_timeless(client: &Client, id: &str) -> Result<bool, String> {
    let sql = "SELECT watership_inbox.claim('c', $1)";
    client.query_one(sql, &[&id]).await.map(|row| row.get(0)).map_err(code)
}

/// Waits until this session waits for another.
pub async fn waits(inbox: &Installed, pid: i32) {
    let sql = format!("cardinality(pg_blocking_pids({pid})) > 0");
    until("it waits", async || inbox.text(&sql).await == "true").await;
}

pub async fn pid(client: &Client) -> i32 {
    client.query_one("SELECT pg_backend_pid()", &[]).await.expect("a pid").get(0)
}

#[tokio::test]
async fn a_claim_that_saw_the_ring_before_it_turned_is_never_forgotten() {
    for level in LEVELS {
        let inbox = Installed::new().await;
        let (a, b) = (inbox.session().await, inbox.session().await);
        run(
            &a,
            &format!("BEGIN ISOLATION LEVEL {level}; SELECT * FROM watership_inbox.remembered"),
        )
        .await;
        assert!(inbox.turn(1).await.is_empty(), "the window passes the day of the message");
        match claim(&a, "m", 7).await {
            Ok(first) => {
                assert!(first && level != "READ COMMITTED", "its snapshot allows it");
                let postponed = inbox.turn(1).await;
                assert_eq!(postponed.len(), 1, "{level}: emptied under an open claim");
                run(&a, "COMMIT").await;
            }
            Err(state) => {
                assert_eq!((state.as_str(), level), ("WI001", "READ COMMITTED"));
                run(&a, "ROLLBACK").await;
            }
        }
        assert!(inbox.turn(1).await.is_empty());
        assert_eq!(claim(&b, "m", 7).await, Err("WI001".into()), "{level}: no second time");
    }
}

#[tokio::test]
async fn an_open_claim_holds_its_slot() {
    for level in LEVELS {
        let inbox = Installed::new().await;
        let (a, b) = (inbox.session().await, inbox.session().await);
        run(&a, &format!("BEGIN ISOLATION LEVEL {level}")).await;
        assert_eq!(claim(&a, "m", 7).await, Ok(true));
        assert!(inbox.turn(1).await.is_empty(), "the window may move");
        run(&inbox.keeper, "SET lock_timeout = '100ms'").await;
        assert_eq!(inbox.turn(1).await.len(), 1, "{level}: emptied under an open claim");
        run(&a, "COMMIT").await;
        assert!(inbox.turn(1).await.is_empty());
        assert_eq!(inbox.text("count(*) FROM watership_inbox.claimed").await, "0", "emptied");
        assert_eq!(claim(&b, "m", 7).await, Err("WI001".into()));
    }
}

#[tokio::test]
async fn a_snapshot_of_any_role_and_a_prepared_transaction_hold_a_slot() {
    let server = private_postgres(&["max_prepared_transactions = 5"], None).await;
    let inbox = Installed::on(database_of(&server)).await;
    run(&inbox.keeper, "SET lock_timeout = '100ms'").await;
    let (a, b) = (inbox.session().await, inbox.session().await);
    assert_eq!(claim(&a, "m", 7).await, Ok(true));
    // A superuser's snapshot, of which the owner of the functions sees little.
    let reader = inbox.database.connect().await;
    run(&reader, "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1 FROM watership_inbox.ring").await;
    assert!(inbox.turn(1).await.is_empty());
    assert_eq!(inbox.turn(1).await.len(), 1, "an old snapshot is left");
    run(&reader, "COMMIT").await;
    run(&b, "BEGIN").await;
    assert_eq!(claim(&b, "n", 6).await, Ok(true));
    run(&b, "PREPARE TRANSACTION 'p'").await;
    assert!(inbox.turn(1).await.is_empty());
    assert!(inbox.turn(2).await.is_empty(), "the next day");
    assert_eq!(inbox.turn(2).await.len(), 1, "a prepared claim is in that slot");
    run(&b, "COMMIT PREPARED 'p'").await;
    assert!(inbox.turn(2).await.is_empty());
    assert_eq!(inbox.text("days_to_empty FROM watership_inbox.remembered").await, "0");
}

#[tokio::test]
async fn two_turns_in_one_transaction_empty_nothing() {
    let inbox = Installed::new().await;
    let a = inbox.session().await;
    assert_eq!(claim(&a, "m", 7).await, Ok(true));
    run(&inbox.keeper, "BEGIN").await;
    assert!(inbox.turn(1).await.is_empty());
    assert_eq!(inbox.turn(1).await.len(), 1, "the move is not committed");
    run(&inbox.keeper, "COMMIT").await;
    assert!(inbox.turn(1).await.is_empty());
}

#[tokio::test]
async fn every_day_that_is_passed_is_emptied_in_every_time_zone() {
    let inbox = Installed::new().await;
    // In Havana 8 March 2026 began at one o'clock.
    run(
        &inbox.admin,
        "INSERT INTO watership_inbox.claimed (day, slot, consumer, message_id)
         SELECT day, (day - date '2000-01-01') % 40, 1, day::text
         FROM (SELECT date '2026-03-05' + n FROM generate_series(0, 4) AS n) AS d (day);
         UPDATE watership_inbox.ring SET emptied_before = '2026-03-05', first_day = '2026-03-10',
             moved_by = pg_current_xact_id()",
    )
    .await;
    run(&inbox.keeper, "SET TimeZone = 'America/Havana'").await;
    assert!(inbox.turn(-1000).await.is_empty());
    assert_eq!(inbox.text("count(*) FROM watership_inbox.claimed").await, "0");
}

#[tokio::test]
async fn a_wrong_clock_moves_the_window_by_one_day_with_claims() {
    let inbox = Installed::new().await;
    let a = inbox.session().await;
    for days_ago in 0..=7 {
        assert_eq!(claim(&a, "m", days_ago).await, Ok(true));
    }
    let first_day = "(now() AT TIME ZONE 'UTC')::date - first_day FROM watership_inbox.ring";
    assert_eq!(inbox.text(first_day).await, "7");
    inbox.turn(365).await;
    assert_eq!(inbox.text(first_day).await, "6");
    inbox.turn(-365).await;
    assert_eq!(inbox.text(first_day).await, "6", "it never goes back");
    for days_ago in 0..=6 {
        assert_eq!(claim(&a, "m", days_ago).await, Ok(false), "still known");
    }
}

#[tokio::test]
async fn a_message_is_one_with_seconds_and_with_microseconds_in_any_time_zone() {
    let inbox = Installed::new().await;
    let (a, b) = (inbox.session().await, inbox.session().await);
    run(&a, "SET TimeZone = 'Pacific/Kiritimati'").await;
    run(&b, "SET TimeZone = 'Pacific/Pago_Pago'").await;
    let midnight = "date_trunc('day', now() AT TIME ZONE 'UTC') AT TIME ZONE 'UTC'";
    let claim = async |client: &Client, before: &str| {
        let sql =
            format!("SELECT watership_inbox.claim('c', 'm', {midnight} - interval '{before}')");
        client.query_one(&sql, &[]).await.expect("claimed").get::<_, bool>(0)
    };
    assert!(claim(&a, "0.1 s").await);
    for before in ["1 s", "0.1 s", "0.000001 s", "23 hours"] {
        assert!(!claim(&b, before).await, "{before}");
    }
    assert!(claim(&b, "0 s").await, "the next day is another one");
}

#[tokio::test]
async fn a_concurrent_duplicate_waits_for_the_first() {
    for level in LEVELS {
        for (end, expected) in [("COMMIT", false), ("ROLLBACK", true)] {
            let inbox = Installed::new().await;
            let (a, b) = (inbox.session().await, inbox.session().await);
            let begin = format!("BEGIN ISOLATION LEVEL {level}; SELECT 1");
            run(&a, &begin).await;
            run(&b, &begin).await;
            assert_eq!(claim(&a, "m", 0).await, Ok(true));
            let b_pid = pid(&b).await;
            let second = tokio::spawn(async move { (claim(&b, "m", 0).await, b) });
            waits(&inbox, b_pid).await;
            run(&a, end).await;
            let (second, b) = within("it continues", second).await.expect("no panic");
            match second {
                Err(state) => {
                    let strict = level != "READ COMMITTED" && end == "COMMIT";
                    assert!(strict && state == "40001", "{level} {end}: {state}");
                    run(&b, "ROLLBACK").await;
                    assert_eq!(claim(&b, "m", 0).await, Ok(false));
                }
                Ok(first) => assert_eq!(first, expected, "{level} {end}"),
            }
        }
    }
}

#[tokio::test]
async fn a_message_that_is_forgotten_while_it_comes_again_is_new() {
    let inbox = Installed::new().await;
    let (a, b) = (inbox.session().await, inbox.session().await);
    assert_eq!(claim(&a, "m", 0).await, Ok(true));
    for _ in 0..50 {
        let forget = b.execute("SELECT watership_inbox.forget('c', 'm')", &[]);
        let (again, forgotten) = tokio::join!(claim(&a, "m", 0), forget);
        assert!(again.is_ok() && forgotten.is_ok(), "{again:?} {forgotten:?}");
    }
}

#[tokio::test]
async fn batches_return_each_new_message_once_and_do_not_deadlock() {
    let inbox = Installed::new().await;
    let (a, b) = (inbox.session().await, inbox.session().await);
    let batch = async |client: &Client, ids: Vec<String>| {
        let sql = "SELECT watership_inbox.claim_many('c', $1, \
                   array_fill(now(), ARRAY[cardinality($1::text[])]))";
        let rows = client.query(sql, &[&ids]).await.expect("a batch");
        rows.iter().map(|row| row.get(0)).collect::<Vec<String>>()
    };
    let twice = ["x", "y", "x"].map(str::to_owned).to_vec();
    assert_eq!(batch(&a, twice.clone()).await, ["x", "y"]);
    assert!(batch(&a, twice).await.is_empty());
    assert_eq!(inbox.text("sum(times) FROM watership_inbox.duplicates").await, "2");
    let mut seen = BTreeMap::new();
    for round in 0..30 {
        let ids: Vec<String> = (0..200).map(|n| format!("{round}-{n}")).collect();
        let mut mixed = ids.clone();
        fastrand::shuffle(&mut mixed);
        let (first, second) = tokio::join!(batch(&a, ids), batch(&b, mixed));
        first.into_iter().chain(second).for_each(|id| *seen.entry(id).or_insert(0) += 1);
    }
    assert_eq!(seen.len(), 6_000);
    assert!(seen.values().all(|times| *times == 1));
    let ids = "SELECT watership_inbox.claim_many('c', ARRAY['z', 'old'], ARRAY[now(), now() - \
               interval '30 days'])";
    assert_eq!(refused(&a, ids).await, "WI001");
    assert_eq!(claim(&a, "z", 0).await, Ok(true), "all or none");
}

#[tokio::test]
async fn errors_have_names_of_their_own() {
    let inbox = Installed::new().await;
    let a = inbox.session().await;
    assert_eq!(claim(&a, "m", 30).await, Err("WI001".into()));
    assert_eq!(claim(&a, "m", -2).await, Err("WI002".into()));
    assert_eq!(claim(&a, "m", -1).await, Ok(true), "tomorrow");
    assert_eq!(claim(&a, "", 0).await, Err("22023".into()));
    assert_eq!(claim(&a, &"x".repeat(1025), 0).await, Err("22023".into()));
    for at in ["'infinity'", "'-infinity'", "NULL"] {
        let sql = format!("SELECT watership_inbox.claim('c', 'm', {at}::timestamptz)");
        assert_eq!(refused(&a, &sql).await, "22023", "{at}");
    }
    for at in ["'infinity'", "'-infinity'"] {
        let message = format!("'c', 'm', {at}::timestamptz, 'k'");
        let receive = format!("SELECT watership_inbox.receive({message}, '')");
        assert_eq!(refused(&a, &receive).await, "22023", "{at}");
        let park = format!("SELECT watership_inbox.park({message}, 'failed', 'why', '')");
        assert_eq!(refused(&a, &park).await, "22023", "{at}");
        let dead = format!(
            "next FROM watership_inbox.fail_message({message}, '', '{{}}', NULL, 'why', true, \
             dead_letters => true)"
        );
        assert_eq!(inbox.text(&dead).await, "dead_letter", "{at}");
    }
    let back = "UPDATE watership_inbox.ring SET first_day = first_day - 40, \
                emptied_before = emptied_before - 40";
    run(&inbox.admin, back).await;
    assert_eq!(claim(&a, "m", 0).await, Err("WI003".into()));
    let mut more = true;
    while more {
        more = a
            .query_one("SELECT more FROM watership_inbox.maintain(now())", &[])
            .await
            .unwrap()
            .get(0);
    }
    assert_eq!(claim(&a, "n", 0).await, Ok(true));
}

#[tokio::test]
async fn another_body_under_a_known_id_is_reported_and_strict_refuses_it() {
    let inbox = Installed::new().await;
    let a = inbox.session().await;
    let claim = |hash: &str, strict: bool| {
        format!("SELECT watership_inbox.claim('c', 'm', now(), '\\x{hash}', {strict})")
    };
    let first = async |sql: String| a.query_one(&sql, &[]).await.expect(&sql).get::<_, bool>(0);
    assert!(first(claim("01", true)).await);
    assert!(!first(claim("01", true)).await);
    assert!(!first(claim("02", false)).await);
    assert_eq!(refused(&a, &claim("02", true)).await, "WI004");
    assert_eq!(inbox.text("times FROM watership_inbox.body_mismatches").await, "1");
}

/// A step of the generations, in whatever phase they are.
async fn steps(inbox: &Installed, count: usize, halves: &mut i32) {
    for _ in 0..count {
        let (done, _) = inbox.step(*halves).await;
        *halves += i32::from(done.iter().any(|what| what.contains("current")));
    }
}

#[tokio::test]
async fn a_switch_of_generations_with_open_claims_at_each_phase_repeats_nothing() {
    let inbox = Installed::new().await;
    run(&inbox.keeper, "SET lock_timeout = '20ms'").await;
    let (mut halves, seed) = (1, fastrand::get_seed());
    let (mut conflicts, mut firsts) = (0, 0);
    for round in 0..150 {
        let id = format!("m{round}");
        let (a, b) = (inbox.session().await, inbox.session().await);
        let level = LEVELS[fastrand::usize(..3)];
        run(
            &a,
            &format!("BEGIN ISOLATION LEVEL {level}; SELECT * FROM watership_inbox.remembered"),
        )
        .await;
        steps(&inbox, fastrand::usize(..6), &mut halves).await;
        let first = claim_timeless(&a, &id).await;
        steps(&inbox, fastrand::usize(..6), &mut halves).await;
        let again = id.clone();
        let second = tokio::spawn(async move { claim_timeless(&b, &again).await });
        if fastrand::bool() {
            tokio::task::yield_now().await;
        } else {
            steps(&inbox, fastrand::usize(..3), &mut halves).await;
        }
        let committed = first.is_ok() && a.batch_execute("COMMIT").await.is_ok();
        if !committed {
            let _ = a.batch_execute("ROLLBACK").await;
            conflicts += 1;
        }
        let second = within("it continues", second).await.expect("no panic").expect("claimed");
        let effects = usize::from(committed && first == Ok(true)) + usize::from(second);
        assert_eq!(effects, 1, "round {round}, seed {seed}: {first:?} {committed} {second}");
        firsts += usize::from(committed);
    }
    assert!(firsts > conflicts, "{firsts} {conflicts}");
    let turned: i32 =
        inbox.text("generation FROM watership_inbox.remembered").await.parse().unwrap();
    assert!(turned > 15, "generations have changed: {turned}");
}

#[tokio::test]
async fn a_claim_that_waited_through_the_opening_of_a_generation_is_seen_by_the_next() {
    let inbox = Installed::new().await;
    let (v, w, b) = (inbox.session().await, inbox.session().await, inbox.session().await);
    run(&v, "BEGIN").await;
    assert_eq!(claim_timeless(&v, "m").await, Ok(true));
    run(&w, "BEGIN").await;
    let w_pid = pid(&w).await;
    let waiting = tokio::spawn(async move { (claim_timeless(&w, "m").await, w) });
    waits(&inbox, w_pid).await;
    // Opened while the statement of w runs, which has read the state from before.
    assert_eq!(inbox.step(1).await.0.len(), 1);
    run(&v, "ROLLBACK").await;
    let (first, w) = within("it continues", waiting).await.expect("no panic");
    assert_eq!(first, Ok(true));
    for _ in 0..6 {
        inbox.step(1).await;
    }
    let current = "generation FROM watership_inbox.remembered";
    assert_eq!(inbox.text(current).await, "10", "the claim of w is open");
    let b_pid = pid(&b).await;
    let second = tokio::spawn(async move { claim_timeless(&b, "m").await });
    waits(&inbox, b_pid).await;
    run(&w, "COMMIT").await;
    assert_eq!(within("it continues", second).await.expect("no panic"), Ok(false));
    until("the next generation", async || {
        inbox.step(1).await;
        inbox.text(current).await == "11"
    })
    .await;
    let late = inbox.session().await;
    assert_eq!(claim_timeless(&late, "m").await, Ok(false));
}

/// Claims messages of the days about the bound again and again, each with an effect if it is new.
async fn claim_at_random(client: Client, level: &'static str) {
    let effect = "INSERT INTO effect SELECT $1, at FROM (SELECT (first_day + $2::integer \
                  + time '12:00') AT TIME ZONE 'UTC' AS at FROM watership_inbox.remembered) AS d \
                  WHERE watership_inbox.claim('c', $1, at)";
    for _ in 0..300 {
        run(&client, &format!("BEGIN ISOLATION LEVEL {level}; SELECT 1")).await;
        if fastrand::bool() {
            run(&client, "SELECT pg_sleep(random() / 200)").await;
        }
        let (id, day) = (format!("m{}", fastrand::u8(..3)), fastrand::i32(-1..3));
        let done = client.execute(effect, &[&id, &day]).await;
        if fastrand::bool() && done.is_ok() {
            run(&client, "SELECT pg_sleep(random() / 200)").await;
        }
        let _ = client.batch_execute(if done.is_ok() { "COMMIT" } else { "ROLLBACK" }).await;
    }
}

#[tokio::test]
async fn claims_at_random_while_the_ring_turns_have_one_effect_each() {
    let inbox = Installed::new().await;
    run(
        &inbox.admin,
        &format!(
            "CREATE TABLE effect (id text, at timestamptz); GRANT INSERT ON effect TO {};
             UPDATE watership_inbox.ring SET first_day = first_day - 120,
                 emptied_before = emptied_before - 120",
            inbox.user
        ),
    )
    .await;
    run(&inbox.keeper, "SET lock_timeout = '20ms'").await;
    let mut claims = tokio::task::JoinSet::new();
    for n in 0..6 {
        claims.spawn(claim_at_random(inbox.session().await, LEVELS[n % 3]));
    }
    // More than two turns of all slots, as far as the claims let it.
    let mut today = -113;
    while !claims.is_empty() {
        today = (today + i32::from(inbox.turn(today).await.is_empty())).min(-10);
        while let Some(done) = claims.try_join_next() {
            done.expect("no panic");
        }
        tokio::task::yield_now().await;
    }
    let twice = "count(*) FROM (SELECT FROM effect GROUP BY id, at HAVING count(*) > 1) AS t";
    assert_eq!(inbox.text(twice).await, "0");
    let days: i32 = inbox.text("count(DISTINCT at) FROM effect").await.parse().expect("a number");
    assert!(days > 10, "the ring has turned: {days} days");
}
