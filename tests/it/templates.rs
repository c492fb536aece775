//! Templates of exchanges, routing keys and headers between real servers: where a row goes by its
//! columns, what is parked, and that a retry goes to the exchange that was chosen.

use crate::parking::{parked, until_rows};
use crate::polling_mapped::{COLUMNS, MAPPED, TABLE as OUTBOX, emit};
use crate::polling_mapped_refused::refuse;
use crate::support::inbox::Message;
use crate::support::stage::{Setup, Stage};

const TABLE: &str = "CREATE TABLE sales (id int PRIMARY KEY, region text, email text)";
const ROUTES: &str = r#"
    [[route]]
    name = "sales"
    table = "public.sales"
    exchange = "shop.{column.region}"
    exchanges = ["shop.eu", "shop.us"]
    routing_key = "{column.region}.{op}"
    headers = { region = "{column.region}", who = "{column.email}/{key}" }
    columns = { mask = ["email"] }
    map = { rename = { region = "area" } }
    on_unroutable = "park"
    [[binding]]
    queue = "all"
    exchange = "shop.eu"
    routing_key = '#'
    "#;
const FAST: &str = "relay.checkpoint_interval = \"20ms\"\nlog.level = \"trace\"";

async fn stage(routes: &str) -> Stage {
    let tables = &["public.sales"];
    Stage::new(Setup { sql: TABLE, tables, settings: FAST, routes, ..Setup::default() }).await
}

fn places(messages: &[Message]) -> Vec<(&str, &str, String)> {
    let place = |m: &'_ Message| m.text("ws-exchange");
    messages.iter().map(|m| (&*m.exchange, &*m.routing_key, place(m))).collect()
}

#[tokio::test]
async fn a_row_goes_where_its_columns_say_and_what_they_cannot_say_is_parked_with_the_reason() {
    let stage = stage(ROUTES).await;
    let mut relay = stage.start().await;
    let insert = "INSERT INTO sales VALUES (1, 'eu', 'topsecret'), (2, NULL, 'topsecret'), \
                  (3, 'asia', 'topsecret'), (4, 'us', 'topsecret')";
    stage.execute(insert).await;
    stage.execute("DELETE FROM sales WHERE id = 1").await;
    stage.execute("TRUNCATE sales").await;
    let rows = [
        "parked invalid",
        "parked invalid",
        "parked unroutable",
        "parked invalid",
        "parked invalid",
    ];
    until_rows(&stage, &rows).await;
    let errors = stage.text("SELECT string_agg(error, '|' ORDER BY id) FROM watership.parked");
    let errors = errors.await;
    for expected in [
        "column \"region\" is in a template of the route, but null in this row",
        "is not one of its exchanges: \"shop.eu\", \"shop.us\"",
        "the replica identity does not carry it",
        "a truncate has no row",
    ] {
        assert!(errors.contains(expected), "{errors}");
    }
    assert!(!errors.contains("asia"), "{errors}");
    let got = stage.settled().await;
    assert_eq!(got[0].json()["after"]["area"], "eu", "templates have the names of the table");
    let eu = ("shop.eu", "eu.insert", "shop.eu".to_owned());
    assert_eq!(places(&got), std::slice::from_ref(&eu));
    assert_eq!(
        (got[0].text("region"), got[0].text("who")),
        ("eu".into(), "***/public.sales/1".into())
    );

    let (options, none) = (Default::default(), Default::default());
    let bind = stage.channel.queue_bind("all".into(), "shop.us".into(), "#".into(), options, none);
    bind.await.expect("bound");
    parked(&stage, &["retry", "--all"]).await;
    let rows = [&rows[..2], &["released unroutable"], &rows[3..]].concat();
    until_rows(&stage, &rows).await;
    let got = stage.settled().await;
    assert_eq!(places(&got), [eu, ("shop.us", "us.insert", "shop.us".to_owned())]);
    let seen = format!("{got:?} {}", relay.get("/status").await.1);
    relay.signal(watership::dev::Signal::Term);
    let log = relay.ended().await.log;
    let table = stage.text("SELECT string_agg(p::text, ' ') FROM watership.parked AS p").await;
    assert!(![seen, log, table].join("\n").contains("topsecret"));
}

#[tokio::test]
async fn a_template_that_names_no_column_of_the_table_is_refused_by_check_and_at_start() {
    let stage = stage(ROUTES).await;
    let text = stage.configuration().replace("{column.region}.{op}", "{column.regoin}.{op}");
    stage.replace_configuration(&text);
    let refused = "routing_key names column \"regoin\", which table public.sales does not have";
    let columns = "its published columns are: id, region, email";
    stage.run(&["check"]).await.expect_code(1).expect_text(&[refused, columns]);
    stage.spawn().ended().await.expect_text(&[refused]);
    for (from, to, expected) in [
        (
            "{column.regoin}",
            "{colum.region}",
            "allowed are: schema, table, op, key, record_key, col",
        ),
        ("{column.regoin}", "{column.email}", "a template names column \"email\", which the route"),
        ("exchanges = [", "ordering = \"pipelined\"\nexchanges = [", "overtake each other"),
        ("exchanges = [\"shop.eu\", \"shop.us\"]", "", "an exchange with fields needs exchanges"),
        (
            "\"shop.{column.region}\"",
            "\"shop.eu\"",
            "but exchange contains no {field}; remove exchanges",
        ),
    ] {
        let text = text.replace(from, to).replace("mask = [\"email\"]", "exclude = [\"email\"]");
        stage.replace_configuration(&text);
        stage.run(&["check"]).await.expect_code(2).expect_text(&[expected]);
    }
}

