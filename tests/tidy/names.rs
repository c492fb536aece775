//! One name, one thing: `Slot` in a signature must not be one of three.

use std::collections::HashMap;

use super::code::{Code, is_word};
use super::{accepts, finds, holds};

/// Names that say the same everywhere: the module in front of them says of what. To a publisher and
/// to a consumer a message is theirs.
const SHARED: &[&str] = &["Args", "Message", "Options"];

/// Types that others can name and that share their name with such a type of another file.
pub fn shared_types(files: &[Code]) -> Vec<String> {
    let mut first: HashMap<&str, String> = HashMap::new();
    let mut found = Vec::new();
    for file in files.iter().filter(|f| f.is_src()) {
        for (at, name) in types(file) {
            let here = file.at(at);
            if let Some(there) = first.get(name) {
                found.push(format!("{here}: {name} is a type of {there} too"));
            } else if !SHARED.contains(&name) {
                first.insert(name, here);
            }
        }
    }
    found
}

/// Every `pub` type with its name, whatever stands in the brackets of its `pub`.
fn types(file: &Code) -> Vec<(usize, &str)> {
    let types =
        ["struct ", "enum ", "trait ", "type ", "union "].into_iter().flat_map(move |kind| {
            let places = file.masked.match_indices(kind);
            places.filter_map(move |(at, _)| {
                let before = file.masked[..at].trim_end();
                let before = before.strip_suffix("unsafe").unwrap_or(before).trim_end();
                let visible = match before.strip_suffix(')') {
                    Some(inner) => inner.rfind('(').map(|open| &inner[..open]),
                    None => Some(before),
                };
                let name = file.masked[at + kind.len()..].split(|c| !is_word(c)).next()?;
                (visible?.ends_with("pub") && !file.is_test(at)).then_some((at, name))
            })
        });
    let mut types: Vec<_> = types.collect();
    types.sort_unstable();
    types
}

#[test]
fn no_two_public_types_share_a_name() {
    holds(shared_types);
    finds(
        shared_types,
        &[
            (
                "src/a.rs",
                "pub struct Slot;
pub enum Slot {}",
                2,
            ),
            (
                "src/a.rs",
                "pub struct Slot;
\npub(super) type Slot = u8;",
                3,
            ),
            (
                "src/a.rs",
                "pub(in crate::a) trait Slot {}
pub struct Slot<'a> {}",
                2,
            ),
        ],
    );
    accepts(
        shared_types,
        &[
            (
                "src/a.rs",
                "pub struct Slot;
struct Slot;",
            ),
            (
                "src/a.rs",
                "pub struct Options;
pub struct Options;",
            ),
            (
                "src/a.rs",
                "pub struct Slot;
pub struct SlotStatus { pub slot: Slot }",
            ),
            (
                "src/a.rs",
                "pub enum Slot {}
#[cfg(test)]
mod tests { pub struct Slot; }",
            ),
            (
                "src/a.rs",
                "pub trait A { type Error; }
pub trait B { type Error; }",
            ),
        ],
    );
}
