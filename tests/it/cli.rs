//! The real binary: what it prints, how it ends, and that it never prints a password.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;
use tokio::process::{Child, Command};
use watership::dev::{self, Postgres, PostgresOptions};

use crate::support::relay;
use crate::support::servers::{Database, Vhost, own_database, own_vhost, postgres, rabbit};
use crate::support::waiting::{LIMIT, until};

/// How a command ended.
#[derive(Debug)]
struct Ran {
    code: i32,
    out: String,
    err: String,
}

fn command(config: &PathBuf, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_watership"));
    command.arg("--config").arg(config).args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

async fn finish(child: Child) -> Ran {
    let ended = tokio::time::timeout(LIMIT, child.wait_with_output()).await;
    let output = ended.expect("the command ends").expect("the command runs");
    Ran {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8(output.stdout).expect("stdout is UTF-8"),
        err: String::from_utf8(output.stderr).expect("stderr is UTF-8"),
    }
}

async fn watership(config: &PathBuf, arguments: &[&str]) -> Ran {
    finish(command(config, arguments).spawn().expect("the program starts")).await
}

/// A configuration file of this test's own.
fn write(text: &str) -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = dev::home().expect("a temporary directory").join(format!("cli-{number}.toml"));
    std::fs::write(&path, text).expect("the file is written");
    path
}

/// A relay over its own database and vhost, with one queue that gets everything.
fn relay_config(database: &Database, vhost: &Vhost, more: &str) -> PathBuf {
    let slot = format!("slot_{}", database.name);
    write(&format!(
        "source.url = \"{}\"\nsource.slot = \"{slot}\"\nbroker.url = \"{}\"\n{more}\n\
         [[queue]]\nname = \"all\"\n\
         [[binding]]\nqueue = \"all\"\nexchange = \"watership\"\nrouting_key = \"#\"\n",
        database.url, vhost.url
    ))
}

fn without_admin() -> &'static str {
    "admin.listen = \"\""
}

#[tokio::test]
async fn mistakes_in_the_file_are_told_with_place_value_and_remedy() {
    let least = "source.url = 'postgres://relay@127.0.0.1/shop'\nbroker.url = 'amqp://r:x@h1'\n";
    for (text, expected) in [
        (
            format!("{least}[sorce]\nurl = \"x\"\n"),
            "error: FILE:3:2: unknown key \"sorce\"\n  |\n3 | sorce\n  | ^^^^^\n\
             hint: did you mean \"source\"?\n",
        ),
        (
            format!("{least}[relay]\nmax_windw_bytes = \"1MiB\"\n"),
            "error: FILE:4:1: unknown key \"max_windw_bytes\"\n  |\n\
             4 | max_windw_bytes = ***\n  | ^^^^^^^^^^^^^^^\n\
             hint: did you mean \"max_window_bytes\"?\n",
        ),
        (
            format!("{least}[relay]\ndrain_timeout = 10\n"),
            "error: FILE:4:17: relay.drain_timeout is an integer; expected a duration in quotes, \
             such as \"30s\"\n",
        ),
        (
            format!("{least}relay.drain_timeout = '10 sec'\n"),
            "error: FILE:3:23: relay.drain_timeout = \"10 sec\" is invalid; expected 1ms to 1h, \
             written as a number with ms, s, m, h or d\n",
        ),
        (
            "source.url = 'mysql://u:pw@h/x'\nbroker.url = 'amqp://r:x@127.0.0.1'\n".to_owned(),
            "error: FILE:1:14: source.url: mysql://u:***@h/x: not a Postgres URL\n\
             hint: the form is postgres://user:password@host:5432/database\n",
        ),
        (
            format!("{least}source.password = '${{WATERSHIP_TEST_UNSET}}'\n"),
            "error: FILE:3:19: source.password: environment variable WATERSHIP_TEST_UNSET is not \
             set\n\
             hint: set it, or give a default with ${NAME:-default}; $${ is a literal ${\n",
        ),
    ] {
        let file = write(&text);
        let ran = watership(&file, &["check"]).await;
        let shown = ran.err.replace(&*file.to_string_lossy(), "FILE");
        assert_eq!((ran.code, shown.as_str(), ran.out.as_str()), (2, expected, ""));
    }
}

