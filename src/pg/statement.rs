//! Fills names and expressions into a statement where parameters are not possible. Pure.

/// The statement with each `:name` replaced by its value. Inserted text is not scanned again, so it
/// may contain any character. A name without a value and a cast (`::type`) stay as they are.
pub fn fill(sql: &str, values: &[(&str, &str)]) -> String {
    let mut filled = String::with_capacity(sql.len());
    let mut rest = sql;
    while let Some(at) = rest.find(':') {
        let (before, after) = (&rest[..=at], &rest[at + 1..]);
        if let Some(cast) = after.strip_prefix(':') {
            filled.push_str(before);
            filled.push(':');
            rest = cast;
            continue;
        }
        let is_part = |c: char| c.is_ascii_lowercase() || c == '_';
        let end = after.find(|c| !is_part(c)).unwrap_or(after.len());
        let (name, behind) = after.split_at(end);
        match values.iter().find(|(known, _)| *known == name) {
            Some((_, value)) => {
                filled.push_str(&rest[..at]);
                filled.push_str(value);
            }
            None => {
                filled.push_str(before);
                filled.push_str(name);
            }
        }
        rest = behind;
    }
    filled.push_str(rest);
    filled
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_is_replaced_once_whatever_stands_in_its_place() {
        let values = [("t", "\":tt\""), ("tt", "\":t::x\""), ("a_b", "$1")];
        let cases = [
            ("SELECT :t, :tt FROM :t", "SELECT \":tt\", \":t::x\" FROM \":tt\""),
            ("o.:a_b::text >= $1::bigint", "o.$1::text >= $1::bigint"),
            (":other : :t:tt", ":other : \":tt\"\":t::x\""),
            ("a:", "a:"),
            ("::t", "::t"),
            ("", ""),
        ];
        for (sql, filled) in cases {
            assert_eq!(fill(sql, &values), filled);
        }
    }
}
