//! The walk over one pgoutput message, field by field.
//!
//! Every field is taken from the front of what is left, or refused: nothing here indexes by a
//! number that came over the wire, and no announced count or length reserves memory. Flag bits
//! are read as the server's own subscriber (`src/backend/replication/logical/proto.c`) reads them.

use super::{
    COLUMNS_MAX, Fault, OldKind, OldTuple, Relation, RelationColumn, ReplicaIdentity,
    ReplicationMessage, Truncate, Tuple, TupleValue,
};
use crate::position::Lsn;

/// Takes fields from the front of what is left. Integers are big-endian.
#[derive(Debug, Clone)]
pub(super) struct Reader<'a> {
    pub(super) rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn message(&mut self) -> Result<ReplicationMessage<'a>, Fault> {
        let message = match self.u8()? {
            b'I' => self.insert()?,
            b'U' => self.update()?,
            b'D' => self.delete()?,
            b'B' => ReplicationMessage::Begin {
                final_lsn: self.lsn()?,
                commit_time: i64::from_be_bytes(self.array()?),
                xid: self.u32()?,
            },
            b'C' => self.commit()?,
            b'R' => ReplicationMessage::Relation(self.relation()?),
            b'Y' => ReplicationMessage::Type {
                id: self.u32()?,
                namespace: self.namespace()?,
                name: self.name()?,
            },
            b'T' => ReplicationMessage::Truncate(self.truncate()?),
            b'M' => self.logical()?,
            b'O' => ReplicationMessage::Origin { commit_lsn: self.lsn()?, name: self.name()? },
            tag => return Err(Fault::Unknown(tag)),
        };
        if self.rest.is_empty() { Ok(message) } else { Err(Fault::LeftOver) }
    }

    #[inline]
    fn insert(&mut self) -> Result<ReplicationMessage<'a>, Fault> {
        let relation = self.u32()?;
        match self.u8()? {
            b'N' => Ok(ReplicationMessage::Insert { relation, new: self.tuple()? }),
            other => Err(Fault::Unknown(other)),
        }
    }

    fn update(&mut self) -> Result<ReplicationMessage<'a>, Fault> {
        let relation = self.u32()?;
        let old = match self.u8()? {
            b'N' => {
                return Ok(ReplicationMessage::Update { relation, old: None, new: self.tuple()? });
            }
            kind => self.old(kind)?,
        };
        match self.u8()? {
            b'N' => Ok(ReplicationMessage::Update { relation, old: Some(old), new: self.tuple()? }),
            other => Err(Fault::Unknown(other)),
        }
    }

    fn delete(&mut self) -> Result<ReplicationMessage<'a>, Fault> {
        let relation = self.u32()?;
        let kind = self.u8()?;
        Ok(ReplicationMessage::Delete { relation, old: self.old(kind)? })
    }

    fn old(&mut self, kind: u8) -> Result<OldTuple<'a>, Fault> {
        let kind = match kind {
            b'K' => OldKind::Key,
            b'O' => OldKind::Full,
            other => return Err(Fault::Unknown(other)),
        };
        Ok(OldTuple { kind, tuple: self.tuple()? })
    }

    fn commit(&mut self) -> Result<ReplicationMessage<'a>, Fault> {
        match self.u8()? {
            0 => Ok(ReplicationMessage::Commit {
                commit_lsn: self.lsn()?,
                end_lsn: self.lsn()?,
                commit_time: i64::from_be_bytes(self.array()?),
            }),
            flags => Err(Fault::Unknown(flags)),
        }
    }

    fn relation(&mut self) -> Result<Relation<'a>, Fault> {
        let id = self.u32()?;
        let namespace = self.namespace()?;
        let name = self.name()?;
        let replica_identity = match self.u8()? {
            b'd' => ReplicaIdentity::Default,
            b'n' => ReplicaIdentity::Nothing,
            b'f' => ReplicaIdentity::Full,
            b'i' => ReplicaIdentity::Index,
            other => return Err(Fault::Unknown(other)),
        };
        let count = self.count()?;
        let start = self.rest;
        for _ in 0..count {
            self.column()?;
        }
        let columns = &start[..start.len() - self.rest.len()];
        Ok(Relation { id, namespace, name, replica_identity, count, columns })
    }

    pub(super) fn column(&mut self) -> Result<RelationColumn<'a>, Fault> {
        Ok(RelationColumn {
            key: self.u8()? & 1 != 0,
            name: self.name()?,
            type_oid: self.u32()?,
            type_modifier: self.i32()?,
        })
    }

    #[inline]
    fn tuple(&mut self) -> Result<Tuple<'a>, Fault> {
        let count = self.count()?;
        let start = self.rest;
        for _ in 0..count {
            if self.value().is_none() {
                return Err(self.value_fault());
            }
        }
        Ok(Tuple { count, data: &start[..start.len() - self.rest.len()] })
    }

    /// The next value of a tuple; `None`, and nothing taken, when there is no valid one.
    ///
    /// This is the hot path: one pattern per kind, and what was wrong is only worked out when
    /// something was. A negative length is far above what is left when read as unsigned.
    #[inline]
    pub(super) fn value(&mut self) -> Option<TupleValue<'a>> {
        let (value, rest) = match self.rest {
            [kind @ (b't' | b'b'), a, b, c, d, rest @ ..] => {
                let len = u32::from_be_bytes([*a, *b, *c, *d]);
                let (bytes, rest) = rest.split_at_checked(usize::try_from(len).ok()?)?;
                (
                    if *kind == b't' { TupleValue::Text(bytes) } else { TupleValue::Binary(bytes) },
                    rest,
                )
            }
            [b'n', rest @ ..] => (TupleValue::Null, rest),
            [b'u', rest @ ..] => (TupleValue::Unchanged, rest),
            _ => return None,
        };
        self.rest = rest;
        Some(value)
    }

    /// Why `value` found none.
    #[cold]
    fn value_fault(&mut self) -> Fault {
        match self.u8() {
            Ok(b't' | b'b') => self.bytes().err().unwrap_or(Fault::CutOff),
            Ok(other) => Fault::Unknown(other),
            Err(fault) => fault,
        }
    }

    fn truncate(&mut self) -> Result<Truncate<'a>, Fault> {
        let count = self.i32()?;
        let flags = self.u8()?;
        let size = usize::try_from(count).ok().and_then(|count| count.checked_mul(4));
        let relations = self.take(size.ok_or(Fault::OutOfRange(count))?)?;
        Ok(Truncate { cascade: flags & 1 != 0, restart_identity: flags & 2 != 0, relations })
    }

    fn logical(&mut self) -> Result<ReplicationMessage<'a>, Fault> {
        Ok(ReplicationMessage::Logical {
            transactional: self.u8()? & 1 != 0,
            lsn: self.lsn()?,
            prefix: self.name()?,
            content: self.bytes()?,
        })
    }

    #[inline]
    fn count(&mut self) -> Result<u16, Fault> {
        let count = i16::from_be_bytes(self.array()?);
        match u16::try_from(count) {
            Ok(count) if usize::from(count) <= COLUMNS_MAX => Ok(count),
            _ => Err(Fault::OutOfRange(i32::from(count))),
        }
    }

    /// Bytes after their own 32-bit length.
    fn bytes(&mut self) -> Result<&'a [u8], Fault> {
        let len = self.i32()?;
        self.take(usize::try_from(len).map_err(|_| Fault::OutOfRange(len))?)
    }

    /// A schema's name; `pg_catalog` is sent as the empty string.
    fn namespace(&mut self) -> Result<&'a str, Fault> {
        match self.name()? {
            "" => Ok("pg_catalog"),
            namespace => Ok(namespace),
        }
    }

    /// A string up to its zero byte.
    fn name(&mut self) -> Result<&'a str, Fault> {
        let len = self.rest.iter().position(|&byte| byte == 0).ok_or(Fault::CutOff)?;
        let name = std::str::from_utf8(&self.rest[..len]).map_err(|_| Fault::NotUtf8)?;
        self.rest = &self.rest[len + 1..];
        Ok(name)
    }

    #[inline]
    fn take(&mut self, len: usize) -> Result<&'a [u8], Fault> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(Fault::CutOff)?;
        self.rest = rest;
        Ok(taken)
    }

    #[inline]
    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(Fault::CutOff)?;
        self.rest = rest;
        Ok(*taken)
    }

    #[inline]
    fn u8(&mut self) -> Result<u8, Fault> {
        Ok(u8::from_be_bytes(self.array()?))
    }

    #[inline]
    fn u32(&mut self) -> Result<u32, Fault> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    #[inline]
    fn i32(&mut self) -> Result<i32, Fault> {
        Ok(i32::from_be_bytes(self.array()?))
    }

    fn lsn(&mut self) -> Result<Lsn, Fault> {
        Ok(Lsn(u64::from_be_bytes(self.array()?)))
    }
}
