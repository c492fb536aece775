//! The pgoutput messages of protocol version 1, decoded in place.
//!
//! A message borrows the frame it came in: nothing is copied and nothing is allocated, so an
//! announced length or count is only ever compared with the bytes that are there. `decode` walks
//! the whole message once and refuses what is cut off, left over or out of range; whatever it
//! returned can then be iterated without errors. That is the invariant of this file: only `decode`
//! makes a `Tuple`, `Relation` or `Truncate`.
//!
//! Not here: the walk itself (reader), what the messages mean for a transaction (source), and the
//! text form of the values (column).
//!
//! Message layouts:
//! <https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html>

mod reader;

use std::fmt;

use self::reader::Reader;
use crate::error::Error;
use crate::position::Lsn;

/// Columns that a Postgres table can have at most (`MaxHeapAttributeNumber`).
///
/// <https://www.postgresql.org/docs/current/limits.html>
pub const COLUMNS_MAX: usize = 1600;

/// One message of the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplicationMessage<'a> {
    /// `B`: a transaction starts. Everything up to its `Commit` is already committed.
    Begin {
        /// The LSN of the commit record; equals `Commit`'s `commit_lsn`.
        final_lsn: Lsn,
        /// Commit time, in microseconds since 2000-01-01 00:00 UTC.
        commit_time: i64,
        /// The transaction's id.
        xid: u32,
    },
    /// `C`: the transaction ends.
    Commit {
        /// The LSN of the commit record.
        commit_lsn: Lsn,
        /// The LSN after the commit record: this is what feedback may confirm.
        end_lsn: Lsn,
        /// Commit time, in microseconds since 2000-01-01 00:00 UTC.
        commit_time: i64,
    },
    /// `O`: the transaction was replicated from elsewhere.
    Origin {
        /// The commit's LSN on the origin server.
        commit_lsn: Lsn,
        /// The origin's name.
        name: &'a str,
    },
    /// `R`: a table's description; holds until the next one with the same id.
    Relation(Relation<'a>),
    /// `Y`: a type that is not built in; sent before the `Relation` that uses it.
    Type {
        /// The type's OID.
        id: u32,
        /// The type's schema; `pg_catalog` is spelled out, as in [`Relation`].
        namespace: &'a str,
        /// The type's name.
        name: &'a str,
    },
    /// `I`: a row was inserted.
    Insert {
        /// The id of the table's `Relation`.
        relation: u32,
        /// The row.
        new: Tuple<'a>,
    },
    /// `U`: a row was updated.
    Update {
        /// The id of the table's `Relation`.
        relation: u32,
        /// What the row was, as far as the replica identity tells. Absent under an identity by key
        /// when the key did not change.
        old: Option<OldTuple<'a>>,
        /// The row as it is now.
        new: Tuple<'a>,
    },
    /// `D`: a row was deleted.
    Delete {
        /// The id of the table's `Relation`.
        relation: u32,
        /// The key or the whole row that went.
        old: OldTuple<'a>,
    },
    /// `T`: tables were truncated by one command.
    Truncate(Truncate<'a>),
    /// `M`: written by `pg_logical_emit_message`.
    Logical {
        /// False: it stands outside `Begin` and `Commit`, and was sent even if its transaction
        /// rolled back.
        transactional: bool,
        /// The LSN of the message itself.
        lsn: Lsn,
        /// The prefix that the writer gave.
        prefix: &'a str,
        /// The content, any bytes.
        content: &'a [u8],
    },
}

/// Which columns of the old row the server logs for a table.
///
/// <https://www.postgresql.org/docs/current/sql-altertable.html#SQL-ALTERTABLE-REPLICA-IDENTITY>
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplicaIdentity {
    /// `d`: the primary key, if there is one.
    Default,
    /// `n`: nothing.
    Nothing,
    /// `f`: the whole row; then every column counts as part of the key.
    Full,
    /// `i`: the columns of a chosen unique index.
    Index,
}

/// A table's description.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Relation<'a> {
    /// The id by which changes refer to it: the table's OID.
    pub id: u32,
    /// The schema; `pg_catalog` travels as the empty string and is spelled out here.
    pub namespace: &'a str,
    /// The table's name.
    pub name: &'a str,
    /// What an `OldTuple` of this table will hold.
    pub replica_identity: ReplicaIdentity,
    count: u16,
    columns: &'a [u8],
}

impl<'a> Relation<'a> {
    /// The columns, in the order in which tuples hold their values.
    pub fn columns(&self) -> Columns<'a> {
        Columns { left: self.count, reader: Reader { rest: self.columns } }
    }
}

