//! A value's binary form (`*send`) as the text form (`*out`) of the same value. Pure.
//!
//! With `source.binary` Postgres sends values in binary, so that rows pass whose text form is
//! above 1 GB. Everything behind this file knows text only, and messages are byte for byte those
//! of text mode. The text is that of a session with DateStyle ISO, IntervalStyle iso_8601,
//! TimeZone UTC, extra_float_digits 3, bytea_output hex and lc_monetary C.
//!
//! A type without a renderer is an error, never a guess.

mod extension;
mod geometry;
mod nested;
mod network;
mod number;
mod read;
mod search;
mod time;

use std::borrow::Cow;

use super::user_type::DEPTH_MAX;
use super::{Types, UserType, oid};
use crate::error::{Error, Result};
use read::Read;

/// Bytes of a value above which it is not rendered: no broker takes a larger message
/// (<https://www.rabbitmq.com/docs/configure>, `max_message_size`).
pub const VALUE_MAX: usize = 512 << 20;

impl Types {
    /// The text form of `value`, borrowed where both forms are the same bytes.
    ///
    /// # Errors
    /// `Kind::Event` for a type without a renderer, for a value that is too large, and for bytes
    /// that are no value of the type. `Kind::Protocol` for a type that was not there when the types
    /// were read, also inside of a value.
    pub fn text<'a>(&self, type_oid: u32, value: &'a [u8]) -> Result<Cow<'a, [u8]>> {
        if value.len() > VALUE_MAX {
            let text = format!("a value of {} bytes; at most {VALUE_MAX} can be sent", value.len());
            return Err(Error::event(text).hint("keep large objects elsewhere, send a reference"));
        }
        if let Some(same) = self.same(type_oid, value)? {
            return Ok(Cow::Borrowed(same));
        }
        let mut out = Vec::new();
        self.write(&mut out, type_oid, value, 0)?;
        Ok(Cow::Owned(out))
    }

    /// The bytes themselves, for types whose binary form is their text.
    fn same<'a>(&self, type_oid: u32, value: &'a [u8]) -> Result<Option<&'a [u8]>> {
        match self.base_of(type_oid) {
            oid::TEXT
            | oid::VARCHAR
            | oid::BPCHAR
            | oid::JSON
            | rare::NAME
            | rare::XML
            | rare::REFCURSOR
            | rare::PG_NODE_TREE
            | rare::UNKNOWN => Ok(Some(value)),
            oid::JSONB | rare::JSONPATH => match value {
                [1, text @ ..] => Ok(Some(text)),
                _ => Err(wrong("jsonb or jsonpath")),
            },
            base => Ok((self.0.get(&base) == Some(&UserType::Text)).then_some(value)),
        }
    }

    fn write(&self, out: &mut Vec<u8>, type_oid: u32, value: &[u8], depth: u8) -> Result<()> {
        if depth > DEPTH_MAX {
            return Err(Error::event("a value is nested too deeply"));
        }
        if let Some(same) = self.same(type_oid, value)? {
            out.extend_from_slice(same);
            return Ok(());
        }
        let base = self.base_of(type_oid);
        if let Some((_, between)) = self.element_of(base) {
            return self.array(out, between, value, depth);
        }
        match nested::range_of(base).or_else(|| self.0.get(&base).copied()) {
            Some(UserType::Range(subtype)) => self.range(out, subtype, value, depth),
            Some(UserType::Multirange(subtype)) => self.multirange(out, subtype, value, depth),
            Some(UserType::Composite) => self.composite(out, value, depth),
            Some(UserType::Extension(extension)) => extension::write(out, extension, value),
            Some(UserType::Text | UserType::Array(..)) => unreachable!("these came before"),
            Some(UserType::Domain(..) | UserType::Opaque) => Err(without_renderer(base)),
            None if self.knows(base) => scalar(out, base, value),
            None => Err(Error::protocol(format!("type {base} is not known to this session")).hint(
                "a type that was dropped cannot be rendered from binary; set \
                       source.binary = false",
            )),
        }
    }
}

/// The OIDs of types that only this file tells apart.
mod rare {
    pub(super) const CHAR: u32 = 18;
    pub(super) const NAME: u32 = 19;
    pub(super) const INT2VECTOR: u32 = 22;
    pub(super) const TID: u32 = 27;
    pub(super) const XID: u32 = 28;
    pub(super) const CID: u32 = 29;
    pub(super) const OIDVECTOR: u32 = 30;
    pub(super) const XML: u32 = 142;
    pub(super) const PG_NODE_TREE: u32 = 194;
    pub(super) const CIDR: u32 = 650;
    pub(super) const UNKNOWN: u32 = 705;
    pub(super) const MACADDR8: u32 = 774;
    pub(super) const MONEY: u32 = 790;
    pub(super) const MACADDR: u32 = 829;
    pub(super) const INET: u32 = 869;
    pub(super) const BIT: u32 = 1560;
    pub(super) const VARBIT: u32 = 1562;
    pub(super) const REFCURSOR: u32 = 1790;
    pub(super) const TXID_SNAPSHOT: u32 = 2970;
    pub(super) const PG_LSN: u32 = 3220;
    pub(super) const TSVECTOR: u32 = 3614;
    pub(super) const TSQUERY: u32 = 3615;
    pub(super) const JSONPATH: u32 = 4072;
    pub(super) const PG_SNAPSHOT: u32 = 5038;
    pub(super) const XID8: u32 = 5069;
}

