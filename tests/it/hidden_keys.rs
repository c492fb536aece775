//! A key that is hidden, where it is needed most: by a backfill, and by what cannot be routed or
//! published.

use crate::backfill::{state, until_state};
use crate::column_rules::not_seen;
use crate::parking::{SMALL, parked};
use crate::support::inbox::Message;
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::until;

const TABLE: &str = "CREATE TABLE customers (email text PRIMARY KEY, name text, note text)";

fn route(name: &str, lines: &str) -> String {
    format!(
        "[[route]]\nname = \"{name}\"\ntable = \"public.customers\"\nexchange = \"watership\"\n\
         {lines}\n"
    )
}

async fn stage(sql: &str, settings: &str, routes: &str) -> Stage {
    let settings = format!("{SMALL}\nlog.level = \"trace\"\n{settings}");
    let tables = &["public.customers"];
    Stage::new(Setup { sql, tables, settings: &settings, routes, source_url: "" }).await
}

/// All that people see, but for the tables of the schema.
async fn shown(stage: &Stage, messages: &[Message]) -> String {
    let mut all = vec![format!("{messages:?}")];
    all.extend(messages.iter().map(|message| String::from_utf8_lossy(&message.bytes).into_owned()));
    for arguments in [
        &["parked", "list"][..],
        &["parked", "--json", "list"],
        &["parked", "show", "1"],
        &["parked", "--json", "show", "1"],
        &["status"],
        &["--json", "status"],
        &["check"],
        &["backfill", "list"],
        &["--json", "backfill", "list"],
        &["schema", "public.customers"],
    ] {
        all.push(stage.run(arguments).await.log);
    }
    all.join("\n")
}

const ROWS: &str =
    "SELECT coalesce((SELECT string_agg(p::text, ' ') FROM watership.parked AS p), '')";

#[tokio::test]
async fn a_hidden_key_is_seen_nowhere_while_its_table_is_read() {
    for rule in ["hash", "mask"] {
        let sql = format!(
            "{TABLE}; INSERT INTO customers \
             SELECT 'topsecret' || g, 'topsecret-name', repeat('x', g % 20 * 100) \
             FROM generate_series(1, 60) AS g"
        );
        let rules = format!("columns = {{ {rule} = [\"email\", \"name\"] }}");
        let settings = "backfill.chunk_rows = 5\nbackfill.max_rate = 20";
        let stage = stage(&sql, settings, &route("customers", &rules)).await;
        let relay = stage.start().await;
        stage.run(&["backfill", "public.customers", "--detach"]).await.expect_code(0);
        let begun = "(SELECT last_key IS NOT NULL FROM watership.backfill)";
        until("it has begun", async || stage.holds(begun).await).await;
        let log = stage.run(&["backfill", "pause", "public.customers"]).await.log;
        let mut all = shown(&stage, &stage.settled().await).await + &log;
        all += &relay.get("/status").await.1;
        // What it continues from is for the relay's role only.
        stage.execute("CREATE ROLE nosy_hidden_keys").await;
        let rights = "SELECT bool_or(has_table_privilege('nosy_hidden_keys', \
            ('watership.' || t)::regclass, 'SELECT')) \
            FROM unnest(ARRAY['backfill', 'secret', 'parked', 'schema_history']) AS t";
        assert_eq!(stage.text(rights).await, "false");
        stage.execute("DROP ROLE nosy_hidden_keys").await;
        stage.run(&["backfill", "resume", "public.customers"]).await.expect_code(0);
        stage.execute("UPDATE customers SET note = 'new' WHERE email LIKE '%3'").await;
        until_state(&stage, "public.customers", "done").await;
        let got = stage.settled().await;
        all += &shown(&stage, &got).await;
        all += &stage.text(ROWS).await;
        // Nothing of it is left behind.
        all += &stage.text("SELECT string_agg(b::text, ' ') FROM watership.backfill AS b").await;
        all += &relay.get("/status").await.1;
        all += &relay.get("/metrics").await.1;
        all += &relay.stop().await.log;
        assert!(!stage.holds("NOT EXISTS (SELECT FROM watership.parked)").await, "large rows");
        assert!(!got.is_empty());
        not_seen(&all);
    }
}

