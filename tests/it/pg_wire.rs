//! Both connections to Postgres: every way in, every way to be refused, and the WAL stream.
//!
//! What concerns entering is tried on both connections, ordinary SQL and replication, because they
//! must not differ. Servers that misbehave are small scripts on a TCP listener.

use std::path::PathBuf;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::OnceCell;
use tokio::time::timeout;
use watership::dev::{Postgres, PostgresOptions, StopMode};
use watership::error::{Error, Kind, Result};
use watership::pg::connect::{self, Options};
use watership::pg::replication::{Frame, ReplicationConnection, ReplicationStream, StreamOptions};
use watership::position::Lsn;
use watership::secret::Secret;

use crate::support;

/// What should happen at once may take this long on a busy machine.
const SOON: Duration = Duration::from_secs(20);
const PASSWORD: &str = "hunter2-canary";

fn options(url: &str) -> Options {
    Options::parse(&Secret::new(url)).unwrap_or_else(|e| panic!("{e:?}"))
}

/// The names of the user on both connections, which must agree.
async fn enter(url: &str) -> Result<()> {
    let options = options(url);
    let sql = match connect::sql(&options).await {
        Ok(session) => {
            session.client.execute("SELECT 1", &[]).await.map(drop).map_err(|e| panic!("{e}"))
        }
        Err(error) => Err(error),
    };
    let replication = match ReplicationConnection::connect(&options).await {
        Ok(mut session) => session.identify_system().await.map(drop),
        Err(error) => Err(error),
    };
    match (&sql, &replication) {
        (Ok(()), Ok(())) => {}
        (Err(a), Err(b)) => assert_eq!(a.kind(), b.kind(), "{a:?} and {b:?}"),
        _ => panic!("SQL {sql:?}, replication {replication:?}"),
    }
    for error in [sql, replication].into_iter().filter_map(Result::err) {
        assert!(!format!("{error:?}").contains(PASSWORD), "{error:?}");
    }
    replication_error(&options).await
}

/// The error of the replication connection alone, for its text.
async fn replication_error(options: &Options) -> Result<()> {
    ReplicationConnection::connect(options).await.map(drop)
}

async fn refused(url: &str) -> Error {
    let error = enter(url).await.expect_err(url);
    assert_eq!(error.kind(), Kind::Refused, "{error:?}");
    error
}

/// A server with one role for each way to prove oneself, and TLS.
struct Guarded {
    server: Postgres,
    ca: PathBuf,
    other_ca: PathBuf,
}

async fn guarded() -> &'static Guarded {
    static SERVER: OnceCell<Guarded> = OnceCell::const_new();
    SERVER.get_or_init(make_guarded).await
}

async fn make_guarded() -> Guarded {
    let line = |user: &str, method: &str| format!("host all {user} 127.0.0.1/32 {method}");
    let hba = vec![
        line("open", "trust"),
        line("scram", "scram-sha-256"),
        line("hashed", "md5"),
        line("clear", "password"),
        "hostssl all secure 127.0.0.1/32 scram-sha-256".into(),
        "local all secure scram-sha-256".into(),
    ];
    let options = PostgresOptions { hba: Some(hba), ..Default::default() };
    let mut server = Postgres::start(options).await.expect("a server");
    for role in ["open", "scram", "clear", "secure"] {
        let sql = format!("CREATE ROLE {role} LOGIN REPLICATION PASSWORD '{PASSWORD}'");
        server.execute(&sql).await.expect("a role");
    }
    let hashed = "SET password_encryption = 'md5'; \
                  CREATE ROLE hashed LOGIN REPLICATION PASSWORD 'hunter2-canary'";
    server.execute(hashed).await.expect("a role with an md5 password");
    server.execute("CREATE ROLE plain LOGIN").await.expect("a role");
    let (ca, other_ca) = certify(&server);
    server.append("postgresql.conf", "ssl = on\n").expect("conf");
    server.stop(StopMode::Fast).await.expect("stops");
    server.start_again().await.expect("starts with TLS");
    Guarded { server, ca, other_ca }
}

