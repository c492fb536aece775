//! Constants of a route's rules between real servers: what is not a value of its column's type, as
//! Postgres writes it, is refused before anything is sent.

use serde_json::json;

use crate::support::servers::{own_database, own_vhost, postgres};
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::until;

const SQL: &str = "CREATE EXTENSION hstore SCHEMA public; CREATE EXTENSION ltree SCHEMA public; \
    CREATE TYPE mood AS ENUM ('lo', 'hi'); CREATE DOMAIN price AS numeric(6,2); \
    CREATE DOMAIN flag AS boolean; CREATE DOMAIN numbers AS int[]; \
    CREATE DOMAIN small AS int CHECK (VALUE < 10); \
    CREATE TABLE public.t (id int PRIMARY KEY, j jsonb, jj json, js jsonb[], f float8, n numeric, \
        p price, i int, s small, m mood, u uuid, ts timestamptz, d date, db flag, da numbers, \
        v varchar(3), c char(3), b bytea, iv interval, arr int[], money money, h hstore, lt ltree, \
        jp jsonpath, tq tsquery, rc regclass, r real, nm name)";

fn route(rules: &str) -> String {
    format!(
        "[[route]]\nname = \"t\"\ntable = \"public.t\"\nexchange = \"watership\"\n\
         routing_key = \"t\"\n{rules}\n"
    )
}

async fn stage(rules: &str) -> Stage {
    let routes = route(rules);
    let setup = Setup { sql: SQL, tables: &["public.t"], routes: &routes, ..Setup::default() };
    Stage::new(setup).await
}

