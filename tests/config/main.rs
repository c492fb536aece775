//! The configuration: the reference file against the code, and the text of every mistake.

use std::collections::BTreeSet;

use toml::{Table, Value};
use watership::config::Config;

mod formats;
mod outbox;
mod polling;
mod secrets;
mod topology;

const REFERENCE: &str = include_str!("../../config/watership.toml");

/// The smallest file that is right.
const LEAST: &str = "source.url = 'postgres://relay@127.0.0.1/shop'\n\
                     broker.url = 'amqp://relay:x@127.0.0.1'\n";

/// Keys of the reference that have no default, or are examples of a name.
const WITHOUT_DEFAULT: &[&str] = &[
    "source.url",
    "broker.url",
    "route.name",
    "route.outbox.aggregate_type",
    "route.exchange",
    "exchange.name",
    "queue.name",
    "binding.queue",
    "binding.exchange",
    "binding.routing_key",
    "route.contract",
    "route.contracts",
];

fn config(text: &str) -> Result<Config, String> {
    Config::parse("w.toml", text, &|_| None).map_err(|e| e.to_string())
}

fn problem(more: &str) -> String {
    config(&format!("{LEAST}{more}")).err().unwrap_or_else(|| panic!("{more} is accepted"))
}

/// The reference with its examples, which are the lines that begin with `#` and no space.
fn reference_with_examples() -> String {
    let uncomment = |line: &'static str| match line.strip_prefix('#') {
        Some(rest) if !rest.starts_with(' ') => rest,
        _ => line,
    };
    let contract = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/config/contract.json");
    let text = REFERENCE.lines().map(uncomment).collect::<Vec<_>>().join("\n");
    text.replace("contracts/order.json", contract).replace("contracts/order-placed.json", contract)
}

/// The table at `path` in `root`, such as `route.outbox`; of a list its first.
fn table_at<'t>(root: &'t mut Table, path: &str) -> &'t mut Table {
    let mut table = root;
    for name in path.split('.').filter(|name| !name.is_empty()) {
        table = match table.get_mut(name).expect("it is in the reference") {
            Value::Table(table) => table,
            Value::Array(list) => list[0].as_table_mut().expect("a list of tables"),
            other => panic!("{path} is {other}"),
        };
    }
    table
}

/// Tables whose keys are free.
const FREE: [&str; 8] = [
    ".arguments",
    ".contracts",
    ".headers",
    ".mask",
    ".rename",
    ".set",
    ".map.default",
    "outbox.headers_from",
];

/// The paths of all tables below `table`, and of the keys in each.
fn collect(table: &Table, path: &str, found: &mut Vec<(String, Vec<String>)>) {
    found.push((path.to_owned(), table.keys().cloned().collect()));
    for (name, value) in table {
        let below = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        match value {
            // What is in it is the user's own.
            Value::Table(_) if FREE.iter().any(|free| below.ends_with(free)) => {}
            Value::Table(table) => collect(table, &below, found),
            Value::Array(list) => list
                .first()
                .and_then(Value::as_table)
                .iter()
                .for_each(|t| collect(t, &below, found)),
            _ => {}
        }
    }
}

