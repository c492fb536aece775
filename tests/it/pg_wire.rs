//! Both connections to Postgres: every way in and every way to be refused.
//!
//! What concerns entering is tried on both connections, ordinary SQL and replication, because they
//! must not differ. Servers that misbehave are small scripts on a TCP listener.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rcgen::{PKCS_ECDSA_P256_SHA256, PKCS_ED25519, SignatureAlgorithm};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::OnceCell;
use tokio::time::timeout;
use watership::dev::{Postgres, PostgresOptions, StopMode};
use watership::error::{Error, Kind, Result};
use watership::pg::client;
use watership::pg::connect::Options;
use watership::pg::replication::ReplicationConnection;
use watership::pg::wire::Wire;
use watership::secret::Secret;

use crate::support::servers;
use crate::support::waiting::LIMIT;

/// What should happen at once may take this long on a busy machine.
const PASSWORD: &str = "hunter2-canary";

fn options(url: &str) -> Options {
    Options::parse(&Secret::new(url)).unwrap_or_else(|e| panic!("{e:?}"))
}

/// Enters by both connections, which must agree; the error is that of the replication connection.
async fn enter(url: &str) -> Result<()> {
    let options = options(url);
    let sql = match client::sql(&options).await {
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
    for error in [&sql, &replication].into_iter().filter_map(|r| r.as_ref().err()) {
        assert!(!format!("{error:?}").contains(PASSWORD), "{error:?}");
    }
    replication
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
    client: [PathBuf; 2],
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
        line("hardened", "scram-sha-256"),
        line("odd", "scram-sha-256"),
        line("clear", "password"),
        "hostssl all secure 127.0.0.1/32 scram-sha-256".into(),
        "hostssl all certified 127.0.0.1/32 cert".into(),
        "local all secure scram-sha-256".into(),
    ];
    let options = PostgresOptions { hba: Some(hba), ..Default::default() };
    let mut server = Postgres::start(options).await.expect("a server");
    for role in ["open", "scram", "clear", "secure", "certified"] {
        let sql = format!("CREATE ROLE {role} LOGIN REPLICATION PASSWORD '{PASSWORD}'");
        server.execute(&sql).await.expect("a role");
    }
    let hashed = "SET password_encryption = 'md5'; \
                  CREATE ROLE hashed LOGIN REPLICATION PASSWORD 'hunter2-canary'";
    server.execute(hashed).await.expect("a role with an md5 password");
    let [ca, other_ca, certificate, key] = certify(&server, &PKCS_ECDSA_P256_SHA256);
    server.append("postgresql.conf", "ssl = on\nssl_ca_file = 'ca.crt'\n").expect("conf");
    server.stop(StopMode::Fast).await.expect("stops");
    server.start_again().await.expect("starts with TLS");
    Guarded { server, ca, other_ca, client: [certificate, key] }
}

/// Gives the server a certificate for `localhost`, its CA signing by `algorithm`. Returns the
/// files of its CA, of a CA that knows nothing, and certificate and key of the client `certified`.
pub(crate) fn certify(server: &Postgres, algorithm: &'static SignatureAlgorithm) -> [PathBuf; 4] {
    let authority = |name: &str| {
        let key = KeyPair::generate_for(algorithm).expect("a key");
        let mut params = CertificateParams::new(vec![]).expect("params");
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).expect("a CA").pem();
        (Issuer::new(params, key), pem)
    };
    let ((issuer, ca_pem), (_, other_pem)) = (authority("one"), authority("two"));
    let issue = |name: &str| {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("params");
        params.distinguished_name.push(DnType::CommonName, name);
        let certificate = params.signed_by(&key, &issuer).expect("a certificate");
        (certificate.pem(), key.serialize_pem())
    };
    let write = |name: &str, text: &str| {
        let path = server.data_dir().join(name);
        std::fs::write(&path, text).expect("written");
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).expect("mode");
        server.give(&path).expect("owner");
        path
    };
    let (certificate, key) = issue("localhost");
    write("server.crt", &certificate);
    write("server.key", &key);
    let (certificate, key) = issue("certified");
    [
        write("ca.crt", &ca_pem),
        write("other.crt", &other_pem),
        write("client.crt", &certificate),
        write("client.key", &key),
    ]
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
    assert!(error.to_string().contains("requires no authentication"), "{error}");
}

