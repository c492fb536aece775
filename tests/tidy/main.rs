//! Reads the repository and holds it against the rules of the house: one test for each rule.
//!
//! Every rule is also tried on a made-up file that breaks it, because a check that cannot fail
//! proves nothing.

mod clocks;
mod code;
mod documents;
mod english;
mod layers;
mod names;
mod paths;
mod planted;
mod shape;
mod unused;

use code::{Code, repository};
use layers::Home;
use shape::Exception;
use unused::Kept;

/// Where tests may break a rule.
const EXCEPTIONS: &[Exception] = &[
    Exception {
        path: "tests/simulation",
        words: "sleep",
        why: "its clock is paused: a sleep there is simulated time",
    },
    Exception {
        path: "tests/support/proxy.rs",
        words: "sleep",
        why: "what its delays do is the fault",
    },
    Exception {
        path: "tests/support/waiting.rs",
        words: "sleep",
        why: "the grain of every wait, which ends on what it sees",
    },
    Exception { path: "tests/soak", words: "sleep", why: "a fault lasts as long as its seed says" },
    Exception { path: "tests/consumers", words: "sleep", why: "a kill comes when its seed says" },
    Exception {
        path: "tests/it/dev.rs",
        words: "#[ignore",
        why: "the process that another test starts and kills",
    },
];

/// What may stay although only tests use it.
const KEPT: &[Kept] = &[];

type Rule = fn(&[Code]) -> Vec<String>;

/// Fails with the list of what `rule` found in the repository.
fn holds(rule: Rule) {
    report(&rule(&repository()));
}

fn at_home(home: &Home) {
    report(&layers::homes(&repository(), home));
}

fn report(found: &[String]) {
    assert!(found.is_empty(), "{} found:\n{}", found.len(), found.join("\n"));
}

/// Each of the made-up files must be found out, at the line given with it (0: no line).
fn finds(rule: impl Fn(&[Code]) -> Vec<String>, cases: &[(&str, &str, usize)]) {
    for (path, text, line) in cases {
        let found = rule(&[Code::new(path, text)]);
        assert_eq!(found.len(), 1, "{path}: {text:?} gave {found:?}");
        let place = if *line == 0 { (*path).to_owned() } else { format!("{path}:{line}:") };
        assert!(found[0].contains(&place), "{:?} does not name {place}", found[0]);
    }
}

/// None of the made-up files may be found fault with.
fn accepts(rule: impl Fn(&[Code]) -> Vec<String>, cases: &[(&str, &str)]) {
    for (path, text) in cases {
        let found = rule(&[Code::new(path, text)]);
        assert!(found.is_empty(), "{path}: {text:?} gave {found:?}");
    }
}

#[test]
fn imports_follow_the_layers() {
    holds(layers::layers);
    finds(
        layers::layers,
        &[
            ("src/amqp/publisher.rs", "//!\nuse crate::source::Batch;", 2),
            ("src/source/wal.rs", "use crate::amqp::Publisher;", 1),
            ("src/pg/wire.rs", "use crate::{error::Result, event::Event};", 1),
            ("src/pg/wire.rs", "use crate::{\n    error::{Error, Result},\n    config,\n};", 1),
            ("src/relay/mod.rs", "fn f(c: &crate::config::Config) {}", 1),
            ("src/relay/mod.rs", "use crate::dev;", 1),
            ("src/error.rs", "use crate::pg::wire;", 1),
            ("src/route.rs", "\n\nuse crate::envelope;", 3),
            ("src/outbox.rs", "use crate::amqp;", 1),
            ("src/inbox/work.rs", "use crate::relay;", 1),
            ("src/relay/mod.rs", "use crate::inbox::sqlx::claim;\nuse crate::cli;", 2),
            ("src/source/mod.rs", "use crate::Publisher;", 1),
            ("src/source/a/b.rs", "use super::super::super::amqp;", 1),
            ("src/main.rs", "use watership::relay;", 1),
            ("src/wonder.rs", "", 0),
        ],
    );
    accepts(
        layers::layers,
        &[
            ("src/lib.rs", "pub use crate::relay::Relay;"),
            ("src/relay/mod.rs", "use crate::{amqp::publisher, source::{self, Batch as B}};"),
            ("src/pg/wire.rs", "// crate::config\nconst T: &str = \"crate::config::X\";"),
            ("src/pg/wire.rs", "#[cfg(test)]\nmod tests { use crate::dev; }"),
            ("src/cli/demo.rs", "use crate::dev::Postgres;"),
        ],
    );
}