#[tokio::test]
async fn no_command_shows_a_password_whatever_goes_wrong() {
    const LEAST: &str = "broker.url = 'amqp://a@127.0.0.1:1'\nadmin.listen = ''\n";
    let database = "source.url = 'postgres://a:hunter2@127.0.0.1:1/x'\n";
    let broker = rabbit().await.url("/").replace("guest:guest@", "guest:hunter2@");
    let refusing = own_database().await.url;
    let texts = [
        // Wrong files.
        format!("{database}{LEAST}[broker]\npasswort = 'hunter2'"),
        format!("{database}{LEAST}source.pasword = 'hunter2'"),
        format!("{LEAST}source.url = 'postgres://a:hunter2/shop'"),
        format!("{database}broker.url = 'amqp://a:hunter2'"),
        format!("{database}{LEAST}broker.management_url = 'http://a:hunter2'"),
        format!("{database}{LEAST}source.password = 'x${{hunter2!}}'"),
        format!(
            "{database}{LEAST}admin.listen2 = '${{HIDDEN}}'\nrelay.drain_timeout = '${{HIDDEN}}'"
        ),
        // Right ones, and nobody there, or who refuses.
        format!("{database}{LEAST}"),
        format!("source.url = '{refusing}'\nadmin.listen = ''\nbroker.url = '{broker}'"),
        format!(
            "source.url = '{refusing}'\nadmin.listen = ''\nbroker.url = '{broker}'\n\
             broker.management_url = 'http://a:hunter2@127.0.0.1:1'"
        ),
    ];
    let admin = [
        "postgres://a:hunter2",
        "postgres://a:hunter2@127.0.0.1:1/x",
        "postgres://a:hunter2@h:x/x",
        "postgres://a:${hunter2!}@h/x",
        "postgres://a:${HIDDEN}@127.0.0.1:1/x",
        "hunter2",
    ];
    let mut commands: Vec<Vec<&str>> =
        [&["check"][..], &["run"], &["status"], &["parked", "list"], &["init"]]
            .map(<[&str]>::to_vec)
            .to_vec();
    commands.extend(admin.map(|url| vec!["init", "--admin-url", url]));
    for text in &texts {
        let file = write(text);
        for arguments in &commands {
            // A relay that finds nobody waits for them.
            if arguments[0] == "run" && text.contains("127.0.0.1:1/x") {
                continue;
            }
            let mut command = command(&file, arguments);
            let child = command.env("HIDDEN", "hunter2/+").spawn().expect("the program starts");
            let ran = finish(child).await;
            let shown = format!("{}{}", ran.out, ran.err);
            assert!(!shown.contains("hunter2"), "{text}\n{arguments:?}\n{shown}");
            assert!(!shown.is_empty(), "{text}\n{arguments:?}");
        }
    }
}

#[tokio::test]
async fn a_missing_file_is_told_with_its_name() {
    let ran = watership(&PathBuf::from("/nowhere/w.toml"), &["run"]).await;
    let expected = "error: config file /nowhere/w.toml does not exist\n\
                    hint: create it (config/watership.toml lists every key), or pass --config \
                    FILE\n";
    assert_eq!((ran.code, ran.err.as_str()), (2, expected));
}

#[tokio::test]
async fn every_command_has_help_with_an_example_and_usage_errors_end_with_2() {
    let file = PathBuf::from("unused.toml");
    for name in ["init", "check", "run", "status", "parked", "find", "resync", "drop", "demo"] {
        let ran = watership(&file, &[name, "--help"]).await;
        assert_eq!(ran.code, 0);
        assert!(ran.out.contains("Example:\n  watership"), "{name}: {}", ran.out);
    }
    assert_eq!(watership(&file, &["destroy"]).await.code, 2);
}

