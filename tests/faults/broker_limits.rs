//! Group D: what a broker's operator takes away from the relay, and confirms that never come.

use std::collections::HashSet;
use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;
use watership::dev::{Rabbit, RabbitOptions};

use crate::broker::close_relays;
use crate::report::Class;
use crate::support::framing::{Protocol, is_ack};
use crate::support::inbox::Message;
use crate::support::proxy::{Action, Direction, Proxy, Trigger};
use crate::support::scene::{Scene, led};
use crate::support::servers::{Database, Vhost, own_database, own_vhost, rabbit};
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::{throughout, until, within};
use crate::support::writers::STEADY;

/// A user of one test's own, who may do everything in the vhost.
async fn user(vhost: &Vhost, name: &str) -> String {
    manage("PUT", &format!("/api/users/{name}"), r#"{"password":"first","tags":""}"#).await;
    permit(vhost, name, ".*").await;
    vhost.url.replace("guest:guest", &format!("{name}:first"))
}

async fn permit(vhost: &Vhost, name: &str, write: &str) {
    let body = format!(r#"{{"configure":".*","write":"{write}","read":".*"}}"#);
    manage("PUT", &format!("/api/permissions/{}/{name}", vhost.name), &body).await;
}

async fn manage(method: &str, path: &str, body: &str) {
    rabbit().await.management(method, path, body).await.unwrap_or_else(|e| panic!("{e:?}"));
}

/// A run whose relay has a user of its own, in which events flow.
async fn flowing(title: &str, name: &str) -> (Database, Vhost, Scene) {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let own = user(&vhost, name).await;
    let ways = (&*database.url, &*database.url);
    let mut scene = led(title, ways, (&vhost.url, &own), "").await;
    scene.consume();
    scene.relay().start();
    scene.write(STEADY);
    scene.flowing(500).await;
    (database, vhost, scene)
}

#[tokio::test]
async fn broker_d07_headers_beyond_a_frame() {
    let class = Class::new("D7", "broker_d07_headers_beyond_a_frame");
    let conf = vec!["frame_max = 16384".to_owned()];
    let node = Rabbit::start(RabbitOptions { conf, ..Default::default() }).await;
    let node = node.expect("a private node");
    let vhost = Vhost { name: "/".into(), url: node.url("/") };
    // A broker of small frames is refused before anything is sent to it.
    let stage = Stage::on(own_database().await, vhost, Setup::default()).await;
    let texts = ["broker allows frames of at most 16384 bytes", "raise frame_max in rabbitmq.conf"];
    stage.spawn().ended().await.expect_code(1).expect_text(&texts);
    drop(node);

    let stage = Stage::new(Setup::default()).await;
    let relay = stage.start().await;
    let emit = |id: u32, bytes: u32| {
        format!(
            "SELECT watership.emit('t', '{id}', 'x', '1', \
             jsonb_build_object('note', repeat('n', {bytes})))"
        )
    };
    // The application is told, where it can still do something.
    let told = stage.sql.batch_execute(&emit(1, 70_000)).await.expect_err("it is refused");
    let told = told.as_db_error().map(|e| e.message().to_owned()).unwrap_or_default();
    assert!(told.contains("headers may have 57344 bytes as AMQP fields"), "{told}");
    // Up to that limit they fit beside the relay's own, whatever the rest of the event is.
    stage.execute(&emit(2, 57_000)).await;
    stage.execute(&emit(3, 50_000)).await;
    let got = stage.settled().await;
    assert_eq!(got.iter().map(|m| m.text("ws-key")).collect::<Vec<_>>(), ["t/2", "t/3"]);
    assert_eq!(stage.text("SELECT count(*) FROM watership.parked").await, "0");
    assert_eq!(relay.status().await["sessions"], 1, "no connection was lost for it");
    relay.stop().await.expect_code(0);
    class.held(2);
}

/// The relay is up, does not stream, and says `word`.
async fn waits_and_says(scene: &mut Scene, word: &str) {
    let says = |status: &Value| {
        let error = status["last_error"]["error"].as_str().unwrap_or_default().to_owned();
        let held = status["held"][0]["reason"].as_str().unwrap_or_default();
        format!("{error} {held}").contains(word)
    };
    scene.relay().reaches(&format!("it says {word:?}"), says).await;
    scene.relay().stays(Duration::from_secs(2), |status| status["sessions"].is_u64()).await;
    scene.relay().logs(&[word]).await;
}

async fn back(class: Class, mut scene: Scene, ended: Instant, before: u64) {
    scene.recovered(ended, before).await;
    scene.flowing(500).await;
    scene.enough();
    class.survived(&scene.judge().await);
}

#[tokio::test]
async fn broker_d05_write_permission_revoked() {
    let class = Class::new("D5", "broker_d05_write_permission_revoked");
    let (_database, vhost, mut scene) = flowing("D5", "d05").await;
    scene.fault("write permission revoked");
    permit(&vhost, "d05", "^$").await;
    // An open channel remembers what it was allowed.
    close_relays(&vhost.name).await;
    waits_and_says(&mut scene, "ACCESS_REFUSED").await;
    let before = scene.relay().confirmed().await;
    permit(&vhost, "d05", ".*").await;
    back(class, scene, Instant::now(), before).await;
}

#[tokio::test]
async fn broker_d05_one_routing_key_forbidden() {
    let class = Class::new("D5", "broker_d05_one_routing_key_forbidden");
    let vhost = own_vhost().await;
    let url = user(&vhost, "d05key").await;
    let name = vhost.name;
    let write = async |pattern: &str| {
        let body = format!(r#"{{"exchange":"watership","write":"{pattern}","read":".*"}}"#);
        manage("PUT", &format!("/api/topic-permissions/{name}/d05key"), &body).await;
    };
    write("^ok[.]").await;
    let routes = ["no", "ok"].map(|name| {
        format!(
            "[[route]]\nname = \"{name}\"\noutbox = {{ aggregate_type = \"{name}\" }}\n\
             exchange = \"watership\"\nrouting_key = \"{name}.x\"\n"
        )
    });
    let setup = Setup { routes: &routes.concat(), ..Setup::default() };
    let stage = Stage::on(own_database().await, Vhost { name: name.clone(), url }, setup).await;
    let relay = stage.start().await;
    // Both are on one channel, which the broker closes with all answers.
    let both = "SELECT watership.emit(t, '0', 'x', '1') FROM (VALUES ('no'), ('ok')) AS rows (t)";
    stage.execute(both).await;
    let held = async || {
        let status = relay.status().await;
        let held = status["held"].as_array().cloned().unwrap_or_default();
        held.iter().map(|h| h["route"].as_str().unwrap_or_default().to_owned()).collect::<Vec<_>>()
    };
    until("the forbidden one is held, and only that", async || {
        held().await == ["no"] && !stage.inbox.count(1).await.is_empty()
    })
    .await;
    // Its probes close the channel again and again; the other route continues.
    let probes = async || relay.metric("watership_route_probes_total").await.unwrap_or(0.0);
    let (enough, mut written) = (probes().await + 2.0, 1);
    while probes().await < enough {
        stage.execute(&format!("SELECT watership.emit('ok', '{}', 'x', '1')", written % 7)).await;
        written += 1;
        let all_came = |all: &[Message]| {
            let ids: HashSet<String> = all.iter().map(Message::id).collect();
            ids.len() >= written
        };
        stage.inbox.wait("the other route continues", all_came).await;
        assert_eq!(held().await, ["no"]);
    }
    write(".*").await;
    until("the other comes too", async || held().await.is_empty()).await;
    let got = stage.settled().await;
    let mut ids: Vec<String> = got.iter().map(|message| message.id()).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), written + 1);
    // At most one was out whenever the channel was closed: by the first message, or by a probe.
    let (repeated, closed) = ((got.len() - ids.len()) as f64, 1.0 + probes().await);
    assert!(repeated <= closed, "{repeated} duplicates, {closed} times closed");
    relay.stop().await.expect_code(0);
    class.held(written as u64 + 1);
}

#[tokio::test]
async fn broker_d20_vhost_deleted() {
    let class = Class::new("D20", "broker_d20_vhost_deleted");
    let (database, vhost) = (own_database().await, own_vhost().await);
    let ways = (&*database.url, &*database.url);
    let mut scene = led("D20 vhost", ways, (&vhost.url, &vhost.url), "").await;
    // The queue goes with the vhost, and what it holds: so nothing was published yet.
    scene.relay().start();
    scene.relay().reaches("it streams", |status| status["state"] == "streaming").await;
    scene.fault("vhost deleted");
    manage("DELETE", &format!("/api/vhosts/{}", vhost.name), "").await;
    scene.write(STEADY);
    scene.committed_more(500).await;
    waits_and_says(&mut scene, "NOT_ALLOWED").await;
    let before = scene.relay().confirmed().await;
    rabbit().await.create_vhost(&vhost.name).await.expect("the vhost is back");
    let ended = Instant::now();
    scene.consume();
    back(class, scene, ended, before).await;
}

#[tokio::test]
async fn broker_d20_user_deleted() {
    let Some(class) = Class::long("D20", "broker_d20_user_deleted") else { return };
    let (_database, vhost, mut scene) = flowing("D20 user", "d20u").await;
    scene.fault("user deleted");
    manage("DELETE", "/api/users/d20u", "").await;
    waits_and_says(&mut scene, "ACCESS_REFUSED").await;
    let before = scene.relay().confirmed().await;
    user(&vhost, "d20u").await;
    back(class, scene, Instant::now(), before).await;
}

#[tokio::test]
async fn broker_d20_password_changed() {
    let class = Class::new("D20", "broker_d20_password_changed");
    let (_database, vhost, mut scene) = flowing("D20 password", "d20p").await;
    scene.fault("password changed");
    manage("PUT", "/api/users/d20p", r#"{"password":"second","tags":""}"#).await;
    close_relays(&vhost.name).await;
    waits_and_says(&mut scene, "ACCESS_REFUSED").await;
    assert!(!scene.relay().log_text().contains("first"), "the password is not logged");
    let before = scene.relay().confirmed().await;
    manage("PUT", "/api/users/d20p", r#"{"password":"first","tags":""}"#).await;
    back(class, scene, Instant::now(), before).await;
}

#[tokio::test]
async fn broker_d22_no_connection_allowed() {
    let Some(class) = Class::long("D22", "broker_d22_no_connection_allowed") else { return };
    let (_database, vhost, mut scene) = flowing("D22", "d22").await;
    scene.fault("connection limit 0");
    let path = format!("/api/vhost-limits/{}/max-connections", vhost.name);
    manage("PUT", &path, r#"{"value":0}"#).await;
    close_relays(&vhost.name).await;
    waits_and_says(&mut scene, "limit").await;
    let before = scene.relay().confirmed().await;
    manage("DELETE", &path, "").await;
    back(class, scene, Instant::now(), before).await;
}

#[tokio::test]
async fn broker_d14_confirms_that_never_come() {
    never_confirmed(Class::new("D14", "broker_d14_confirms_that_never_come"), "D14").await;
}

/// No confirm arrives any more: nothing is stored, the session ends by the deadline, and all that
/// was not confirmed is sent again.
pub async fn never_confirmed(class: Class, title: &str) {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let proxy = Proxy::before(rabbit().await.port(), Protocol::Amqp).await;
    let settings = "broker.heartbeat = \"3s\"\nbroker.confirm_timeout = \"7s\"";
    let broker = (&*vhost.url, &*proxy.url(&vhost.url));
    let mut scene = led(title, (&database.url, &database.url), broker, settings).await;
    scene.consume();
    scene.relay().start();
    scene.write(STEADY);
    scene.flowing(500).await;
    scene.fault("no confirm arrives");
    let (direction, nth, for_ever) = (Direction::ToRelay, 1, true);
    proxy.trigger(Trigger { direction, matches: is_ack, nth, action: Action::Drop, for_ever });
    proxy.strikes().await;
    // What was confirmed before is stored within the checkpoint interval.
    let waiting = |status: &Value| status["in_flight"].as_u64() >= Some(150);
    scene.relay().reaches("every key waits", waiting).await;
    throughout(Duration::from_millis(500), "it lives", async || {
        scene.relay().check();
        true
    })
    .await;
    let stored = scene.relay().status().await["checkpointed"].clone();
    within("the session is given up", scene.relay().logs(&["session ended", "confirm"])).await;
    assert_eq!(scene.relay().status().await["checkpointed"], stored, "nothing was confirmed");
    let before = scene.relay().confirmed().await;
    proxy.heal();
    back(class, scene, Instant::now(), before).await;
}

#[tokio::test]
async fn broker_d14_one_confirm_lost() {
    let Some(class) = Class::long("D14", "broker_d14_one_confirm_lost") else { return };
    let (database, vhost) = (own_database().await, own_vhost().await);
    let proxy = Proxy::before(rabbit().await.port(), Protocol::Amqp).await;
    let settings = "broker.heartbeat = \"3s\"\nbroker.confirm_timeout = \"7s\"";
    let broker = (&*vhost.url, &*proxy.url(&vhost.url));
    let mut scene = led("D14 one", (&database.url, &database.url), broker, settings).await;
    scene.consume();
    scene.relay().start();
    scene.write(STEADY);
    scene.flowing(500).await;
    scene.fault("the 7th confirm is lost");
    let (direction, nth, for_ever) = (Direction::ToRelay, 7, false);
    proxy.trigger(Trigger { direction, matches: is_ack, nth, action: Action::Drop, for_ever });
    proxy.strikes().await;
    // A later confirm of several covers it, or the deadline ends the session: either is right.
    let before = scene.relay().confirmed().await;
    scene.flowing(3_200).await;
    if scene.relay().status().await["sessions"] == 1 {
        scene.relay().says_nothing();
    } else {
        scene.relay().logs(&["no confirm for"]).await;
    }
    back(class, scene, Instant::now(), before).await;
}
