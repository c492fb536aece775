//! Settings of the server and the database with which the relay works, but not as expected. Pure.

/// Whether commits may wait for the stream of `application`, because this value of
/// `synchronous_standby_names` can choose it.
///
/// <https://www.postgresql.org/docs/current/runtime-config-replication.html>
pub fn may_be_waited_for(synchronous_standby_names: &str, application: &str) -> bool {
    let all = synchronous_standby_names.trim();
    // `FIRST 2 (a, b)`, `ANY 2 (a, b)`, `2 (a, b)`, or the names alone.
    let list = match all.split_once('(') {
        Some((method, list)) if !method.contains('"') => list.trim_end_matches(')'),
        _ => all,
    };
    list.split(',')
        .map(|name| name.trim().trim_matches('"'))
        .any(|name| name == "*" || (!name.is_empty() && name.eq_ignore_ascii_case(application)))
}

/// What may happen in a database of this encoding; absent where nothing can.
pub fn encoding_risk(encoding: &str) -> Option<String> {
    match encoding {
        "UTF8" => None,
        "SQL_ASCII" => Some(
            "the database is SQL_ASCII: the first text that is not UTF-8 stops the relay (verdict \
             row_unsendable)"
                .to_owned(),
        ),
        other => Some(format!(
            "the encoding of the database is {other}: only UTF8 is safe; text arrives converted, \
             and the first byte that is not a character in UTF-8 stops the relay (verdict \
             row_unsendable)"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_that_can_choose_the_relay_is_recognised() {
        for names in [
            "*",
            "ANY 1 (*)",
            "FIRST 2 (s1, *)",
            "watership",
            "s1, Watership",
            "2 (s1,\"watership\")",
        ] {
            assert!(may_be_waited_for(names, "watership"), "{names}");
        }
        for names in ["", "s1", "ANY 1 (s1, s2)", "watership_2, s1"] {
            assert!(!may_be_waited_for(names, "watership"), "{names}");
        }
    }
}
