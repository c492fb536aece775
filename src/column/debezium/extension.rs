//! Types of extensions that Debezium knows: `hstore`, PostGIS and pgvector.
//!
//! <https://debezium.io/documentation/reference/stable/connectors/postgresql.html>, "HStore type",
//! "PostGIS types" and "pgvector types".

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::{HstoreHandling, write_double};
use crate::column::{is_number, unexpected, utf8, write_string};
use crate::error::Result;

/// The flag of EWKB's type that says that an SRID follows it.
const HAS_SRID: u32 = 0x2000_0000;

/// `"a"=>"1", "b"=>NULL` as a JSON object, or as a string with that in it.
pub(super) fn write_hstore(out: &mut Vec<u8>, text: &[u8], handling: HstoreHandling) -> Result<()> {
    let wrong = || unexpected(text, "an hstore");
    let mut json = vec![b'{'];
    let mut rest = text;
    while !rest.is_empty() {
        if json.len() > 1 {
            json.push(b',');
            rest = rest.strip_prefix(b", ").ok_or_else(wrong)?;
        }
        let (key, after) = quoted(rest).ok_or_else(wrong)?;
        write_string(&mut json, utf8(&key)?);
        json.push(b':');
        let after = after.strip_prefix(b"=>").ok_or_else(wrong)?;
        rest = match after.strip_prefix(b"NULL") {
            Some(after) => {
                json.extend_from_slice(b"null");
                after
            }
            None => {
                let (value, after) = quoted(after).ok_or_else(wrong)?;
                write_string(&mut json, utf8(&value)?);
                after
            }
        };
    }
    json.push(b'}');
    write_object(out, utf8(&json)?, handling);
    Ok(())
}

/// An object with the placeholder as its only key and value.
pub(super) fn write_hstore_unavailable(
    out: &mut Vec<u8>,
    placeholder: &str,
    handling: HstoreHandling,
) {
    let mut json = vec![b'{'];
    write_string(&mut json, placeholder);
    json.push(b':');
    write_string(&mut json, placeholder);
    json.push(b'}');
    write_object(out, &String::from_utf8_lossy(&json), handling);
}

fn write_object(out: &mut Vec<u8>, json: &str, handling: HstoreHandling) {
    match handling {
        HstoreHandling::Json => write_string(out, json),
        HstoreHandling::Map => out.extend_from_slice(json.as_bytes()),
    }
}

/// The text in quotes that `text` begins with, and what comes after it.
fn quoted(text: &[u8]) -> Option<(Vec<u8>, &[u8])> {
    let mut bytes = text.strip_prefix(b"\"")?.iter();
    let mut unescaped = Vec::new();
    loop {
        match bytes.next()? {
            b'"' => return Some((unescaped, bytes.as_slice())),
            b'\\' => unescaped.push(*bytes.next()?),
            byte => unescaped.push(*byte),
        }
    }
}

/// EWKB in hex as a structure with its bytes and its SRID.
pub(super) fn write_ewkb(out: &mut Vec<u8>, text: &[u8]) -> Result<()> {
    let wrong = || unexpected(text, "a geometry in EWKB");
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let pair = |pair: &[u8; 2]| Some((digit(pair[0])? << 4 | digit(pair[1])?) as u8);
    let (pairs, []) = text.as_chunks::<2>() else { return Err(wrong()) };
    let bytes: Option<Vec<u8>> = pairs.iter().map(pair).collect();
    let bytes = bytes.ok_or_else(wrong)?;
    let srid = srid(&bytes).ok_or_else(wrong)?;
    write_struct(out, &bytes, srid);
    Ok(())
}

/// Debezium's placeholder: the point (-99999999 -99999999) with SRID 4326.
pub(super) fn write_ewkb_unavailable(out: &mut Vec<u8>) {
    let mut bytes = vec![1];
    bytes.extend_from_slice(&(HAS_SRID | 1).to_le_bytes());
    bytes.extend_from_slice(&4326_u32.to_le_bytes());
    for _ in 0..2 {
        bytes.extend_from_slice(&(-99_999_999_f64).to_le_bytes());
    }
    write_struct(out, &bytes, Some(4326));
}

