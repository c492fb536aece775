//! Geometric types, most of them as well-known binary.
//!
//! <https://www.ogc.org/standards/sfa/>: byte order 1 is little-endian.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::write_double;
use crate::column::{unexpected, write_string};
use crate::error::Result;

/// A built-in geometric type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Figure {
    Point,
    Lseg,
    Path,
    Box,
    Polygon,
    Line,
    Circle,
}

const POINT: u32 = 1;
const LINE_STRING: u32 = 2;
const POLYGON: u32 = 3;

/// A figure in the text form of its type: numbers between brackets of all kinds.
pub(super) fn write(out: &mut Vec<u8>, text: &[u8], figure: Figure) -> Result<()> {
    let wrong = || unexpected(text, "a geometric value");
    let numbers = numbers(text).ok_or_else(wrong)?;
    let (points, []) = numbers.as_chunks::<2>() else {
        return match (figure, &numbers[..]) {
            (Figure::Circle, [x, y, radius]) => {
                out.extend_from_slice(b"{\"center\":");
                write_point(out, [*x, *y]);
                write_fields(out, &[("radius", *radius)], b',');
                Ok(())
            }
            (Figure::Line, [a, b, c]) => {
                write_fields(out, &[("a", *a), ("b", *b), ("c", *c)], b'{');
                Ok(())
            }
            _ => Err(wrong()),
        };
    };
    match (figure, points) {
        (Figure::Point, [point]) => write_point(out, *point),
        (Figure::Lseg, [_, _]) => write_geometry(out, &line_string(points), &[("type", "lseg")]),
        (Figure::Path, [_, ..]) => {
            let closed = if text.starts_with(b"(") { "true" } else { "false" };
            let extensions = [("type", "path"), ("closed", closed)];
            write_geometry(out, &line_string(points), &extensions);
        }
        (Figure::Box, [[x1, y1], [x2, y2]]) => {
            let ring = [[*x1, *y1], [*x1, *y2], [*x2, *y2], [*x2, *y1], [*x1, *y1]];
            write_geometry(out, &polygon(&ring), &[("type", "box")]);
        }
        (Figure::Polygon, [first, .., last]) => {
            let mut ring = points.to_vec();
            if first != last {
                ring.push(*first);
            }
            write_geometry(out, &polygon(&ring), &[("type", "polygon")]);
        }
        (Figure::Polygon, [_]) => write_geometry(out, &polygon(points), &[("type", "polygon")]),
        _ => return Err(wrong()),
    }
    Ok(())
}

fn numbers(text: &[u8]) -> Option<Vec<f64>> {
    let text = std::str::from_utf8(text).ok()?;
    let parts = text.split(|c: char| "()[]{}<>,".contains(c)).filter(|part| !part.is_empty());
    parts.map(|part| part.parse().ok()).collect()
}

/// `{"x":1.0,"y":2.0,"wkb":"…","srid":null}`.
fn write_point(out: &mut Vec<u8>, [x, y]: [f64; 2]) {
    write_fields(out, &[("x", x), ("y", y)], b'{');
    out.pop();
    out.extend_from_slice(b",\"wkb\":");
    let mut wkb = header(POINT);
    put(&mut wkb, &[[x, y]]);
    write_string(out, &STANDARD.encode(&wkb));
    out.extend_from_slice(b",\"srid\":null}");
}

fn write_fields(out: &mut Vec<u8>, fields: &[(&str, f64)], opening: u8) {
    let mut before = opening;
    for (name, value) in fields {
        out.push(before);
        before = b',';
        write_string(out, name);
        out.push(b':');
        write_double(out, *value);
    }
    out.push(b'}');
}

/// `{"wkb":"…","srid":null,"extensions":{"type":"box"}}`.
fn write_geometry(out: &mut Vec<u8>, wkb: &[u8], extensions: &[(&str, &str)]) {
    out.extend_from_slice(b"{\"wkb\":");
    write_string(out, &STANDARD.encode(wkb));
    out.extend_from_slice(b",\"srid\":null,\"extensions\":");
    let mut before = b'{';
    for (name, value) in extensions {
        out.push(before);
        before = b',';
        write_string(out, name);
        out.push(b':');
        write_string(out, value);
    }
    out.extend_from_slice(b"}}");
}

fn line_string(points: &[[f64; 2]]) -> Vec<u8> {
    let mut wkb = header(LINE_STRING);
    put_ring(&mut wkb, points);
    wkb
}

fn polygon(ring: &[[f64; 2]]) -> Vec<u8> {
    let mut wkb = header(POLYGON);
    // One ring: no holes.
    wkb.extend_from_slice(&1_u32.to_le_bytes());
    put_ring(&mut wkb, ring);
    wkb
}

fn header(kind: u32) -> Vec<u8> {
    let mut wkb = vec![1];
    wkb.extend_from_slice(&kind.to_le_bytes());
    wkb
}

fn put_ring(wkb: &mut Vec<u8>, points: &[[f64; 2]]) {
    // A value has less than 1 GiB of text.
    wkb.extend_from_slice(&(points.len() as u32).to_le_bytes());
    put(wkb, points);
}

fn put(wkb: &mut Vec<u8>, points: &[[f64; 2]]) {
    wkb.extend(points.iter().flatten().flat_map(|number| number.to_le_bytes()));
}