/// One column of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RelationColumn<'a> {
    /// Part of the replica identity.
    pub key: bool,
    /// The column's name.
    pub name: &'a str,
    /// The OID of its type.
    pub type_oid: u32,
    /// `atttypmod`: length, precision and scale, packed by the type; -1 for none.
    pub type_modifier: i32,
}

/// A row, or as much of it as was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuple<'a> {
    count: u16,
    data: &'a [u8],
}

impl<'a> Tuple<'a> {
    /// The number of columns.
    pub fn len(&self) -> usize {
        usize::from(self.count)
    }

    /// A table without columns has such rows.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The values, in the order of the relation's columns. Cheap: a few nanoseconds each.
    pub fn columns(&self) -> TupleValues<'a> {
        TupleValues { left: self.count, reader: Reader { rest: self.data } }
    }

    /// Puts the first values into `out` and says how many: the smaller of both lengths.
    ///
    /// For callers who pick several columns by index, out of order: one walk, no allocation.
    pub fn read_into(&self, out: &mut [TupleValue<'a>]) -> usize {
        let mut read = 0;
        for (slot, value) in out.iter_mut().zip(self.columns()) {
            *slot = value;
            read += 1;
        }
        read
    }
}

/// One column's value in a tuple.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TupleValue<'a> {
    /// `n`: SQL null; in a key tuple, also every column outside the key.
    #[default]
    Null,
    /// `u`: a TOASTed value that the update did not touch; it was not sent.
    Unchanged,
    /// `t`: the type's text form, in the client encoding. Not checked: with an SQL_ASCII
    /// database it can be any bytes.
    Text(&'a [u8]),
    /// `b`: the type's binary form; only when the `binary` option was asked for.
    Binary(&'a [u8]),
}

/// What the old row's tuple holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OldKind {
    /// `K`: the values of the replica identity, null elsewhere.
    Key,
    /// `O`: the whole row (replica identity FULL).
    Full,
}

/// The row before an update or delete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OldTuple<'a> {
    /// How much of the row it holds.
    pub kind: OldKind,
    /// Its values.
    pub tuple: Tuple<'a>,
}

/// The tables that one TRUNCATE emptied, as far as they are published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Truncate<'a> {
    /// `CASCADE` was given.
    pub cascade: bool,
    /// `RESTART IDENTITY` was given.
    pub restart_identity: bool,
    relations: &'a [u8],
}

impl<'a> Truncate<'a> {
    /// The ids of the tables' `Relation`s.
    pub fn relations(&self) -> impl ExactSizeIterator<Item = u32> + use<'a> {
        self.relations.as_chunks().0.iter().map(|id| u32::from_be_bytes(*id))
    }
}

/// Why a message was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The message ended before the field did.
    CutOff,
    /// Bytes were left after the last field.
    LeftOver,
    /// A byte that chooses the meaning of what follows has no known meaning.
    Unknown(u8),
    /// A count or length is negative or above what Postgres allows.
    OutOfRange(i32),
    /// A name is not UTF-8.
    NotUtf8,
}

/// A message that is not pgoutput protocol version 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeError {
    /// The message's first byte; `None` for an empty message.
    pub tag: Option<u8>,
    /// Where reading stopped, in bytes from the start of the message.
    pub offset: usize,
    /// What was wrong there.
    pub fault: Fault,
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.tag {
            Some(tag) => write!(f, "pgoutput message '{}'", tag.escape_ascii())?,
            None => f.write_str("empty pgoutput message")?,
        }
        write!(f, ", byte {}: ", self.offset)?;
        match self.fault {
            Fault::CutOff => f.write_str("the message ends inside a field"),
            Fault::LeftOver => f.write_str("bytes left over after the last field"),
            Fault::Unknown(byte) => write!(f, "unknown kind or flag '{}'", byte.escape_ascii()),
            Fault::OutOfRange(n) => write!(f, "count or length {n} is out of range"),
            Fault::NotUtf8 => f.write_str("a name is not UTF-8"),
        }
    }
}

impl std::error::Error for DecodeError {}

impl From<DecodeError> for Error {
    fn from(error: DecodeError) -> Self {
        Error::protocol(error.to_string())
    }
}

/// Decodes one message: the payload of one XLogData.
///
/// # Errors
/// When `data` is not exactly one message of protocol version 1, streaming off.
pub fn decode(data: &[u8]) -> Result<ReplicationMessage<'_>, DecodeError> {
    let mut reader = Reader { rest: data };
    reader.message().map_err(|fault| DecodeError {
        tag: data.first().copied(),
        offset: data.len() - reader.rest.len(),
        fault,
    })
}