/// Each key of the reference that has a value: the path of its table, and its name.
fn keys_with_values(reference: &Table) -> Vec<(String, String)> {
    let mut tables = Vec::new();
    collect(reference, "", &mut tables);
    let all: BTreeSet<String> = tables.iter().map(|(path, _)| path.clone()).collect();
    let mut keys = Vec::new();
    for (path, names) in tables {
        for name in names {
            if !all.contains(join(&path, &name).as_str()) {
                keys.push((path.clone(), name));
            }
        }
    }
    keys
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

fn debug(table: &Table) -> Result<String, String> {
    config(&toml::to_string(table).expect("a table is TOML")).map(|config| format!("{config:?}"))
}

#[test]
fn reference_shows_every_key_that_the_code_reads() {
    let reference: Table = reference_with_examples().parse().unwrap();
    let mut tables = Vec::new();
    collect(&reference, "", &mut tables);
    assert!(tables.len() >= 12, "{tables:?}");
    for (path, shown) in tables {
        let mut with_typo = reference.clone();
        let typo = "a_key_that_is_like_no_other".to_owned();
        table_at(&mut with_typo, &path).insert(typo, Value::Integer(1));
        // The hint of an unknown key lists the known ones, in the order in which they are read.
        let text = toml::to_string(&with_typo).unwrap();
        let error = Config::parse("w.toml", &text, &|_| None).expect_err("the key is unknown");
        let told = format!("{error:?}");
        let known = told.split_once("known keys here: ").unwrap_or_else(|| panic!("{told}")).1;
        let known: BTreeSet<&str> = known.trim_end_matches(')').split(", ").collect();
        assert_eq!(shown.iter().map(String::as_str).collect::<BTreeSet<_>>(), known, "[{path}]");
    }
}

#[test]
fn reference_shows_every_key_at_its_default() {
    let reference: Table = reference_with_examples().parse().unwrap();
    let whole = debug(&reference).unwrap();
    let mut compared = 0;
    for (path, name) in keys_with_values(&reference) {
        let key = join(&path, &name);
        if !WITHOUT_DEFAULT.contains(&&*key) {
            let mut without = reference.clone();
            table_at(&mut without, &path).remove(&name);
            assert_eq!(debug(&without).as_ref(), Ok(&whole), "{key} is not at its default");
            compared += 1;
        }
    }
    assert!(compared >= 40, "only {compared} keys");
}

#[test]
fn no_key_of_the_reference_is_without_effect() {
    let reference: Table = reference_with_examples().parse().unwrap();
    let whole = debug(&reference).unwrap();
    for (path, name) in keys_with_values(&reference) {
        let key = join(&path, &name);
        let mut changed = reference.clone();
        let table = table_at(&mut changed, &path);
        let other = match &table[&name] {
            Value::String(_) => Value::String("no such \u{1} thing".into()),
            Value::Boolean(yes) => Value::Boolean(!yes),
            Value::Integer(number) => Value::Integer(number + 1),
            Value::Array(_) => Value::Array(vec![Value::String("a.b".into())]),
            Value::Table(_) => {
                Value::Table([("x".into(), Value::Integer(1))].into_iter().collect())
            }
            other => panic!("{key} is {other}"),
        };
        table.insert(name, other);
        // The first only allows something, the second is never shown: tested below.
        if !["admin.allow_remote", "broker.password"].contains(&&*key) {
            assert_ne!(debug(&changed).as_ref(), Ok(&whole), "{key} changes nothing");
        }
    }
}

#[test]
fn reference_is_a_valid_configuration_with_and_without_its_examples() {
    let plain = config(REFERENCE).unwrap();
    assert_eq!(plain.relay.rules.len(), 2, "the default rules");
    let full = config(&reference_with_examples()).unwrap();
    assert_eq!(full.relay.rules.len(), 1);
    assert_eq!(full.relay.topology.exchanges.len(), 1);
    assert_eq!(full.relay.topology.queues.len(), 1);
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
fn all_problems_are_reported_at_once_in_the_order_of_the_file() {
    let text = problem(
        "relay.checkpoint_interval = '100'\nsource.mode = 'pull'\nname = 'A B'\n\
         source.slott = 'x'\nsource.password = '${NOT_SET}'\n",
    );
    let lines: Vec<&str> = text.lines().collect();
    let starts = [
        "w.toml has 5 problems:",
        "  - line 3: relay.checkpoint_interval = \"100\" is invalid; expected 1ms to 1m, written",
        "  - line 4: source.mode = \"pull\" is invalid; expected \"wal\", \"poll\"",
        "  - line 5: name = \"A B\" is invalid; expected 1 to 63 characters",
        "  - line 6: unknown key \"slott\" (did you mean \"slot\"?)",
        "  - line 7: source.password: environment variable NOT_SET is not set (set it, or give",
    ];
    assert_eq!(lines.len(), starts.len(), "{text}");
    lines.iter().zip(starts).for_each(|(line, start)| assert!(line.starts_with(start), "{text}"));
}

#[test]
fn each_mistake_is_named_with_what_is_expected() {
    for (more, part) in [
        ("name = ''", "w.toml:3:8: name = \"\" is invalid; expected 1 to 63 characters from a"),
        ("source.mode = 'pull'", "source.mode = \"pull\" is invalid; expected \"wal\""),
        ("source.slot = 'My-Slot'", "source.slot = \"My-Slot\" is invalid"),
        ("source.tables = ['customers']", "has \"customers\"; expected \"schema.table\""),
        ("source.tables = ['watership.outbox']", "a table outside the relay's own schema"),
        ("source.tables = ['a.b', 'a.b']", "source.tables has \"a.b\"; expected each table once"),
        ("source.url = 'postgres://a@h/x'", "w.toml:3:8: duplicate key"),
        ("broker.auth = 'external'", "needs broker.tls_cert and broker.tls_key"),
        ("broker.tls_cert = '/x'", "belong together"),
        ("broker.password = 'y'", "expected a user and no password in broker.url"),
        ("broker.heartbeat = '1500ms'", "= \"1500ms\" is invalid; expected whole seconds"),
        ("broker.confirm_timeout = '10s'", "= \"10s\" is invalid; expected more than twice broker"),
        ("broker.heartbeat = '20s'", "= \"30s\" is invalid; expected more than twice broker.heart"),
        ("broker.max_message_size = '1TB'", "expected 1B to 512MiB, written as a number with B"),
        ("broker.management_url = 'h:15672'", "management URL ***: no scheme"),
        ("broker.management_url = 'ftp://h'", "scheme is neither http nor https"),
        ("broker.management_url = 'http://'", "no host"),
        ("broker.management_url = 'http://h:abc'", "broker.management_url: "),
        ("broker.management_url = 'http://h/rabbit?x'", "may follow the path"),
        ("broker.management_url = 'http://::1'", "is written in brackets"),
        ("relay.max_unconfirmed = 0", "max_unconfirmed = 0 is invalid; expected 1 to 1048576"),
        ("relay.max_unconfirmed = -1", "max_unconfirmed = -1 is invalid; expected 1 to 1048576"),
        ("relay.max_unconfirmed = 99999999999999999999", "999 is invalid; expected 1 to 1048576"),
        ("relay.canary_interval = '1ms'", "= \"1ms\" is invalid; expected \"0s\", or 1s to 1h"),
        ("outbox.retain = '1 week'", "outbox.retain = \"1 week\" is invalid; expected 0s to 365d"),
        ("admin.listen = '9465'", "such as \"127.0.0.1:9465\""),
        ("admin.listen = '0.0.0.0:9465'", "can be reached from other machines"),
        ("log.level = 'loud'", "log.level = \"loud\" is invalid; expected \"info\""),
        ("[[exchange]]\nname = 'x'\nkind = 'topics'", "5:8: exchange[0].kind = \"topics\" is inv"),
        ("[[queue]]\nname = ''", "queue[0].name = \"\" is invalid; expected 1 to 255 bytes"),
        ("[[queue]]\nname = 'q'\ntype = 'fast'", "queue[0].type = \"fast\""),
        (
            "[[queue]]\nname = 'q'\narguments = {x = [1]}",
            "queue[0].arguments.x is a list; expected",
        ),
        ("[[queue]]\nname = 'q'\narguments = {x-queue-type = 'x'}", "its key \"type\""),
        ("[[binding]]\nexchange = 'e'", "set queue or to_exchange"),
        (
            "[[route]]\nname = 'r'\noutbox.aggregate_type = '*'\nexchange = '{schema}.events'",
            "exchange = \"{schema}.events\": an exchange with fields needs exchanges, the list",
        ),
        (
            "[[binding]]\nexchange = 'e'\nqueue = 'q'\nto_exchange = 'f'",
            "set queue or to_exchange, not both",
        ),
        (
            "[[exchange]]\nname = 'e'\nkind = 'headers'\n\
             [[binding]]\nexchange = 'e'\nqueue = 'q'",
            "routes by headers, and a binding without any gets every message",
        ),
        (
            "[[exchange]]\nname = 'e'\nkind = 'headers'\n\
             [[binding]]\nexchange = 'e'\nqueue = 'q'\narguments = {x-match = 'any'}",
            "add the headers to compare",
        ),
        ("[[exchange]]\nname = 'e'\narguments = {x = 1.5}", "a string, a whole number"),
        ("[[exchange]]\nname = 'e'\nkind = 'x-delayed-message'", "x-delayed-type"),
        ("[[binding]]\nqueue = 'q'", "w.toml:3:1: binding[0].exchange = \"\""),
        ("[[queue]]\nname = 'q'\n[[queue]]\nname = 'q'", "6:8: queue \"q\" is listed twice"),
        ("[[exchange]]\nname = 'e'\n[[exchange]]\nname = 'e'", "exchange \"e\" is listed twice"),
    ] {
        let text = problem(more);
        assert!(text.contains(part), "{more}\n{text}");
    }
    config(&format!("{LEAST}admin.listen = '0.0.0.0:9465'\nadmin.allow_remote = true")).unwrap();
}

#[test]
fn each_mistake_in_routes_is_named() {
    let route = |rest: &str| format!("[[route]]\nname = 'r'\n{rest}");
    for (more, part) in [
        (
            route("exchange = 'x'"),
            "w.toml:3:1: route \"r\": selects nothing; expected outbox = { aggregate_type",
        ),
        (route("table = 'a.b'\noutbox = {aggregate_type = 'o'}"), "split it in two"),
        (route("table = '*'"), "w.toml:3:1: route \"r\": exchange = \"\" is invalid"),
        (
            route("table = '*'\nexchange = 'x'\ndrop = true"),
            "route \"r\": drop = true ignores exchange; remove one or the other",
        ),
        (
            route("table = '*'\ndrop = true\nordering = 'pipelined'\nkey = ['a']"),
            "drop = true ignores key, ordering; remove",
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

const PARTITIONS: &str = "[[route]]\nname = 'r'\noutbox = {aggregate_type = '*'}\n\
                          partitions = 3\nqueue = 'orders'\n";

#[test]
fn each_mistake_in_partitions_is_named() {
    let route = "[[route]]\nname = 'r'\noutbox = {aggregate_type = '*'}\n";
    for (more, part) in [
        (
            format!("{route}exchange = 'x'\nqueue = 'orders'\ndelivery_limit = 50"),
            "route \"r\": partitions is not set, and queue, delivery_limit would have no effect",
        ),
        (
            format!("{route}exchange = 'x'\narguments = {{ x = 1 }}"),
            "arguments would have no effect",
        ),
        (format!("{route}partitions = 3"), "queue = \"\" is invalid; expected 1 to 250 bytes"),
        (format!("{route}partitions = 3\nqueue = 'a.*'"), "without \"*\" and \"#\""),
        (format!("{route}partitions = 101\nqueue = 'q'"), "= 101 is invalid; expected 0 to 100"),
        (
            format!("{PARTITIONS}routing_key = 'a'"),
            "with partitions the routing key is the name of the key's queue; remove it",
        ),
        (
            format!("{PARTITIONS}arguments = {{ x-overflow = 'drop-head' }}"),
            "arguments.x-overflow: the relay sets it itself for partitions",
        ),
        (
            format!("{PARTITIONS}[[exchange]]\nname = 'orders'\nkind = 'fanout'"),
            "exchange \"orders\" routes as \"fanout\", and partitions need one that routes by",
        ),
        (
            format!("{PARTITIONS}[[queue]]\nname = 'orders.02'"),
            "queue \"orders.02\" is a partition of a route; do not list it",
        ),
        (
            format!("{PARTITIONS}{}", PARTITIONS.replace("'r'", "'s'").replace('3', "4")),
            "two routes have partitions of queue \"orders\" and disagree about them",
        ),
        (format!("{PARTITIONS}drop = true"), "drop = true ignores partitions, queue; remove one"),
    ] {
        let text = problem(&more);
        assert!(text.contains(part), "{more}\n{text}");
    }
}

#[test]
fn partitions_come_with_their_queues_bindings_and_dead_letters() {
    let topology = |more: &str| config(&format!("{LEAST}{more}")).unwrap().relay.topology;
    let made = topology(PARTITIONS);
    let queues: Vec<&str> = made.queues.iter().map(|queue| &*queue.name).collect();
    assert_eq!(queues, ["orders.dead", "orders.00", "orders.01", "orders.02"]);
    let exchanges: Vec<_> = made.exchanges.iter().map(|e| (&*e.name, &*e.kind)).collect();
    assert_eq!(exchanges, [("orders", "direct"), ("orders.dlx", "fanout")]);
    let bindings: Vec<String> = made.bindings.iter().map(ToString::to_string).collect();
    let to = |to, key| format!("to exchange {to:?} with routing key {key:?}");
    assert_eq!(bindings[1], format!("queue \"orders.01\" {}", to("orders", "orders.01")));
    assert_eq!(bindings[3], format!("queue \"orders.dead\" {}", to("orders.dlx", "#")));
    assert_eq!(bindings.len(), 4);
    // A second route may share them, and what is listed is declared as it is listed.
    let listed = "[[exchange]]\nname = 'orders.dlx'\nkind = 'direct'\n\
                  [[queue]]\nname = 'orders.dead'\ntype = 'classic'\n";
    let shared = PARTITIONS.replace("'r'", "'s'").replace("'*'", "'order'");
    let made = topology(&format!("{PARTITIONS}{shared}{listed}"));
    assert_eq!((made.queues.len(), made.exchanges.len(), made.bindings.len()), (4, 2, 6));
    // Another route of the exchange may need patterns.
    let patterns = "[[route]]\nname = 'p'\noutbox = {aggregate_type = '*'}\nexchange = 'orders'\n";
    assert_eq!(topology(&format!("{PARTITIONS}{patterns}")).exchanges[0].kind, "topic");
}

#[test]
fn a_broken_file_is_reported_with_its_place() {
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
fn an_unknown_key_is_shown_without_its_value_and_with_the_nearest_name() {
    let text = format!("{LEAST}[relay]\nchekpoint_interval = \"1s\"\n");
    let error = Config::parse("w.toml", &text, &|_| None).expect_err("the key is unknown");
    let told = "w.toml:4:1: unknown key \"chekpoint_interval\"\n  |\n\
                4 | chekpoint_interval = ***\n  | ^^^^^^^^^^^^^^^^^^";
    assert_eq!(error.to_string(), told);
    assert!(format!("{error:?}").ends_with("(hint: did you mean \"checkpoint_interval\"?)"));
}

#[test]
fn a_value_of_the_wrong_type_is_reported_with_what_to_write() {
    for (more, expected) in [
        (
            "[route]\nname = 'r'",
            "3:1: route is a table; expected a list of tables: write [[route]] for each",
        ),
        ("[[log]]\nlevel = 'info'", "log is a list; expected a table, written [log], once, with"),
        (
            "[[route]]\nname = 'r'\nexchange = 'x'\ntable = '*'\noutbox = 'order'",
            "such as { aggregate_type = \"order\" }",
        ),
        ("log = 'info'", "3:7: log is a string; expected a table, written [log], once, with its"),
        ("source.tables = 'a.b'", "source.tables is a string; expected a list of \"schema.table\""),
        ("source.tables = [7]", "source.tables[0] is an integer; expected \"schema.table\""),
        ("relay.max_unconfirmed = '7'", "is a string; expected a whole number, without quotes"),
        ("relay.drain_timeout = 10", "is an integer; expected a duration in quotes, such as \"3"),
        ("relay.max_window_bytes = 10", "is an integer; expected a size in quotes, such as \"16"),
        ("source.binary = 'no'", "source.binary is a string; expected true or false, without"),
    ] {
        let text = problem(more);
        assert!(text.contains(expected), "{more}\n{text}");
    }
}

#[test]
fn parameters_of_a_broker_url_are_checked_as_the_keys_are() {
    for (url, part) in [
        ("'amqp://r@h/x?heartbeat=60'", "more than twice its heartbeat"),
        ("'amqp://r@h/x?auth_mechanism=external'", "needs amqps://"),
        ("'amqps://r@h/x?auth_mechanism=external'", "needs broker.tls_cert and broker.tls_key"),
        ("['amqp://r@a/x', 'amqp://r@b/y']", "must use one vhost; found \"x\" and \"y\""),
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
    assert!(text.contains("source.url is not set; expected \"postgres://user@host"), "{text}");
    assert!(text.contains("broker.url is not set; expected \"amqp://user@host"), "{text}");
}

#[test]
fn routes_make_their_exchanges_known() {
    let more = "[[exchange]]\nname = 'log'\nkind = 'fanout'\n\
                [[route]]\nname = 'a'\noutbox = {aggregate_type = '*'}\nexchange = 'log'\n\
                [[route]]\nname = 'b'\noutbox = {aggregate_type = 'x'}\nexchange = 'events'\n";
    let config = config(&format!("{LEAST}{more}")).unwrap();
    let list = config.relay.topology.exchanges.iter();
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

#[test]
fn a_captured_table_may_say_what_its_loss_means() {
    let tables = "source.tables = [\"public.a\", \
                  { name = \"public.b\", on_table_lost = \"hold\" }, \
                  { name = \"public.c\", on_table_lost = \"stop\" }, { name = \"public.d\" }]\n";
    let listed = "[[source.tables]]\nname = \"public.b\"\non_table_lost = \"hold\"\n";
    for (text, count) in [(tables, 4), (listed, 1)] {
        let relay = config(&format!("{LEAST}{text}")).unwrap_or_else(|e| panic!("{e}")).relay;
        assert_eq!(relay.tables.len(), count);
        let held: Vec<String> = relay.held.iter().map(ToString::to_string).collect();
        assert_eq!(held, ["public.b"]);
    }
    for (text, expected) in [
        ("[{ name = \"public.a\", on_table_lost = \"park\" }]", "on_table_lost = \"park\""),
        ("[{ name = \"public.a\", on_lost = \"hold\" }]", "unknown key \"on_lost\""),
        ("[{ on_table_lost = \"hold\" }]", "source.tables has \"\"; expected \"schema.table\""),
        ("[1]", "source.tables[0] is an integer; expected \"schema.table\" or { name"),
        ("\"public.a\"", "source.tables is a string; expected a list of"),
        ("[\"public.a\", { name = \"public.a\" }]", "expected each table once"),
    ] {
        let problem = problem(&format!("source.tables = {text}\n"));
        assert!(problem.contains(expected), "{problem}");
    }
}

#[test]
fn a_captured_table_may_ask_for_a_snapshot() {
    let tables = "source.tables = [\"public.a\", { name = \"public.b\", snapshot = \"initial\" }, \
                  { name = \"public.c\", snapshot = \"never\" }]\n";
    let relay = config(&format!("{LEAST}{tables}")).unwrap_or_else(|e| panic!("{e}")).relay;
    let initial: Vec<String> = relay.backfill.initial.iter().map(ToString::to_string).collect();
    assert_eq!((relay.tables.len(), initial), (3, vec!["public.b".to_owned()]));
    let wrong = "source.tables = [{ name = \"public.a\", snapshot = \"always\" }]\n";
    assert!(problem(wrong).contains("snapshot = \"always\""), "{}", problem(wrong));
    let wrong = "backfill.chunk_rows = 0\n";
    assert!(problem(wrong).contains("backfill.chunk_rows"), "{}", problem(wrong));
}

#[test]
fn certificates_beside_a_url_without_tls_are_a_mistake() {
    let expected = "broker.tls_ca is set, but broker.url is amqp://, which is plain text";
    assert!(problem("broker.tls_ca = '/ca.pem'\n").contains(expected));
    let secure = LEAST.replace("amqp://", "amqps://");
    config(&format!("{secure}broker.tls_ca = '/ca.pem'\n")).unwrap();
    // They are for the management API, too.
    let management = "broker.management_url = 'https://127.0.0.1:15671'\n";
    let problem = config(&format!("{LEAST}broker.tls_ca = '/ca.pem'\n{management}")).err();
    assert!(!problem.is_some_and(|text| text.contains(expected)));
}
