//! `debezium`, `contracts` and `filter` of a route: the text of a mistake names key and value.

use super::problem;

const OUTBOX: &str = "[[route]]\nname = 'r'\noutbox = { aggregate_type = '*' }\nexchange = 'e'\n";
const TABLE: &str = "source.tables = ['public.t']\n[[route]]\nname = 'r'\ntable = 'public.t'\n\
                     exchange = 'e'\n";

#[test]
fn two_fields_of_one_name_in_a_message_of_the_event_router_are_refused() {
    for (placement, told) in [
        (
            "['type:envelope', 'version:envelope:type']",
            "\"version:envelope:type\" is invalid; expected an alias of its own, such as \
             \"version:envelope:type2\": another field has the name \"type\" in the envelope",
        ),
        ("['type:header:x', 'version:header:x']", "another field has the name \"x\" in the header"),
        ("['type:envelope:payload']", "the router itself has the name \"payload\" in the envelope"),
        (
            "['id:envelope', 'type:header:id']",
            "the router itself has the name \"id\" in the header",
        ),
    ] {
        let option = format!("debezium = {{ additional_placement = {placement} }}");
        let text = problem(&format!("{OUTBOX}format = 'debezium'\n{option}"));
        assert!(text.contains("route \"r\": debezium.additional_placement = "), "{text}");
        assert!(text.contains(told), "{placement}\n{text}");
    }
    let placement = "['type:envelope', 'type:header', 'id:header:payload', 'version:envelope:id']";
    let option = format!("debezium = {{ additional_placement = {placement} }}");
    let text = problem(&format!("{OUTBOX}format = 'debezium'\n{option}\nfilter = '('"));
    assert!(!text.contains("additional_placement"), "{text}");
}

#[test]
fn an_option_for_the_other_kind_of_route_is_named_with_its_value() {
    for (route, option, told) in [
        (
            OUTBOX,
            "decimal_handling = 'string'",
            "debezium.decimal_handling = \"string\" is for routes of tables; an outbox route has: \
             routing_key, tombstone_body, additional_placement, missing_field, ",
        ),
        (OUTBOX, "tombstones = true", "debezium.tombstones = true is for routes of tables"),
        (OUTBOX, "money_fraction_digits = 3", "debezium.money_fraction_digits = 3 is for"),
        (TABLE, "quoted_id = true", "debezium.quoted_id = true is for outbox routes; remove it"),
        (TABLE, "additional_placement = ['a:header']", "debezium.additional_placement is for outb"),
    ] {
        let text = problem(&format!("{route}format = 'debezium'\ndebezium = {{ {option} }}"));
        assert!(text.contains(told), "{option}\n{text}");
    }
}

#[test]
fn a_contract_for_no_event_type_is_refused() {
    for name in ["*", ""] {
        let text = problem(&format!("{OUTBOX}contracts = {{ '{name}' = 'tests/config/c.json' }}"));
        let told = format!("contracts names {name:?}, which is not an event type");
        assert!(text.contains(&told), "{text}");
        assert!(text.contains("the contract of all other events is the key contract"), "{text}");
    }
}

#[test]
fn a_filter_that_no_event_passes_is_refused() {
    for (route, filter, told) in [
        (TABLE, "op = 'upsert'", "op can be 'insert', 'update', 'delete', 'truncate', 'read'"),
        (OUTBOX, "op = 'update'", "op of an outbox event can be 'insert'"),
        (OUTBOX, "headers.tenant-id = 'a'", "must be in double quotes: headers.\"tenant-id\""),
    ] {
        let text = problem(&format!("{route}filter = \"\"\"{filter}\"\"\""));
        assert!(text.contains("route \"r\"") && text.contains(told), "{filter}\n{text}");
    }
}