#[tokio::test]
async fn init_makes_everything_once_and_check_finds_it() {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let url = rabbit().await.management_url().expect("management runs");
    let more = format!("broker.management_url = \"{url}\"\n{}", without_admin());
    let file = relay_config(&database, &vhost, &more);

    let before = watership(&file, &["check"]).await;
    assert_eq!(before.code, 1, "{before:?}");
    assert!(before.out.contains("-> run `watership init`"), "{}", before.out);

    let first = watership(&file, &["init"]).await;
    assert_eq!(first.code, 0, "{first:?}");
    for step in ["schema", "publication", "slot", "checkpoint", "grants"] {
        assert!(first.out.contains(&format!("created  {step:<12}")), "{step}: {}", first.out);
    }
    let second = watership(&file, &["init", "--json"]).await;
    assert_eq!(second.code, 0, "{second:?}");
    let steps: Value = serde_json::from_str(&second.out).expect("JSON");
    let steps = steps["steps"].as_array().expect("a list");
    for step in steps.iter().filter(|step| step["what"] != "broker") {
        assert_eq!(step["done"], "exists", "{steps:?}");
    }

    let check = watership(&file, &["check", "--json"]).await;
    assert_eq!(check.code, 0, "{check:?}");
    let report: Value = serde_json::from_str(&check.out).expect("JSON");
    let findings = report["findings"].as_array().expect("a list");
    let told = |area: &str| findings.iter().filter(|f| f["area"] == area).collect::<Vec<_>>();
    assert_eq!(told("binding").len(), 1, "{findings:?}");
    // One node: its disk is the only copy. (RabbitMQ 4 adds its delivery limit.)
    let graded = |f: &&Value| {
        let what = f["what"].as_str().unwrap_or_default();
        what.starts_with("\"outbox\" is WEAK (queue \"all\": ")
            && what.contains("quorum queue with a single member")
    };
    assert!(told("route").into_iter().any(|f| graded(&f)), "{findings:?}");

    let status = watership(&file, &["status", "--json"]).await;
    assert_eq!(status.code, 0, "without admin.listen nobody knows whether it runs: {status:?}");
    let status: Value = serde_json::from_str(&status.out).expect("JSON");
    assert_eq!(status["slot"]["wal_status"], "reserved");
    assert_eq!(status["checkpoint"]["flush_lsn"], status["slot"]["confirmed_flush_lsn"]);

    let mut unprinted = command(&file, &["status", "--json"]);
    let full = std::fs::File::options().write(true).open("/dev/full").expect("Linux has it");
    unprinted.stdout(full);
    let ran = finish(unprinted.spawn().expect("the program starts")).await;
    assert!(ran.err.contains("stdout cannot be written"), "{ran:?}");
    assert_eq!(ran.code, 1, "a result that nobody has is not a success");
}

#[tokio::test]
async fn init_refuses_rows_that_are_older_than_the_slot_unless_told_to_skip_them() {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let file = relay_config(&database, &vhost, without_admin());
    assert_eq!(watership(&file, &["init"]).await.code, 0);
    let client = database.connect().await;
    let sql = format!(
        "SELECT pg_drop_replication_slot('slot_{}'); DELETE FROM watership.checkpoint; \
         SELECT watership.emit('order', '1', 'made', '{{}}')",
        database.name
    );
    client.batch_execute(&sql).await.expect("the slot is gone and a row is there");

    let refused = watership(&file, &["init"]).await;
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(refused.err.contains("watership.outbox has 1 rows that are older"), "{}", refused.err);
    assert!(refused.err.contains("--skip-existing"), "{}", refused.err);
    let skipped = watership(&file, &["init", "--skip-existing"]).await;
    assert_eq!(skipped.code, 0, "{skipped:?}");
    assert!(skipped.out.contains("skipped  outbox       1 rows"), "{}", skipped.out);
}

#[tokio::test]
async fn a_dropped_slot_is_a_verdict_for_init_check_and_run() {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let file = relay_config(&database, &vhost, without_admin());
    assert_eq!(watership(&file, &["init"]).await.code, 0);
    let sql = format!("SELECT pg_drop_replication_slot('slot_{}')", database.name);
    database.connect().await.batch_execute(&sql).await.expect("the slot is dropped");
    for name in ["init", "check", "run"] {
        let ran = watership(&file, &[name]).await;
        assert_eq!(ran.code, 3, "{name}: {ran:?}");
        assert!(format!("{}{}", ran.out, ran.err).contains("slot"), "{name}: {ran:?}");
    }
}

#[tokio::test]
async fn run_without_init_says_to_run_init() {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let file = relay_config(&database, &vhost, "admin.listen = \"\"\nlog.format = \"text\"");
    let ran = watership(&file, &["run"]).await;
    assert_eq!(ran.code, 3, "{ran:?}");
    assert!(ran.err.contains("hint: run `watership init` first"), "{}", ran.err);
}

#[tokio::test]
async fn a_missing_exchange_is_named_with_what_to_do() {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let more = "admin.listen = \"\"\nlog.format = \"text\"\nbroker.topology = \"verify\"";
    let file = relay_config(&database, &vhost, more);
    for name in ["init", "check"] {
        let ran = watership(&file, &[name]).await;
        assert_eq!(ran.code, 1, "{name}: {ran:?}");
        let told = format!("{}{}", ran.out, ran.err);
        assert!(told.contains("exchange \"watership\" does not exist in vhost"), "{name}: {told}");
        assert!(told.contains("set broker.topology = \"declare\""), "{name}: {told}");
    }
}

