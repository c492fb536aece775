//! A column's Postgres text form as the JSON that Debezium's PostgreSQL connector makes of it,
//! with its converter for JSON and without schemas.
//!
//! The invariants are those of [`super::Shape`]: what is appended is one complete JSON value, or
//! nothing and an error; the text comes from a session with DateStyle ISO, IntervalStyle iso_8601
//! and TimeZone UTC. How a column is written is decided once, in [`Writer::of`].
//!
//! <https://debezium.io/documentation/reference/stable/connectors/postgresql.html>, "Data type
//! mappings".

mod extension;
mod geometry;
mod number;
mod time;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::{Resolved, ValueKind};
use super::{array, bytes, is_number, oid, unexpected, utf8, write_bool, write_string};
use crate::error::Result;

/// How values are written where Debezium has a choice. The names are those of its properties.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValueForms {
    /// `decimal.handling.mode`.
    pub decimal: DecimalHandling,
    /// `time.precision.mode`.
    pub time: TimePrecision,
    /// `interval.handling.mode`.
    pub interval: IntervalHandling,
    /// `binary.handling.mode`.
    pub binary: BinaryHandling,
    /// `hstore.handling.mode`.
    pub hstore: HstoreHandling,
    /// `money.fraction.digits`, at most [`MONEY_DIGITS_MAX`].
    pub money_fraction_digits: u8,
    /// `include.unknown.datatypes`: their text, as `binary` says, instead of no field.
    pub include_unknown: bool,
    /// `unavailable.value.placeholder`.
    pub unavailable: String,
}

/// Maximum of [`ValueForms::money_fraction_digits`].
pub const MONEY_DIGITS_MAX: u8 = 18;

impl Default for ValueForms {
    fn default() -> Self {
        Self {
            decimal: DecimalHandling::Precise,
            time: TimePrecision::Adaptive,
            interval: IntervalHandling::Numeric,
            binary: BinaryHandling::Bytes,
            hstore: HstoreHandling::Json,
            money_fraction_digits: 2,
            include_unknown: false,
            unavailable: "__debezium_unavailable_value".to_owned(),
        }
    }
}

/// `numeric` and `money`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DecimalHandling {
    /// The unscaled number's bytes, big-endian two's complement, in base64.
    Precise,
    /// A number, rounded to a double.
    Double,
    /// A string with its digits.
    String,
}

/// `date`, `time` and `timestamp`; the types with a zone are strings in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimePrecision {
    /// Milliseconds or microseconds, whatever the column has.
    Adaptive,
    /// The same, and `time` always in microseconds.
    AdaptiveTimeMicroseconds,
    /// Milliseconds.
    Connect,
    /// Strings.
    IsoString,
    /// Microseconds.
    Microseconds,
    /// Nanoseconds.
    Nanoseconds,
}

/// `interval`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IntervalHandling {
    /// Microseconds; a month has 365.25 / 12 days.
    Numeric,
    /// `P1Y2M3DT4H5M6.78S`.
    String,
}

/// `bytea`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BinaryHandling {
    /// Bytes, which are base64 in JSON.
    Bytes,
    /// A string: base64.
    Base64,
    /// A string: base64 with `-` and `_`.
    Base64UrlSafe,
    /// A string: two digits for each byte.
    Hex,
}

/// `hstore`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HstoreHandling {
    /// A string with a JSON object in it.
    Json,
    /// An object.
    Map,
}

/// How the values of a column are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Writer {
    element: Element,
    /// It is an array of these, with this between two of them.
    delimiter: Option<u8>,
}

/// One value that is not an array.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Element {
    Bool,
    /// `bit(1)`.
    Bit,
    Bits,
    Integer,
    Float,
    Text,
    Bytes(BinaryHandling),
    /// The text of a type that Debezium does not know, as bytes.
    Unknown(BinaryHandling),
    /// With the scale of the column, if it has one.
    Numeric(DecimalHandling, Option<i16>),
    Money(DecimalHandling, u8),
    Date(time::Unit),
    Time(time::Unit),
    Timestamp(time::Unit),
    /// With the number of digits that seconds have after the decimal point.
    TimestampTz(u8),
    TimeTz,
    Interval(IntervalHandling),
    Geometric(geometry::Figure),
    Hstore(HstoreHandling),
    /// PostGIS.
    Ewkb,
    /// pgvector; of floats that are half as long, or not.
    Vector {
        is_half: bool,
    },
    SparseVector,
}

