//! What `check` and `init` see in the broker: what would stop `run`, and what a running relay does
//! not declare.

use lapin::types::FieldTable;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use crate::support::servers::{Vhost, own_database, own_vhost, postgres, rabbit};
use crate::support::stage::{Setup, Stage};

async fn put(path: &str, body: &str) {
    rabbit().await.management("PUT", path, body).await.unwrap_or_else(|e| panic!("{e:?}"));
}

/// A vhost with a user of its own, who may do everything in it; returns it with the user's name and
/// the URL for this user.
async fn vhost_with_user() -> (Vhost, String, String) {
    let vhost = own_vhost().await;
    let user = format!("limited-{}", vhost.name);
    put(&format!("/api/users/{user}"), r#"{"password":"pw","tags":""}"#).await;
    let rights = r#"{"configure":".*","write":".*","read":".*"}"#;
    put(&format!("/api/permissions/{}/{user}", vhost.name), rights).await;
    let url = vhost.url.replace("guest:guest", &format!("{user}:pw"));
    (vhost, user, url)
}

#[tokio::test]
async fn a_limit_of_the_broker_that_stops_the_relay_is_found_by_check_with_what_to_raise() {
    let (Vhost { name, .. }, user, url) = vhost_with_user().await;
    let of_vhost = format!("/api/vhost-limits/{name}/max-queues");
    let stage = Stage::on(own_database().await, Vhost { url, name }, Setup::default()).await;
    stage.run(&["check"]).await.expect_code(0);
    // The queue of the stage is there, and no other is allowed.
    let limits = [
        (of_vhost, ["queue limit in vhost", "raise that limit (max-queues"]),
        (
            format!("/api/user-limits/{user}/max-channels"),
            ["number of channels opened for user", "raise that limit (max-channels"],
        ),
    ];
    for (path, told) in limits {
        put(&path, r#"{"value":1}"#).await;
        for ended in [stage.run(&["check"]).await, stage.spawn().ended().await] {
            ended.expect_code(1).expect_text(&told);
            let log = &ended.log;
            assert!(!log.contains("delete the existing") && !log.contains("create the"), "{log}");
            assert!(!log.contains("/: broker amqp"), "the broker is named once: {log}");
        }
        rabbit().await.management("DELETE", &path, "").await.expect("the limit is gone");
    }
    stage.run(&["check"]).await.expect_code(0);
}

#[tokio::test]
async fn a_relay_that_may_have_one_connection_is_told_that_it_needs_two() {
    let (vhost, user, as_user) = vhost_with_user().await;
    let url = vhost.url.clone();
    let stage = Stage::on(own_database().await, vhost, Setup::default()).await;
    // The consumer of the stage stays another user.
    stage.replace_configuration(&stage.configuration().replace(&url, &as_user));
    stage.run(&["check"]).await.expect_code(0);
    put(&format!("/api/user-limits/{user}/max-connections"), r#"{"value":1}"#).await;
    let told = ["connection limit (1) is reached", "a relay needs two"];
    stage.run(&["check"]).await.expect_code(1).expect_text(&told);
    stage.spawn().ended().await.expect_code(1).expect_text(&told);
}

#[tokio::test]
async fn what_a_running_relay_will_not_declare_is_a_problem_and_what_its_start_declares_is_not() {
    let url = rabbit().await.management_url().expect("management runs");
    let settings = format!("broker.management_url = \"{url}\"");
    let setup = Setup { settings: &settings, ..Setup::default() };
    let stage = Stage::new(setup).await;
    let relay = stage.start().await;
    stage.run(&["check"]).await.expect_code(0);
    let none = FieldTable::default;
    let unbind = stage.channel.queue_unbind("all".into(), "watership".into(), "#".into(), none());
    unbind.await.expect("unbound");
    stage.append_to_configuration("[[queue]]\nname = \"more\"\n");
    stage.run(&["check"]).await.expect_code(1).expect_text(&[
        "queue \"all\" to exchange \"watership\" with routing key \"#\" does not exist, and the \
         relay is running",
        "queue \"more\" does not exist, and the relay is running",
        "restart the relay",
    ]);
    relay.stop().await.expect_code(0);
    let told = "does not exist; `watership run` will declare it";
    let ended = stage.run(&["check"]).await;
    assert_eq!(ended.expect_code(0).log.matches(told).count(), 2, "{}", ended.log);
    stage.start().await.stop().await.expect_code(0);
    assert!(!stage.run(&["check"]).await.expect_code(0).log.contains(told));
}

#[tokio::test]
async fn init_verifies_bindings_or_does_not_claim_them() {
    let stage = Stage::new(Setup::default()).await;
    let text = stage.configuration();
    let one_more =
        "[[binding]]\nqueue = \"all\"\nexchange = \"watership\"\nrouting_key = \"more\"\n";
    let verify = format!("broker.topology = \"verify\"\n{text}");
    stage.replace_configuration(&format!("{verify}{one_more}"));
    let init = ["init", "--admin-url", &stage.database.url];
    let told = ["verified 1 exchanges, 1 queues", "2 are not verified: set broker.management_url"];
    stage.run(&init).await.expect_code(0).expect_text(&told);
    let url = rabbit().await.management_url().expect("management runs");
    let seen = format!("broker.management_url = \"{url}\"\n{verify}");
    stage.replace_configuration(&format!("{seen}{one_more}"));
    stage.run(&init).await.expect_code(1).expect_text(&[
        "1 of 2 bindings are missing: queue \"all\" to exchange \"watership\" with routing key \
         \"more\"",
        "run init again",
    ]);
    stage.replace_configuration(&seen);
    stage.run(&init).await.expect_code(0).expect_text(&["verified 1"]);
}

#[tokio::test]
async fn what_run_may_not_do_is_a_problem_that_names_the_permission() {
    let (Vhost { name, .. }, user, url) = vhost_with_user().await;
    let path = format!("/api/permissions/{name}/{user}");
    let stage = Stage::on(own_database().await, Vhost { url, name }, Setup::default()).await;
    stage.append_to_configuration(
        "[[exchange]]\nname = \"wide\"\n[[queue]]\nname = \"more\"\n\
         [[binding]]\nqueue = \"more\"\nexchange = \"wide\"\nrouting_key = \"#\"\n",
    );
    let queue = stage.run(&["check"]).await;
    queue.expect_code(0).expect_text(&["queue \"more\" does not exist; `watership run` will"]);
    put(&path, r#"{"configure":"^(watership.*|all)$","write":".*","read":".*"}"#).await;
    stage.run(&["check"]).await.expect_code(1).expect_text(&[
        "queue \"more\": 403",
        "exchange \"wide\": 403",
        "grant configure permission on queue",
        "grant configure permission on exchange",
    ]);
    put(&path, r#"{"configure":".*","write":"^(watership|wide|all)$","read":".*"}"#).await;
    let told = ["binding of queue \"more\"", "403", "write permission on queue"];
    stage.run(&["check"]).await.expect_code(1).expect_text(&told);
    put(&path, r#"{"configure":".*","write":".*","read":"^(watership|wide)$"}"#).await;
    let told = ["the lock queue cannot be watched", "grant read permission on it"];
    stage.run(&["check"]).await.expect_code(0).expect_text(&told);
    put(&path, r#"{"configure":".*","write":".*","read":".*"}"#).await;
    let all_right = stage.run(&["check"]).await;
    assert!(!all_right.expect_code(0).log.contains("cannot be watched"), "{}", all_right.log);
    // Nothing was made, and nothing removed.
    let (none, passive) = (FieldTable::default(), true);
    let options = lapin::options::QueueDeclareOptions { passive, ..Default::default() };
    let looked = stage.channel.queue_declare("more".into(), options, none).await;
    assert!(looked.is_err(), "the queue was declared");
    stage.start().await.stop().await.expect_code(0);
    stage.run(&["check"]).await.expect_code(0);
}

#[tokio::test]
async fn an_internal_exchange_is_refused_for_what_it_is() {
    let vhost = own_vhost().await;
    let body = r#"{"type":"topic","durable":true,"internal":true}"#;
    put(&format!("/api/exchanges/{}/inner", vhost.name), body).await;
    let stage = Stage::on(own_database().await, vhost, Setup::default()).await;
    stage.append_to_configuration(
        "[[route]]\nname = \"in\"\noutbox = { aggregate_type = \"in\" }\nexchange = \"inner\"\n",
    );
    let told = ["publishing to exchange \"inner\"", "takes messages from other exchanges only"];
    stage.run(&["check"]).await.expect_code(1).expect_text(&told);
}

#[tokio::test]
async fn a_port_of_another_protocol_is_named_as_such() {
    // As a server of SSH does it.
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
    let ssh = listener.local_addr().expect("an address").port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let _ = stream.write_all(b"SSH-2.0-OpenSSH_9.6\r\n").await;
                // Until the client gives up.
                while let Ok(1..) = stream.read(&mut [0; 4096]).await {}
            });
        }
    });
    let stage = Stage::new(Setup::default()).await;
    let text = stage.configuration();
    let line = |key: &str| {
        let line = text.lines().find(|line| line.starts_with(key));
        line.expect("it is configured").to_owned()
    };
    let management = rabbit().await.management_url().expect("management runs");
    let http = management.rsplit(':').next().expect("a port").trim_end_matches('/');
    let (amqp, sql) = (rabbit().await.port().to_string(), postgres().await.port().to_string());
    let ssh = ssh.to_string();
    for port in [&ssh, http, &amqp] {
        let other = format!("source.url = \"postgres://postgres@127.0.0.1:{port}/shop\"");
        stage.replace_configuration(&text.replace(&line("source.url"), &other));
        stage.run(&["check"]).await.expect_code(1).expect_text(&["this is not a Postgres port"]);
    }
    for port in [&ssh, http, &sql] {
        let other = format!("broker.url = \"amqp://guest:guest@127.0.0.1:{port}/shop\"");
        stage.replace_configuration(&text.replace(&line("broker.url"), &other));
        stage.run(&["check"]).await.expect_code(1).expect_text(&["this is not a RabbitMQ port"]);
    }
}