#[tokio::test]
async fn a_server_without_logical_wal_and_a_wrong_password_are_told_clearly() {
    let options = PostgresOptions {
        conf: vec!["wal_level = replica".into(), "password_encryption = 'scram-sha-256'".into()],
        hba: Some(vec!["host all all 127.0.0.1/32 scram-sha-256".into()]),
        ..Default::default()
    };
    let server = Postgres::start(options).await.expect("a private server");
    let sql = "CREATE ROLE relay LOGIN SUPERUSER PASSWORD 'right'";
    server.execute(sql).await.expect("a role");
    let vhost = own_vhost().await;
    let port = server.port();
    let config = |password: &str| {
        write(&format!(
            "source.url = \"postgres://relay:{password}@127.0.0.1:{port}/postgres\"\n\
             broker.url = \"{}\"\nadmin.listen = \"\"\nlog.format = \"text\"\n",
            vhost.url
        ))
    };
    for name in ["init", "check"] {
        let ran = watership(&config("right"), &[name]).await;
        assert_eq!(ran.code, 1, "{name}: {ran:?}");
        let told = format!("{}{}", ran.out, ran.err);
        assert!(told.contains("\"replica\", logical replication needs \"logical\""), "{told}");
        assert!(told.contains("ALTER SYSTEM SET wal_level = 'logical'"), "{told}");
        let ran = watership(&config("wrong-canary"), &[name]).await;
        assert_eq!(ran.code, 1, "{name}: {ran:?}");
        let told = format!("{}{}", ran.out, ran.err);
        assert!(told.contains("password"), "{told}");
        assert!(!told.contains("wrong-canary"), "{told}");
    }
}

/// A relay that runs.
struct Running {
    child: Child,
}

impl Running {
    async fn start(config: &PathBuf, port: u16) -> Self {
        let child = command(config, &["run"]).spawn().expect("the program starts");
        let mut running = Self { child };
        until("the relay is ready", async || {
            let ended = running.child.try_wait().expect("its state is known");
            assert!(ended.is_none(), "the relay ended: {ended:?}");
            relay::get(port, "/readyz").await.0 == 200
        })
        .await;
        running
    }

    async fn stop(self) -> Ran {
        let pid = self.child.id().expect("it runs").to_string();
        let killed = Command::new("kill").args(["-TERM", &pid]).status().await;
        assert!(killed.expect("kill runs").success());
        finish(self.child).await
    }
}