#[test]
fn lapin_stays_out_of_the_hot_path() {
    at_home(&layers::LAPIN);
    let rule = |files: &[Code]| layers::homes(files, &layers::LAPIN);
    finds(rule, &[("src/amqp/publisher.rs", "\nuse lapin::Channel;", 2)]);
    accepts(rule, &[("src/amqp/topology.rs", "use lapin::Channel;"), ("src/x.rs", "// lapin")]);
}

#[test]
fn clap_stays_in_the_cli() {
    at_home(&layers::CLAP);
    let rule = |files: &[Code]| layers::homes(files, &layers::CLAP);
    finds(rule, &[("src/config/mod.rs", "use clap::Parser;", 1)]);
    accepts(rule, &[("src/cli/run.rs", "use clap::Parser;")]);
}

#[test]
fn only_the_cli_prints() {
    at_home(&layers::PRINTING);
    let rule = |files: &[Code]| layers::homes(files, &layers::PRINTING);
    finds(
        rule,
        &[
            ("src/relay/mod.rs", "fn f() { println!(\"x\"); }", 1),
            ("src/dev.rs", "fn f() {\n eprintln!(\"x\"); }", 2),
        ],
    );
    accepts(rule, &[("src/cli/status.rs", "fn f() { println!(\"x\"); }")]);
}

#[test]
fn only_config_load_reads_the_environment() {
    holds(layers::environment);
    finds(
        layers::environment,
        &[
            ("src/pg/connect.rs", "fn f() { std::env::var(\"X\"); }", 1),
            ("src/pg/connect.rs", "use std::{env, fs};", 1),
            ("src/config/mod.rs", "use std::env;", 1),
        ],
    );
    accepts(
        layers::environment,
        &[
            ("src/config/load.rs", "use std::env;\nfn f() { env::var(\"X\"); }"),
            ("src/cli/demo.rs", "fn f() { std::env::current_exe(); }"),
            ("src/cli/run.rs", "const V: &str = env!(\"CARGO_PKG_VERSION\");"),
        ],
    );
}

#[test]
fn only_main_ends_the_process() {
    at_home(&layers::EXIT);
    let rule = |files: &[Code]| layers::homes(files, &layers::EXIT);
    finds(rule, &[("src/cli/run.rs", "fn f() { std::process::exit(1); }", 1)]);
    accepts(rule, &[("src/main.rs", "fn f() { std::process::exit(1); }")]);
}

#[test]
fn tokio_postgres_stays_where_sql_is() {
    at_home(&layers::TOKIO_POSTGRES);
    let rule = |files: &[Code]| layers::homes(files, &layers::TOKIO_POSTGRES);
    finds(rule, &[("src/relay/mod.rs", "use tokio_postgres::Client;", 1)]);
    accepts(rule, &[("src/relay/checkpoint.rs", "use tokio_postgres::Client;")]);
}

#[test]
fn statements_on_our_own_tables_live_in_sql_files() {
    holds(layers::inline_sql);
    finds(
        layers::inline_sql,
        &[
            ("src/pg/migrate.rs", "\nconst SQL: &str = \"UPDATE watership.outbox SET a = 1\";", 2),
            ("src/cli/init.rs", "const A: &str = \"SELECT 1 from\\\n  watership.outbox\";", 2),
        ],
    );
    accepts(
        layers::inline_sql,
        &[
            ("src/pg/slot.rs", "const A: &str = \"SELECT 1 FROM pg_catalog.pg_class\";"),
            (
                "src/outbox.rs",
                "// From watership.outbox\nconst A: &str = \"SELECT watership.emit()\";",
            ),
            (
                "src/cli/init.rs",
                "const A: &str = include_str!(\"../../sql/query/outbox_count.sql\");",
            ),
            (
                "src/a.rs",
                "#[cfg(test)]\nmod tests { const A: &str = \"SELECT FROM watership.a\"; }",
            ),
        ],
    );
}

