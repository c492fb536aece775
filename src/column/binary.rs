//! A value's binary form (`*send`) as the text form (`*out`) of the same value. Pure.
//!
//! With `source.binary` Postgres sends values in binary, so that rows pass whose text form is
//! above 1 GB. Everything behind this file knows text only, and messages are byte for byte those
//! of text mode. The text is that of a session with DateStyle ISO, IntervalStyle iso_8601,
//! TimeZone UTC, extra_float_digits 3 and bytea_output hex.
//!
//! A type without a renderer is an error, never a guess.

mod number;
mod time;

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};

use super::oid;
use crate::error::{Error, Result};

/// Bytes of a value above which it is not rendered: no broker takes a larger message
/// (<https://www.rabbitmq.com/docs/configure>, `max_message_size`).
pub const VALUE_MAX: usize = 512 << 20;
/// Domains over domains, arrays of ranges and the like: deeper is hostile.
const DEPTH_MAX: usize = 16;

/// How a user's type is sent, by its send function in the catalog.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UserType {
    /// Text in binary too: enums, `citext`.
    Text,
    /// The form of this type.
    Domain(u32),
    /// An array; its element type comes with each value.
    Array,
    /// A range of this type.
    Range(u32),
    /// A multirange of this type.
    Multirange(u32),
    /// A type without a renderer, such as a row type.
    Opaque,
}

impl UserType {
    /// By the name of the send function; `related` is the base type of a domain and the subtype of
    /// a range.
    pub fn of(send_function: &str, related: u32) -> Self {
        match send_function {
            "enum_send" | "textsend" | "citextsend" => UserType::Text,
            "array_send" => UserType::Array,
            "range_send" => UserType::Range(related),
            "multirange_send" => UserType::Multirange(related),
            _ => UserType::Opaque,
        }
    }
}

/// The types of users and extensions, by OID; they differ in every database.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Types(pub HashMap<u32, UserType>);

/// Types from here on are made by users and extensions (`FirstNormalObjectId`,
/// `src/include/access/transam.h`).
const FIRST_USER_OID: u32 = 16_384;

impl Types {
    /// It is built in, or was there when the types were read.
    pub fn knows(&self, type_oid: u32) -> bool {
        type_oid < FIRST_USER_OID || self.0.contains_key(&type_oid)
    }

