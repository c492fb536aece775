//! Types of users that come, change and go while a relay runs or is away, in both modes.

use serde_json::json;

use crate::backfill::{backfill, reads, until_state};
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::until;

/// Text mode and binary mode.
const MODES: [&str; 2] = ["", "source.binary = true"];

async fn moods(settings: &str) -> Stage {
    let sql = "CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE DOMAIN moods AS mood[]; \
        CREATE TYPE pair AS (a int, m mood); \
        CREATE TABLE public.t (id int PRIMARY KEY, m mood, ms moods, p pair, ps pair[])";
    Stage::new(Setup { sql, tables: &["public.t"], settings, ..Setup::default() }).await
}

#[tokio::test]
async fn a_type_made_while_a_session_runs_is_read_and_nothing_is_parked() {
    for settings in MODES {
        let sql = "CREATE TABLE public.t (id int PRIMARY KEY)";
        let setup = Setup { sql, tables: &["public.t"], settings, ..Setup::default() };
        let stage = Stage::new(setup).await;
        let relay = stage.start().await;
        stage.execute("INSERT INTO t VALUES (1)").await;
        // Settled and stored, so that the next session does not repeat it.
        stage.settled().await;
        stage
            .execute(
                "CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE DOMAIN many AS mood[]; \
                 ALTER TABLE t ADD COLUMN m mood, ADD COLUMN ms mood[], ADD COLUMN d many",
            )
            .await;
        stage.execute("INSERT INTO t VALUES (2, 'ok', '{sad,NULL}', '{{ok},{sad}}')").await;
        let got = stage.inbox.count(2).await;
        let after = json!({"id": 2, "m": "ok", "ms": ["sad", null], "d": [["ok"], ["sad"]]});
        assert_eq!(got[1].json()["after"], after, "{settings}");
        assert!(stage.holds("NOT EXISTS (SELECT FROM watership.parked)").await);
        assert!(relay.status().await["sessions"].as_u64() >= Some(2), "a session read it");
        relay.stop().await.expect_code(0);
    }
}

#[tokio::test]
async fn values_added_to_an_enum_and_fields_added_to_a_row_type_arrive_in_the_same_session() {
    for settings in MODES {
        let stage = moods(settings).await;
        let relay = stage.start().await;
        stage.execute("INSERT INTO t VALUES (1, 'ok', '{ok}', '(1,ok)', '{}')").await;
        stage.execute("ALTER TYPE mood ADD VALUE 'very happy'").await;
        stage.execute("ALTER TYPE pair ADD ATTRIBUTE t text").await;
        let row = "2, 'very happy', '{\"very happy\"}', ROW(1, 'very happy', 'x'), \
                   ARRAY[ROW(2, NULL, '')::pair]";
        stage.execute(&format!("INSERT INTO t VALUES ({row})")).await;
        let got = stage.settled().await;
        let after = json!({
            "id": 2, "m": "very happy", "ms": ["very happy"],
            "p": "(1,\"very happy\",x)", "ps": ["(2,,\"\")"],
        });
        assert_eq!(got[1].json()["after"], after, "{settings}");
        assert_eq!(relay.status().await["sessions"], 1, "{settings}");
        relay.stop().await.expect_code(0);
    }
}

#[tokio::test]
async fn a_field_of_a_type_that_is_younger_than_the_session_is_read_by_the_next_one() {
    let stage = moods("source.binary = true").await;
    let relay = stage.start().await;
    stage.execute("INSERT INTO t VALUES (1)").await;
    stage.settled().await;
    stage
        .execute("CREATE TYPE size AS ENUM ('s', 'l'); ALTER TYPE pair ADD ATTRIBUTE s size")
        .await;
    stage.execute("INSERT INTO t (id, p) VALUES (2, ROW(1, 'ok', 'l'))").await;
    let got = stage.inbox.count(2).await;
    assert_eq!(got[1].json()["after"]["p"], "(1,ok,l)");
    assert!(stage.holds("NOT EXISTS (SELECT FROM watership.parked)").await);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_backlog_with_a_type_that_is_gone_comes_as_text_or_is_parked_in_binary_mode() {
    for settings in MODES {
        let stage = moods(settings).await;
        stage.execute("INSERT INTO t VALUES (1, 'ok', '{ok}', '(1,ok)', NULL)").await;
        stage
            .execute(
                "ALTER TABLE t DROP COLUMN p, DROP COLUMN ps, ALTER COLUMN ms TYPE text[] \
                 USING ms::text[], ALTER COLUMN m TYPE text; \
                 DROP TYPE pair; DROP DOMAIN moods; DROP TYPE mood",
            )
            .await;
        stage.execute("INSERT INTO t VALUES (2, 'ok', '{ok}')").await;
        let relay = stage.start().await;
        let second = json!({"id": 2, "m": "ok", "ms": ["ok"]});
        if settings.is_empty() {
            let got = stage.settled().await;
            let first = json!({"id": 1, "m": "ok", "ms": "{ok}", "p": "(1,ok)", "ps": null});
            assert_eq!(got[0].json()["after"], first);
            assert_eq!(got[1].json()["after"], second);
        } else {
            let got = stage.inbox.count(1).await;
            assert_eq!(got[0].json()["after"], second);
            let one = "(SELECT count(*) FROM watership.parked) = 1";
            until("the first row is parked", async || stage.holds(one).await).await;
            let error = stage.text("SELECT error FROM watership.parked").await;
            assert!(error.contains("is not known to this session"), "{error}");
        }
        relay.stop().await.expect_code(0);
    }
}

#[tokio::test]
async fn a_row_that_was_parked_is_retried_as_it_would_have_been_sent_although_its_type_is_gone() {
    let stage = moods("broker.max_message_size = \"2KiB\"").await;
    let relay = stage.start().await;
    let many = "(SELECT array_agg('ok'::mood) FROM generate_series(1, 1000))";
    stage.execute(&format!("INSERT INTO t (id, ms) VALUES (1, {many})")).await;
    let one = "(SELECT count(*) FROM watership.parked) = 1";
    until("the row is parked", async || stage.holds(one).await).await;
    relay.stop().await.expect_code(0);
    stage
        .execute(
            "ALTER TABLE t DROP m, DROP ms, DROP p, DROP ps; DROP TYPE pair; DROP DOMAIN moods; \
             DROP TYPE mood",
        )
        .await;
    let larger = stage.configuration().replace("2KiB", "1MiB");
    stage.replace_configuration(&larger);
    let relay = stage.start().await;
    stage.run(&["parked", "retry", "--all"]).await.expect_code(0);
    let got = stage.inbox.count(1).await;
    let ms = got[0].json()["after"]["ms"].clone();
    assert_eq!(ms.as_array().map(Vec::len), Some(1000), "{ms}");
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_backfill_writes_the_types_of_users_as_the_stream_does() {
    for settings in MODES {
        let stage = moods(settings).await;
        let relay = stage.start().await;
        stage.execute("INSERT INTO t VALUES (1, 'ok', '{ok,NULL}', '(1,ok)', '{\"(2,)\"}')").await;
        stage.settled().await;
        backfill(&stage, &["public.t"]).await;
        until_state(&stage, "public.t", "done").await;
        let got = stage.settled().await;
        let read = reads(&got);
        assert_eq!(read.len(), 1, "{settings}");
        assert_eq!(read[0].json()["after"], got[0].json()["after"], "{settings}");
        assert_eq!(read[0].json()["after"]["ms"], json!(["ok", null]), "{settings}");
        relay.stop().await.expect_code(0);
    }
}
