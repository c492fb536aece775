//! Points, and what is made of them.

use super::{Read, number};
use crate::error::Result;

const POINT: u32 = 600;
const LSEG: u32 = 601;
const PATH: u32 = 602;
const BOX: u32 = 603;
const POLYGON: u32 = 604;
const LINE: u32 = 628;
const CIRCLE: u32 = 718;

/// Whether the type is one of these; then its value is written.
pub(super) fn write(out: &mut Vec<u8>, type_oid: u32, read: &mut Read<'_>) -> Result<bool> {
    match type_oid {
        POINT => point(out, read)?,
        LSEG => points(out, read, 2, Some(b"[]"))?,
        BOX => points(out, read, 2, None)?,
        PATH => {
            let is_closed = read.u8()? != 0;
            let count = read.count()?;
            points(out, read, count, Some(if is_closed { b"()" } else { b"[]" }))?;
        }
        POLYGON => {
            let count = read.count()?;
            points(out, read, count, Some(b"()"))?;
        }
        LINE => {
            out.push(b'{');
            floats(out, read, 3)?;
            out.push(b'}');
        }
        CIRCLE => {
            out.push(b'<');
            point(out, read)?;
            out.push(b',');
            floats(out, read, 1)?;
            out.push(b'>');
        }
        _ => return Ok(false),
    }
    Ok(true)
}

fn points(
    out: &mut Vec<u8>,
    read: &mut Read<'_>,
    count: usize,
    around: Option<&[u8; 2]>,
) -> Result<()> {
    out.extend(around.map(|[open, _]| *open));
    for index in 0..count {
        if index > 0 {
            out.push(b',');
        }
        point(out, read)?;
    }
    out.extend(around.map(|[_, close]| *close));
    Ok(())
}

fn point(out: &mut Vec<u8>, read: &mut Read<'_>) -> Result<()> {
    out.push(b'(');
    floats(out, read, 2)?;
    out.push(b')');
    Ok(())
}

fn floats(out: &mut Vec<u8>, read: &mut Read<'_>, count: usize) -> Result<()> {
    for index in 0..count {
        if index > 0 {
            out.push(b',');
        }
        number::float8(out, read.f64()?);
    }
    Ok(())
}