#[test]
fn pure_files_hold_no_async_no_clock_no_chance() {
    assert!(layers::pure_files_seen(&repository()) >= 3, "the list of pure files fits no more");
    holds(layers::impurities);
    finds(
        layers::impurities,
        &[
            ("src/route.rs", "async fn f() {}", 1),
            ("src/relay/window/lanes.rs", "fn f() {\n let now = Instant::now(); }", 2),
            ("src/pg/pgoutput.rs", "fn f() { std::time::SystemTime::UNIX_EPOCH; }", 1),
            ("src/pg/pgoutput/tuple.rs", "fn f() { x.await; }", 1),
            ("src/backoff.rs", "fn f() { rand::random(); }", 1),
        ],
    );
    accepts(
        layers::impurities,
        &[
            ("src/publisher.rs", "trait P { fn next(&mut self) -> impl Future<Output = ()>; }"),
            ("src/backoff.rs", "fn f(random: f64) {}"),
            ("src/event.rs", "#[cfg(test)]\nmod tests { fn f() { Instant::now(); } }"),
            ("src/relay/mod.rs", "async fn run() {}"),
        ],
    );
}

#[test]
fn functions_end_within_70_lines() {
    holds(shape::long_functions);
    let long = format!("fn long() {{{}}}", "\n".repeat(70));
    let with_brace_in_text = format!("\nfn text() {{ \"}}\"; '}}';{}}}", "\n".repeat(70));
    finds(shape::long_functions, &[("src/a.rs", &long, 1), ("tests/a.rs", &with_brace_in_text, 2)]);
    let wall = format!("fn wall() -> [u8; 2] {{{}}}\ntype F = fn();", "\n".repeat(69));
    let declared = format!("trait T {{ fn f();{} }}", "\n".repeat(90));
    let hidden = format!("// fn a() {{{}\n", "\n".repeat(90));
    accepts(shape::long_functions, &[("src/a.rs", &wall), ("a.rs", &declared), ("a.rs", &hidden)]);
}

#[test]
fn files_end_within_550_lines() {
    holds(shape::long_files);
    let (long, wall) = ("\n".repeat(551), "\n".repeat(550));
    finds(shape::long_files, &[("src/a.rs", &long, 0), ("sql/0001_a.sql", &long, 0)]);
    accepts(shape::long_files, &[("src/a.rs", &wall), ("README.md", &long)]);
}

#[test]
fn lines_end_within_100_characters() {
    holds(shape::long_lines);
    let long = format!("\n// {}", "ä".repeat(98));
    let script = format!("#!/usr/bin/env bash\necho {}", "x".repeat(100));
    finds(shape::long_lines, &[("src/a.rs", &long, 2), ("check", &script, 2)]);
    accepts(shape::long_lines, &[("src/a.rs", &long[..long.len() - 2]), ("a.md", &long)]);
}

#[test]
fn what_a_database_gets_is_ascii() {
    holds(shape::foreign_characters);
    finds(
        shape::foreign_characters,
        &[
            ("sql/0009_more.sql", "\n-- schön", 2),
            ("src/message.rs", "fn f() {\n    g(\"…\");\n}", 2),
        ],
    );
    accepts(
        shape::foreign_characters,
        &[
            ("src/message.rs", "/// …\nfn f() {}"),
            ("src/message.rs", "#[cfg(test)]\nmod tests {\n    const A: &str = \"…\";\n}"),
            ("src/cli/init.rs", "const A: &str = \"…\";"),
        ],
    );
}