#[tokio::test]
async fn a_column_of_a_template_that_is_gone_breaks_the_promise_of_the_route() {
    let routes = "[[route]]\nname = \"sales\"\ntable = \"public.sales\"\n\
        exchange = \"watership\"\nrouting_key = \"{column.region}\"\non_drift = \"park\"\n\
        columns = { mask = [\"region\"] }\n";
    let stage = stage(routes).await;
    let relay = stage.start().await;
    stage.execute("INSERT INTO sales VALUES (1, 'eu', 'a')").await;
    let got = stage.settled().await;
    assert_eq!(got[0].routing_key, "***");
    stage.execute("ALTER TABLE sales RENAME region TO area").await;
    stage.execute("INSERT INTO sales VALUES (2, 'topsecret', 'a')").await;
    until_rows(&stage, &["parked drift"]).await;
    let error = stage.text("SELECT error FROM watership.parked").await;
    assert!(error.contains("column \"region\" (text) is gone"), "{error}");
    let refused = "routing_key names column \"region\", which table public.sales does not have";
    let accepted = stage.run(&["schema", "accept", "public.sales"]).await;
    assert!(accepted.code != 0 && !accepted.log.contains("topsecret"), "{}", accepted.log);
    // The mask is named first.
    accepted.expect_text(&["column \"region\", which table public.sales does not have"]);
    let without = stage.configuration().replace("columns = { mask = [\"region\"] }\n", "");
    stage.replace_configuration(&without);
    stage.run(&["schema", "accept", "public.sales"]).await.expect_text(&[refused]);
    relay.stop().await.expect_code(0);
}

const OUTBOX_ROUTES: &str = r#"
    [[route]]
    name = "outbox"
    outbox = { aggregate_type = "order" }
    exchange = "shop.{column.the region}"
    exchanges = ["shop.eu", "shop.us"]
    routing_key = "{event_type}.{column.the region}"
    headers = { vip = "{column.vip}/{aggregate_id}" }
    on_unroutable = "park"
    [[binding]]
    queue = "all"
    exchange = "shop.eu"
    routing_key = '#'
    "#;

#[tokio::test]
async fn an_event_of_a_table_of_ones_own_goes_where_its_further_columns_say() {
    let sql = format!("{OUTBOX}; ALTER TABLE outbox ADD \"the region\" text, ADD vip boolean");
    let mapped = "outbox.table = \"public.outbox\"\noutbox.profile = \"debezium\"";
    for settings in [mapped.to_owned(), format!("{MAPPED}\n{COLUMNS}")] {
        let settings = format!("{settings}\n{FAST}");
        let setup = Setup { sql: &sql, settings: &settings, ..Setup::default() };
        let stage = Stage::new(Setup { routes: OUTBOX_ROUTES, ..setup }).await;
        let relay = stage.start().await;
        let row = |kind: &str, key: &str, region: &str| {
            emit(kind)
                .replace("payload)", "payload, \"the region\", vip)")
                .replace("'order', '1'", &format!("'order', '{key}'"))
                .replace("'1')", &format!("'1', {region}, true)"))
        };
        stage.execute(&row("made", "1", "'eu'")).await;
        stage.execute(&row("made", "2", "NULL")).await;
        stage.execute(&row("made", "3", "'us'")).await;
        stage.execute(&row("made", "4", "'asia'")).await;
        until_rows(&stage, &["parked invalid", "parked unroutable", "parked invalid"]).await;
        let got = stage.inbox.count(1).await;
        assert_eq!(places(&got), [("shop.eu", "made.eu", "shop.eu".to_owned())]);
        assert_eq!(got[0].text("vip"), "t/1");
        let errors = "SELECT string_agg(error, '|' ORDER BY id) FROM watership.parked";
        let null = "column \"the region\" is in a template of the route, but null in this row";
        let told = stage.text(errors).await;
        assert!(told.contains(null) && !told.contains("asia"), "{told}");
        // A row that was parked keeps what its templates name.
        let (options, none) = (Default::default(), Default::default());
        let bind =
            stage.channel.queue_bind("all".into(), "shop.us".into(), "#".into(), options, none);
        bind.await.expect("bound");
        parked(&stage, &["retry", "--all"]).await;
        until_rows(&stage, &["parked invalid", "released unroutable", "parked invalid"]).await;
        assert_eq!(stage.text(errors).await, told, "with the same reason");
        let got = stage.inbox.count(2).await;
        assert_eq!(places(&got)[1], ("shop.us", "made.us", "shop.us".to_owned()));
        relay.stop().await.expect_code(0);
        // One that is not there is refused by all.
        let text = stage.configuration().replace("{column.vip}", "{column.nope}");
        stage.replace_configuration(&text);
        let told = "public.outbox has no column \"nope\" ({column.NAME} in a template of a route)";
        refuse(&stage, &[told, "its columns are: id, aggregatetype"]).await;
    }
}

#[tokio::test]
async fn a_template_of_the_relays_own_outbox_has_no_columns() {
    let stage = Stage::new(Setup::default()).await;
    let route = "\n[[route]]\nname = \"one\"\noutbox = { aggregate_type = \"one\" }\n\
        exchange = \"watership\"\nrouting_key = \"{column.region}\"\n";
    stage.append_to_configuration(route);
    let told = ["\"column.region\"", "watership.outbox has no columns of yours", "outbox.table"];
    stage.run(&["check"]).await.expect_code(2).expect_text(&told);
}
