//! The types that have other OIDs in every database: those of users and extensions, and the row
//! types and domains that come with the server. Pure.
//!
//! The invariant: what is kept of a type cannot change while it has its OID. An enum gets more
//! values and a row type more fields, but the element of an array and the base of a domain stay.
//! So what a session read once is right for everything that was written since, and for a backlog
//! from before as long as the type has not been dropped.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::{Form, Shape, oid};

/// Arrays of domains over arrays and the like: deeper ones are sent as text.
pub(super) const DEPTH_MAX: u8 = 16;

/// What a type is, by the catalog.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UserType {
    /// The same bytes in text and in binary: enums, `citext`.
    Text,
    /// The form of this type, with this type modifier.
    Domain(u32, i32),
    /// An array of this type; the byte stands between two elements.
    Array(u32, u8),
    /// A range of this type.
    Range(u32),
    /// A multirange of this type.
    Multirange(u32),
    /// A row type; the types of its fields come with each value in binary.
    Composite,
    /// A type of an extension that we can render from binary.
    Extension(Extension),
    /// Text, and in binary nothing that we know.
    Opaque,
}

/// What a type of users or extensions is made of, for formats that tell types apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolved {
    /// What one value is, or one element of an array.
    pub kind: ValueKind,
    /// Its type modifier. Of a domain over a domain none is known.
    pub modifier: i32,
    /// How many arrays are around one value; see [`Shape::arrays`].
    pub arrays: u8,
    /// Between two elements of these arrays.
    pub delimiter: u8,
}

/// What a value is that is not an array, under all domains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ValueKind {
    /// The built-in type with this OID.
    BuiltIn(u32),
    /// Text: an enum, `citext`, `ltree`, `isbn` and others.
    Text,
    /// `hstore`.
    Hstore,
    /// `geometry` and `geography` of PostGIS.
    Ewkb,
    /// `vector` of pgvector.
    Vector,
    /// `halfvec` of pgvector.
    HalfVector,
    /// `sparsevec` of pgvector.
    SparseVector,
    /// A row type, or a range of a type that is not built in.
    Unknown,
}

/// Types of extensions, by what their send functions write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extension {
    /// `hstore`.
    Hstore,
    /// `ltree`, `lquery`, `ltxtquery`: a byte for the version, then the text.
    VersionedText,
    /// `cube`.
    Cube,
    /// `geometry` and `geography` of PostGIS: EWKB.
    Ewkb,
    /// `vector` of pgvector.
    Vector,
    /// `halfvec` of pgvector.
    HalfVector,
    /// `sparsevec` of pgvector.
    SparseVector,
}

impl UserType {
    /// A type that is neither a domain nor an array, by the name of its send function; `subtype` is
    /// that of a range or multirange.
    pub fn of(send_function: &str, subtype: u32) -> Self {
        match send_function {
            "enum_send" | "textsend" | "citextsend" => UserType::Text,
            "range_send" => UserType::Range(subtype),
            "multirange_send" => UserType::Multirange(subtype),
            "record_send" => UserType::Composite,
            "hstore_send" => UserType::Extension(Extension::Hstore),
            "ltree_send" | "lquery_send" | "ltxtq_send" => {
                UserType::Extension(Extension::VersionedText)
            }
            "cube_send" => UserType::Extension(Extension::Cube),
            "geometry_send" | "geography_send" => UserType::Extension(Extension::Ewkb),
            "vector_send" => UserType::Extension(Extension::Vector),
            "halfvec_send" => UserType::Extension(Extension::HalfVector),
            "sparsevec_send" => UserType::Extension(Extension::SparseVector),
            _ => UserType::Opaque,
        }
    }
}

