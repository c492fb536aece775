//! The OIDs of the built-in types that JSON treats specially, and of the built-in array types.
//!
//! They never change (`src/include/catalog/pg_type.dat`). Types of extensions and users have
//! other OIDs in every database and are text here.

/// Types from here on have other OIDs in other databases or versions (`FirstGenbkiObjectId`,
/// `src/include/access/transam.h`).
pub const FIRST_NOT_FIXED: u32 = 10_000;

/// `bool`.
pub const BOOL: u32 = 16;
/// `bytea`.
pub const BYTEA: u32 = 17;
/// `"char"`.
pub const CHAR: u32 = 18;
/// `name`.
pub const NAME: u32 = 19;
/// `int8`.
pub const INT8: u32 = 20;
/// `int2`.
pub const INT2: u32 = 21;
/// `int4`.
pub const INT4: u32 = 23;
/// `text`.
pub const TEXT: u32 = 25;
/// `oid`.
pub const OID: u32 = 26;
/// `xid`.
pub const XID: u32 = 28;
/// `json`.
pub const JSON: u32 = 114;
/// `point`.
pub const POINT: u32 = 600;
/// `lseg`.
pub const LSEG: u32 = 601;
/// `path`.
pub const PATH: u32 = 602;
/// `box`.
pub const BOX: u32 = 603;
/// `polygon`.
pub const POLYGON: u32 = 604;
/// `line`.
pub const LINE: u32 = 628;
/// `float4`.
pub const FLOAT4: u32 = 700;
/// `float8`.
pub const FLOAT8: u32 = 701;
/// `circle`.
pub const CIRCLE: u32 = 718;
/// `money`.
pub const MONEY: u32 = 790;
/// `bpchar`.
pub const BPCHAR: u32 = 1042;
/// `varchar`.
pub const VARCHAR: u32 = 1043;
/// `date`.
pub const DATE: u32 = 1082;
/// `time`.
pub const TIME: u32 = 1083;
/// `timestamp`.
pub const TIMESTAMP: u32 = 1114;
/// `timestamptz`.
pub const TIMESTAMPTZ: u32 = 1184;
/// `interval`.
pub const INTERVAL: u32 = 1186;
/// `timetz`.
pub const TIMETZ: u32 = 1266;
/// `bit`.
pub const BIT: u32 = 1560;
/// `varbit`.
pub const VARBIT: u32 = 1562;
/// `numeric`.
pub const NUMERIC: u32 = 1700;
/// `uuid`.
pub const UUID: u32 = 2950;
/// `jsonb`.
pub const JSONB: u32 = 3802;
/// `xid8`.
pub const XID8: u32 = 5069;

/// Types from here on are made by users and extensions (`FirstNormalObjectId`,
/// `src/include/access/transam.h`).
pub const FIRST_USER: u32 = 16_384;

/// The element type of a built-in array type; `None` for everything else.
pub const fn element_of(type_oid: u32) -> Option<u32> {
    let element = match type_oid {
        1000 => BOOL,
        1001 => BYTEA,
        1016 => INT8,
        1005 => INT2,
        1007 => INT4,
        1009 => TEXT,
        1028 => OID,
        199 => JSON,
        1020 => BOX,
        1021 => FLOAT4,
        1022 => FLOAT8,
        1014 => BPCHAR,
        1015 => VARCHAR,
        1182 => DATE,
        1183 => TIME,
        1115 => TIMESTAMP,
        1185 => TIMESTAMPTZ,
        1187 => INTERVAL,
        1270 => TIMETZ,
        1231 => NUMERIC,
        2951 => UUID,
        3807 => JSONB,
        // Arrays of the other built-in types: their elements are text.
        143 | 271 | 629 | 651 | 719 | 775 | 791 | 1002 | 1003 | 1006 | 1008 | 1010 | 1011
        | 1012 | 1013 | 1017 | 1018 | 1019 | 1027 | 1034 | 1040 | 1041 | 1561 | 1563 | 2201
        | 2207 | 2208 | 2209 | 2210 | 2211 | 2949 | 3221 | 3643 | 3644 | 3645 | 3735 | 3770
        | 3905 | 3907 | 3909 | 3911 | 3913 | 3927 | 4073 | 4090 | 4097 | 4192 | 5039 | 6150
        | 6151 | 6152 | 6153 | 6155 | 6157 => TEXT,
        _ => return None,
    };
    Some(element)
}

/// The element type of a built-in array type that [`element_of`] takes for text, or knows; `None`
/// for everything else.
pub const fn precise_element_of(type_oid: u32) -> Option<u32> {
    let element = match type_oid {
        143 => 142,
        271 => XID8,
        629 => LINE,
        651 => 650,
        719 => CIRCLE,
        775 => 774,
        791 => MONEY,
        1002 => CHAR,
        1003 => NAME,
        1017 => POINT,
        1018 => LSEG,
        1019 => PATH,
        1027 => POLYGON,
        1040 => 829,
        1041 => 869,
        1561 => BIT,
        1563 => VARBIT,
        3643 => 3614,
        3645 => 3615,
        3905 => 3904,
        3907 => 3906,
        3909 => 3908,
        3911 => 3910,
        3913 => 3912,
        3927 => 3926,
        4073 => 4072,
        _ => match element_of(type_oid) {
            // Another one whose elements are text: not a type that is told apart from others.
            Some(TEXT) if type_oid != 1009 => 0,
            element => return element,
        },
    };
    Some(element)
}