impl Writer {
    /// How a column with this type and type modifier is written; absent for a type that Debezium
    /// does not know, whose columns it leaves out.
    pub fn of(type_oid: u32, modifier: i32, values: &ValueForms) -> Option<Self> {
        let (element, delimiter) = match oid::element_of(type_oid) {
            Some(_) => {
                let element = oid::precise_element_of(type_oid)?;
                if has_no_array(element) {
                    return None;
                }
                (element, Some(if element == oid::BOX { b';' } else { b',' }))
            }
            None => (type_oid, None),
        };
        let element = match (Element::of(element, modifier, values), values.include_unknown) {
            (Some(element), _) => element,
            (None, true) => Element::Unknown(values.binary),
            (None, false) => return None,
        };
        Some(Self { element, delimiter })
    }

    /// The same for a column of a type that users or extensions made.
    pub fn of_user_type(of: Resolved, values: &ValueForms) -> Option<Self> {
        let known = match of.kind {
            ValueKind::BuiltIn(element) => Element::of(element, of.modifier, values),
            ValueKind::Text => Some(Element::Text),
            ValueKind::Hstore => Some(Element::Hstore(values.hstore)),
            ValueKind::Ewkb => Some(Element::Ewkb),
            ValueKind::Vector => Some(Element::Vector { is_half: false }),
            ValueKind::HalfVector => Some(Element::Vector { is_half: true }),
            ValueKind::SparseVector => Some(Element::SparseVector),
            ValueKind::Unknown => None,
        };
        if let ValueKind::BuiltIn(element) = of.kind
            && of.arrays > 0
            && has_no_array(element)
        {
            return None;
        }
        // An array whose elements are of a domain over an array has no schema there.
        let known = known.filter(|_| of.arrays <= 1);
        let element =
            known.or(values.include_unknown.then_some(Element::Unknown(values.binary)))?;
        let is_array = of.arrays == 1;
        Some(Self { element, delimiter: is_array.then_some(of.delimiter) })
    }

    /// Whether what the other one writes is read in the same way.
    pub fn is_like(self, other: Self) -> bool {
        let is_like = match (self.element, other.element) {
            (Element::Numeric(one, _), Element::Numeric(other, _))
                if one != DecimalHandling::Precise =>
            {
                one == other
            }
            (Element::TimestampTz(_), Element::TimestampTz(_)) => true,
            (one, other) => one == other,
        };
        is_like && self.delimiter == other.delimiter
    }

    /// Appends `text` as one JSON value.
    ///
    /// # Errors
    /// `Kind::Event` when `text` is not what the type's output function writes, or when it is a
    /// value that this way of writing has no place for. Nothing is appended then.
    pub fn write(self, out: &mut Vec<u8>, text: &[u8]) -> Result<()> {
        let start = out.len();
        let written = match self.delimiter {
            None => self.element.write(out, text),
            Some(delimiter) => {
                let element = |out: &mut Vec<u8>, text: &[u8]| self.element.write(out, text);
                array::write_elements(out, delimiter, text, element)
            }
        };
        if written.is_err() {
            out.truncate(start);
        }
        written
    }

