//! `[source]` with `mode = "poll"`.

use super::problem;

#[test]
fn a_key_that_does_nothing_in_the_mode_is_refused() {
    for (more, part) in [
        ("source.mode = 'poll'\nsource.slot = 'x'", "source.slot is only for source.mode = \"wal"),
        ("source.mode = 'poll'\nsource.failover = true", "source.failover is only for source.mo"),
        ("source.mode = 'poll'\nsource.binary = true", "source.binary is only for source.mode"),
        ("source.mode = 'poll'\nrelay.canary_interval = '0s'", "canary_interval is only for sou"),
        ("source.mode = 'poll'\nrelay.idle_interval = '1s'", "idle_interval is only for source"),
        ("source.mode = 'poll'\nsource.tables = ['a.b']", "= \"poll\" reads the outbox only"),
        ("source.poll_min_interval = '1s'", "poll_min_interval is only for source.mode = \"poll"),
        (
            "source.mode = 'poll'\nsource.poll_min_interval = '2s'",
            "poll_max_interval = \"1s\" is invalid; expected at least source.poll_min_interval, ",
        ),
    ] {
        let text = problem(&format!("{more}\n"));
        assert!(text.contains(part), "{more}: {text}");
    }
}