#[tokio::test]
async fn no_output_of_any_command_shows_a_password() {
    const CANARY: &str = "canary-7f3a9";
    let (database, vhost) = (own_database().await, own_vhost().await);
    let node = rabbit().await;
    let user = format!("user-{}", vhost.name);
    let body = format!(r#"{{"password":"{CANARY}","tags":"monitoring"}}"#);
    node.management("PUT", &format!("/api/users/{user}"), &body).await.expect("a user");
    let path = format!("/api/permissions/{}/{user}", vhost.name);
    let all = r#"{"configure":".*","write":".*","read":".*"}"#;
    node.management("PUT", &path, all).await.expect("permissions");

    let with_user = |url: &str| url.replacen("guest:guest", &format!("{user}:{CANARY}"), 1);
    let source = format!(
        "postgres://postgres:{CANARY}@127.0.0.1:{}/{}",
        postgres().await.port(),
        database.name
    );
    let admin = dev::free_port().expect("a free port");
    let text = |broker: &str| {
        write(&format!(
            "source.url = \"{source}\"\nsource.slot = \"slot_{}\"\nbroker.url = \"{broker}\"\n\
             broker.management_url = \"{}\"\nadmin.listen = \"127.0.0.1:{admin}\"\n\
             log.level = \"trace\"\n[[queue]]\nname = \"all\"\n\
             [[binding]]\nqueue = \"all\"\nexchange = \"watership\"\nrouting_key = \"#\"\n",
            database.name,
            with_user(&node.management_url().expect("management runs")),
        ))
    };
    let good = text(&with_user(&vhost.url));
    let bad = text(&vhost.url.replacen("guest:guest", &format!("nobody:{CANARY}"), 1));
    let mut all = String::new();
    let mut note = |ran: Ran, code: i32| {
        assert_eq!(ran.code, code, "{ran:?}");
        all.push_str(&ran.out);
        all.push_str(&ran.err);
    };
    note(watership(&good, &["init"]).await, 0);
    note(watership(&good, &["init", "--admin-url", &source]).await, 0);
    note(watership(&good, &["check"]).await, 0);
    note(watership(&good, &["check", "--json"]).await, 0);
    note(watership(&bad, &["check"]).await, 1);
    note(watership(&bad, &["run"]).await, 1);
    note(watership(&good, &["status", "--ready"]).await, 1);
    note(watership(&good, &["status"]).await, 1);

    let relay = Running::start(&good, admin).await;
    note(watership(&good, &["status", "--ready"]).await, 0);
    note(watership(&good, &["status"]).await, 0);
    note(watership(&good, &["check"]).await, 0);
    let mut pages = String::new();
    for path in ["/livez", "/readyz", "/status", "/metrics", "/nothing"] {
        pages.push_str(&relay::get(admin, path).await.1);
    }
    note(relay.stop().await, 0);
    assert!(pages.contains("watership_messages_confirmed_total{route=\"outbox\""), "{pages}");
    assert!(pages.contains("\"state\":\"streaming\""), "{pages}");
    assert!(all.contains("watership starts"), "logs were looked at: {all}");
    for shown in [&all, &pages] {
        assert!(!shown.contains(CANARY), "{shown}");
    }
}

#[tokio::test]
async fn a_plain_role_relays_after_init_by_an_admin() {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let role = format!("relay_{}", database.name);
    let admin = dev::free_port().expect("a free port");
    let file = write(&format!(
        "source.url = \"{}\"\nsource.slot = \"slot_{}\"\nbroker.url = \"{}\"\n\
         admin.listen = \"127.0.0.1:{admin}\"\n[[queue]]\nname = \"all\"\n\
         [[binding]]\nqueue = \"all\"\nexchange = \"watership\"\nrouting_key = \"#\"\n",
        postgres().await.url(&role, &database.name),
        database.name,
        vhost.url
    ));
    let init = ["init", "--admin-url", &database.url];
    let missing = watership(&file, &init).await;
    assert_eq!(missing.code, 1, "{missing:?}");
    assert!(missing.err.contains(&format!("CREATE ROLE \"{role}\" LOGIN REPLICATION")));

    let client = database.connect().await;
    let sql = format!("CREATE ROLE {role} LOGIN REPLICATION");
    client.batch_execute(&sql).await.expect("a role");
    let made = watership(&file, &init).await;
    assert_eq!(made.code, 0, "{made:?}");
    assert!(made.out.contains(&format!("watership_relay granted to {role}")), "{}", made.out);
    let check = watership(&file, &["check"]).await;
    assert_eq!(check.code, 0, "{check:?}");

    let running = Running::start(&file, admin).await;
    let sql = "SELECT watership.emit('order', '1', 'made', '{}')";
    client.batch_execute(sql).await.expect("an event");
    let confirmed = "watership_messages_confirmed_total{route=\"outbox\",owner=\"\"} 1";
    let arrived = async || relay::get(admin, "/metrics").await.1.contains(confirmed);
    until("the event is confirmed", arrived).await;
    let ended = running.stop().await;
    assert_eq!(ended.code, 0, "{ended:?}");
    client.batch_execute(&format!("REVOKE watership_relay FROM {role}")).await.expect("revoked");
    let check = watership(&file, &["check"]).await;
    assert_eq!(check.code, 1, "{check:?}");
    assert!(check.out.contains(&format!("{role} is not a member of watership_relay")), "{check:?}");
}

#[tokio::test]
async fn a_health_check_does_not_take_another_relays_answer_for_its_own() {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let admin = dev::free_port().expect("a free port");
    let text = |name: &str| {
        write(&format!(
            "name = \"{name}\"\nsource.url = \"{}\"\nsource.slot = \"slot_{}\"\n\
             broker.url = \"{}\"\nadmin.listen = \"127.0.0.1:{admin}\"\n",
            database.url, database.name, vhost.url
        ))
    };
    let (own, other) = (text("own"), text("other"));
    assert_eq!(watership(&own, &["init"]).await.code, 0);
    let relay = Running::start(&own, admin).await;
    assert_eq!(watership(&own, &["status", "--ready"]).await.code, 0);
    let ran = watership(&other, &["status", "--ready"]).await;
    assert!(ran.err.contains("is \"own\", not \"other\""), "{ran:?}");
    assert_eq!(ran.code, 1, "a health check knows no other code: {ran:?}");
    let ran = watership(&other, &["status"]).await;
    assert!(ran.out.contains("not running: ") && !ran.out.contains("streaming"), "{ran:?}");
    assert_eq!(ran.code, 1, "{ran:?}");
    assert_eq!(relay.stop().await.code, 0);
}