    /// Appends what stands for a value that the change did not touch and Postgres did not send.
    pub fn write_unavailable(self, out: &mut Vec<u8>, values: &ValueForms) {
        let placeholder = &values.unavailable;
        match (self.delimiter, self.element) {
            // Arrays of integers hold its bytes, one by one; days are integers.
            (Some(_), Element::Integer | Element::Date(time::Unit::Days)) => {
                let bytes: Vec<String> = placeholder.bytes().map(|b| b.to_string()).collect();
                out.extend_from_slice(format!("[{}]", bytes.join(",")).as_bytes());
            }
            (Some(_), _) => {
                out.push(b'[');
                write_string(out, placeholder);
                out.push(b']');
            }
            (None, Element::Bytes(BinaryHandling::Bytes)) => {
                write_string(out, &STANDARD.encode(placeholder));
            }
            (None, Element::Hstore(handling)) => {
                extension::write_hstore_unavailable(out, placeholder, handling);
            }
            (None, Element::Ewkb) => extension::write_ewkb_unavailable(out),
            (None, _) => write_string(out, placeholder),
        }
    }
}

impl Element {
    fn of(type_oid: u32, modifier: i32, values: &ValueForms) -> Option<Self> {
        use geometry::Figure;
        use time::Unit;
        let known = match type_oid {
            oid::BOOL => Element::Bool,
            oid::BIT | oid::VARBIT if modifier == 1 => Element::Bit,
            oid::BIT | oid::VARBIT => Element::Bits,
            oid::INT2 | oid::INT4 | oid::INT8 | oid::OID => Element::Integer,
            oid::FLOAT4 | oid::FLOAT8 => Element::Float,
            oid::BYTEA => Element::Bytes(values.binary),
            oid::NUMERIC => Element::Numeric(values.decimal, number::scale(modifier)),
            oid::MONEY => Element::Money(values.decimal, values.money_fraction_digits),
            oid::DATE => Element::Date(Unit::of_date(values.time)),
            oid::TIME => Element::Time(Unit::of_time(values.time, modifier)),
            oid::TIMESTAMP => Element::Timestamp(Unit::of_timestamp(values.time, modifier)),
            oid::TIMESTAMPTZ => Element::TimestampTz(time::digits(modifier)),
            oid::TIMETZ => Element::TimeTz,
            oid::INTERVAL => Element::Interval(values.interval),
            oid::POINT => Element::Geometric(Figure::Point),
            oid::LSEG => Element::Geometric(Figure::Lseg),
            oid::PATH => Element::Geometric(Figure::Path),
            oid::BOX => Element::Geometric(Figure::Box),
            oid::POLYGON => Element::Geometric(Figure::Polygon),
            oid::LINE => Element::Geometric(Figure::Line),
            oid::CIRCLE => Element::Geometric(Figure::Circle),
            _ if is_text(type_oid) => Element::Text,
            _ => return None,
        };
        Some(known)
    }

    fn write(self, out: &mut Vec<u8>, text: &[u8]) -> Result<()> {
        match self {
            Element::Bool => write_bool(out, text),
            Element::Bit => match text {
                b"1" => super::append(out, b"true"),
                b"0" => super::append(out, b"false"),
                _ => Err(unexpected(text, "0 or 1")),
            },
            Element::Bits => number::write_bits(out, text),
            Element::Integer if is_number(text, false) => super::append(out, text),
            Element::Float if is_number(text, true) => super::append(out, text),
            Element::Float if matches!(text, b"NaN" | b"Infinity" | b"-Infinity") => {
                write_text(out, text)
            }
            Element::Integer | Element::Float => Err(unexpected(text, "a number")),
            Element::Text => write_text(out, text),
            Element::Bytes(handling) => write_bytes(out, text, handling),
            Element::Unknown(handling) => write_unknown(out, text, handling),
            Element::Numeric(handling, scale) => number::write(out, text, handling, scale),
            Element::Money(handling, digits) => number::write_money(out, text, handling, digits),
            Element::Date(unit) => time::write_date(out, text, unit),
            Element::Time(unit) => time::write_time(out, text, unit),
            Element::Timestamp(unit) => time::write_timestamp(out, text, unit),
            Element::TimestampTz(digits) => time::write_timestamptz(out, text, digits),
            Element::TimeTz => time::write_timetz(out, text),
            Element::Interval(handling) => time::write_interval(out, text, handling),
            Element::Geometric(figure) => geometry::write(out, text, figure),
            Element::Hstore(handling) => extension::write_hstore(out, text, handling),
            Element::Ewkb => extension::write_ewkb(out, text),
            Element::Vector { is_half } => extension::write_vector(out, text, is_half),
            Element::SparseVector => extension::write_sparse_vector(out, text),
        }
    }
}