#[test]
fn names_say_something() {
    holds(shape::empty_names);
    finds(
        shape::empty_names,
        &[
            ("src/utils.rs", "", 0),
            ("src/common/parse.rs", "", 0),
            ("tests/it/helpers.rs", "", 0),
            ("src/a.rs", "mod types {}", 1),
        ],
    );
    accepts(shape::empty_names, &[("src/pg/mod.rs", "mod slot; // mod utils")]);
}

#[test]
fn nothing_is_left_over() {
    let rule = |files: &[Code]| shape::left_overs(files, EXCEPTIONS);
    report(&rule(&repository()));
    finds(
        rule,
        &[
            ("src/a.rs", "fn f() { todo!() }", 1),
            ("src/a.rs", "fn f() { unimplemented!() }", 1),
            ("src/a.rs", "\nfn f() { dbg!(1); }", 2),
            ("tests/a.rs", "#[test]\n#[ignore = \"slow\"]\nfn f() {}", 2),
            ("tests/it/dev.rs", "fn f() { todo!() }", 1),
        ],
    );
    accepts(rule, &[("src/a.rs", "// todo!\nconst A: &str = \"dbg!(1)\";")]);
}

#[test]
fn tests_wait_on_progress_and_never_sleep() {
    let rule = |files: &[Code]| layers::sleeps(files, EXCEPTIONS);
    report(&rule(&repository()));
    finds(
        rule,
        &[
            ("tests/it/slot.rs", "async fn f() { tokio::time::sleep(D).await; }", 1),
            ("src/a.rs", "#[cfg(test)]\nmod tests {\n fn f() { thread::sleep(D); }\n}", 3),
            ("tests/it/a.rs", "fn f() { loop { sleep(Duration::from_millis(20)); } }", 1),
            ("tests/it/a.rs", "fn deadline() {}\nfn f() { loop { sleep(POLL); } }", 2),
            (
                "tests/it/a.rs",
                "fn f() { while now < deadline { sleep(Duration::from_millis(500)); } }",
                1,
            ),
            ("tests/it/slot.rs", "use tokio::time::sleep;\nasync fn f() { sleep(D).await; }", 2),
        ],
    );
    accepts(
        rule,
        &[
            ("src/relay/supervisor.rs", "async fn f() { tokio::time::sleep(D).await; }"),
            ("tests/simulation.rs", "async fn f() { tokio::time::sleep(D).await; }"),
            ("tests/it/a.rs", "fn f() { while go { assert!(now < deadline); sleep(POLL); } }"),
            ("tests/it/slow.rs", "// sleep()\nfn f() { sleeper(); }"),
        ],
    );
}

#[test]
fn every_exception_has_a_reason_and_is_needed() {
    for exception in EXCEPTIONS {
        let files = repository();
        let mut there = files.iter().filter(|f| f.path.starts_with(exception.path));
        // The simulation may do without.
        let needed = there.any(|f| f.masked.contains(exception.words));
        assert!(needed || exception.words == "sleep", "{} needs no exception", exception.path);
        assert!(!exception.why.is_empty());
    }
    let all = unused::unused(&repository(), &[]);
    for Kept { path, name, why } in KEPT {
        let needed = all.iter().any(|f| f.starts_with(path) && f.ends_with(&format!(" {name}")));
        assert!(needed && !why.is_empty(), "{name} of {path} needs no exception");
    }
}

#[test]
fn migrations_are_numbered_without_holes() {
    holds(shape::migration_holes);
    let broken = [Code::new("sql/0001_a.sql", ""), Code::new("sql/0003_b.sql", "")];
    assert_eq!(shape::migration_holes(&broken), ["sql/0003_b.sql: expected number 0002 here"]);
    let twins = [Code::new("sql/0001_a.sql", ""), Code::new("sql/0001_b.sql", "")];
    assert_eq!(shape::migration_holes(&twins).len(), 1);
    finds(shape::migration_holes, &[("sql/1_a.sql", "", 0)]);
    accepts(shape::migration_holes, &[("sql/0001_schema.sql", ""), ("sql/grant.sql", "")]);
}

