//! Which header of encoded properties is the largest. Pure.
//!
//! It reads what `message` writes, and no more: a content type, then a table with texts, integers,
//! booleans and headers without a value.

/// Before the content type: the property flags.
const FLAGS_LEN: usize = 2;

/// The name of the largest header, and how many bytes it has with its name.
pub(super) fn largest_header(properties: &[u8]) -> Option<(&str, usize)> {
    let (_, rest) = short(properties.get(FLAGS_LEN..)?)?;
    let (mut table, _) = long(rest)?;
    let mut largest = None;
    while !table.is_empty() {
        let (name, rest) = short(table)?;
        let (kind, rest) = rest.split_first()?;
        let rest = match kind {
            b'S' => long(rest)?.1,
            b'l' => rest.get(8..)?,
            b't' => rest.get(1..)?,
            b'V' => rest,
            _ => return largest,
        };
        let len = table.len() - rest.len();
        if largest.is_none_or(|(_, most)| len > most) {
            largest = Some((std::str::from_utf8(name).ok()?, len));
        }
        table = rest;
    }
    largest
}

/// What a length of one byte gives, and the rest.
fn short(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = bytes.split_first()?;
    rest.split_at_checked(usize::from(*len))
}

/// The same with four bytes.
fn long(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = bytes.split_first_chunk()?;
    rest.split_at_checked(usize::try_from(u32::from_be_bytes(*len)).ok()?)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use crate::message::{Builder, ExchangeId, PROPERTIES_MAX, Properties, RouteId};

    #[test]
    fn headers_that_are_too_large_are_refused_with_the_name_of_the_largest() {
        let properties = Properties {
            content_type: "application/json",
            message_id: Uuid::nil(),
            timestamp: 1,
            kind: "created",
            app_id: "shop",
        };
        for largest in ["first", "middle", "last"] {
            let mut scratch = Vec::new();
            let mut builder = Builder::new(&mut scratch, "key", properties).unwrap();
            for name in ["first", "middle", "last"] {
                let len = if name == largest { PROPERTIES_MAX } else { 100 };
                builder.header_int("int", 5).unwrap();
                builder.header_bool("bool", true).unwrap();
                builder.header_void("void").unwrap();
                builder.header_text(name, &vec![b'x'; len]).unwrap();
            }
            let error = builder.finish(ExchangeId(0), RouteId(0), |_| {}).unwrap_err().to_string();
            // Lengths of one byte and of four, and the type.
            let len = PROPERTIES_MAX + largest.len() + 6;
            let told = format!("are allowed; the largest header, {largest:?}, has {len}");
            assert!(error.ends_with(&told), "{error}");
        }
    }
}