/// Gives the server a certificate for `localhost`; returns its CA and one that knows nothing.
fn certify(server: &Postgres) -> (PathBuf, PathBuf) {
    let authority = |name: &str| {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec![]).expect("params");
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).expect("a CA").pem();
        (Issuer::new(params, key), pem)
    };
    let ((issuer, ca_pem), (_, other_pem)) = (authority("one"), authority("two"));
    let key = KeyPair::generate().expect("a key");
    let params = CertificateParams::new(vec!["localhost".to_owned()]).expect("params");
    let certificate = params.signed_by(&key, &issuer).expect("a certificate");
    let write = |name: &str, text: &str| {
        use std::os::unix::fs::PermissionsExt;
        let path = server.data_dir().join(name);
        std::fs::write(&path, text).expect("written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("mode");
        server.give(&path).expect("owner");
        path
    };
    write("server.crt", &certificate.pem());
    write("server.key", &key.serialize_pem());
    (write("ca.crt", &ca_pem), write("other.crt", &other_pem))
}

impl Guarded {
    fn url(&self, user: &str, host: &str, query: &str) -> String {
        format!("postgres://{user}:{PASSWORD}@{host}:{}/postgres?{query}", self.server.port())
    }

    fn local(&self, user: &str, query: &str) -> String {
        self.url(user, "127.0.0.1", query)
    }

    /// TLS as asked, with the right CA.
    fn tls(&self, host: &str, query: &str) -> String {
        self.url("secure", host, &format!("sslrootcert={}&{query}", self.ca.display()))
    }
}

#[tokio::test]
async fn trust_and_scram_let_us_in() {
    let it = guarded().await;
    enter(&it.local("open", "")).await.unwrap();
    enter(&it.local("scram", "")).await.unwrap();
    enter(&it.local("scram", "require_auth=scram-sha-256")).await.unwrap();
    let error = refused(&it.local("open", "require_auth=scram-sha-256")).await;
    assert!(error.to_string().contains("asks for no proof"), "{error}");
}

#[tokio::test]
async fn a_wrong_password_names_the_user_and_not_the_password() {
    let it = guarded().await;
    let url = it.local("scram", "").replace(PASSWORD, "hunter2-canary-wrong");
    let error = refused(&url).await;
    assert!(error.to_string().contains("\"scram\""), "{error}");
    assert!(error.advice().unwrap().contains("password"), "{error:?}");
    assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");

    let url = it.local("scram", "").replace(&format!(":{PASSWORD}"), "");
    let error = enter(&url).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Config, "{error:?}");
    assert!(error.to_string().contains("asks for the password"), "{error}");
}

#[tokio::test]
async fn unknown_role_and_database_are_refused_with_advice() {
    let it = guarded().await;
    assert!(refused(&it.local("nobody", "")).await.advice().unwrap().contains("pg_hba"));
    let error = refused(&it.local("open", "dbname=nowhere")).await;
    assert!(error.to_string().contains("nowhere"), "{error}");
    assert!(error.advice().unwrap().contains("database"), "{error:?}");
}

#[tokio::test]
async fn md5_is_refused_until_allowed_and_clear_text_always() {
    let it = guarded().await;
    let error = refused(&it.local("hashed", "")).await;
    assert!(error.advice().unwrap().contains("allow_md5=true"), "{error:?}");
    enter(&it.local("hashed", "allow_md5=true")).await.unwrap();
    refused(&it.local("hashed", "allow_md5=true&require_auth=scram-sha-256")).await;
    let error = refused(&it.local("clear", "allow_md5=true")).await;
    assert!(error.to_string().contains("clear-text"), "{error}");
}

#[tokio::test]
async fn verify_full_checks_chain_and_name() {
    let it = guarded().await;
    enter(&it.tls("localhost", "")).await.unwrap();
    enter(&it.tls("localhost", "sslmode=verify-full")).await.unwrap();
    let error = refused(&it.tls("127.0.0.1", "sslmode=verify-full")).await;
    assert!(error.advice().unwrap().contains("name that the certificate carries"), "{error:?}");
    let other = format!("sslrootcert={}", it.other_ca.display());
    let error = refused(&it.url("secure", "localhost", &other)).await;
    assert!(error.advice().unwrap().contains("sslrootcert"), "{error:?}");
}