fn scalar(out: &mut Vec<u8>, type_oid: u32, value: &[u8]) -> Result<()> {
    let mut read = Read(value, "value");
    match type_oid {
        oid::BOOL => out.push(if read.u8()? != 0 { b't' } else { b'f' }),
        oid::INT2 => put(out, read.i16()?),
        oid::INT4 => put(out, read.i32()?),
        oid::INT8 => put(out, read.i64()?),
        oid::OID | rare::XID | rare::CID => put(out, read.u32()?),
        rare::XID8 => put(out, read.u64()?),
        oid::FLOAT4 => number::float4(out, f32::from_bits(read.u32()?)),
        oid::FLOAT8 => number::float8(out, read.f64()?),
        oid::NUMERIC => number::numeric(out, &mut read)?,
        rare::MONEY => number::money(out, read.i64()?),
        oid::UUID => uuid(out, read.take(16)?),
        oid::BYTEA => {
            out.reserve(2 + 2 * value.len());
            out.extend_from_slice(b"\\x");
            hex(out, read.rest());
        }
        oid::DATE => time::date(out, read.i32()?),
        oid::TIME => time::time(out, read.i64()?),
        oid::TIMETZ => time::timetz(out, read.i64()?, read.i32()?),
        oid::TIMESTAMP => time::timestamp(out, read.i64()?, ""),
        oid::TIMESTAMPTZ => time::timestamp(out, read.i64()?, "+00"),
        oid::INTERVAL => time::interval(out, read.i64()?, read.i32()?, read.i32()?),
        rare::INET | rare::CIDR => network::inet(out, &mut read)?,
        rare::MACADDR => network::mac(out, read.take(6)?),
        rare::MACADDR8 => network::mac(out, read.take(8)?),
        rare::BIT | rare::VARBIT => bits(out, &mut read)?,
        rare::TSVECTOR => search::vector(out, &mut read)?,
        rare::TSQUERY => search::query(out, &mut read)?,
        _ => return identifier(out, type_oid, value),
    }
    read.end()
}

/// What only names something of the server's own, and geometry.
fn identifier(out: &mut Vec<u8>, type_oid: u32, value: &[u8]) -> Result<()> {
    let mut read = Read(value, "value");
    match type_oid {
        rare::PG_LSN => {
            let lsn = read.u64()?;
            put(out, format_args!("{:X}/{:X}", lsn >> 32, lsn & 0xFFFF_FFFF));
        }
        rare::TID => {
            let block = read.u32()?;
            put(out, format_args!("({block},{})", read.u16()?));
        }
        rare::CHAR => match read.u8()? {
            0 => {}
            byte if byte.is_ascii() => out.push(byte),
            // As Postgres writes it from version 16 on; before, it is a byte that is not text.
            byte => put(out, format_args!("\\{byte:03o}")),
        },
        rare::INT2VECTOR | rare::OIDVECTOR => vector(out, type_oid, &mut read)?,
        rare::TXID_SNAPSHOT | rare::PG_SNAPSHOT => snapshot(out, &mut read)?,
        _ if geometry::write(out, type_oid, &mut read)? => {}
        _ => return Err(without_renderer(type_oid)),
    }
    read.end()
}

fn without_renderer(type_oid: u32) -> Error {
    Error::event(format!("type {type_oid} cannot be rendered from binary"))
        .hint("set source.binary = false, or leave the column out of the publication")
}

fn put(out: &mut Vec<u8>, value: impl std::fmt::Display) {
    use std::io::Write as _;
    // A vector takes everything.
    let _ = write!(out, "{value}");
}

fn hex(out: &mut Vec<u8>, bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    out.extend(
        bytes
            .iter()
            .flat_map(|byte| [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]),
    );
}

fn uuid(out: &mut Vec<u8>, bytes: &[u8]) {
    for (index, part) in [0..4, 4..6, 6..8, 8..10, 10..16].into_iter().enumerate() {
        if index > 0 {
            out.push(b'-');
        }
        hex(out, &bytes[part]);
    }
}