/// The columns of a [`Relation`].
#[derive(Debug, Clone)]
pub struct Columns<'a> {
    left: u16,
    reader: Reader<'a>,
}

impl<'a> Iterator for Columns<'a> {
    type Item = RelationColumn<'a>;

    fn next(&mut self) -> Option<RelationColumn<'a>> {
        self.left = self.left.checked_sub(1)?;
        Some(self.reader.column().expect("decode read these columns before"))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (usize::from(self.left), Some(usize::from(self.left)))
    }
}

impl ExactSizeIterator for Columns<'_> {}

/// The values of a [`Tuple`].
#[derive(Debug, Clone)]
pub struct TupleValues<'a> {
    left: u16,
    reader: Reader<'a>,
}

impl<'a> Iterator for TupleValues<'a> {
    type Item = TupleValue<'a>;

    #[inline]
    fn next(&mut self) -> Option<TupleValue<'a>> {
        self.left = self.left.checked_sub(1)?;
        Some(self.reader.value().expect("decode read these values before"))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (usize::from(self.left), Some(usize::from(self.left)))
    }
}

impl ExactSizeIterator for TupleValues<'_> {}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two columns, text "7" and unchanged.
    const INSERT: &[u8] = b"I\0\0\x40\x01N\0\x02t\0\0\0\x017u";

    fn fault(data: &[u8]) -> (usize, Fault) {
        let error = decode(data).unwrap_err();
        assert_eq!(error.tag, data.first().copied());
        (error.offset, error.fault)
    }

    #[test]
    fn a_value_is_a_slice_of_the_frame() {
        let ReplicationMessage::Insert { relation, new } = decode(INSERT).unwrap() else {
            panic!()
        };
        assert_eq!((relation, new.len()), (0x4001, 2));
        let mut values = [TupleValue::Null; 3];
        assert_eq!(new.read_into(&mut values), 2);
        assert_eq!(values, [TupleValue::Text(b"7"), TupleValue::Unchanged, TupleValue::Null]);
        let TupleValue::Text(text) = values[0] else { panic!() };
        assert!(INSERT.as_ptr_range().contains(&text.as_ptr()));
    }

    #[test]
    fn an_empty_schema_is_pg_catalog() {
        let expected = ReplicationMessage::Type { id: 1, namespace: "pg_catalog", name: "x" };
        assert_eq!(decode(b"Y\0\0\0\x01\0x\0"), Ok(expected));
        let Ok(ReplicationMessage::Relation(relation)) = decode(b"R\0\0\0\x01\0x\0d\0\0") else {
            panic!()
        };
        assert_eq!((relation.namespace, relation.name), ("pg_catalog", "x"));
    }

    #[test]
    fn every_cut_and_every_extra_byte_is_refused() {
        for cut in 0..INSERT.len() {
            assert_eq!(fault(&INSERT[..cut]).1, Fault::CutOff, "cut at {cut}");
        }
        let extra = [INSERT, b"x"].concat();
        assert_eq!(fault(&extra), (INSERT.len(), Fault::LeftOver));
    }

    #[test]
    fn absurd_numbers_are_refused() {
        let cases: [(&[u8], Fault); 9] = [
            (b"S\0\0\0\x01\x01", Fault::Unknown(b'S')),
            (b"I\0\0\0\x01K\0\0", Fault::Unknown(b'K')),
            (b"I\0\0\0\x01N\xff\xff", Fault::OutOfRange(-1)),
            (b"I\0\0\0\x01N\x06\x41", Fault::OutOfRange(1601)),
            (b"I\0\0\0\x01N\0\x01t\xff\xff\xff\xff", Fault::OutOfRange(-1)),
            (b"I\0\0\0\x01N\0\x01t\x7f\xff\xff\xffx", Fault::CutOff),
            (b"T\xff\xff\xff\xff\0", Fault::OutOfRange(-1)),
            (b"T\x7f\xff\xff\xff\0\0\0\0\x01", Fault::CutOff),
            (b"Y\0\0\0\x01\xff\0x\0", Fault::NotUtf8),
        ];
        for (data, expected) in cases {
            assert_eq!(fault(data).1, expected, "{}", data.escape_ascii());
        }
    }

    #[test]
    fn an_error_names_the_message_and_the_place() {
        let error = Error::from(decode(b"I\0\0\0\x01N\0\x01z").unwrap_err());
        let expected = "pgoutput message 'I', byte 9: unknown kind or flag 'z'";
        assert_eq!(error.to_string(), expected);
        assert_eq!(
            decode(b"").unwrap_err().to_string().split(',').next(),
            Some("empty pgoutput message")
        );
    }
}