/// These types, by OID.
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

    /// The type under all domains over it.
    pub fn base_of(&self, type_oid: u32) -> u32 {
        let mut base = type_oid;
        // More steps than there are types would be a circle, which no server has.
        for _ in 0..=self.0.len() {
            match self.0.get(&base) {
                Some(UserType::Domain(of, _)) => base = *of,
                _ => break,
            }
        }
        base
    }

    /// How the values of a type are written as JSON. A type that is not known is text.
    pub fn shape(&self, type_oid: u32) -> Shape {
        let (mut element, mut arrays, mut delimiter) = (self.base_of(type_oid), 0, b',');
        while let Some((of, between)) = self.element_of(element) {
            if arrays == DEPTH_MAX {
                return Shape::TEXT;
            }
            (element, delimiter) = (self.base_of(of), between);
            arrays += 1;
        }
        Shape { form: Form::of(element), arrays, delimiter }
    }

    /// What a type of users or extensions is made of; absent for a built-in type, for one that is
    /// not known, and for text.
    pub fn resolve(&self, type_oid: u32, modifier: i32) -> Option<Resolved> {
        self.0.get(&type_oid)?;
        let under = |type_oid: u32, modifier| match self.0.get(&type_oid) {
            Some(UserType::Domain(_, of_domain)) => (self.base_of(type_oid), *of_domain),
            _ => (type_oid, modifier),
        };
        let (mut of, mut modifier) = under(type_oid, modifier);
        let (mut arrays, mut delimiter) = (0, b',');
        while let Some((element, between)) = self.precise_element_of(of) {
            if arrays == DEPTH_MAX {
                return None;
            }
            ((of, modifier), delimiter) = (under(element, modifier), between);
            arrays += 1;
        }
        let kind = match self.0.get(&of) {
            None => ValueKind::BuiltIn(of),
            Some(UserType::Text | UserType::Opaque) => ValueKind::Text,
            Some(UserType::Extension(Extension::VersionedText | Extension::Cube)) => {
                ValueKind::Text
            }
            Some(UserType::Extension(Extension::Hstore)) => ValueKind::Hstore,
            Some(UserType::Extension(Extension::Ewkb)) => ValueKind::Ewkb,
            Some(UserType::Extension(Extension::Vector)) => ValueKind::Vector,
            Some(UserType::Extension(Extension::HalfVector)) => ValueKind::HalfVector,
            Some(UserType::Extension(Extension::SparseVector)) => ValueKind::SparseVector,
            Some(UserType::Range(_) | UserType::Multirange(_) | UserType::Composite) => {
                ValueKind::Unknown
            }
            // Domains that lead to themselves, which no server has.
            Some(UserType::Domain(..) | UserType::Array(..)) => return None,
        };
        let is_text = kind == ValueKind::Text && arrays == 0;
        (!is_text).then_some(Resolved { kind, modifier, arrays, delimiter })
    }

    /// As [`Self::element_of`], and tells the elements apart that are text there.
    fn precise_element_of(&self, type_oid: u32) -> Option<(u32, u8)> {
        let (_, delimiter) = self.element_of(type_oid)?;
        match self.0.get(&type_oid) {
            Some(UserType::Array(element, _)) => Some((*element, delimiter)),
            _ => Some((oid::precise_element_of(type_oid)?, delimiter)),
        }
    }

    /// The element type of an array, and what stands between two elements.
    pub(super) fn element_of(&self, type_oid: u32) -> Option<(u32, u8)> {
        match self.0.get(&type_oid) {
            Some(UserType::Array(element, delimiter)) => Some((*element, *delimiter)),
            Some(_) => None,
            None => {
                let element = oid::element_of(type_oid)?;
                Some((element, if element == oid::BOX { b';' } else { b',' }))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOOD: u32 = 20_000;
    const POSINT: u32 = 20_001;
    const SMALL: u32 = 20_002;
    const SMALLS: u32 = 20_003;
    const LIST: u32 = 20_004;
    const LISTS: u32 = 20_005;
    const PLACES: u32 = 20_006;

    fn types() -> Types {
        Types(HashMap::from([
            (MOOD, UserType::Text),
            (POSINT, UserType::Domain(oid::INT4, -1)),
            (SMALL, UserType::Domain(POSINT, -1)),
            (SMALLS, UserType::Array(SMALL, b',')),
            (LIST, UserType::Domain(SMALLS, -1)),
            (LISTS, UserType::Array(LIST, b',')),
            (PLACES, UserType::Array(20_007, b':')),
        ]))
    }

    fn json(type_oid: u32, text: &str) -> String {
        let mut out = Vec::new();
        types().shape(type_oid).write(&mut out, text.as_bytes()).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_domain_is_written_as_its_base_type_and_an_array_as_an_array() {
        assert_eq!(json(MOOD, "so so"), r#""so so""#);
        assert_eq!(json(SMALL, "7"), "7");
        assert_eq!(json(SMALLS, "{7,NULL}"), "[7,null]");
        assert_eq!(json(LIST, "[0:1]={7,8}"), "[7,8]");
        assert_eq!(json(LISTS, r#"{"{7,8}",NULL,"{}"}"#), "[[7,8],null,[]]");
        assert_eq!(json(PLACES, "{01:02}"), r#"["01","02"]"#);
        assert_eq!(json(1020, "{(3,4),(1,2);(7,8),(5,6)}"), r#"["(3,4),(1,2)","(7,8),(5,6)"]"#);
        // One that is not known.
        assert_eq!(json(20_008, "{a,b}"), r#""{a,b}""#);
    }

    #[test]
    fn types_that_lead_to_themselves_are_text() {
        let types = Types(HashMap::from([
            (20_000, UserType::Domain(20_001, -1)),
            (20_001, UserType::Domain(20_000, -1)),
            (20_002, UserType::Array(20_002, b',')),
        ]));
        assert_eq!(types.shape(20_000), Shape::TEXT);
        assert_eq!(types.shape(20_002), Shape::TEXT);
    }
}