#[tokio::test]
async fn a_wrong_password_names_the_user_and_not_the_password() {
    let it = guarded().await;
    let url = it.local("scram", "").replace(PASSWORD, "hunter2-canary-wrong");
    let error = refused(&url).await;
    assert!(error.to_string().contains("\"scram\""), "{error}");
    assert!(error.hint_text().unwrap().contains("password"), "{error:?}");
    assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");

    let url = it.local("scram", "").replace(&format!(":{PASSWORD}"), "");
    let error = enter(&url).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Config, "{error:?}");
    assert!(error.to_string().contains("asks for the password"), "{error}");
}

#[tokio::test]
async fn unknown_role_and_database_are_refused_with_a_hint() {
    let it = guarded().await;
    assert!(refused(&it.local("nobody", "")).await.hint_text().unwrap().contains("pg_hba"));
    let error = refused(&it.local("open", "dbname=nowhere")).await;
    assert!(error.to_string().contains("nowhere"), "{error}");
    assert!(error.hint_text().unwrap().contains("database"), "{error:?}");
}

#[tokio::test]
async fn md5_is_refused_until_allowed_and_clear_text_always() {
    let it = guarded().await;
    let error = refused(&it.local("hashed", "")).await;
    assert!(error.hint_text().unwrap().contains("allow_md5=true"), "{error:?}");
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
    assert!(
        error.hint_text().unwrap().contains("host name listed in the certificate"),
        "{error:?}"
    );
    let other = format!("sslrootcert={}", it.other_ca.display());
    let error = refused(&it.url("secure", "localhost", &other)).await;
    assert!(error.hint_text().unwrap().contains("sslrootcert"), "{error:?}");
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
    assert!(error.hint_text().unwrap().contains("pg_hba"), "{error:?}");
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
async fn a_client_certificate_is_shown_when_asked_for() {
    let it = guarded().await;
    let [certificate, key] = it.client.each_ref().map(|path| path.display());
    let tls = format!("sslrootcert={}", it.ca.display());
    let both = format!("{tls}&sslcert={certificate}&sslkey={key}");
    enter(&it.url("certified", "localhost", &both)).await.unwrap();
    refused(&it.url("certified", "localhost", &tls)).await;
    let half = it.url("certified", "localhost", &format!("{tls}&sslcert={certificate}"));
    assert_eq!(enter(&half).await.unwrap_err().kind(), Kind::Config);
}

#[tokio::test]
async fn an_ed25519_certificate_cannot_be_bound_to() {
    let hba = Some(vec!["hostssl all all 127.0.0.1/32 scram-sha-256".into()]);
    let options = PostgresOptions { hba, ..Default::default() };
    let mut server = Postgres::start(options).await.unwrap();
    let [ca, ..] = certify(&server, &PKCS_ED25519);
    server.append("postgresql.conf", "ssl = on\n").unwrap();
    let sql = format!("CREATE ROLE secure LOGIN REPLICATION PASSWORD '{PASSWORD}'");
    server.execute(&sql).await.unwrap();
    server.stop(StopMode::Fast).await.unwrap();
    server.start_again().await.unwrap();
    let it = Guarded { server, other_ca: ca.clone(), client: [ca.clone(), ca.clone()], ca };
    enter(&it.tls("localhost", "")).await.unwrap();
    let error = refused(&it.tls("localhost", "channel_binding=require")).await;
    assert!(error.to_string().contains("channel"), "{error}");
    assert!(error.to_string().contains("Ed25519"), "{error}");
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
    let server = servers::postgres().await;
    server.execute("CREATE ROLE no_replication LOGIN").await.unwrap();
    let options = options(&server.url("no_replication", "postgres"));
    let error = replication_error(&options).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Refused, "{error:?}");
    assert!(error.hint_text().unwrap().contains("REPLICATION"), "{error:?}");
}