    /// The text form of `value`, borrowed where both forms are the same bytes.
    ///
    /// # Errors
    /// `Kind::Event` for a type without a renderer, for a value that is too large, and for bytes
    /// that are no value of the type.
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
        const NAME: u32 = 19;
        const UNKNOWN: u32 = 705;
        match type_oid {
            oid::TEXT | oid::VARCHAR | oid::BPCHAR | oid::JSON | NAME | UNKNOWN => Ok(Some(value)),
            oid::JSONB => match value {
                [1, json @ ..] => Ok(Some(json)),
                _ => Err(wrong("jsonb")),
            },
            _ => match self.0.get(&type_oid) {
                Some(UserType::Text) => Ok(Some(value)),
                Some(UserType::Domain(base)) => self.same(*base, value),
                _ => Ok(None),
            },
        }
    }

    fn write(&self, out: &mut Vec<u8>, type_oid: u32, value: &[u8], depth: usize) -> Result<()> {
        if depth > DEPTH_MAX {
            return Err(Error::event("a value is nested too deeply"));
        }
        if let Some(same) = self.same(type_oid, value)? {
            out.extend_from_slice(same);
            return Ok(());
        }
        let user = match oid::element_of(type_oid) {
            Some(_) => Some(UserType::Array),
            None => range_of(type_oid).or_else(|| self.0.get(&type_oid).copied()),
        };
        match user {
            Some(UserType::Text) => Ok(()),
            Some(UserType::Domain(base)) => self.write(out, base, value, depth + 1),
            Some(UserType::Array) => self.array(out, value, depth),
            Some(UserType::Range(subtype)) => self.range(out, subtype, value, depth),
            Some(UserType::Multirange(subtype)) => self.multirange(out, subtype, value, depth),
            Some(UserType::Opaque) | None => scalar(out, type_oid, value),
        }
    }

    /// Dimensions, a flag, the element type, length and lower bound of each dimension, elements.
    fn array(&self, out: &mut Vec<u8>, value: &[u8], depth: usize) -> Result<()> {
        const DIMENSIONS_MAX: usize = 6;
        let mut read = Read(value, "array");
        let dimensions = usize::try_from(read.i32()?).map_err(|_| wrong("array"))?;
        let _has_nulls = read.i32()?;
        let element = read.u32()?;
        if dimensions > DIMENSIONS_MAX {
            return Err(wrong("array"));
        }
        let mut lengths = Vec::new();
        let mut bounds = String::new();
        for _ in 0..dimensions {
            let (length, lower) = (read.i32()?, read.i32()?);
            let upper = i64::from(lower) + i64::from(length) - 1;
            let _ = write!(bounds, "[{lower}:{upper}]");
            // An empty array has no dimensions at all.
            let length = usize::try_from(length).ok().filter(|length| *length > 0);
            lengths.push((length.ok_or_else(|| wrong("array"))?, lower));
        }
        if lengths.is_empty() {
            out.extend_from_slice(b"{}");
            return read.end();
        }
        if lengths.iter().any(|(_, lower)| *lower != 1) {
            out.extend_from_slice(bounds.as_bytes());
            out.push(b'=');
        }
        let lengths: Vec<usize> = lengths.into_iter().map(|(length, _)| length).collect();
        self.dimension(out, &mut read, element, &lengths, depth)?;
        read.end()
    }

    fn dimension(
        &self,
        out: &mut Vec<u8>,
        read: &mut Read<'_>,
        element: u32,
        lengths: &[usize],
        depth: usize,
    ) -> Result<()> {
        out.push(b'{');
        let (length, inner) = lengths.split_first().ok_or_else(|| wrong("array"))?;
        let mut text = Vec::new();
        for index in 0..*length {
            if index > 0 {
                out.push(b',');
            }
            if !inner.is_empty() {
                self.dimension(out, read, element, inner, depth)?;
                continue;
            }
            match read.field()? {
                None => out.extend_from_slice(b"NULL"),
                Some(value) => {
                    text.clear();
                    self.write(&mut text, element, value, depth + 1)?;
                    quote_element(out, &text);
                }
            }
        }
        out.push(b'}');
        Ok(())
    }

    /// A byte of flags, then the bounds that are there.
    fn range(&self, out: &mut Vec<u8>, subtype: u32, value: &[u8], depth: usize) -> Result<()> {
        const EMPTY: u8 = 0x01;
        const LOWER_INCLUSIVE: u8 = 0x02;
        const UPPER_INCLUSIVE: u8 = 0x04;
        const LOWER_INFINITE: u8 = 0x08;
        const UPPER_INFINITE: u8 = 0x10;
        let mut read = Read(value, "range");
        let flags = read.u8()?;
        if flags & EMPTY != 0 {
            out.extend_from_slice(b"empty");
            return read.end();
        }
        out.push(if flags & LOWER_INCLUSIVE != 0 { b'[' } else { b'(' });
        let mut text = Vec::new();
        for (infinite, after) in [(LOWER_INFINITE, b','), (UPPER_INFINITE, b'\0')] {
            if flags & infinite == 0 {
                let bound = read.field()?.ok_or_else(|| wrong("range"))?;
                text.clear();
                self.write(&mut text, subtype, bound, depth + 1)?;
                quote_bound(out, &text);
            }
            if after != 0 {
                out.push(after);
            }
        }
        out.push(if flags & UPPER_INCLUSIVE != 0 { b']' } else { b')' });
        read.end()
    }

    fn multirange(
        &self,
        out: &mut Vec<u8>,
        subtype: u32,
        value: &[u8],
        depth: usize,
    ) -> Result<()> {
        let mut read = Read(value, "multirange");
        out.push(b'{');
        for index in 0..read.i32()? {
            if index > 0 {
                out.push(b',');
            }
            let range = read.field()?.ok_or_else(|| wrong("multirange"))?;
            self.range(out, subtype, range, depth + 1)?;
        }
        out.push(b'}');
        read.end()
    }
}