/// The number of bits, then the bits from the left.
fn bits(out: &mut Vec<u8>, read: &mut Read<'_>) -> Result<()> {
    let count = usize::try_from(read.i32()?).map_err(|_| wrong("bit"))?;
    let bytes = read.take(count.div_ceil(8))?;
    out.extend((0..count).map(|i| b'0' + (bytes[i / 8] >> (7 - i % 8) & 1)));
    Ok(())
}

/// `int2vector` and `oidvector`: an array of one dimension in binary, words in text.
fn vector(out: &mut Vec<u8>, type_oid: u32, read: &mut Read<'_>) -> Result<()> {
    let (dimensions, _has_nulls, _element) = (read.i32()?, read.i32()?, read.u32()?);
    // `oidvectorsend` writes a dimension of length 0 for an empty one.
    let count = if dimensions == 0 { 0 } else { read.i32()? };
    if dimensions > 0 {
        let _lower_bound = read.i32()?;
    }
    for index in 0..count {
        if index > 0 {
            out.push(b' ');
        }
        let mut element = Read(read.field()?.ok_or_else(|| wrong("vector"))?, "vector");
        match type_oid {
            rare::INT2VECTOR => put(out, element.i16()?),
            _ => put(out, element.u32()?),
        }
        element.end()?;
    }
    Ok(())
}

/// The count of transactions in progress, the oldest, the next, and those in progress.
fn snapshot(out: &mut Vec<u8>, read: &mut Read<'_>) -> Result<()> {
    let count = read.count()?;
    put(out, format_args!("{}:{}:", read.u64()?, read.u64()?));
    for index in 0..count {
        if index > 0 {
            out.push(b',');
        }
        put(out, read.u64()?);
    }
    Ok(())
}

fn wrong(what: &str) -> Error {
    Error::event(format!("the bytes are not a valid binary {what}"))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn text(type_oid: u32, value: &[u8]) -> String {
        let types = Types(HashMap::from([
            (20_000, UserType::Text),
            (20_001, UserType::Domain(oid::INT4, -1)),
            (20_002, UserType::Array(20_000, b',')),
            (20_003, UserType::Composite),
        ]));
        String::from_utf8(types.text(type_oid, value).unwrap().into_owned()).unwrap()
    }

    #[test]
    fn users_types_follow_the_catalog() {
        assert_eq!(text(20_000, b"so so"), "so so");
        assert_eq!(text(20_001, &7_i32.to_be_bytes()), "7");
        let mut moods = Vec::new();
        for number in [1, 0, 20_000, 2, 1, 5] {
            moods.extend_from_slice(&i32::to_be_bytes(number));
        }
        moods.extend_from_slice(b"so so");
        moods.extend_from_slice(&(-1_i32).to_be_bytes());
        assert_eq!(text(20_002, &moods), "{\"so so\",NULL}");
        assert_eq!(UserType::of("raster_send", 0), UserType::Opaque);
    }

    #[test]
    fn what_cannot_be_rendered_is_an_error_not_a_guess() {
        let types = Types::default();
        let error = types.text(20_003, b"x").unwrap_err();
        assert_eq!(error.to_string(), "type 20003 is not known to this session");
        assert_eq!(error.kind(), crate::error::Kind::Protocol);
        assert!(error.hint_text().unwrap().contains("source.binary = false"));
        let error = types.text(2205, b"\0\0\0\x01").unwrap_err();
        assert_eq!(error.to_string(), "type 2205 cannot be rendered from binary");
        // Cut short, too long, or of another shape.
        for (type_oid, value) in [
            (oid::INT4, &b"\0\0\0"[..]),
            (oid::INT4, b"\0\0\0\0\0"),
            (oid::UUID, b"short"),
            (oid::NUMERIC, b"\0\x05\0\0\0\0\0\0"),
            (oid::JSONB, b"\x02{}"),
            (869, b"\x02\x20\0\x05abcde"),
            (1007, b"\0\0\0\x01\0\0\0\0\0\0\0\x17\x7f\xff\xff\xff\0\0\0\x01"),
            (1007, b"\0\0\0\x07\0\0\0\0\0\0\0\x17"),
            (1007, b"\0\0\0\x01\0\0\0\0\0\0\0\x17\0\0\0\0\0\0\0\x01"),
            (3904, b"\x02\0\0\0\x04"),
            (4451, b"\x7f\xff\xff\xff"),
        ] {
            assert!(types.text(type_oid, value).is_err(), "{type_oid} {value:?}");
        }
    }

    #[test]
    fn text_is_borrowed() {
        let types = Types::default();
        assert!(matches!(types.text(oid::TEXT, b"x"), Ok(Cow::Borrowed(b"x"))));
        assert!(matches!(types.text(oid::JSONB, b"\x01{}"), Ok(Cow::Borrowed(b"{}"))));
    }
}
