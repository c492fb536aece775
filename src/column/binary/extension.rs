//! Types of extensions.

use super::{Read, number, put, wrong};
use crate::column::Extension;
use crate::error::Result;

/// Writes one value.
pub(super) fn write(out: &mut Vec<u8>, extension: Extension, value: &[u8]) -> Result<()> {
    let mut read = Read(value, "value of an extension's type");
    match extension {
        Extension::Hstore => hstore(out, &mut read)?,
        Extension::VersionedText => match read.u8()? {
            1 => out.extend_from_slice(read.rest()),
            _ => return Err(wrong("ltree of version 1")),
        },
        Extension::Cube => cube(out, &mut read)?,
        Extension::Ewkb => {
            let start = out.len();
            super::hex(out, read.rest());
            out[start..].make_ascii_uppercase();
        }
        Extension::Vector => vector(out, &mut read, |read| read.u32().map(f32::from_bits))?,
        Extension::HalfVector => vector(out, &mut read, |read| read.u16().map(half))?,
        Extension::SparseVector => sparse_vector(out, &mut read)?,
    }
    read.end()
}

/// The count of pairs, then length and bytes of each key and value; all in quotes but null.
fn hstore(out: &mut Vec<u8>, read: &mut Read<'_>) -> Result<()> {
    for index in 0..read.count()? {
        if index > 0 {
            out.extend_from_slice(b", ");
        }
        quoted(out, read.field()?.ok_or_else(|| wrong("hstore"))?);
        out.extend_from_slice(b"=>");
        match read.field()? {
            Some(value) => quoted(out, value),
            None => out.extend_from_slice(b"NULL"),
        }
    }
    Ok(())
}

fn quoted(out: &mut Vec<u8>, text: &[u8]) {
    out.push(b'"');
    for byte in text {
        if matches!(byte, b'"' | b'\\') {
            out.push(b'\\');
        }
        out.push(*byte);
    }
    out.push(b'"');
}

/// The number of dimensions, with a bit for a cube that is a point, then one corner or two.
fn cube(out: &mut Vec<u8>, read: &mut Read<'_>) -> Result<()> {
    const POINT: u32 = 1 << 31;
    let header = read.u32()?;
    let corners = if header & POINT != 0 { 1 } else { 2 };
    for corner in 0..corners {
        out.extend_from_slice(if corner == 0 { b"(" } else { b",(" });
        for index in 0..header & !POINT {
            if index > 0 {
                out.extend_from_slice(b", ");
            }
            number::float8(out, read.f64()?);
        }
        out.push(b')');
    }
    Ok(())
}

/// The number of dimensions, two unused bytes, then the elements.
fn vector(
    out: &mut Vec<u8>,
    read: &mut Read<'_>,
    element: impl Fn(&mut Read<'_>) -> Result<f32>,
) -> Result<()> {
    let (dimensions, _unused) = (read.u16()?, read.u16()?);
    out.push(b'[');
    for index in 0..dimensions {
        if index > 0 {
            out.push(b',');
        }
        number::float4(out, element(read)?);
    }
    out.push(b']');
    Ok(())
}

/// The number of dimensions, how many are not zero, four unused bytes, the indexes of these from 0
/// on, and their values. The text counts from 1.
fn sparse_vector(out: &mut Vec<u8>, read: &mut Read<'_>) -> Result<()> {
    let (dimensions, count, _unused) = (read.i32()?, read.u32()?, read.i32()?);
    let len = usize::try_from(count).ok().and_then(|count| count.checked_mul(4));
    let mut indexes = Read(read.take(len.ok_or_else(|| wrong("sparsevec"))?)?, "sparsevec");
    out.push(b'{');
    for index in 0..count {
        if index > 0 {
            out.push(b',');
        }
        put(out, format_args!("{}:", i64::from(indexes.i32()?) + 1));
        number::float4(out, f32::from_bits(read.u32()?));
    }
    put(out, format_args!("}}/{dimensions}"));
    Ok(())
}

/// A float of 16 bits (IEEE 754 binary16), exactly.
fn half(bits: u16) -> f32 {
    let sign = u32::from(bits >> 15) << 31;
    let exponent = u32::from(bits >> 10 & 0x1F);
    let mantissa = u32::from(bits & 0x3FF);
    let magnitude = match (exponent, mantissa) {
        (0, mantissa) => (mantissa as f32 * 2_f32.powi(-24)).to_bits(),
        (0x1F, mantissa) => 0xFF << 23 | mantissa << 13,
        (exponent, mantissa) => (exponent + 112) << 23 | mantissa << 13,
    };
    f32::from_bits(sign | magnitude)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(extension: Extension, value: &[u8]) -> String {
        let mut out = Vec::new();
        write(&mut out, extension, value).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn vectors_are_written_as_pgvector_writes_them() {
        let mut value = vec![0, 3, 0, 0];
        for element in [1.0_f32, -0.5, 3e38] {
            value.extend_from_slice(&element.to_be_bytes());
        }
        assert_eq!(text(Extension::Vector, &value), "[1,-0.5,3e+38]");
        let halves = [0, 5, 0, 0, 0x3C, 0, 0xC0, 0, 0x7B, 0xFF, 0, 1, 0x80, 0];
        assert_eq!(text(Extension::HalfVector, &halves), "[1,-2,65504,5.9604645e-08,-0]");
        let mut sparse = [5_i32, 2, 0, 0, 3].map(i32::to_be_bytes).concat();
        for element in [1.5_f32, 2.0] {
            sparse.extend_from_slice(&element.to_be_bytes());
        }
        assert_eq!(text(Extension::SparseVector, &sparse), "{1:1.5,4:2}/5");
    }

    #[test]
    fn what_is_cut_short_is_an_error() {
        for (extension, value) in [
            (Extension::Hstore, &b"\0\0\0\x01\0\0\0\x01a"[..]),
            (Extension::Hstore, b"\x7f\xff\xff\xff"),
            (Extension::VersionedText, b"\x02a.b"),
            (Extension::Cube, b"\x7f\xff\xff\xff"),
            (Extension::Vector, b"\0\x02\0\0\0\0\0\0"),
            (Extension::SparseVector, b"\0\0\0\x02\xff\xff\xff\xff\0\0\0\0"),
        ] {
            assert!(write(&mut Vec::new(), extension, value).is_err(), "{value:?}");
        }
    }
}