#[tokio::test]
async fn weaker_levels_check_what_they_say() {
    let it = guarded().await;
    enter(&it.tls("127.0.0.1", "sslmode=verify-ca")).await.unwrap();
    let other = format!("sslmode=verify-ca&sslrootcert={}", it.other_ca.display());
    refused(&it.url("secure", "localhost", &other)).await;
    enter(&it.url("secure", "127.0.0.1", "sslmode=require")).await.unwrap();
    // The role enters over TLS only.
    let error = refused(&it.url("secure", "127.0.0.1", "sslmode=disable")).await;
    assert!(error.advice().unwrap().contains("pg_hba"), "{error:?}");
}

#[tokio::test]
async fn a_certificate_file_that_is_missing_is_a_config_error() {
    let it = guarded().await;
    let url = it.url("secure", "localhost", "sslrootcert=/nowhere/ca.pem");
    let error = enter(&url).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Config);
    assert!(error.to_string().contains("/nowhere/ca.pem"), "{error}");
}

#[tokio::test]
async fn channel_binding_can_be_required_and_switched_off() {
    let it = guarded().await;
    for binding in ["require", "prefer", "disable"] {
        enter(&it.tls("localhost", &format!("channel_binding={binding}"))).await.unwrap();
    }
    // Trust proves nothing, so there is nothing to bind.
    let tls = format!("sslrootcert={}&channel_binding=require", it.ca.display());
    let error = refused(&it.url("open", "localhost", &tls)).await;
    assert!(error.to_string().contains("channel binding"), "{error}");
    refused(&it.url("hashed", "localhost", &format!("{tls}&allow_md5=true"))).await;
}

#[tokio::test]
async fn a_unix_socket_works() {
    let it = guarded().await;
    let dir = it.server.socket_dir().display();
    let port = it.server.port();
    enter(&format!("postgres://postgres@:{port}/postgres?host={dir}")).await.unwrap();
    let secure = format!("postgres://secure:{PASSWORD}@:{port}/postgres?host={dir}");
    enter(&secure).await.unwrap();
    let error = enter("postgres://postgres@/postgres?host=/nowhere").await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unreachable);
    assert!(error.to_string().contains("/nowhere/.s.PGSQL.5432"), "{error}");
}

#[tokio::test]
async fn a_role_without_replication_is_refused() {
    let server = support::postgres().await;
    server.execute("CREATE ROLE no_replication LOGIN").await.unwrap();
    let options = options(&server.url("no_replication", "postgres"));
    let error = replication_error(&options).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Refused, "{error:?}");
    assert!(error.advice().unwrap().contains("REPLICATION"), "{error:?}");
}

/// A listener that answers the first packet (and an SSLRequest, if any) with `answer`, and
/// returns all that it was sent afterwards.
async fn rogue(answer: &'static [u8]) -> (String, tokio::task::JoinHandle<Vec<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("postgres://r:{PASSWORD}@{}/db?", listener.local_addr().unwrap());
    let task = tokio::spawn(async move {
        let mut heard = Vec::new();
        for _ in 0..3 {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut first = vec![0; 4096];
            let n = stream.read(&mut first).await.unwrap();
            first.truncate(n);
            stream.write_all(answer).await.unwrap();
            // A client that resets the connection has heard enough as well.
            let _ = stream.read_to_end(&mut first).await;
            heard.push(first);
        }
        heard
    });
    (url, task)
}

#[tokio::test]
async fn a_rogue_server_never_hears_the_password() {
    for (answer, kind) in [
        (&b"R\0\0\0\x08\0\0\0\x03"[..], Kind::Refused),
        (b"R\0\0\0\x0c\0\0\0\x05salt", Kind::Refused),
        (b"R\0\0\0\x08\0\0\0\x07", Kind::Refused),
        (b"R\0\0\0\x0d\0\0\0\x0aPLN\0\0", Kind::Refused),
    ] {
        let (url, heard) = rogue(answer).await;
        let error = enter(&url).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error:?}");
        for heard in timeout(SOON, heard).await.unwrap().unwrap() {
            assert!(!heard.windows(PASSWORD.len()).any(|w| w == PASSWORD.as_bytes()));
        }
    }
}