/// Built-in types whose arrays Debezium leaves out, whatever is configured
/// (`PostgresValueConverter`: "These array types still need to be implemented").
fn has_no_array(element: u32) -> bool {
    const NAME: u32 = 19;
    const XML: u32 = 142;
    const REFCURSOR: u32 = 1790;
    let without = [oid::MONEY, NAME, oid::INTERVAL, oid::VARBIT, XML, oid::POINT, REFCURSOR];
    without.contains(&element)
}

/// Built-in types that are strings there. What is not among them is unknown to Debezium:
/// `tsquery`, `jsonpath`, `pg_lsn`, multiranges, row types and others.
fn is_text(type_oid: u32) -> bool {
    const CHAR: u32 = 18;
    const NAME: u32 = 19;
    const XML: u32 = 142;
    const MACADDR8: u32 = 774;
    const MACADDR: u32 = 829;
    const INET: u32 = 869;
    const CIDR: u32 = 650;
    const TSVECTOR: u32 = 3614;
    const RANGES: [u32; 6] = [3904, 3906, 3908, 3910, 3912, 3926];
    let is_one = matches!(
        type_oid,
        oid::TEXT
            | oid::BPCHAR
            | oid::VARCHAR
            | oid::UUID
            | oid::JSON
            | oid::JSONB
            | CHAR
            | NAME
            | XML
            | MACADDR8
            | MACADDR
            | INET
            | CIDR
            | TSVECTOR
    );
    // A type of a user or an extension that nothing is known of: a row that an earlier version
    // parked.
    is_one || RANGES.contains(&type_oid) || type_oid >= oid::FIRST_USER
}

fn write_text(out: &mut Vec<u8>, text: &[u8]) -> Result<()> {
    write_string(out, utf8(text)?);
    Ok(())
}

fn write_bytes(out: &mut Vec<u8>, text: &[u8], handling: BinaryHandling) -> Result<()> {
    let start = out.len();
    match handling {
        BinaryHandling::Bytes | BinaryHandling::Base64 => bytes::write(out, text),
        BinaryHandling::Base64UrlSafe => {
            bytes::write(out, text)?;
            make_url_safe(&mut out[start..]);
            Ok(())
        }
        BinaryHandling::Hex => match text.strip_prefix(b"\\x") {
            Some(hex) if hex.iter().all(u8::is_ascii_hexdigit) => write_text(out, hex),
            Some(_) | None => Err(unexpected(text, "bytea in hex form")),
        },
    }
}

fn write_unknown(out: &mut Vec<u8>, text: &[u8], handling: BinaryHandling) -> Result<()> {
    let start = out.len();
    match handling {
        BinaryHandling::Bytes | BinaryHandling::Base64 => {
            write_string(out, &STANDARD.encode(text));
        }
        BinaryHandling::Base64UrlSafe => {
            write_string(out, &STANDARD.encode(text));
            make_url_safe(&mut out[start..]);
        }
        BinaryHandling::Hex => {
            let hex: String = text.iter().map(|byte| format!("{byte:02x}")).collect();
            write_string(out, &hex);
        }
    }
    Ok(())
}

fn make_url_safe(base64: &mut [u8]) {
    for byte in base64 {
        match byte {
            b'+' => *byte = b'-',
            b'/' => *byte = b'_',
            _ => {}
        }
    }
}

/// A double as Java's JSON has it: what is not a number is a string.
fn write_double(out: &mut Vec<u8>, number: f64) {
    use std::io::Write as _;
    // Writing to a vector cannot fail.
    let _ = match number {
        n if n.is_nan() => out.write_all(b"\"NaN\""),
        f64::INFINITY => out.write_all(b"\"Infinity\""),
        f64::NEG_INFINITY => out.write_all(b"\"-Infinity\""),
        n => write!(out, "{n:?}"),
    };
}

#[cfg(test)]
mod tests;
