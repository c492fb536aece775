//! The configuration: the reference file against the code, and the text of every mistake.

use watership::config::Config;
use watership::config::load::{fill_in, parse};
use watership::config::raw::{Binding, Exchange, Queue, Raw, Route};

const REFERENCE: &str = include_str!("../config/watership.toml");

/// The smallest file that is right.
const LEAST: &str = "source.url = 'postgres://relay@127.0.0.1/shop'\n\
                     broker.url = 'amqp://relay:x@127.0.0.1'\n";

fn config(text: &str) -> Result<Config, String> {
    let raw = parse("w.toml", text).map_err(|e| e.to_string())?;
    let raw = fill_in(&raw, &|_| None).map_err(|e| e.to_string())?;
    Config::from_raw("w.toml", raw).map_err(|e| e.to_string())
}

fn problem(more: &str) -> String {
    config(&format!("{LEAST}{more}")).err().unwrap_or_else(|| panic!("{more} is accepted"))
}

fn keys(value: &toml::Value) -> toml::Table {
    value.as_table().expect("it is a table").clone()
}

#[test]
fn reference_shows_every_key_at_its_default() {
    let mut shown: toml::Table = toml::from_str(REFERENCE).unwrap();
    let mut default = keys(&toml::Value::try_from(Raw::default()).unwrap());
    for (table, key) in [("source", "url"), ("broker", "url")] {
        let required = shown[table].as_table_mut().unwrap().remove(key);
        assert!(required.is_some(), "{table}.{key} is shown");
        default[table].as_table_mut().unwrap().remove(key);
    }
    // Lists of tables are shown as comments, see the next test.
    for list in ["route", "exchange", "queue", "binding"] {
        assert_eq!(default.remove(list), Some(toml::Value::Array(Vec::new())));
    }
    assert_eq!(shown, default);
}

/// The reference with its examples, which are the lines that begin with `#` and no space.
fn reference_with_examples() -> String {
    let uncomment = |line: &'static str| match line.strip_prefix('#') {
        Some(rest) if !rest.starts_with(' ') => rest,
        _ => line,
    };
    REFERENCE.lines().map(uncomment).collect::<Vec<_>>().join("\n")
}

#[test]
fn reference_examples_show_every_key_of_every_list() {
    let shown: toml::Table = toml::from_str(&reference_with_examples()).unwrap();
    let default = |item: toml::Value, list: &str, free: &[&str]| {
        let example = shown[list][0].as_table().unwrap().clone();
        let default = keys(&item);
        let names = |t: &toml::Table| t.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&example), names(&default), "{list}");
        for (key, value) in default.iter().filter(|(key, _)| !free.contains(&key.as_str())) {
            assert_eq!(&example[key], value, "{list}.{key}");
        }
    };
    let value = |item| toml::Value::try_from(item).unwrap();
    default(value(Route::default()), "route", &["name", "outbox", "exchange"]);
    default(toml::Value::try_from(Exchange::default()).unwrap(), "exchange", &["name"]);
    default(toml::Value::try_from(Queue::default()).unwrap(), "queue", &["name"]);
    let free = ["queue", "exchange", "routing_key"];
    default(toml::Value::try_from(Binding::default()).unwrap(), "binding", &free);
}

#[test]
fn reference_is_a_valid_configuration_with_and_without_its_examples() {
    let plain = config(REFERENCE).unwrap();
    assert_eq!(plain.rules.len(), 2, "the default rules");
    let full = config(&reference_with_examples()).unwrap();
    assert_eq!(full.rules.len(), 1);
    assert_eq!(full.topology.exchanges.len(), 1);
    assert_eq!(full.topology.queues.len(), 1);
}

#[test]
fn each_key_of_the_reference_has_a_comment_line_before_it() {
    let mut before = "";
    for line in REFERENCE.lines() {
        let is_key = line.contains(" = ") && !line.starts_with("# ");
        assert!(!is_key || before.starts_with("# "), "no comment before {line:?}");
        before = line;
    }
}

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
    assert_eq!(config.source.sql.password.unwrap().expose(), "canary-1");
    assert_eq!(config.broker.urls[0].password.expose(), "canary-2");
}

#[test]
fn all_problems_are_reported_at_once() {
    let text = problem("relay.checkpoint_interval = '100'\nsource.mode = 'poll'\nname = 'A B'\n");
    assert!(
        text.starts_with("w.toml has 3 problems:\n  - name = \"A B\" is not allowed"),
        "{text}"
    );
    assert_eq!(text.lines().count(), 4, "{text}");
}

