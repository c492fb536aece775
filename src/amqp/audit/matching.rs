//! Which of a route's routing keys a binding takes, by the type of its exchange. Pure.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::{KnownHeaders, KnownKey};
use crate::message::KeyPart;

/// How many of a route's messages a binding takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Takes {
    None,
    Some,
    All,
}

/// Whole keys are compared.
pub(super) fn direct(binding_key: &str, key: &KnownKey) -> Takes {
    takes(&[Element::Text(binding_key)], key)
}

/// `*` is one word, `#` any number of words.
pub(super) fn topic(binding_key: &str, key: &KnownKey) -> Takes {
    takes(&topic_elements(binding_key), &dotted(key))
}

/// Values are compared with their types; a binding without a value asks whether the header is there
/// (`deps/rabbit/src/rabbit_exchange_type_headers.erl`).
pub(super) fn headers(arguments: &Map<String, Value>, known: &KnownHeaders) -> Takes {
    let kind = arguments.get("x-match").and_then(Value::as_str).unwrap_or("all");
    let (any, all_names) = (kind.starts_with("any"), kind.ends_with("-with-x"));
    let is_asked = |name: &str| name != "x-match" && (all_names || !name.starts_with("x-"));
    let mut asked = arguments.iter().filter(|(name, _)| is_asked(name)).peekable();
    if asked.peek().is_none() {
        return if any { Takes::None } else { Takes::All };
    }
    let each = asked.map(|(name, value)| {
        match known.iter().find(|(known, _)| known == name) {
            Some(_) if value.is_null() => Takes::All,
            // All of them are strings.
            Some(_) if !value.is_string() => Takes::None,
            Some((_, Some(text))) if value.as_str() == Some(text) => Takes::All,
            Some((_, Some(_))) => Takes::None,
            Some((_, None)) | None => Takes::Some,
        }
    });
    let each = if any { each.max() } else { each.min() };
    each.unwrap_or(Takes::None)
}

/// A part of a binding key's pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Element<'a> {
    /// This text.
    Text(&'a str),
    /// Text without a dot.
    Word,
    /// Nothing, or a dot and any text.
    Rest,
}

/// The pattern of a topic exchange, over keys with a dot before each word: `*` is one word, `#`
/// any number of words. <https://www.rabbitmq.com/tutorials/tutorial-five-python>
fn topic_elements(pattern: &str) -> Vec<Element<'_>> {
    let mut elements = Vec::new();
    for word in pattern.split('.') {
        match word {
            "#" => elements.push(Element::Rest),
            "*" => elements.extend([Element::Text("."), Element::Word]),
            word => elements.extend([Element::Text("."), Element::Text(word)]),
        }
    }
    elements
}

fn dotted(key: &KnownKey) -> Vec<KeyPart> {
    let mut dotted = vec![KeyPart::Text(".".to_owned())];
    dotted.extend(key.iter().cloned());
    dotted
}

/// Which of the keys match the pattern: some do when both can spell the same text; all do when the
/// pattern takes whatever stands in for what is not known.
fn takes(pattern: &[Element<'_>], key: &KnownKey) -> Takes {
    let steps = steps(pattern);
    let letters: Vec<Letter> = key
        .iter()
        .flat_map(|part| match part {
            KeyPart::Text(text) => text.chars().map(Letter::Known).collect(),
            KeyPart::Word => vec![Letter::Word],
            KeyPart::Any => vec![Letter::Any],
        })
        .collect();
    let meet = |all| Meeting { steps: &steps, letters: &letters, all }.run();
    match (meet(true), meet(false)) {
        (true, _) => Takes::All,
        (false, true) => Takes::Some,
        (false, false) => Takes::None,
    }
}

/// A key, letter by letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Letter {
    Known(char),
    /// Some word.
    Word,
    /// Some text, which may have dots.
    Any,
}

impl Letter {
    /// What it is, is not known.
    fn is_open(self) -> bool {
        !matches!(self, Letter::Known(_))
    }
}

/// A pattern, letter by letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Letter(char),
    /// Any letters but dots.
    Word,
    /// Any letters.
    Any,
    /// The next two steps may be left out.
    Optional,
}

fn steps(pattern: &[Element<'_>]) -> Vec<Step> {
    let mut steps = Vec::new();
    for element in pattern {
        match element {
            Element::Text(text) => steps.extend(text.chars().map(Step::Letter)),
            Element::Word => steps.push(Step::Word),
            Element::Rest => steps.extend([Step::Optional, Step::Letter('.'), Step::Any]),
        }
    }
    steps
}

/// Walks pattern and key together, over all pairs of places, each once.
struct Meeting<'a> {
    steps: &'a [Step],
    letters: &'a [Letter],
    /// Whether what is not known is something that only a wildcard takes, or any text that fits.
    all: bool,
}