/// `None` for bytes that are too short; `Some(None)` for a geometry without an SRID.
fn srid(bytes: &[u8]) -> Option<Option<u32>> {
    let (order, rest) = bytes.split_first()?;
    let (kind, rest) = rest.split_first_chunk()?;
    let number = |bytes: &[u8; 4]| match order {
        0 => u32::from_be_bytes(*bytes),
        _ => u32::from_le_bytes(*bytes),
    };
    if number(kind) & HAS_SRID == 0 {
        return Some(None);
    }
    rest.first_chunk().map(|srid| Some(number(srid)))
}

fn write_struct(out: &mut Vec<u8>, bytes: &[u8], srid: Option<u32>) {
    let srid = srid.map_or("null".to_owned(), |srid| srid.to_string());
    out.extend_from_slice(b"{\"wkb\":\"");
    out.extend_from_slice(STANDARD.encode(bytes).as_bytes());
    out.extend_from_slice(format!("\",\"srid\":{srid}}}").as_bytes());
}

/// `[1,2.5]` as an array of numbers: `vector` of doubles, `halfvec` of floats.
pub(super) fn write_vector(out: &mut Vec<u8>, text: &[u8], is_half: bool) -> Result<()> {
    let wrong = || unexpected(text, "a vector");
    let inner = text.strip_prefix(b"[").and_then(|text| text.strip_suffix(b"]"));
    out.push(b'[');
    for (index, number) in inner.ok_or_else(wrong)?.split(|byte| *byte == b',').enumerate() {
        if index > 0 {
            out.push(b',');
        }
        match is_half {
            true => {
                let number: f32 = parsed(number).ok_or_else(wrong)?;
                out.extend_from_slice(format!("{number:?}").as_bytes());
            }
            false => write_double(out, parsed(number).ok_or_else(wrong)?),
        }
    }
    out.push(b']');
    Ok(())
}

/// `{1:1.5,3:2}/5` as a structure. Its map has keys that are no texts, which Kafka's JSON converter
/// writes as pairs.
pub(super) fn write_sparse_vector(out: &mut Vec<u8>, text: &[u8]) -> Result<()> {
    let wrong = || unexpected(text, "a sparse vector");
    let at = text.iter().rposition(|byte| *byte == b'/').ok_or_else(wrong)?;
    let (pairs, dimensions) = (&text[..at], &text[at + 1..]);
    let pairs = pairs.strip_prefix(b"{").and_then(|pairs| pairs.strip_suffix(b"}"));
    let pairs = pairs.ok_or_else(wrong)?;
    if !is_number(dimensions, false) {
        return Err(wrong());
    }
    out.extend_from_slice(b"{\"dimensions\":");
    out.extend_from_slice(dimensions);
    out.extend_from_slice(b",\"vector\":[");
    for (index, pair) in pairs.split(|byte| *byte == b',').filter(|p| !p.is_empty()).enumerate() {
        let colon = pair.iter().position(|byte| *byte == b':').ok_or_else(wrong)?;
        let (place, number) = (&pair[..colon], &pair[colon + 1..]);
        if !is_number(place, false) {
            return Err(wrong());
        }
        out.extend_from_slice(if index > 0 { b",[" } else { b"[" });
        out.extend_from_slice(place);
        out.push(b',');
        write_double(out, parsed(number).ok_or_else(wrong)?);
        out.push(b']');
    }
    out.extend_from_slice(b"]}");
    Ok(())
}

fn parsed<T: std::str::FromStr>(number: &[u8]) -> Option<T> {
    let text = std::str::from_utf8(number).ok()?;
    is_number(number, true).then(|| text.parse().ok())?
}