#[tokio::test]
async fn a_server_without_tls_gets_no_plain_text() {
    let (url, heard) = rogue(b"N").await;
    refused(&format!("{url}sslmode=require")).await;
    for heard in timeout(SOON, heard).await.unwrap().unwrap() {
        assert_eq!(heard.len(), 8, "only the SSLRequest was sent");
    }
}

#[tokio::test]
async fn nonsense_from_a_server_is_an_error() {
    for answer in [
        &b"R\xff\xff\xff\xff\0\0\0\0"[..],
        b"R\0\0\0\x03",
        b"\0\0\0\0\0\0\0\0\0",
        b"R\0\0\0\x08\0\0\0\0D\0\0\0\x06\xff\xff",
        b"E\0\0\0\x05C",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
    ] {
        let (url, _task) = rogue(answer).await;
        let options = options(&format!("{url}connect_timeout=1"));
        let error = timeout(SOON, replication_error(&options)).await.unwrap().unwrap_err();
        assert!(matches!(error.kind(), Kind::Protocol | Kind::Refused), "{answer:?}: {error:?}");
        assert!(timeout(SOON, connect::sql(&options)).await.unwrap().is_err(), "{answer:?}");
    }
}

#[tokio::test]
async fn the_connect_timeout_covers_a_server_that_says_nothing() {
    let (url, _task) = rogue(b"").await;
    let error = timeout(SOON, enter(&format!("{url}connect_timeout=1"))).await.unwrap();
    let error = error.unwrap_err();
    assert_eq!(error.kind(), Kind::Unreachable);
    assert!(error.to_string().contains("within 1 s"), "{error}");
}

#[tokio::test]
async fn nobody_listening_is_unreachable_and_named() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let error = enter(&format!("postgres://r@{address}/db")).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unreachable);
    assert!(error.to_string().contains(&address.to_string()), "{error}");
}

#[tokio::test]
async fn session_settings_are_fixed_whatever_the_role_says() {
    let database = support::own_database().await;
    let client = database.connect().await;
    let name = &database.name;
    client
        .batch_execute(&format!(
            "ALTER DATABASE {name} SET datestyle = 'SQL, DMY';
             ALTER DATABASE {name} SET intervalstyle = 'postgres';
             ALTER DATABASE {name} SET timezone = 'Asia/Tokyo';
             ALTER DATABASE {name} SET extra_float_digits = 0;
             ALTER DATABASE {name} SET bytea_output = 'escape';
             ALTER DATABASE {name} SET statement_timeout = '1s';
             ALTER DATABASE {name} SET search_path = public"
        ))
        .await
        .unwrap();
    let options = options(&database.url);
    let mut replication = ReplicationConnection::connect(&options).await.unwrap();
    let sql = connect::sql(&options).await.unwrap();
    for (setting, value) in [
        ("datestyle", "ISO, YMD"),
        ("intervalstyle", "iso_8601"),
        ("timezone", "UTC"),
        ("extra_float_digits", "3"),
        ("bytea_output", "hex"),
        ("search_path", "pg_catalog"),
        ("client_encoding", "UTF8"),
        ("application_name", "watership"),
    ] {
        assert_eq!(replication.show(setting).await.unwrap(), value, "{setting}");
        let row = sql.client.query_one(&format!("SHOW {setting}"), &[]).await.unwrap();
        assert_eq!(row.get::<_, String>(0), value, "{setting}");
    }
    assert_eq!(replication.show("statement_timeout").await.unwrap(), "0");
    let row = sql.client.query_one("SHOW statement_timeout", &[]).await.unwrap();
    assert_eq!(row.get::<_, String>(0), "30s");
}

/// A database with a table, a publication of it and a slot.
async fn published() -> (support::Database, tokio_postgres::Client, ReplicationConnection) {
    let database = support::own_database().await;
    let client = database.connect().await;
    let sql = "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE PUBLICATION p FOR TABLE t";
    client.batch_execute(sql).await.unwrap();
    let session = ReplicationConnection::connect(&options(&database.url)).await.unwrap();
    (database, client, session)
}