#[test]
fn each_mistake_is_named_with_what_is_allowed() {
    for (more, part) in [
        ("name = ''", "name = \"\" is not allowed; allowed: 1 to 63 of the letters a to z"),
        ("source.mode = 'pull'", "source.mode = \"pull\" is not allowed; allowed: \"wal\""),
        ("source.mode = 'poll'", "source.mode = \"poll\" is not available yet"),
        ("source.slot = 'My-Slot'", "source.slot = \"My-Slot\" is not allowed"),
        ("source.tables = ['customers']", "allowed: \"schema.table\""),
        ("source.tables = ['watership.outbox']", "outside the relay's own schema"),
        ("source.tables = ['a.b', 'a.b']", "source.tables[1]: table \"a.b\" is listed twice"),
        ("broker.auth = 'external'", "needs broker.tls_cert and broker.tls_key"),
        ("broker.tls_cert = '/x'", "belong together"),
        ("broker.password = 'y'", "needs a user and no password"),
        ("broker.heartbeat = '1500ms'", "allowed: whole seconds"),
        ("broker.confirm_timeout = '10s'", "more than twice broker.heartbeat"),
        ("broker.max_message_size = '1TB'", "allowed: 1B to 512MiB"),
        ("broker.management_url = 'h:15672'", "management URL ***: no scheme"),
        ("broker.management_url = 'ftp://h'", "scheme is neither http nor https"),
        ("broker.management_url = 'http://'", "no host"),
        ("broker.management_url = 'http://h:abc'", "the port is not a number"),
        ("broker.management_url = 'http://h/rabbit'", "nothing may follow the port"),
        ("relay.max_unconfirmed = 0", "relay.max_unconfirmed = 0 is not allowed; allowed: 1 to"),
        ("outbox.retain = '1 week'", "outbox.retain = \"1 week\" is not allowed; allowed: 0d to"),
        ("admin.listen = '9187'", "such as \"127.0.0.1:9187\""),
        ("admin.listen = '0.0.0.0:9187'", "can be reached from other machines"),
        ("log.level = 'loud'", "log.level = \"loud\" is not allowed; allowed: \"info\""),
        ("[[exchange]]\nname = 'x'\nkind = 'topics'", "exchange[0].kind = \"topics\""),
        ("[[queue]]\nname = ''", "queue[0].name = \"\" is not allowed; allowed: 1 to 255 bytes"),
        ("[[queue]]\nname = 'q'\ntype = 'fast'", "queue[0].type = \"fast\""),
        ("[[queue]]\nname = 'q'\narguments = {x = [1]}", "queue[0].arguments.x: allowed are"),
        ("[[binding]]\nqueue = 'q'", "binding[0].exchange = \"\""),
        ("[[queue]]\nname = 'q'\n[[queue]]\nname = 'q'", "queue[1]: queue \"q\" is listed twice"),
        ("[[exchange]]\nname = 'e'\n[[exchange]]\nname = 'e'", "exchange \"e\" is listed twice"),
    ] {
        let text = problem(more);
        assert!(text.contains(part), "{more}\n{text}");
    }
}

#[test]
fn each_mistake_in_routes_is_named() {
    let route = |rest: &str| format!("[[route]]\nname = 'r'\n{rest}");
    for (more, part) in [
        (route(""), "route \"r\" selects nothing; allowed: outbox = { aggregate_type"),
        (route("table = 'a.b'\noutbox = {aggregate_type = 'o'}"), "make two routes of it"),
        (route("table = '*'"), "route \"r\": exchange = \"\" is not allowed"),
        (route("table = '*'\nexchange = 'x'\ndrop = true"), "keep one of them"),
        (
            route("table = '*'\ndrop = true\nordering = 'zzz'\nkey = ['a']"),
            "has key, ordering, which",
        ),
        (
            route("table = '*'\ndrop = true\nnack_limit = 3"),
            "has nack_limit, which it would not use",
        ),
        (route("table = 'a.b'\nexchange = 'x'"), "which is not captured; add it to source.tables"),
        (route("table = '*'\nexchange = 'x'\nordering = 'fifo'"), "\"keyed\", \"pipelined\""),
        (route("table = '*'\nexchange = 'x'\nrouting_key = '{nope}'"), "route \"r\""),
        (
            format!(
                "source.tables = ['a.b']\n{}",
                route("outbox = {aggregate_type = '*'}\nexchange = 'x'")
            ),
            "table \"a.b\" is captured and no route selects it",
        ),
    ] {
        let text = problem(&more);
        assert!(text.contains(part), "{more}\n{text}");
    }
}