#[tokio::test]
async fn a_run_that_ends_early_keeps_no_key_and_tells_none() {
    let sql = format!(
        "{TABLE}; INSERT INTO customers SELECT 'topsecret' || g FROM generate_series(1, 60) AS g"
    );
    let settings = "backfill.chunk_rows = 5\nbackfill.max_rate = 20";
    let stage =
        stage(&sql, settings, &route("customers", "columns = { hash = [\"email\"] }")).await;
    let relay = stage.start().await;
    let begun = "(SELECT bool_or(last_key IS NOT NULL) FROM watership.backfill)";
    let mut all = String::new();
    for end in ["cancel", "alter"] {
        stage.run(&["backfill", "public.customers", "--detach"]).await.expect_code(0);
        until("it has begun", async || stage.holds(begun).await).await;
        match end {
            "cancel" => {
                all += &stage.run(&["backfill", "cancel", "public.customers"]).await.log;
            }
            _ => stage.execute("ALTER TABLE customers ADD more int").await,
        }
        until("it has ended", async || {
            let state = state(&stage, "public.customers").await;
            state.starts_with("cancelled") || state.starts_with("failed")
        })
        .await;
        // A chunk that was on its way when it ended is settled, too.
        all += &shown(&stage, &stage.settled().await).await;
        all += &stage.text("SELECT string_agg(b::text, ' ') FROM watership.backfill AS b").await;
    }
    all += &relay.stop().await.log;
    not_seen(&all);
}

#[tokio::test]
async fn what_cannot_be_routed_or_made_tells_no_hidden_value() {
    let nowhere = "[[exchange]]\nname = \"nowhere\"\n";
    let hidden = "columns = { hash = [\"email\"], mask = [\"name\"] }\nrouting_key = \"c.{key}\"";
    let aside = "on_unroutable = \"park\"";
    let unroutable = route("customers", &format!("{hidden}\n{aside}"))
        .replace("exchange = \"watership\"", "exchange = \"nowhere\"");
    let held = unroutable.replace(aside, "");
    // Longer than a routing key may be, with what is sent of the key in it.
    let poison = route("customers", &format!("{hidden}{}", "{key}.".repeat(4)))
        .replace("c.{key}\"{key}", "c.{key}{key}");
    let poison = poison.replace("{key}.\n", "{key}.\"\n");
    for (routes, parks) in [(unroutable, true), (held, false), (poison, true)] {
        let kind = if routes.contains("nowhere") { "unroutable" } else { "invalid" };
        let stage = stage(TABLE, "", &format!("{routes}\n{nowhere}")).await;
        let relay = stage.start().await;
        stage
            .execute("INSERT INTO customers VALUES ('topsecret-mail', 'topsecret-name', 'note')")
            .await;
        stage.execute("UPDATE customers SET note = 'later'").await;
        let stopped = async || match parks {
            true => stage.holds("(SELECT count(*) = 2 FROM watership.parked)").await,
            false => relay.status().await["held"].as_array().is_some_and(|held| !held.is_empty()),
        };
        until("nothing goes", stopped).await;
        let found = stage.text(&format!("SELECT coalesce(({ROWS}), '')")).await;
        assert!(!parks || found.contains(kind), "{found}");
        let mut all = shown(&stage, &stage.settled_now().await).await;
        all += &stage.run(&["find", "--key", "public.customers/other"]).await.log;
        all += &stage.text(ROWS).await;
        all += &relay.get("/status").await.1;
        all += &relay.get("/metrics").await.1;
        if parks {
            parked(&stage, &["retry", "--all"]).await;
            until("they were tried", async || {
                stage.holds("(SELECT max(attempts) FROM watership.parked) > 1").await
            })
            .await;
            all += &stage.text(ROWS).await;
        }
        all += &relay.stop().await.log;
        assert!(all.contains("customers"), "{all}");
        not_seen(&all);
    }
}