/// Column, default as TOML, and what is told of it.
const WRONG: [(&str, &str, &str); 27] = [
    ("j", r#"'{"a":1'"#, "(jsonb) is \"{\\\"a\\\":1\""),
    ("j", "'none'", "(jsonb) is \"none\""),
    ("jj", "'nojson'", "(json) is \"nojson\""),
    ("js", "'{x}'", "(jsonb[]) is \"{x}\""),
    ("f", "'1e400'", "(double precision) is \"1e400\""),
    ("n", "'abc'", "(numeric) is \"abc\""),
    ("p", "'abc'", "(public.price) is \"abc\""),
    ("p", "1000000", "(public.price) is \"1000000\": numeric field overflow"),
    ("i", "99999999999", "(integer) is \"99999999999\": "),
    ("s", "'x'", "(public.small) is \"x\""),
    ("h", "'x'", "(public.hstore) is \"x\": "),
    ("lt", "'a..b'", "(public.ltree) is \"a..b\": "),
    ("jp", "'$.'", "(jsonpath) is \"$.\": syntax error at end of jsonpath input"),
    ("tq", "'a b &'", "(tsquery) is \"a b &\": syntax error in tsquery"),
    ("rc", "'nothing'", "(regclass) is \"nothing\": relation \"nothing\" does not exist"),
    ("m", "'nomood'", "(public.mood) is \"nomood\": invalid input value for enum public.mood"),
    ("u", "'nouuid'", "(uuid) is \"nouuid\": invalid input syntax for type uuid"),
    ("ts", "'2024'", "(timestamp with time zone) is \"2024\": invalid input syntax"),
    ("ts", "'2024-01-01 02:00:00+02'", "which Postgres writes as \"2024-01-01 00:00:00+00\""),
    ("d", "'2024-02-31'", "(date) is \"2024-02-31\": date/time field value out of range"),
    ("db", "'x'", "(public.flag) is \"x\""),
    ("da", "'{x}'", "(public.numbers) is \"{x}\""),
    ("arr", "'[1]'", "(integer[]) is \"[1]\""),
    ("v", "'toolong'", "(character varying(3)) is \"toolong\": value too long for type"),
    ("c", "'a'", "(character(3)) is \"a\", which Postgres writes as \"a  \""),
    ("b", "'AQI='", "(bytea) is \"AQI=\", which Postgres writes as \"\\\\x4151493d\""),
    ("iv", "'1 day'", "(interval) is \"1 day\", which Postgres writes as \"P1D\""),
];

#[tokio::test]
async fn a_default_that_is_no_value_of_its_type_is_refused_by_init_check_and_run() {
    let stage = stage("").await;
    let before = stage.configuration();
    for (index, (column, default, told)) in WRONG.iter().enumerate() {
        let rules = format!("map = {{ default = {{ {column} = {default} }} }}");
        stage.replace_configuration(&before.replace(&route(""), &route(&rules)));
        let place = format!("route \"t\": map.default of column {column:?} (");
        let told = [&*place, told];
        stage.run(&["check"]).await.expect_code(1).expect_text(&told);
        if index % 5 == 0 {
            stage.run(&["init"]).await.expect_code(1).expect_text(&told);
            stage.run(&["run"]).await.expect_code(1).expect_text(&told);
            let accept = stage.run(&["schema", "accept", "public.t"]).await;
            accept.expect_code(1).expect_text(&told);
        }
    }
}

#[tokio::test]
async fn defaults_of_every_type_make_a_body_of_valid_json() {
    let rules =
        r#"map = { default = { j = "{\"a\": [1]}", jj = "\"x\"", js = "{\"{\\\"b\\\": 2}\"}",
        f = "1e300", n = "1.50", p = 5, i = 7, s = 9, m = "hi",
        u = "0f4c4d5e-6f0a-4a39-b1ad-7f3e0c1a9a51", ts = "2024-01-01 00:00:00+00",
        d = "2024-02-29", db = true, da = "{1,NULL}", v = "abc", c = "a  ", b = "\\x0102",
        iv = "P1D", arr = "{{1},{2}}", money = "$1.50", h = "\"a\"=>\"1\"", lt = "a.b",
        jp = "$.\"a\"", tq = "'a'", rc = "pg_class", r = "0.1", nm = "n" } }"#
            .replace("\n", " ");
    let stage = stage(&rules).await;
    let relay = stage.start().await;
    stage.execute("INSERT INTO t (id) VALUES (1)").await;
    let got = stage.settled().await;
    let expected = json!({
        "id": 1, "j": {"a": [1]}, "jj": "x", "js": [{"b": 2}], "f": 1e300, "n": "1.50", "p": "5",
        "i": 7, "s": 9, "m": "hi", "u": "0f4c4d5e-6f0a-4a39-b1ad-7f3e0c1a9a51",
        "ts": "2024-01-01T00:00:00Z", "d": "2024-02-29", "db": true, "da": [1, null], "v": "abc",
        "c": "a  ", "b": "AQI=", "iv": "P1D", "arr": [[1], [2]], "money": "$1.50",
        "h": "\"a\"=>\"1\"", "lt": "a.b", "jp": "$.\"a\"", "tq": "'a'", "rc": "pg_class", "r": 0.1,
        "nm": "n",
    });
    assert_eq!(got[0].json()["after"], expected);
    // The type is another while the relay runs: the row is parked, and the reason names the key.
    stage.execute("ALTER TABLE t ALTER m TYPE jsonb USING NULL, ALTER v TYPE int USING 1").await;
    stage.execute("INSERT INTO t (id, v) VALUES (2, 1)").await;
    let parked = "SELECT coalesce(string_agg(error, ' '), '') FROM watership.parked";
    until("it is parked", async || {
        stage.text(parked).await.contains("map.default of the column is not a value of its type")
    })
    .await;
    relay.stop().await;
}