#[test]
fn a_broken_file_is_told_with_its_place() {
    let long = format!("name = 'a'\nnote = '{}", "x".repeat(1 << 20));
    for (more, part) in [
        ("source.slott = 'a'", "w.toml:3:8: unknown key \"slott\""),
        ("name = 'a'\nname = 'b'", "w.toml:4:1: duplicate key"),
        ("[source]\nslot = 'a'", "w.toml:3:2: duplicate key"),
        ("name = 'a", "w.toml:3:"),
        ("name = a", "w.toml:3:8: "),
        ("name 'a'", "w.toml:3:"),
        ("name = 7", "w.toml:3:8: "),
        ("name = '\u{0}'", "w.toml:3:"),
        ("\u{feff}name = 'a'", "w.toml:3:"),
        (&long, "w.toml:4:"),
    ] {
        let text = problem(more);
        assert!(text.starts_with("w.toml:") && text.contains(part), "{more:.40}\n{text:.400}");
        assert!(text.len() < 1000, "{} bytes for {more:.40}", text.len());
    }
    // Neither is a mistake.
    for text in [format!("\u{feff}{LEAST}"), LEAST.replace(" = ", "\t=\t")] {
        config(&text).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn a_value_of_the_wrong_shape_is_told_with_what_to_write() {
    for (more, text, hint) in [
        (
            "[route]\nname = 'r'",
            "found, expected a list of tables",
            "write [[route]], once for each",
        ),
        ("[[log]]\nlevel = 'info'", "found, expected a table", "write [log], once"),
        ("[[route]]\noutbox = 'order'", "expected a table", "write outbox = { aggregate_type ="),
        ("log = 'info'", "expected a table", "write its keys below [log]"),
        ("source.tables = 'a.b'", "expected a list", "write source.tables = [\"…\"]"),
        ("relay.max_unconfirmed = '7'", "expected a whole number", "without quotes"),
        ("relay.max_unconfirmed = -1", "integer -1 is not allowed here", "0 or more"),
    ] {
        let error = parse("w.toml", &format!("{LEAST}{more}")).err().expect(more);
        let (told, hinted) = (error.to_string(), error.hint_text().unwrap_or_default());
        assert!(told.contains(text) && hinted.contains(hint), "{more}\n{told}\n{hinted}");
        assert!(!told.contains("struct") && !told.contains("u64"), "{told}");
    }
}

#[test]
fn parameters_of_a_broker_url_are_checked_as_the_keys_are() {
    for (url, part) in [
        ("'amqp://r@h/x?heartbeat=60'", "more than twice its heartbeat"),
        ("'amqp://r@h/x?auth_mechanism=external'", "needs amqps://"),
        ("'amqps://r@h/x?auth_mechanism=external'", "needs broker.tls_cert and broker.tls_key"),
        ("['amqp://r@a/x', 'amqp://r@b/y']", "two vhosts: \"x\", \"y\""),
    ] {
        let text = LEAST.replace("'amqp://relay:x@127.0.0.1'", url);
        let told = config(&text).err().unwrap_or_else(|| panic!("{url} is accepted"));
        assert!(told.contains(part), "{url}\n{told}");
    }
    let cluster = LEAST.replace("'amqp://relay:x@127.0.0.1'", "['amqp://r@a/x', 'amqp://r@b/x']");
    config(&cluster).unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn missing_urls_are_named() {
    let text = config("").unwrap_err();
    assert!(text.contains("source.url is not set; allowed: \"postgres://user@host"), "{text}");
    assert!(text.contains("broker.url is not set; allowed: \"amqp://user@host"), "{text}");
}

#[test]
fn routes_make_their_exchanges_known() {
    let more = "[[exchange]]\nname = 'log'\nkind = 'fanout'\n\
                [[route]]\nname = 'a'\noutbox = {aggregate_type = '*'}\nexchange = 'log'\n\
                [[route]]\nname = 'b'\noutbox = {aggregate_type = 'x'}\nexchange = 'events'\n";
    let config = config(&format!("{LEAST}{more}")).unwrap();
    let list = config.topology.exchanges.iter();
    let list: Vec<_> = list.map(|e| (e.name.as_str(), e.kind.as_str())).collect();
    assert_eq!(list, [("log", "fanout"), ("events", "topic")]);
}

#[test]
fn weak_transport_is_warned_about() {
    let text = "source.url = 'postgres://r@db/shop?sslmode=require'\nbroker.url = 'amqp://r:x@mq'";
    let warnings = config(text).unwrap().warnings;
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    let text = text.replace("amqp:", "amqps:") + "\nbroker.management_url = 'http://mq:15672'";
    let warnings = config(&text).unwrap().warnings;
    assert!(warnings[1].contains("sends a password in plain text to mq"), "{warnings:?}");
}
