//! The lock queue: nothing deletes it unnoticed, and who holds it is told.

use crate::support::servers::{Vhost, own_database, own_vhost, rabbit};
use crate::support::stage::{Running, Setup, Stage};
use crate::support::waiting::until;

const LOCK: &str = "watership.shop.lock";

async fn sessions(relay: &Running) -> u64 {
    relay.status().await["sessions"].as_u64().unwrap_or(0)
}

/// Consumers of the lock queue; `None` when it does not exist.
async fn consumers(vhost: &str) -> Option<u64> {
    let path = format!("/api/queues/{vhost}/{LOCK}");
    let text = rabbit().await.management("GET", &path, "").await.ok()?;
    let queue: serde_json::Value = serde_json::from_str(&text).ok()?;
    Some(queue["consumers"].as_u64().unwrap_or(0))
}

#[tokio::test]
async fn a_policy_that_expires_unused_queues_does_not_take_the_lock_away() {
    let vhost = own_vhost().await;
    let name = vhost.name.clone();
    let policy = r#"{"pattern":".*","apply-to":"queues","definition":{"expires":1000}}"#;
    let path = format!("/api/policies/{name}/expiry");
    rabbit().await.management("PUT", &path, policy).await.expect("a policy");
    let stage = Stage::on(own_database().await, vhost, Setup::default()).await;
    let relay = stage.start().await;
    // An unused queue of the same policy shows that the time has passed.
    let options = lapin::options::QueueDeclareOptions { durable: true, ..Default::default() };
    let declare = stage.channel.queue_declare("unused".into(), options, Default::default());
    declare.await.expect("declared");
    let unused = format!("/api/queues/{name}/unused");
    until("the unused queue has expired", async || {
        rabbit().await.management("GET", &unused, "").await.is_err()
    })
    .await;
    until("the lock has its consumer", async || consumers(&name).await == Some(1)).await;
    assert_eq!(sessions(&relay).await, 1);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_lock_that_was_deleted_ends_the_session_and_is_taken_again() {
    let vhost = own_vhost().await;
    let name = vhost.name.clone();
    let stage = Stage::on(own_database().await, vhost, Setup::default()).await;
    let relay = stage.start().await;
    // What is published to it is not for the relay, and changes nothing.
    let publish = stage.channel.basic_publish(
        "".into(),
        LOCK.into(),
        Default::default(),
        b"hello",
        Default::default(),
    );
    publish.await.expect("published").await.expect("taken");
    stage.execute("SELECT watership.emit('t', '1', 'e', '1')").await;
    stage.inbox.count(1).await;
    assert_eq!(sessions(&relay).await, 1);
    rabbit().await.ctl(&["delete_queue", "--vhost", &name, LOCK]).await.expect("deleted");
    until("the next session streams", async || {
        sessions(&relay).await > 1 && relay.status().await["state"] == "streaming"
    })
    .await;
    assert!(consumers(&name).await.is_some(), "the lock is back");
    stage.execute("SELECT watership.emit('t', '1', 'e', '2')").await;
    stage.inbox.count(2).await;
    relay.stop().await.expect_code(0).expect_text(&["the lock queue of this relay was deleted"]);
}

#[tokio::test]
async fn a_user_who_may_not_read_the_lock_relays_and_is_told() {
    let vhost = own_vhost().await;
    let (name, user) = (vhost.name.clone(), format!("blind-{}", vhost.name));
    let node = rabbit().await;
    let put = async |path: String, body: &str| {
        node.management("PUT", &path, body).await.expect("the broker takes it");
    };
    put(format!("/api/users/{user}"), r#"{"password":"pw","tags":""}"#).await;
    let rights = r#"{"configure":".*","write":".*","read":"^(all|watership)$"}"#;
    put(format!("/api/permissions/{name}/{user}"), rights).await;
    let url = vhost.url.replace("guest:guest", &format!("{user}:pw"));
    let vhost = Vhost { url, name };
    let stage = Stage::on(own_database().await, vhost, Setup::default()).await;
    let relay = stage.start().await;
    stage.execute("SELECT watership.emit('t', '1', 'e', '1')").await;
    stage.inbox.count(1).await;
    relay.stop().await.expect_code(0).expect_text(&["cannot be watched", "read permission"]);
}

#[tokio::test]
async fn an_ordinary_queue_in_place_of_the_lock_is_not_taken_for_another_relay() {
    let vhost = own_vhost().await;
    let path = format!("/api/queues/{}/{LOCK}", vhost.name);
    let stage = Stage::on(own_database().await, vhost, Setup::default()).await;
    let node = rabbit().await;
    for queue in [
        r#"{"durable":true}"#,
        r#"{"durable":true,"arguments":{"x-queue-type":"quorum"}}"#,
        r#"{"durable":false,"auto_delete":true}"#,
    ] {
        node.management("PUT", &path, queue).await.expect("a queue");
        let told = ["queue \"watership.shop.lock\" is an ordinary queue", "delete that queue"];
        stage.spawn().ended().await.expect_code(1).expect_text(&told);
        stage.run(&["check"]).await.expect_code(1).expect_text(&told);
        node.management("DELETE", &path, "").await.expect("it is deleted");
    }
    let told = ["opened two connections, all channels, and the lock queue"];
    stage.run(&["check"]).await.expect_code(0).expect_text(&told);
    let relay = stage.start().await;
    let told = ["a relay of this name holds the lock queue", "nothing is wrong with it"];
    stage.run(&["check"]).await.expect_code(0).expect_text(&told);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_stand_by_behind_the_relay_of_another_database_says_which_one_that_serves() {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let url = rabbit().await.management_url().expect("management runs");
    let settings = format!("broker.management_url = \"{url}\"");
    let setup = Setup { settings: &settings, ..Setup::default() };
    let same = Vhost { url: vhost.url.clone(), name: vhost.name.clone() };
    let first = Stage::on(own_database().await, same, setup.clone()).await;
    let second = Stage::on(database, vhost, setup).await;
    let active = first.start().await;
    let waiting = second.spawn();
    until("it says whom it waits for", async || {
        let status = waiting.status().await;
        let by = &status["standing_by"];
        let owner = by["lock_owner"].as_str().unwrap_or_default();
        let doubt = by["doubt"].as_str().unwrap_or_default();
        owner.contains(&first.database.name) && doubt.contains("serves another database")
    })
    .await;
    let (_, told) = waiting.get("/readyz").await;
    assert!(told.contains("another database") && !told.contains("guest:"), "{told}");
    // That is normal for a moment while the other one starts.
    until("it is a problem", async || {
        waiting.status().await["problems"].as_array().is_some_and(|list| !list.is_empty())
    })
    .await;
    assert_eq!(waiting.get("/readyz?standby=ok").await.0, 503);
    let told = ["nobody has read the slot for", &first.database.name, "another name"];
    for command in ["status", "check"] {
        second.run(&[command]).await.expect_code(1).expect_text(&told);
    }
    drop((active, waiting));
}
