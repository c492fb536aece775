//! `[outbox]`: a table of the application's, by profiles and columns.

use super::{LEAST, config, problem};

#[test]
fn each_mistake_in_the_outbox_is_named() {
    for (more, part) in [
        ("outbox.profile = 'debezium'", "outbox.profile is for a table of your own: set outbox.ta"),
        ("outbox.columns.id = 'a'", "outbox.columns is for a table of your own"),
        ("outbox.delete_after = '7d'", "outbox.delete_after is for a table of your own"),
        (
            "[[route]]\nname = 'r'\noutbox = {aggregate_type = 'o*'}\nexchange = 'x'",
            "expected an aggregate type, or \"*\" alone for all",
        ),
        ("outbox.table = 'events'", "outbox.table = \"events\" is invalid; expected \"schema.tab"),
        ("outbox.table = 'watership.outbox'", "a table outside the relay's own schema"),
        ("outbox = {table = 'a.b', retain = '1d'}", "outbox.retain is for the relay's own outbox"),
        ("outbox = {table = 'a.b', order_by = 'n'}", "outbox.order_by is for source.mode = \"poll"),
        ("outbox = {table = 'a.b', delete_after = '5s'}", "expected \"0s\", or 1m to 3650d"),
        (
            "outbox = {table = 'a.b', profile = 'debezium', delete_after = '7d'}",
            "goes by the age of a row: set outbox.columns.created_at",
        ),
        ("outbox = {table = 'a.b', columns = {payloud = 'x'}}", "unknown key \"payloud\""),
        (
            "outbox = {table = 'a.b', columns = {payload = 'x', data = 'x'}}",
            "names one column as payload and as data",
        ),
        (
            "outbox = {table = 'a.b', aggregate_type = 'x', columns = {aggregate_type = 'y'}}",
            "are both set; remove one",
        ),
        ("outbox = {table = 'a.b', headers_from = {x-a = 'v'}}", "has \"x-a\"; expected 1 to 255"),
        ("outbox = {table = 'a.b', headers_from = {a = 1}}", "is not the name of a column"),
        (
            "source.tables = ['a.b']\noutbox.table = 'a.b'",
            "a table that is not in source.tables: its inserts are events already",
        ),
    ] {
        let text = problem(more);
        assert!(text.contains(part), "{more}\n{text}");
    }
}

#[test]
fn a_profile_names_the_columns_and_each_can_be_another() {
    let columns = |more: &str| {
        let text = format!("{LEAST}[outbox]\ntable = 'public.events'\n{more}");
        config(&text).unwrap().relay.outbox
    };
    let own = columns("");
    assert_eq!(
        (own.needed().join(" "), own.optional().count()),
        ("id aggregate_type aggregate_id event_type".into(), 6)
    );
    let debezium = columns("profile = 'debezium'\ncolumns = { event_type = 'kind' }");
    assert_eq!(debezium.needed(), ["id", "aggregatetype", "aggregateid", "kind"]);
    assert_eq!(debezium.optional().collect::<Vec<_>>(), ["payload"]);
    assert!(debezium.demanded.is_empty());
    let open = columns("profile = 'open-outbox'\ncolumns = { data = 'body' }");
    assert_eq!(open.needed(), ["event_id", "partition_key", "event_type"]);
    assert_eq!(open.optional().collect::<Vec<_>>(), ["body", "headers", "created_at"]);
    assert_eq!(open.demanded, ["body"]);
}

#[test]
fn polling_of_a_mapped_table_needs_the_time_for_which_its_rows_stay() {
    let mapped = "source.mode = 'poll'\noutbox = {table = 'a.b', profile = 'open-outbox'";
    for (more, part) in [
        (format!("{mapped}}}"), "needs outbox.retained_for: for how long your applications leave"),
        (format!("{mapped}, retained_for = '5s'}}"), "expected \"0s\", or 1m to 3650d"),
        (
            format!("{mapped}, retained_for = '7d', delete_after = '1d'}}"),
            "outbox.delete_after = \"1d\" is invalid; expected at least outbox.retained_for, which",
        ),
        ("outbox = {table = 'a.b', retained_for = '7d'}".into(), "outbox.retained_for is for sour"),
        ("outbox.retained_for = '7d'".into(), "outbox.retained_for is for a table of your own"),
    ] {
        let text = problem(&more);
        assert!(text.contains(part), "{more}\n{text}");
    }
}