#[test]
fn every_source_file_says_what_it_is() {
    holds(shape::headless);
    finds(shape::headless, &[("src/a.rs", "fn f() {}", 0), ("src/a.rs", "/// x\nfn f() {}", 0)]);
    accepts(shape::headless, &[("src/a.rs", "//! What.\n"), ("tests/a.rs", "fn f() {}")]);
}

#[test]
fn documents_are_short_and_there() {
    holds(documents::long_documents);
    let long = |lines: usize| "\n".repeat(lines);
    finds(
        documents::long_documents,
        &[("README.md", &long(121), 0), ("docs/architecture.md", &long(251), 0)],
    );
    accepts(documents::long_documents, &[("README.md", &long(120)), ("docs/x.md", &long(900))]);
    holds(documents::missing_documents);
    assert_eq!(documents::missing_documents(&[Code::new("CHANGELOG.md", "")]).len(), 3);
}

#[test]
fn the_root_is_read_at_a_glance() {
    holds(documents::crowded_root);
    let root = |entries: u32| {
        let of = |n: u32| Code::new(&format!("{n}/file"), "");
        let mut files: Vec<Code> = (0..entries).map(of).collect();
        files.extend([Code::new("0/another", ""), Code::new(".hidden", "")]);
        documents::crowded_root(&files)
    };
    assert!(root(16).is_empty());
    assert_eq!(root(17).len(), 1);
}

#[test]
fn links_between_documents_lead_somewhere() {
    holds(documents::broken_links);
    holds(documents::unlisted_documents);
    finds(
        documents::broken_links,
        &[
            ("README.md", "\n[a](docs/a.md)", 2),
            ("docs/a.md", "# A\n[b](../b.md)", 2),
            ("docs/a.md", "# A\n\n[b](#b)", 3),
            ("docs/a.md", "[a](a.md#b)", 1),
        ],
    );
    accepts(
        documents::broken_links,
        &[
            ("docs/a.md", "# What it's *for*\n[a](a.md) [b](#what-its-for) [c](../docs)"),
            ("docs/a.md", "[c](https://example.org/b.md)\n```\n[d](d.md)\n```"),
        ],
    );
    let alone = [Code::new("README.md", "[a](docs/a.md)"), Code::new("docs/b.md", "")];
    assert_eq!(documents::unlisted_documents(&alone).len(), 1);
}

#[test]
fn documents_cite_no_line_numbers() {
    holds(documents::line_references);
    finds(documents::line_references, &[("docs/a.md", "\nsee `lanes.rs:12`", 2)]);
    accepts(documents::line_references, &[("docs/a.md", "see `lanes.rs`: it …")]);
}

