//! Secrets: never shown, whatever is wrong; taken from elsewhere, and taken again.

use watership::config::Config;

use super::{LEAST, config};

#[test]
fn secrets_are_not_in_the_debug_text() {
    let text = "
        source.url = 'postgres://relay:canary-1@db/shop?sslmode=verify-full'
        [broker]
        url = ['amqps://a:canary-2@h1', 'amqps://a:canary-2@h2']
        management_url = 'http://admin:canary-3@h1:15672'";
    let shown = format!("{:#?}", config(text).unwrap());
    assert!(!shown.contains("canary-"), "{shown}");
    let text = "
        source.url = 'postgres://relay@db/shop'
        source.password = 'canary-1'
        broker.url = 'amqps://a@h1'
        broker.password = 'canary-2'";
    let config = config(text).unwrap();
    assert!(!format!("{config:#?}").contains("canary-"));
    assert_eq!(config.relay.sql.password.unwrap().expose(), "canary-1");
    assert_eq!(config.relay.broker.urls[0].password.expose(), "canary-2");
}

/// Wrong files with a password in them, the word hunter2, wherever it may end up.
fn files_with_a_password() -> Vec<String> {
    [mistyped_keys(), broken_files(), malformed_variables(), wrong_urls(), from_elsewhere()]
        .concat()
}

/// In each form that a value can have.
fn mistyped_keys() -> Vec<String> {
    let mut files = Vec::new();
    for section in ["source", "broker", "relay", "admin", "log", "outbox"] {
        for key in
            ["pasword", "passwd", "pass", "pw", "secret", "token", "PASSWORD", "\"pass word\""]
        {
            for value in ["'hunter2'", "\"hunter2\"", "\"\"\"\nhunter2\"\"\"", "['hunter2']"] {
                files.push(format!("{LEAST}[{section}]\n{key} = {value}"));
                files.push(format!("{LEAST}{section}.{key} = {value}"));
            }
            files.push(format!("[{section}]\n{key} = hunter2"));
            files.push(format!("{section} = {{ {key} = 'hunter2', slot = 'x' }}"));
            files.push(format!("{section} = {{ {key} = hunter2 }}"));
            files.push(format!("{section} = {{ slot = 'x', {key} = \"hunter2\""));
        }
    }
    files
}

/// The file is broken where a password stands.
fn broken_files() -> Vec<String> {
    let mut files = Vec::new();
    for text in [
        "password = hunter2",
        "password = 'hunter2",
        "password = \"hunter2\\\"",
        "password hunter2",
        "password: hunter2",
        "password = 'x' hunter2",
        "password = \"\"\"\nhunter2=\n",
        "password = \nhunter2==",
        "password = ['hunter2'",
        "password = {x = 'hunter2'}",
        "password = ['hunter2']",
        "password = 'hunter2'\npassword = 'hunter2'",
        "hunter2",
        "url = hunter2",
        "url = 'postgres://a:hunter2@h/x",
        "url = postgres://a:hunter2@h/x",
        "url = [\n'amqp://a:hunter2=x@h\n]",
        "url = [\n\"amqp://a:hunter2@h\",\namqp://a:hunter2@h\n]",
        "url = [['postgres://a:hunter2@h/x']]",
        "url = { x = 'amqp://a:hunter2@h' }",
        "'amqp://a:hunter2@h' = 1",
        "\"amqp://a:hunter2@h\"",
        "listen = 'amqp://a:hunter2@h/'",
    ] {
        for section in ["source", "broker", "log"] {
            files.push(format!("[{section}]\n{text}"));
        }
    }
    files
}

/// What stands in `${}` is malformed, or the name of none.
fn malformed_variables() -> Vec<String> {
    let mut files = Vec::new();
    for text in [
        "ab${c!hunter2}e",
        "${hunter2",
        "x${}hunter2",
        "${hunter2:+x}",
        "${a-hunter2}",
        "${FILE:hunter2}",
    ] {
        files.push(format!("{LEAST}source.password = '{text}'"));
        files.push(format!("{LEAST}broker.management_url = 'http://a:{text}@h'"));
        files.push(format!(
            "source.url = 'postgres://a:{text}@h/x'\nbroker.url = 'amqp://a:{text}@h'"
        ));
    }
    files
}