async fn next(stream: &mut ReplicationStream) -> Result<Frame> {
    loop {
        if let Some(frame) = stream.try_next()? {
            return Ok(frame);
        }
        timeout(SOON, stream.fill()).await.expect("something arrives")?;
    }
}

/// The tags of the pgoutput messages up to and including the next Commit, and its end LSN.
async fn transaction(stream: &mut ReplicationStream) -> (String, Lsn) {
    let mut tags = String::new();
    loop {
        let Frame::XLogData { data, .. } = next(stream).await.unwrap() else { continue };
        tags.push(char::from(data[0]));
        if data[0] == b'C' {
            // Commit: tag, flags, commit LSN, end LSN, time.
            return (tags, Lsn(u64::from_be_bytes(data[10..18].try_into().unwrap())));
        }
    }
}

#[tokio::test]
async fn a_slot_streams_an_insert_and_takes_the_flush_position() {
    let (database, client, mut session) = published().await;
    let slot = format!("slot_{}", database.name);
    let system = session.identify_system().await.unwrap();
    let row = client
        .query_one("SELECT system_identifier::text FROM pg_control_system()", &[])
        .await
        .unwrap();
    assert_eq!(system.system_id.to_string(), row.get::<_, String>(0));
    assert_eq!((system.timeline, &system.dbname), (1, &database.name));
    let point = session.create_slot(&slot, false).await.unwrap();
    assert!(point > Lsn::ZERO);
    let error = session.create_slot(&slot, false).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Refused);
    assert!(error.to_string().contains(&slot), "{error}");

    let options = StreamOptions { messages: true, ..Default::default() };
    let mut stream = session.start(&slot, Lsn::ZERO, &["p"], options).await.unwrap();
    let sql = "INSERT INTO t VALUES (1, 'x'); SELECT pg_logical_emit_message(false, 'w', 'm')";
    client.batch_execute(sql).await.unwrap();
    let (tags, end) = transaction(&mut stream).await;
    assert_eq!(tags.replace('M', ""), "BRIC");
    assert!(end > point && stream.last_received().elapsed() < SOON);

    stream.status_update(end, end, true);
    stream.flush().await.unwrap();
    while !matches!(next(&mut stream).await.unwrap(), Frame::Keepalive { wal_end, .. } if wal_end >= end)
    {
    }
    stream.close().await;
    let sql =
        "SELECT confirmed_flush_lsn::text, active FROM pg_replication_slots WHERE slot_name = $1";
    let row = client.query_one(sql, &[&slot]).await.unwrap();
    assert_eq!(row.get::<_, String>(0).parse::<Lsn>().unwrap(), end);
    assert!(!row.get::<_, bool>(1), "close waits until the slot is free");
}

#[tokio::test]
async fn publication_names_of_any_kind_are_found() {
    let (database, client, mut session) = published().await;
    let slot = format!("slot_{}", database.name);
    let names = ["a\"b", "a,b", "a;b", "a\\b", "it's", "grüße 🐇", "Upper", &"x".repeat(63)];
    for name in names {
        let quoted = name.replace('"', "\"\"");
        client
            .batch_execute(&format!("CREATE PUBLICATION \"{quoted}\" FOR TABLE t"))
            .await
            .unwrap();
    }
    session.create_slot(&slot, false).await.unwrap();
    let names: Vec<&str> = names.iter().map(|n| &**n).collect();
    let started = session.start(&slot, Lsn::ZERO, &names, StreamOptions::default()).await;
    let mut stream = started.unwrap();
    client.batch_execute("INSERT INTO t VALUES (1, 'x')").await.unwrap();
    assert_eq!(transaction(&mut stream).await.0, "BRIC");
}