/// The built-in ranges and multiranges, whose OIDs are fixed.
fn range_of(type_oid: u32) -> Option<UserType> {
    Some(match type_oid {
        3904 => UserType::Range(oid::INT4),
        3906 => UserType::Range(oid::NUMERIC),
        3908 => UserType::Range(oid::TIMESTAMP),
        3910 => UserType::Range(oid::TIMESTAMPTZ),
        3912 => UserType::Range(oid::DATE),
        3926 => UserType::Range(oid::INT8),
        4451 => UserType::Multirange(oid::INT4),
        4532 => UserType::Multirange(oid::NUMERIC),
        4533 => UserType::Multirange(oid::TIMESTAMP),
        4534 => UserType::Multirange(oid::TIMESTAMPTZ),
        4535 => UserType::Multirange(oid::DATE),
        4536 => UserType::Multirange(oid::INT8),
        _ => return None,
    })
}

/// The OIDs of types that only this file tells apart.
mod rare {
    pub(super) const CHAR: u32 = 18;
    pub(super) const XID: u32 = 28;
    pub(super) const CIDR: u32 = 650;
    pub(super) const MACADDR8: u32 = 774;
    pub(super) const MACADDR: u32 = 829;
    pub(super) const INET: u32 = 869;
    pub(super) const BIT: u32 = 1560;
    pub(super) const VARBIT: u32 = 1562;
    pub(super) const PG_LSN: u32 = 3220;
    pub(super) const XID8: u32 = 5069;
}

/// `array_out`: in quotes what could be taken for something else.
fn quote_element(out: &mut Vec<u8>, text: &[u8]) {
    let special = |byte: &u8| matches!(byte, b'"' | b'\\' | b'{' | b'}' | b',') || is_space(byte);
    let plain =
        !text.is_empty() && !text.eq_ignore_ascii_case(b"NULL") && !text.iter().any(special);
    if plain {
        return out.extend_from_slice(text);
    }
    out.push(b'"');
    for byte in text {
        if matches!(byte, b'"' | b'\\') {
            out.push(b'\\');
        }
        out.push(*byte);
    }
    out.push(b'"');
}

/// `range_out`: in quotes what could be taken for something else, quotes and backslashes doubled.
fn quote_bound(out: &mut Vec<u8>, text: &[u8]) {
    let special = |byte: &u8| {
        matches!(byte, b'"' | b'\\' | b'(' | b')' | b'[' | b']' | b',') || is_space(byte)
    };
    if !text.is_empty() && !text.iter().any(special) {
        return out.extend_from_slice(text);
    }
    out.push(b'"');
    for byte in text {
        if matches!(byte, b'"' | b'\\') {
            out.push(*byte);
        }
        out.push(*byte);
    }
    out.push(b'"');
}

/// Space as the server's parsers of arrays and ranges see it.
fn is_space(byte: &u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r' | 0x0B | 0x0C)
}

fn scalar(out: &mut Vec<u8>, type_oid: u32, value: &[u8]) -> Result<()> {
    let mut read = Read(value, "value");
    match type_oid {
        oid::BOOL => out.push(if read.u8()? != 0 { b't' } else { b'f' }),
        oid::INT2 => put(out, read.i16()?),
        oid::INT4 => put(out, read.i32()?),
        oid::INT8 => put(out, read.i64()?),
        oid::OID | rare::XID => put(out, read.u32()?),
        rare::XID8 => put(out, read.u64()?),
        oid::FLOAT4 => number::float4(out, f32::from_bits(read.u32()?)),
        oid::FLOAT8 => number::float8(out, f64::from_bits(read.u64()?)),
        oid::NUMERIC => number::numeric(out, &mut read)?,
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
        rare::INET | rare::CIDR => inet(out, &mut read)?,
        rare::MACADDR | rare::MACADDR8 => {
            let bytes = read.take(if type_oid == rare::MACADDR { 6 } else { 8 })?;
            put(out, bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(":"));
        }
        rare::BIT | rare::VARBIT => bits(out, &mut read)?,
        rare::PG_LSN => {
            let lsn = read.u64()?;
            put(out, format_args!("{:X}/{:X}", lsn >> 32, lsn & 0xFFFF_FFFF));
        }
        rare::CHAR => match read.u8()? {
            0 => {}
            byte if byte.is_ascii() => out.push(byte),
            _ => return Err(wrong("\"char\"")),
        },
        _ => {
            return Err(Error::event(format!("type {type_oid} cannot be rendered from binary"))
                .hint(
                    "set source.binary = false, or leave the column out of the publication; a \
                     type created after this session began is recognised after a restart",
                ));
        }
    }
    read.end()
}