const WRONG_URLS: &[&str] = &[
    "S://a:hunter2",
    "S://a:hunter2/shop",
    "S://a:hunter2?x=1",
    "S://a:hun/hunter2",
    "S://a:1/hunter2:x",
    "S://a:hunter2/x@h/shop",
    "S://a:x/hunter2@h:y/shop",
    "S://a:hunter2?x@h/shop",
    "S://a:hunter2#x@h/shop",
    "S://a:hunter2@",
    "S://a:hunter2@h:port/x",
    "S://a@h:hunter2/x",
    "S://a/hunter2@h:port",
    "S://a%3Ahunter2@h:port/x",
    "S://a:hunter2@h,i:x/shop",
    "S://a:hunter2%FF@h/shop",
    "S://a:%FFhunter2@h/shop",
    "S://h/x?password=hunter2&x=1",
    "S://h/x?passwd=hunter2",
    "S://h/x?sslpassword=hunter2",
    "S://h/x?hunter2",
    "S://h/x?hunter2=1",
    "S:a:hunter2@h",
    "a:hunter2@h",
    "hunter2",
    "host=h user=a password=hunter2",
    "T://a:hunter2@h/x",
    "hunter2://h/x",
];

fn wrong_urls() -> Vec<String> {
    let mut files = Vec::new();
    for url in WRONG_URLS {
        for scheme in ["postgres", "amqp", "amqps", "http", "https"] {
            let url = url.replace('S', scheme).replace('T', "redis");
            files.push(format!("source.url = '{url}'\nbroker.url = ['{url}']"));
            files.push(format!("{LEAST}broker.management_url = '{url}'"));
            files.push(format!(
                "source.url = 'postgres://a@h/x'\nbroker.url = '{url}'\nbroker.password = 'y'"
            ));
        }
    }
    files
}

/// A secret from elsewhere in the wrong place.
fn from_elsewhere() -> Vec<String> {
    let mut files = Vec::new();
    for key in [
        "name",
        "source.mode",
        "source.slot",
        "source.publication",
        "source.tables",
        "source.binary",
        "broker.auth",
        "broker.heartbeat",
        "broker.max_message_size",
        "broker.topology",
        "relay.drain_timeout",
        "relay.max_unconfirmed",
        "relay.max_window_bytes",
        "outbox.retain",
        "admin.listen",
        "log.level",
        "log.format",
    ] {
        for value in ["'${SECRET}'", "['${SECRET}']", "'A ${SECRET} B'"] {
            files.push(format!("{LEAST}{key} = {value}"));
        }
    }
    for route in [
        "table = '${SECRET}'",
        "outbox = {aggregate_type = '${SECRET}', x = 'hunter2'}",
        "ordering = '${SECRET}'",
        "table = '*'\nexchange = 'x'\nrouting_key = '{${SECRET}}'",
        "hunter = 'hunter2'",
    ] {
        files.push(format!("{LEAST}[[route]]\nname = 'r'\n{route}"));
    }
    files
}

#[test]
fn no_error_shows_a_password() {
    let files = files_with_a_password();
    assert!(files.len() > 500, "{}", files.len());
    let secret = |name: &str| (name == "SECRET").then(|| "hunter2 ü".to_owned());
    let mut refused = 0;
    for text in files {
        // What is accepted may be shown by Debug, which shows no secret either.
        let shown = match Config::parse("w.toml", &text, &secret) {
            Err(error) => {
                refused += 1;
                format!("{error:?} {error} {:?}", error.hint_text())
            }
            Ok(config) if text.contains("SECRET") => format!("{:?}", config.warnings),
            Ok(config) => format!("{config:?}"),
        };
        assert!(!shown.contains("hunter2"), "{text}\n{shown}");
    }
    assert!(refused > 500, "{refused}");
}