#[tokio::test]
async fn slot_missing_busy_and_free_again() {
    let (database, client, mut session) = published().await;
    let slot = format!("slot_{}", database.name);
    session.create_slot(&slot, false).await.unwrap();
    let none = StreamOptions::default();
    let held = session.start(&slot, Lsn::ZERO, &["p"], none).await.unwrap();

    let options = options(&database.url);
    let second = ReplicationConnection::connect(&options).await.unwrap();
    let error = second.start(&slot, Lsn::ZERO, &["p"], none).await.err().unwrap();
    assert_eq!(error.kind(), Kind::Busy, "{error:?}");
    let row = client
        .query_one(
            "SELECT active_pid::text FROM pg_replication_slots WHERE slot_name = $1",
            &[&slot],
        )
        .await
        .unwrap();
    assert!(error.to_string().contains(&row.get::<_, String>(0)), "{error}");
    let mut third = ReplicationConnection::connect(&options).await.unwrap();
    assert_eq!(third.drop_slot(&slot).await.unwrap_err().kind(), Kind::Busy);

    held.close().await;
    third.drop_slot(&slot).await.unwrap();
    assert_eq!(third.drop_slot(&slot).await.unwrap_err().kind(), Kind::Verdict);
    let error = third.start(&slot, Lsn::ZERO, &["p"], none).await.err().unwrap();
    assert_eq!(error.kind(), Kind::Verdict, "{error:?}");
    assert!(error.to_string().contains(&slot), "{error}");
}

#[tokio::test]
async fn a_missing_publication_is_a_sticky_verdict_up_to_17() {
    let (database, client, mut session) = published().await;
    if session.server_major().unwrap() >= 18 {
        return;
    }
    let slot = format!("slot_{}", database.name);
    session.create_slot(&slot, false).await.unwrap();
    let none = StreamOptions::default();
    let mut stream = session.start(&slot, Lsn::ZERO, &["absent"], none).await.unwrap();
    client.batch_execute("INSERT INTO t VALUES (1, 'x')").await.unwrap();
    let error = loop {
        match next(&mut stream).await {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), Kind::Verdict, "{error:?}");
    assert!(error.to_string().contains("absent"), "{error}");
    for again in [stream.try_next().err(), stream.fill().await.err()] {
        assert_eq!(again.unwrap().to_string(), error.to_string());
    }
}

#[tokio::test]
async fn wal_level_replica_is_a_verdict() {
    let conf = vec!["wal_level = replica".into()];
    let server = Postgres::start(PostgresOptions { conf, ..Default::default() }).await.unwrap();
    let options = options(&server.url("postgres", "postgres"));
    let mut session = ReplicationConnection::connect(&options).await.unwrap();
    let error = session.create_slot("s", false).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Verdict, "{error:?}");
    assert!(error.to_string().contains("wal_level"), "{error}");
}

#[tokio::test]
async fn a_server_that_stops_is_seen_at_once_on_both_connections() {
    let mut server = Postgres::start(PostgresOptions::default()).await.unwrap();
    let options = options(&server.url("postgres", "postgres"));
    server.execute("CREATE PUBLICATION p").await.unwrap();
    let mut session = ReplicationConnection::connect(&options).await.unwrap();
    session.create_slot("s", false).await.unwrap();
    let none = StreamOptions::default();
    let mut stream = session.start("s", Lsn::ZERO, &["p"], none).await.unwrap();
    let mut sql = connect::sql(&options).await.unwrap();

    let answer_keepalives = async {
        loop {
            match next(&mut stream).await {
                Ok(Frame::Keepalive { wal_end, .. }) => {
                    stream.status_update(wal_end, wal_end, false);
                    if let Err(error) = stream.flush().await {
                        return error;
                    }
                }
                Ok(Frame::XLogData { .. }) => {}
                Err(error) => return error,
            }
        }
    };
    let (stopped, streamed, closed) = timeout(SOON, async {
        tokio::join!(server.stop(StopMode::Fast), answer_keepalives, sql.closed.wait())
    })
    .await
    .expect("all end soon");
    stopped.unwrap();
    assert_eq!(streamed.kind(), Kind::Unreachable, "{streamed:?}");
    assert_eq!(closed.kind(), Kind::Unreachable, "{closed:?}");
    assert!(closed.to_string().contains("57P01"), "{closed}");
    assert_eq!(enter(&options.display()).await.unwrap_err().kind(), Kind::Unreachable);
}