#[tokio::test]
async fn a_filter_that_no_row_passes_is_refused_with_column_and_type() {
    let stage = stage("").await;
    let before = stage.configuration();
    for (filter, told) in [
        ("p = 'abc'", "compares \"p\" (public.price) with a text in single quotes; expected a num"),
        ("arr", "compares \"arr\" (integer[]) with true or false"),
        (
            "m = 'nomood'",
            "the constant for column \"m\" (public.mood) is \"nomood\": invalid input",
        ),
        ("j = '{\\\"a\\\":1}'", "which Postgres writes as \"{\\\"a\\\": 1}\""),
        ("u = '0F4C4D5E-6F0A-4A39-B1AD-7F3E0C1A9A51'", "which Postgres writes as \"0f4c4d5e-"),
        ("ts > '2024-02-31'", "(timestamp with time zone) is \"2024-02-31\": date"),
        ("v = 'toolong'", "(character varying(3)) is \"toolong\": value too long for type"),
        ("c in ('a', 'toolong')", "(character(3)) is \"toolong\": value too long for type"),
        ("p = 1.234", "(public.price) is \"1.234\", which Postgres writes as \"1.23\""),
        ("p = 1000000", "(public.price) is \"1000000\": numeric field overflow"),
        ("r = 16777217", "(real) is \"16777217\", which Postgres writes as \"1.6777216e+07\""),
        ("i = 1.5", "compares \"i\" (integer) with 1.5; expected a whole number from"),
        ("s in (1, 99999999999)", "compares \"s\" (public.small) with 99999999999; expected a"),
        ("s = '5'", "compares \"s\" (public.small) with a text in single quotes; expected a num"),
        ("lt != 'a' or h = 'x'", "(public.hstore) is \"x\": "),
        ("jp = '$.'", "(jsonpath) is \"$.\": syntax error at end of jsonpath input"),
        ("j != '{\\\"a\\\":1}'", "which Postgres writes as \"{\\\"a\\\": 1}\""),
        ("m not in ('lo', 'nomood') and not (m != 'x')", "(public.mood) is \"x\": invalid input"),
        ("money > 100", "compares \"money\" (money) with >, but values of this type have no order"),
    ] {
        let rules = format!("filter = \"{filter}\"");
        stage.replace_configuration(&before.replace(&route(""), &route(&rules)));
        stage.run(&["check"]).await.expect_code(1).expect_text(&["route \"t\"", told]);
    }
    stage.run(&["run"]).await.expect_code(1).expect_text(&["money > 100"]);
    let rules = "filter = \"\"\"c = 'a' and db and p >= 1.5 and ts > '2024-01-31T00:00:00Z' and \
                 m in ('lo', 'hi') and arr = '{1}' and money = '$1.50' and m != 'future' and \
                 m not in ('later') and ts > '2024-01-31 10:00:00' and i is null and p = 2.00 and \
                 p != 1.234 and v is null and nm is null\"\"\"";
    stage.replace_configuration(&before.replace(&route(""), &route(rules)));
    let relay = stage.start().await;
    let insert = "INSERT INTO t (id, c, db, p, ts, m, arr, money) VALUES";
    let row =
        |id: u32, c: &str| format!("{insert} ({id}, '{c}', true, 2, now(), 'hi', '{{1}}', 1.5)");
    stage.execute(&row(1, "b")).await;
    stage.execute(&row(2, "a")).await;
    let got = stage.settled().await;
    assert_eq!(got.len(), 1);
    assert_eq!(got[0].json()["key"], json!({"id": 2}));
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_type_that_the_relays_role_may_not_use_is_judged_as_others_are() {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let role = format!("{}_relay", database.name);
    let sql = format!(
        "CREATE ROLE {role} LOGIN REPLICATION; CREATE SCHEMA app; \
         CREATE TYPE app.mood AS ENUM ('lo', 'hi'); CREATE DOMAIN app.body AS jsonb; \
         REVOKE USAGE ON TYPE app.mood, app.body FROM PUBLIC; \
         CREATE TABLE public.t (id int PRIMARY KEY, m app.mood, j app.body)"
    );
    let routes = route("map = { default = { m = 'lo', j = '{}' } }\nfilter = \"m is null\"");
    let source_url = &postgres().await.url(&role, &database.name);
    let tables = &["public.t"];
    let setup = Setup { sql: &sql, source_url, routes: &routes, tables, ..Setup::default() };
    let stage = Stage::on(database, vhost, setup).await;
    let relay = stage.start().await;
    stage.execute("INSERT INTO t (id) VALUES (1)").await;
    let got = stage.settled().await;
    assert_eq!(got[0].json()["after"], json!({"id": 1, "m": "lo", "j": {}}));
    relay.stop().await.expect_code(0);
    stage.run(&["check"]).await.expect_code(0);
    let right = stage.configuration();
    for (from, to, told) in [
        ("j = '{}'", "j = '{]'", "map.default of column \"j\" (app.body) is \"{]\""),
        ("m = 'lo'", "m = 'no'", "column \"m\" (app.mood) is \"no\": invalid input value for enum"),
    ] {
        stage.replace_configuration(&right.replace(from, to));
        stage.run(&["check"]).await.expect_code(1).expect_text(&[told]);
    }
}

/// Each would fail, or name its role, if something called it.
const TRAPS: &str = "CREATE FUNCTION app.trap() RETURNS boolean LANGUAGE plpgsql AS $f$ BEGIN \
        RAISE EXCEPTION 'called as %', current_user; END $f$; \
    CREATE TYPE app.mood AS ENUM ('lo', 'hi'); \
    CREATE FUNCTION app.to_mood(text) RETURNS app.mood LANGUAGE plpgsql AS $f$ BEGIN \
        PERFORM app.trap(); RETURN 'lo'; END $f$; \
    CREATE CAST (text AS app.mood) WITH FUNCTION app.to_mood AS IMPLICIT; \
    CREATE FUNCTION app.to_text(app.mood) RETURNS text LANGUAGE plpgsql AS $f$ BEGIN \
        PERFORM app.trap(); RETURN ''; END $f$; \
    CREATE CAST (app.mood AS text) WITH FUNCTION app.to_text AS IMPLICIT; \
    CREATE DOMAIN app.small AS int CHECK (app.trap()); \
    CREATE DOMAIN app.smaller AS app.small; \
    CREATE TYPE app.pair AS (a app.small, b int); \
    CREATE TYPE app.span AS RANGE (subtype = app.small); \
    CREATE TABLE public.t (id int PRIMARY KEY, m app.mood, ms app.mood[], s app.smaller, \
        list app.small[], pair app.pair, span app.span, spans app.span[]); \
    ALTER TABLE public.t OWNER TO app; ALTER TYPE app.mood OWNER TO app; \
    ALTER DOMAIN app.small OWNER TO app; ALTER FUNCTION app.trap OWNER TO app";

#[tokio::test]
async fn no_function_of_a_tables_owner_is_called_for_a_constant() {
    let rules = "map = { default = { m = 'hi', ms = '{hi}', s = 5, list = '{5}', \
                 pair = '(5,6)', span = '[1,2)', spans = '{\"[1,2)\"}' } }\n\
                 filter = \"m != 'hi' and ms != '{hi}' and s != 5 and not s = 7 and s = 5 and \
                 list != '{5}' and pair = '(5,6)' and span = '[1,2)'\"";
    let sql = format!(
        "DO $d$ BEGIN CREATE ROLE app; EXCEPTION WHEN duplicate_object OR unique_violation THEN \
         END $d$; CREATE SCHEMA app AUTHORIZATION app; {TRAPS}"
    );
    let (routes, tables) = (route(rules), &["public.t"]);
    let stage = Stage::new(Setup { sql: &sql, tables, routes: &routes, ..Setup::default() }).await;
    stage.run(&["check"]).await.expect_code(0);
    stage.start().await.stop().await.expect_code(0);
    let right = stage.configuration();
    for (from, to, told) in [
        ("m = 'hi', ms", "m = 'no', ms", "(app.mood) is \"no\": invalid input value for enum"),
        ("s = 5, list", "s = 5000000000, list", "(app.smaller) is \"5000000000\": value"),
    ] {
        assert!(right.contains(from), "{right}");
        stage.replace_configuration(&right.replace(from, to));
        stage.run(&["check"]).await.expect_code(1).expect_text(&[told]);
    }
}