/// A listener that answers the first packet (and an SSLRequest, if any) with `answer`, and
/// returns all that it was sent afterwards.
async fn rogue(answer: &'static [u8]) -> (String, tokio::task::JoinHandle<Vec<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("postgres://r:{PASSWORD}@{}/db?", listener.local_addr().expect("bound"));
    let task = tokio::spawn(async move {
        let mut heard = Vec::new();
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().await.expect("a client");
            let mut first = vec![0; 4096];
            let n = stream.read(&mut first).await.expect("a packet");
            first.truncate(n);
            stream.write_all(answer).await.expect("sent");
            // A client that resets the connection has heard enough as well.
            let _ = stream.read_to_end(&mut first).await;
            heard.push(first);
        }
        heard
    });
    (url, task)
}

/// What `scram_iterations` of Postgres 16 and later makes of the password.
fn verifier(password: &str, iterations: u32) -> String {
    use base64::Engine as _;
    use ring::{digest, hmac, pbkdf2};
    let (salt, mut salted) = (b"sixteen bytes ok", [0; 32]);
    let count = iterations.try_into().expect("not zero");
    let secret = password.as_bytes();
    pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, count, salt, secret, &mut salted);
    let key = hmac::Key::new(hmac::HMAC_SHA256, &salted);
    let stored = digest::digest(&digest::SHA256, hmac::sign(&key, b"Client Key").as_ref());
    let encode = |bytes: &[u8]| base64::engine::general_purpose::STANDARD.encode(bytes);
    let (stored, server) = (encode(stored.as_ref()), hmac::sign(&key, b"Server Key"));
    let (salt, server) = (encode(salt), encode(server.as_ref()));
    format!("SCRAM-SHA-256${iterations}:{salt}${stored}:{server}")
}

#[tokio::test]
async fn a_hardened_server_may_ask_for_many_iterations_and_not_for_any_number() {
    let it = guarded().await;
    let many = verifier(PASSWORD, 150_000);
    let role = "CREATE ROLE hardened LOGIN REPLICATION PASSWORD";
    it.server.execute(&format!("{role} '{many}'")).await.unwrap();
    let url = format!("{}connect_timeout=60", it.local("hardened", ""));
    enter(&url).await.unwrap();
    let wrong = url.replace(PASSWORD, "other");
    assert_eq!(refused(&wrong).await.sqlstate(), Some("28P01"));
    let verifier = verifier(PASSWORD, 1_000).replace("$1000:", "$5000000:");
    it.server.execute(&format!("ALTER ROLE hardened PASSWORD '{verifier}'")).await.unwrap();
    let error = refused(&it.local("hardened", "")).await;
    assert!(error.to_string().contains("asks for 5000000 SCRAM iterations"), "{error}");
    assert!(error.hint_text().unwrap().contains("scram_iterations"), "{error:?}");
}

#[tokio::test]
async fn a_password_may_hold_any_character() {
    let it = guarded().await;
    it.server.execute("CREATE ROLE odd LOGIN REPLICATION").await.unwrap();
    for password in
        ["p w", "100%", "%41", "a@b:c/d?e#f", "€ ü 日本", "quo'te\"s\\", "ﬁ\u{a0}x", "$$"]
    {
        let sql = format!("ALTER ROLE odd PASSWORD '{}'", password.replace('\'', "''"));
        it.server.execute(&sql).await.unwrap();
        let encoded =
            percent_encoding::utf8_percent_encode(password, percent_encoding::NON_ALPHANUMERIC);
        let url = it.local("odd", "").replace(PASSWORD, &encoded.to_string());
        enter(&url).await.unwrap_or_else(|e| panic!("{password}: {e:?}"));
        let mut options = options(&it.local("odd", ""));
        options.password = Some(Secret::new(password));
        client::sql(&options).await.unwrap();
    }
}

