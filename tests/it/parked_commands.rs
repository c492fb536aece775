//! `watership parked`: what it shows, and what it discards.

use serde_json::json;

use super::parking::{SMALL, emit, emit_large, parked, rows, until_rows};
use crate::support::inbox::kinds;
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::until;

#[tokio::test]
async fn a_key_a_route_or_everything_that_waits_is_discarded_at_once() {
    let stage = Stage::new(Setup { settings: SMALL, ..Setup::default() }).await;
    let relay = stage.start().await;
    for key in ["1", "2", "3"] {
        emit_large(&stage, "order", key, "large").await;
        emit(&stage, "order", key, "after").await;
    }
    until_rows(&stage, &["parked too_large", "parked follows"].repeat(3)).await;
    let discard = async |which: &[&str]| {
        let arguments = ["parked", "discard", "--reason", "a test"];
        stage.run(&[&arguments, which].concat()).await
    };
    discard(&[]).await.expect_code(2);
    discard(&["--key", "order/9"])
        .await
        .expect_code(1)
        .expect_text(&["no waiting rows that match"]);
    let retry = async |which: &[&str]| stage.run(&[&["parked", "retry"], which].concat()).await;
    for which in [&["--key", "order/9"][..], &["--key", "-x/1"], &["--route", "nope"]] {
        let told = ["no waiting rows that match"];
        retry(which).await.expect_code(1).expect_text(&told);
    }
    discard(&["1", "99"]).await.expect_code(1).expect_text(&["no parked row 99"]);
    assert_eq!(rows(&stage).await[0], "parked too_large", "all that are named, or none");

    let ended = discard(&["--key", "order/1"]).await;
    ended.expect_code(0).expect_text(&["discarded 2 rows"]);
    assert!(!ended.log.contains("same key follow"), "{}", ended.log);
    discard(&["3", "4"]).await.expect_code(0).expect_text(&["discarded 2 rows"]);
    discard(&["--route", "outbox"]).await.expect_code(0).expect_text(&["discarded 2 rows"]);
    discard(&["--all"]).await.expect_code(1);
    retry(&["--all"]).await.expect_code(0).expect_text(&["0 rows"]);
    let told = ["row 1 is discarded; only waiting rows can be retried"];
    retry(&["1"]).await.expect_code(1).expect_text(&told);
    let told = ["outbox       no such row"];
    stage.run(&["find", "--key", "-x/1"]).await.expect_code(1).expect_text(&told);
    until_rows(&stage, &["discarded too_large", "discarded follows"].repeat(3)).await;
    until("the keys are free", async || relay.status().await["parked"]["rows"] == 0).await;
    emit(&stage, "order", "1", "live").await;
    assert_eq!(kinds(&stage.settled().await), ["live"]);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_retry_that_fails_keeps_the_first_reason_and_shows_its_own() {
    let stage = Stage::new(Setup { settings: SMALL, ..Setup::default() }).await;
    let relay = stage.start().await;
    emit_large(&stage, "order", "1", "large").await;
    until_rows(&stage, &["parked too_large"]).await;
    relay.stop().await.expect_code(0);
    stage.append_to_configuration(
        "[[route]]\nname = \"others\"\noutbox = { aggregate_type = \"x\" }\n\
         exchange = \"watership\"\n",
    );
    let relay = stage.start().await;
    parked(&stage, &["retry", "1"]).await;
    until("it was tried", async || {
        stage.holds("(SELECT attempts FROM watership.parked WHERE id = 1) = 2").await
    })
    .await;
    let shown = parked(&stage, &["show", "1"]).await;
    assert_eq!((&shown["kind"], &shown["last_kind"]), (&json!("too_large"), &json!("no_route")));
    let told = stage.run(&["parked", "show", "1"]).await;
    told.expect_text(&[
        "error        its body has 2002 bytes",
        "last retry   failed, no_route: there is no route \"outbox\" any more",
        "hint         add a [[route]]",
    ]);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn what_applications_wrote_reaches_no_terminal_as_a_command_and_forges_no_line() {
    let routes = r#"
        [[route]]
        name = "all"
        outbox = { aggregate_type = "*" }
        exchange = "narrow"
        on_unroutable = "park"
        [[exchange]]
        name = "narrow"
        "#;
    let stage = Stage::new(Setup { routes, ..Setup::default() }).await;
    let relay = stage.start().await;
    let nasty = r"E'k\x1b]52;c;eA==\x07\u009b2J\u202e\n     9 parked    forged'";
    let body = r"E'{\n\n\n\n}'::json".to_owned();
    let long = "to_json(repeat('ä', 1500))";
    let binary = r"'\xff001b5d'::bytea";
    stage.execute(&format!("SELECT watership.emit('a', {nasty}, 't', {body})")).await;
    stage.execute(&format!("SELECT watership.emit('a', '2', 't', {long})")).await;
    stage.execute(&format!("SELECT watership.emit_bytes('b', '1', 't', {binary}, 'x/y')")).await;
    until("they are parked", async || rows(&stage).await.len() == 3).await;

    let mut all = Vec::new();
    for arguments in [
        &["parked", "list"][..],
        &["parked", "list", "--json"],
        &["parked", "show", "1"],
        &["parked", "show", "1", "--json"],
        &["status"],
    ] {
        all.push(stage.run(arguments).await.log);
    }
    for text in &all {
        let obeyed = |c: char| c.is_control() && c != '\n' || c == '\u{202e}';
        assert!(!text.contains(obeyed), "{text:?}");
        assert!(!text.lines().any(|line| line.trim_start().starts_with("9 parked")), "{text}");
    }
    assert!(all[0].contains(r"a/k\u{1b}]52;c;eA==\u{7}\u{9b}2J\u{202e}\n     9"), "{}", all[0]);
    let listed = parked(&stage, &["list"]).await;
    let key = "a/k\u{1b}]52;c;eA==\u{7}\u{9b}2J\u{202e}\n     9 parked    forged";
    assert_eq!(listed[0]["key"], key, "JSON keeps the value");

    let ended = stage.run(&["parked", "show", "2"]).await;
    ended.expect_text(&["body         3002 bytes", "and 954 bytes more; --full shows all"]);
    let ended = stage.run(&["parked", "show", "2", "--full"]).await;
    ended.expect_text(&[&"ä".repeat(1500)]);
    let ended = stage.run(&["parked", "show", "3"]).await;
    ended.expect_text(&["body (hex)   4 bytes\n    ff001b5d\n"]);
    assert_eq!(parked(&stage, &["show", "3"]).await["body_hex"], "ff001b5d");
    relay.stop().await.expect_code(0);
}