fn put(out: &mut Vec<u8>, value: impl std::fmt::Display) {
    out.extend_from_slice(value.to_string().as_bytes());
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

/// Family, bits of the mask, whether it is a cidr, length, address.
fn inet(out: &mut Vec<u8>, read: &mut Read<'_>) -> Result<()> {
    const V4: u8 = 2;
    const V6: u8 = 3;
    let (family, bits, is_cidr, len) = (read.u8()?, read.u8()?, read.u8()?, read.u8()?);
    let address = read.take(usize::from(len))?;
    let most = match (family, address) {
        (V4, &[a, b, c, d]) => {
            put(out, Ipv4Addr::new(a, b, c, d));
            32
        }
        (V6, address) => {
            let bytes: [u8; 16] = address.try_into().map_err(|_| wrong("inet"))?;
            // The server writes the last four bytes of such an address as IPv4.
            match bytes {
                [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, a, b, c, d] if (a, b) != (0, 0) => {
                    put(out, format_args!("::{}", Ipv4Addr::new(a, b, c, d)));
                }
                _ => put(out, Ipv6Addr::from(bytes)),
            }
            128
        }
        _ => return Err(wrong("inet")),
    };
    if is_cidr != 0 || bits != most {
        put(out, format_args!("/{bits}"));
    }
    Ok(())
}

/// The number of bits, then the bits from the left.
fn bits(out: &mut Vec<u8>, read: &mut Read<'_>) -> Result<()> {
    let count = usize::try_from(read.i32()?).map_err(|_| wrong("bit"))?;
    let bytes = read.take(count.div_ceil(8))?;
    out.extend((0..count).map(|i| b'0' + (bytes[i / 8] >> (7 - i % 8) & 1)));
    Ok(())
}

fn wrong(what: &str) -> Error {
    Error::event(format!("the bytes are not a valid binary {what}"))
}

/// Takes big-endian numbers off the front; the second is what is read, for errors.
struct Read<'a>(&'a [u8], &'static str);

impl<'a> Read<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(len).ok_or_else(|| wrong(self.1))?;
        self.0 = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        self.take(N)?.try_into().map_err(|_| wrong(self.1))
    }

    fn u8(&mut self) -> Result<u8> {
        self.array().map(u8::from_be_bytes)
    }

    fn i16(&mut self) -> Result<i16> {
        self.array().map(i16::from_be_bytes)
    }

    fn u16(&mut self) -> Result<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn i32(&mut self) -> Result<i32> {
        self.array().map(i32::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn i64(&mut self) -> Result<i64> {
        self.array().map(i64::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A length and as many bytes; `None` for null.
    fn field(&mut self) -> Result<Option<&'a [u8]>> {
        match self.i32()? {
            -1 => Ok(None),
            len => self.take(usize::try_from(len).map_err(|_| wrong(self.1))?).map(Some),
        }
    }

    fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    fn end(&self) -> Result<()> {
        if self.0.is_empty() { Ok(()) } else { Err(wrong(self.1)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(type_oid: u32, value: &[u8]) -> String {
        let types = Types(HashMap::from([
            (20_000, UserType::Text),
            (20_001, UserType::Domain(oid::INT4)),
            (20_002, UserType::Array),
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
        assert_eq!(UserType::of("record_send", 0), UserType::Opaque);
    }

    #[test]
    fn what_cannot_be_rendered_is_an_error_not_a_guess() {
        let types = Types::default();
        let error = types.text(20_003, b"x").unwrap_err();
        assert_eq!(error.to_string(), "type 20003 cannot be rendered from binary");
        assert!(error.hint_text().unwrap().contains("source.binary = false"));
        // Cut short, too long, or of another shape.
        for (type_oid, value) in [
            (oid::INT4, &b"\0\0\0"[..]),
            (oid::INT4, b"\0\0\0\0\0"),
            (oid::UUID, b"short"),
            (oid::NUMERIC, b"\0\x05\0\0\0\0\0\0"),
            (oid::JSONB, b"\x02{}"),
            (rare::INET, b"\x02\x20\0\x05abcde"),
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