#[tokio::test]
async fn a_pooler_that_ignores_our_settings_is_refused() {
    let answer = b"R\0\0\0\x08\0\0\0\0S\0\0\0\x16DateStyle\0ISO, DMY\0Z\0\0\0\x05I";
    let length = "DateStyle".len() + "ISO, DMY".len() + 2 + 4;
    let mut answer = answer.to_vec();
    answer[13] = u8::try_from(length).unwrap();
    let (url, _task) = rogue(answer.leak()).await;
    let error = refused(&url).await;
    assert!(error.to_string().contains("DateStyle is \"ISO, DMY\""), "{error}");
    assert!(error.hint_text().unwrap().contains("PgBouncer"), "{error:?}");
}

#[tokio::test]
async fn a_rogue_server_never_hears_the_password() {
    for (answer, kind) in [
        (&b"R\0\0\0\x08\0\0\0\x03"[..], Kind::Refused),
        (b"R\0\0\0\x0c\0\0\0\x05salt", Kind::Refused),
        (b"R\0\0\0\x08\0\0\0\x07", Kind::Refused),
        (b"R\0\0\0\x0d\0\0\0\x0aPLN\0\0", Kind::Refused),
        // SCRAM, and then an answer to another client's nonce.
        (
            b"R\0\0\0\x17\0\0\0\x0aSCRAM-SHA-256\0\0\
              R\0\0\0\x1f\0\0\0\x0br=bad,s=c2FsdA==,i=4096",
            Kind::Refused,
        ),
    ] {
        let (url, heard) = rogue(answer).await;
        let error = enter(&url).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error:?}");
        for heard in timeout(LIMIT, heard).await.unwrap().unwrap() {
            assert!(!heard.windows(PASSWORD.len()).any(|w| w == PASSWORD.as_bytes()));
        }
    }
}

#[tokio::test]
async fn a_server_without_tls_gets_no_plain_text() {
    let (url, heard) = rogue(b"N").await;
    refused(&format!("{url}sslmode=require")).await;
    for heard in timeout(LIMIT, heard).await.unwrap().unwrap() {
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
        let patient = options(&format!("{url}connect_timeout=60"));
        let error = timeout(LIMIT, replication_error(&patient)).await.unwrap().unwrap_err();
        assert!(matches!(error.kind(), Kind::Protocol | Kind::Refused), "{answer:?}: {error:?}");
        // Another client library waits for the rest of some of them.
        let options = options(&format!("{url}connect_timeout=1"));
        assert!(timeout(LIMIT, client::sql(&options)).await.unwrap().is_err(), "{answer:?}");
    }
}

#[tokio::test]
async fn the_connect_timeout_covers_a_server_that_says_nothing() {
    let (url, _task) = rogue(b"").await;
    let error = timeout(LIMIT, enter(&format!("{url}connect_timeout=1"))).await.unwrap();
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
    let database = servers::own_database().await;
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
    let mut replication = Wire::connect(&options, true).await.unwrap();
    let mut shown = async |setting: &str| {
        let rows = replication.query(&format!("SHOW {setting}")).await.unwrap();
        rows[0][0].clone().unwrap()
    };
    let sql = client::sql(&options).await.unwrap();
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
        assert_eq!(shown(setting).await, value, "{setting}");
        let row = sql.client.query_one(&format!("SHOW {setting}"), &[]).await.unwrap();
        assert_eq!(row.get::<_, String>(0), value, "{setting}");
    }
    assert_eq!(shown("statement_timeout").await, "0");
    let row = sql.client.query_one("SHOW statement_timeout", &[]).await.unwrap();
    assert_eq!(row.get::<_, String>(0), "30s");
}