impl Meeting<'_> {
    fn run(&self) -> bool {
        let mut seen = BTreeSet::new();
        let mut open = vec![(0, 0)];
        while let Some((step, letter)) = open.pop() {
            if !seen.insert((step, letter)) {
                continue;
            }
            if step == self.steps.len() && letter == self.letters.len() {
                return true;
            }
            self.next(step, letter, &mut open);
        }
        false
    }

    fn next(&self, step: usize, letter: usize, open: &mut Vec<(usize, usize)>) {
        let known = self.letters.get(letter).copied();
        let spells = |wanted: char| match known {
            Some(Letter::Word) => !self.all && wanted != '.',
            Some(Letter::Any) => !self.all,
            Some(Letter::Known(_)) | None => false,
        };
        match self.steps.get(step) {
            Some(Step::Optional) => open.extend([(step + 1, letter), (step + 3, letter)]),
            Some(wild @ (Step::Word | Step::Any)) => {
                open.push((step + 1, letter));
                let takes = match known {
                    Some(Letter::Known(c)) => *wild == Step::Any || c != '.',
                    Some(Letter::Word) => true,
                    Some(Letter::Any) => *wild == Step::Any || !self.all,
                    None => false,
                };
                if takes {
                    open.push((step, letter + 1));
                }
            }
            Some(Step::Letter(wanted)) => {
                if known == Some(Letter::Known(*wanted)) {
                    open.push((step + 1, letter + 1));
                }
                if spells(*wanted) {
                    open.push((step + 1, letter));
                }
            }
            None => {}
        }
        // What is not known may also be the empty text, or be spelled to its end.
        if known.is_some_and(Letter::is_open) && !self.all {
            open.push((step, letter + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::key;
    use super::*;

    #[test]
    fn a_topic_binding_takes_none_some_or_all_of_a_routes_keys() {
        for (pattern, text, expected) in [
            ("#", "order.{}", Takes::All),
            ("#", "", Takes::All),
            ("order.#", "order.{}", Takes::All),
            ("order.*", "order.{}", Takes::Some),
            ("*.*", "order.{}", Takes::Some),
            ("order.paid", "order.{}", Takes::Some),
            ("order.*.x", "order.{}", Takes::Some),
            ("*.paid", "{}.{}", Takes::Some),
            ("order.#", "order", Takes::All),
            ("order.*", "order", Takes::None),
            ("orders.#", "order.{}", Takes::None),
            ("order", "order.{}", Takes::None),
            ("#.paid", "order.paid", Takes::All),
            ("#.paid", "order.created", Takes::None),
            ("#.paid.#", "a.b.paid.c.d", Takes::All),
            ("a.#.b.*", "a.b.c", Takes::All),
            ("a.#.b.*", "a.x.b", Takes::None),
            ("public.*.insert", "public.items.{}", Takes::Some),
            ("public.items.*", "public.items.{}", Takes::Some),
            ("*", "a.b", Takes::None),
            ("", "", Takes::All),
            ("", "a", Takes::None),
        ] {
            let got = topic(pattern, &key(text));
            assert_eq!(got, expected, "{pattern} with {text}");
        }
    }

    #[test]
    fn a_star_takes_every_word_and_only_some_texts() {
        let table = |part| [KeyPart::Text("public.items.".into()), part];
        assert_eq!(topic("public.items.*", &table(KeyPart::Word)), Takes::All);
        assert_eq!(topic("public.items.*", &table(KeyPart::Any)), Takes::Some);
        assert_eq!(topic("public.items.*.*", &table(KeyPart::Word)), Takes::None);
        assert_eq!(topic("public.items.*.*", &table(KeyPart::Any)), Takes::Some);
        assert_eq!(topic("#", &table(KeyPart::Any)), Takes::All);
    }

    #[test]
    fn a_direct_binding_compares_whole_keys() {
        for (pattern, text, expected) in [
            ("a.b", "a.b", Takes::All),
            ("a.b", "a.{}", Takes::Some),
            ("a.#", "a.b", Takes::None),
            ("b", "a.{}", Takes::None),
            ("{}", "x", Takes::None),
        ] {
            assert_eq!(direct(pattern, &key(text)), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn a_headers_binding_can_ask_for_the_route_and_for_its_own_headers() {
        let known = [("ws-route", Some("orders")), ("region", Some("eu")), ("tenant", None)];
        let known = known.map(|(name, value)| (name.to_owned(), value.map(str::to_owned)));
        let takes = |json| {
            headers(serde_json::from_str::<Value>(json).unwrap().as_object().unwrap(), &known)
        };
        for (arguments, expected) in [
            ("{}", Takes::All),
            (r#"{"x-match":"any"}"#, Takes::None),
            (r#"{"ws-route":"orders"}"#, Takes::All),
            (r#"{"ws-route":"other"}"#, Takes::None),
            (r#"{"x-match":"all","ws-route":"orders","region":"eu"}"#, Takes::All),
            (r#"{"x-match":"all","ws-route":"orders","region":"us"}"#, Takes::None),
            (r#"{"x-match":"any","ws-route":"other","region":"eu"}"#, Takes::All),
            (r#"{"x-match":"all","ws-route":"orders","tenant":"a"}"#, Takes::Some),
            (r#"{"x-match":"any","ws-route":"other","tenant":"a"}"#, Takes::Some),
            (r#"{"x-match":"any","tenant":"a","region":"eu"}"#, Takes::All),
            (r#"{"x-match":"all","of the row":"a"}"#, Takes::Some),
            (r#"{"region":null,"tenant":null}"#, Takes::All),
            (r#"{"region":1}"#, Takes::None),
            (r#"{"tenant":true}"#, Takes::None),
            (r#"{"x-match":"all","x-tenant":"a"}"#, Takes::All),
            (r#"{"x-match":"all-with-x","x-tenant":"a"}"#, Takes::Some),
        ] {
            assert_eq!(takes(arguments), expected, "{arguments}");
        }
    }
}