#[test]
fn every_public_function_has_a_user() {
    let rule = |files: &[Code]| unused::unused(files, KEPT);
    report(&rule(&repository()));
    finds(
        rule,
        &[
            ("src/a.rs", "pub fn lonely() {}", 1),
            ("src/a.rs", "pub async fn itself() { itself().await; }", 1),
            (
                "src/a.rs",
                "\npub fn tested() {}\n#[cfg(test)]\nmod tests { fn t() { tested(); } }",
                2,
            ),
            ("src/a.rs", "impl A {\n pub fn new() {}\n}\nfn f(new: B) { B::new(); x.new(); }", 2),
            ("src/a.rs", "impl<T: B<C>> A<T> {\n pub fn x(&self) {}\n}\nfn f() { x(); a.x; }", 2),
            ("src/a.rs", "use b::x;\npub fn x() {}\nstruct S { x: u8 }\nfn f() { s.x(); }", 2),
            ("src/a.rs", "/// ```text\n/// a::x()\n/// ```\npub fn x() {}", 4),
        ],
    );
    accepts(
        rule,
        &[
            ("src/a.rs", "pub fn called() {}\nfn f() { called(); }"),
            ("src/a.rs", "pub fn passed() {}\nfn f() { g(passed); }"),
            ("src/a.rs", "pub fn x<T>() {}\nfn f() { crate::a::x::<u8>(); }"),
            ("src/a.rs", "impl<T: B<C>> A<T> {\n pub fn x(\n&mut self) {}\n}\nfn f() { a\n.x(); }"),
            ("src/a.rs", "impl A {\n pub fn new() {}\n}\nfn f() { A::new(); }"),
            ("src/a.rs", "use z::A as B;\nimpl A {\n pub fn new() {}\n}\nfn f() { B::new(); }"),
            ("src/a.rs", "impl A {\n pub fn label(self) {}\n}\nfn f() { x.map(A::label); }"),
            ("src/a.rs", "/// ```\n/// use a::x;\n/// x();\n/// ```\npub fn x() {}"),
            ("src/a.rs", "pub(crate) fn the_compiler_sees_it() {}"),
        ],
    );
    let across = |other: &str, text: &str| {
        let lonely = Code::new("src/a.rs", "pub fn x() {}");
        rule(&[lonely, Code::new(other, text)]).is_empty()
    };
    assert!(across("src/b.rs", "use crate::a::x;\nfn f() { x(); }"));
    assert!(across("tests/bench/b.rs", "fn f() { watership::a::x(); }"));
    assert!(!across("src/b.rs", "fn f() { x(); }"), "it is another x");
    assert!(!across("src/b.rs", "use crate::a::x;"), "an import alone is no use");
    assert!(!across("tests/b.rs", "use watership::a::x;\nfn f() { x(); }"));
    let dev = [Code::new("src/dev/a.rs", "pub fn x() {}"), Code::new("tests/b.rs", "f(a::x)")];
    assert!(rule(&dev).is_empty(), "what is in dev is there for tests");
}

#[test]
fn every_planted_bug_still_applies_and_says_what_it_is() {
    assert!(planted::patches_seen(&repository()) >= 18, "the planted bugs are somewhere else");
    holds(planted::wrong_patches);
    holds(planted::stale_patches);
    let path = "tests/planted/07_x.patch";
    let patch = "# M7, Somebody: it loses rows.\n+++ b/src/a.rs\n";
    finds(
        planted::wrong_patches,
        &[
            (path, &patch.replace("M7", "M8"), 0),
            (path, &patch.replace(": it loses rows", ""), 0),
            (path, &patch.replace("src/a.rs", "tests/a.rs"), 0),
            ("tests/planted/x.patch", patch, 0),
        ],
    );
    accepts(planted::wrong_patches, &[(path, patch), ("tests/a.patch", "")]);
    let files = repository();
    let mut head = files.iter().find(|f| f.path == "src/lib.rs").expect("the library").text.lines();
    let (first, second) = (head.next().unwrap_or_default(), head.next().unwrap_or_default());
    let cuts = |first: &str| {
        format!("--- a/src/lib.rs\n+++ b/src/lib.rs\n@@ -1,2 +1,1 @@\n-{first}\n {second}\n")
    };
    finds(planted::stale_patches, &[(path, &cuts("//! What never stood there."), 0)]);
    accepts(planted::stale_patches, &[(path, &cuts(first))]);
}

#[test]
fn masking_keeps_length_and_blanks_what_is_no_code() {
    for (text, masked) in [
        ("a // b\nc", "a     \nc"),
        ("/* a /* b */ c */ d", "                  d"),
        ("f(\"a\\\"b\") g", "f(      ) g"),
        ("r#\"a\"b\"# c br\"x\" d", "         c b     d"),
        ("'a' 'b: &'c str '\\'' '\\u{7d}' '}'", "    'b: &'c str                     "),
        ("fn for_x\"{\" r#type", "fn for_x    r#type"),
    ] {
        let got = code::mask(text);
        assert_eq!(got.len(), text.len(), "{text}");
        assert_eq!(got.trim_end(), masked.trim_end(), "{text}");
    }
}