#[tokio::test]
async fn a_terminated_walsender_is_unreachable() {
    let (database, client, mut session) = published().await;
    let slot = format!("slot_{}", database.name);
    session.create_slot(&slot, false).await.unwrap();
    let none = StreamOptions::default();
    let mut stream = session.start(&slot, Lsn::ZERO, &["p"], none).await.unwrap();
    let sql =
        "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = $1";
    client.query(sql, &[&slot]).await.unwrap();
    let error = loop {
        match next(&mut stream).await {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), Kind::Unreachable, "{error:?}");
}

#[tokio::test]
async fn a_dropped_fill_loses_nothing() {
    let (database, client, mut session) = published().await;
    let slot = format!("slot_{}", database.name);
    session.create_slot(&slot, false).await.unwrap();
    let none = StreamOptions::default();
    let mut stream = session.start(&slot, Lsn::ZERO, &["p"], none).await.unwrap();
    let sql = "INSERT INTO t SELECT i, repeat('x', i % 500) FROM generate_series(1, 20000) i";
    client.batch_execute(sql).await.unwrap();
    let (mut inserts, mut turn) = (0, 0u32);
    let all = async {
        while inserts < 20_000 {
            while let Some(frame) = stream.try_next().unwrap() {
                if let Frame::XLogData { data, .. } = frame {
                    inserts += usize::from(data[0] == b'I');
                }
            }
            turn += 1;
            tokio::select! {
                biased;
                () = tokio::task::yield_now(), if turn % 2 == 0 => {}
                filled = stream.fill() => filled.unwrap(),
            }
        }
    };
    timeout(SOON, all).await.expect("all rows arrive");
}

#[tokio::test]
async fn a_cancelled_command_poisons_the_connection() {
    let database = support::own_database().await;
    let mut session = ReplicationConnection::connect(&options(&database.url)).await.unwrap();
    tokio::select! {
        biased;
        _ = session.identify_system() => panic!("answered at once"),
        () = std::future::ready(()) => {}
    }
    let error = session.identify_system().await.unwrap_err();
    assert!(error.to_string().contains("cancelled"), "{error}");
    assert_eq!(session.show("timezone").await.unwrap_err().to_string(), error.to_string());
}

#[tokio::test]
async fn one_byte_segments_make_the_same_frames() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("postgres://r@{}/db", listener.local_addr().unwrap());
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        let mut heard = [0; 4096];
        stream.read(&mut heard).await.unwrap();
        let mut script = b"R\0\0\0\x08\0\0\0\0v\0\0\0\x0c\0\x03\0\0\0\0\0\0".to_vec();
        script.extend(b"S\0\0\0\x18server_version\x0015.1\0Z\0\0\0\x05I");
        stream.write_all(&script).await.unwrap();
        stream.read(&mut heard).await.unwrap();
        let mut script = b"W\0\0\0\x07\0\0\0d\0\0\0\x1dw".to_vec();
        script.extend([0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3]);
        script.extend(b"N\0\0\0\x06S\0\0d\0\0\0\x05?c\0\0\0\x04");
        for byte in script {
            // The client leaves at the frame that is none.
            let _ = stream.write_all(&[byte]).await;
            tokio::task::yield_now().await;
        }
    });
    let session = ReplicationConnection::connect(&options(&url)).await.unwrap();
    assert_eq!(session.server_major().unwrap(), 15);
    let none = StreamOptions::default();
    let mut stream = session.start("s", Lsn::ZERO, &["p"], none).await.unwrap();
    let Frame::XLogData { wal_start, wal_end, sent_at, data } = next(&mut stream).await.unwrap()
    else {
        panic!("no XLogData")
    };
    assert_eq!((wal_start, wal_end, sent_at, data.len()), (Lsn(1), Lsn(2), 3, 0));
    let error = next(&mut stream).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Protocol, "{error:?}");
    assert_eq!(next(&mut stream).await.unwrap_err().to_string(), error.to_string());
    drop(stream);
    server.await.unwrap();
}
