//! Text from outside as a terminal may show it. Applications choose keys, payloads and routing
//! keys, servers choose error texts: none of them may move the cursor, set the title or the
//! clipboard, turn the direction of writing, or forge a line of ours.

use std::borrow::Cow;

/// `text` with line breaks and tabs, and everything else that a terminal obeys written out.
pub(super) fn lines(text: &str) -> Cow<'_, str> {
    escaped(text, |c| c != '\n' && c != '\t' && is_obeyed(c))
}

/// The same on one line: line breaks and tabs are written out, too.
pub(super) fn one_line(text: &str) -> Cow<'_, str> {
    escaped(text, is_obeyed)
}

/// One line in which colours (`ESC [ … m`) may stand.
pub(super) fn coloured_line(text: &str) -> Cow<'_, str> {
    if !text.contains(is_obeyed) {
        return Cow::Borrowed(text);
    }
    let mut parts = text.split('\u{1b}');
    let mut out = one_line(parts.next().unwrap_or_default()).into_owned();
    for part in parts {
        let end = part.find(|c: char| !matches!(c, '[' | ';' | '0'..='9'));
        let is_colour = part.starts_with('[') && end.is_some_and(|at| part[at..].starts_with('m'));
        out.push_str(if is_colour { "\u{1b}" } else { "\\u{1b}" });
        out.push_str(&one_line(part));
    }
    Cow::Owned(out)
}

/// JSON in which those characters are `\u` escapes; it is the same value.
pub(super) fn json(text: &str) -> Cow<'_, str> {
    let inside = |c: char| c != '\n' && is_obeyed(c);
    if !text.contains(inside) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if inside(c) {
            for unit in c.encode_utf16(&mut [0; 2]) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            out.push(c);
        }
    }
    Cow::Owned(out)
}

fn escaped(text: &str, is_bad: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&is_bad) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_bad(c) {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    Cow::Owned(out)
}

/// Control characters (C0, delete, C1), line and paragraph separators, what turns the direction of
/// writing, and what is not seen at all.
fn is_obeyed(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{2060}' | '\u{feff}')
        || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{206f}')
        || matches!(c, '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_obeys_remains() {
        for (raw, shown) in [
            ("\u{1b}]52;c;aGk=\u{7}", "\\u{1b}]52;c;aGk=\\u{7}"),
            ("\u{1b}[2J", "\\u{1b}[2J"),
            ("\u{9b}31m \u{9d}0;title\u{9c}", "\\u{9b}31m \\u{9d}0;title\\u{9c}"),
            ("a\u{202e}b\u{2066}c\u{200f}", "a\\u{202e}b\\u{2066}c\\u{200f}"),
            ("a\rb\u{7f}\u{8}", "a\\rb\\u{7f}\\u{8}"),
            ("x\n     2 parked", "x\\n     2 parked"),
            ("x\u{2028}y\u{85}z\u{b}", "x\\u{2028}y\\u{85}z\\u{b}"),
            ("plain, Größe, 注文, 👩‍👧", "plain, Größe, 注文, 👩‍👧"),
        ] {
            assert_eq!(one_line(raw), shown);
        }
        assert_eq!(lines("a\n\tb\u{1b}c\rd"), "a\n\tb\\u{1b}c\\rd");
    }

    #[test]
    fn json_keeps_its_value() {
        let value = serde_json::json!({"k": "a\u{9b}b\u{202e}c\u{7f}\u{1b}\u{e0041}\nd"});
        let text = serde_json::to_string_pretty(&value).expect("JSON");
        let shown = json(&text);
        assert!(!shown.contains(|c: char| c != '\n' && is_obeyed(c)), "{shown}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).expect("JSON"), value);
    }
}