#[test]
fn secrets_from_variables_and_files_may_hold_any_character() {
    let directory = std::env::temp_dir().join(format!("watership-config-{}", std::process::id()));
    std::fs::create_dir(&directory).unwrap();
    let odd = "p w/?#[]@:%41€'\"\\$";
    std::fs::write(directory.join("pw"), format!("{odd}\n")).unwrap();
    let file = directory.join("w.toml").display().to_string();
    let variable = |name: &str| (name == "PW").then(|| format!("{odd}\n"));
    for place in ["${PW}", "${file:pw}"] {
        let in_urls = format!(
            "source.url = 'postgres://r:{place}@h/x'\n\
             broker.url = ['amqps://r:{place}@h', 'amqps://r:{place}@i']"
        );
        let as_keys = format!(
            "source.url = 'postgres://r@h/x'\nbroker.url = 'amqps://r@h'\n\
             source.password = '{place}'\nbroker.password = '{place}'"
        );
        for text in [in_urls, as_keys] {
            let config = Config::parse(&file, &text, &variable).unwrap();
            assert_eq!(config.relay.sql.user, "r");
            assert_eq!(config.relay.sql.password.unwrap().expose(), odd, "{text}");
            assert_eq!(config.relay.broker.urls[0].password.expose(), odd, "{text}");
        }
    }
    std::fs::remove_dir_all(directory).unwrap();
}

#[test]
fn a_password_is_read_only_from_a_regular_file_of_limited_size() {
    let directory = std::env::temp_dir().join(format!("watership-pipe-{}", std::process::id()));
    std::fs::create_dir(&directory).unwrap();
    let pipe = directory.join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    std::fs::write(directory.join("large"), vec![b'x'; (1 << 20) + 1]).unwrap();
    let file = directory.join("w.toml").display().to_string();
    for (name, why) in [
        ("pipe", "it is not a regular file"),
        (".", "it is not a regular file"),
        ("large", "it has 1048577 bytes, at most 1048576 are allowed"),
    ] {
        let text = format!("broker.url = 'amqp://h'\nbroker.password = '${{file:{name}}}'\n");
        let errors = Config::parse(&file, &text, &|_| None).unwrap_err().to_string();
        assert!(errors.contains(why), "{errors}");
    }
    std::fs::remove_dir_all(directory).unwrap();
}

#[test]
fn credentials_in_files_are_read_again_and_the_files_are_relative_to_the_one_that_names_them() {
    let directory = std::env::temp_dir().join(format!("watership-again-{}", std::process::id()));
    std::fs::create_dir(&directory).unwrap();
    let write = |name: &str, text: &str| std::fs::write(directory.join(name), text).unwrap();
    write("user", "u1");
    write("pw", "one");
    let text = "source.url = 'postgres://${file:user}:${file:pw}@h/x?sslrootcert=ca.pem'\n\
                broker.url = 'amqps://r@h'\nbroker.password = '${file:pw}'\n\
                broker.tls_ca = 'sub/ca.pem'\n\
                broker.management_url = 'https://${file:user}:${file:pw}@h'";
    let file = directory.join("w.toml").display().to_string();
    let relay = Config::parse(&file, text, &|_| None).unwrap().relay;
    assert_eq!(relay.sql.tls.root_cert, Some(directory.join("ca.pem")));
    assert_eq!(relay.broker.tls.root_cert, Some(directory.join("sub/ca.pem")));
    write("user", "u2");
    write("pw", "two\n");
    let now = relay.sql.current().unwrap();
    assert_eq!((now.user.as_str(), now.password.as_ref().unwrap().expose()), ("u2", "two"));
    assert_eq!(now.tls.root_cert, Some(directory.join("ca.pem")));
    assert_eq!(relay.broker.current_urls().unwrap()[0].password.expose(), "two");
    std::fs::remove_file(directory.join("pw")).unwrap();
    let error = relay.sql.current().unwrap_err();
    assert!(error.to_string().contains("file pw of ${file:…} cannot be read"), "{error}");
    assert!(relay.broker.current_urls().is_err());
    assert!(relay.audit.management(&relay.broker).is_err());
    std::fs::remove_dir_all(directory).unwrap();
}
