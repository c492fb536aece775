//! Ids of captured events, and of the messages that are made of an event.
//!
//! Invariant: the same change has the same id on every attempt and from every relay, whatever its
//! publication, filters and configuration are, and different changes never share one. An outbox
//! event's id is its row's uuid. A captured event's is derived from the change itself:
//!
//! - system identifier, timeline, and LSN of the change: where it stands in the WAL;
//! - commit time and xid of its transaction, which `Begin` carries: a restored volume hands out
//!   the same LSNs again, for other changes at another time;
//! - the text of the row's identity columns as the Relation message flags them, all columns where
//!   none is flagged: the rows of one COPY share an LSN, and a row filter may leave some of them
//!   out, so they cannot be numbered. Equal rows are numbered; a filter takes all of them or none.
//!
//! Not part of it: what depends on the reader (ordinal, epoch, publication, the names and order of
//! the columns, the relation's OID, because one publication names the leaf and another the root)
//! and today's catalog, because a replay after an ALTER must give the same id.
//!
//! `relay/check/tables` warns where two publications disagree on what an id is made of; the two
//! change together.

use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY};
use uuid::Uuid;

use crate::event::{Identity, Row, Table, Value};
use crate::position::Lsn;

/// UUIDv5 namespace of captured events. Changing it would change every id.
const CAPTURED: Uuid = Uuid::from_u128(0x7d1c_9c5e_5b0a_4f6e_9a58_3f1e_7a77_5e01);
/// UUIDv5 namespace of the further messages that one route makes of one event.
const PART: Uuid = Uuid::from_u128(0x1c1f_87a4_8f43_4b6b_8c3e_64c3_9d4c_5e02);

/// The namespace of a cluster's changes: of its system identifier (`IDENTIFY_SYSTEM`) and the
/// timeline on which the change's LSN lies.
pub fn namespace(system_id: u64, timeline: u32) -> Uuid {
    let mut name = [0_u8; 8 + 4];
    name[..8].copy_from_slice(&system_id.to_be_bytes());
    name[8..].copy_from_slice(&timeline.to_be_bytes());
    Uuid::new_v5(&CAPTURED, &name)
}

/// The id of a row that the run of a backfill read: of the run, the table and the key, so that a
/// row that is read again in the same run has the same id. `moved` is the position of the change
/// that moved a row to this key, if that is why it is read again: another row may have had the key
/// before. Otherwise it is empty.
pub fn of_read(run: Uuid, table: &Table, row: &Row, moved: &str) -> Uuid {
    let mut ids = Ids::default();
    ids.name.extend_from_slice(&(table.full_name.len() as u64).to_be_bytes());
    ids.name.extend_from_slice(table.full_name.as_bytes());
    for column in &table.key {
        ids.value(run, &row[*column]);
    }
    if !moved.is_empty() {
        ids.value(run, &Value::Text(moved.to_owned().into()));
    }
    ids.hashed(run)
}

/// A value above this size, in bytes, is hashed where it is, not copied.
const COPIED_MAX: usize = 64 * 1024;

/// Gives ids to the changes of a stream, one after the other.
#[derive(Default)]
pub struct Ids {
    /// Scratch space for the name that is hashed.
    name: Vec<u8>,
    /// What comes before it, of a name with a large value in it.
    hashed: Option<Context>,
    /// LSN of the last change.
    at: Lsn,
    /// Ids that were given at this LSN, with how many rows would have had each of them. Few: a
    /// record of the WAL is about one page of rows.
    given: Vec<(Uuid, u32)>,
}

/// What a change's id is made of, in addition to its row.
#[derive(Debug, Clone, Copy)]
pub struct Origin {
    /// See [`namespace`].
    pub namespace: Uuid,
    /// LSN of the change itself.
    pub lsn: Lsn,
    /// Commit time of its transaction, in microseconds since 1970-01-01 UTC.
    pub committed_at_us: i64,
    /// Its transaction.
    pub xid: u32,
}

impl std::fmt::Debug for Ids {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ids").field("at", &self.at).finish_non_exhaustive()
    }
}

impl Ids {
    /// The id of a changed row: `row` is the new one, or the old one of a delete; `columns` are
    /// those of [`columns`].
    pub fn row(&mut self, source: Origin, columns: &[usize], row: &Row) -> Uuid {
        self.begin(source);
        for &column in columns {
            self.value(source.namespace, &row[column]);
        }
        self.number(source)
    }

    /// The id of the truncation of the table `oid`.
    pub fn truncate(&mut self, source: Origin, oid: u32) -> Uuid {
        self.begin(source);
        self.name.extend_from_slice(&oid.to_be_bytes());
        self.number(source)
    }

    fn begin(&mut self, source: Origin) {
        if source.lsn != self.at {
            self.at = source.lsn;
            self.given.clear();
        }
        self.hashed = None;
        self.name.clear();
        self.name.extend_from_slice(&source.lsn.0.to_be_bytes());
        self.name.extend_from_slice(&source.committed_at_us.to_be_bytes());
        self.name.extend_from_slice(&source.xid.to_be_bytes());
    }

    /// Values are told apart from each other and from null by two bits of kind below their length,
    /// as a LEB128: one byte for a short value, so that with an integer key all that is hashed
    /// fits into one block of SHA-1.
    fn value(&mut self, namespace: Uuid, value: &Value) {
        let (kind, bytes): (u64, &[u8]) = match value {
            Value::Null => (0, &[]),
            Value::Text(text) => (1, text),
            // Not sent; nothing better is known of it.
            Value::Unchanged => (2, &[]),
            Value::Unreadable(value) => (3, value.bytes.as_deref().unwrap_or_default()),
        };
        let mut head = (bytes.len() as u64) << 2 | kind;
        while head >= 0x80 {
            self.name.push(head as u8 | 0x80);
            head >>= 7;
        }
        self.name.push(head as u8);
        if bytes.len() <= COPIED_MAX {
            self.name.extend_from_slice(bytes);
            return;
        }
        let hashed = self.hashed.get_or_insert_with(|| {
            let mut hashed = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
            hashed.update(namespace.as_bytes());
            hashed
        });
        hashed.update(&self.name);
        hashed.update(bytes);
        self.name.clear();
    }

    fn hashed(&mut self, namespace: Uuid) -> Uuid {
        match self.hashed.take() {
            None => Uuid::new_v5(&namespace, &self.name),
            // The same, in pieces (RFC 9562, section 5.5).
            Some(mut hashed) => {
                hashed.update(&self.name);
                let hash = hashed.finish();
                let bytes = hash.as_ref().first_chunk().expect("SHA-1 has 20 bytes");
                uuid::Builder::from_sha1_bytes(*bytes).into_uuid()
            }
        }
    }

    fn number(&mut self, source: Origin) -> Uuid {
        let first = self.hashed(source.namespace);
        match self.given.iter_mut().find(|(id, _)| *id == first) {
            Some((_, number)) => {
                *number += 1;
                Uuid::new_v5(&first, &number.to_be_bytes())
            }
            None => {
                self.given.push((first, 0));
                first
            }
        }
    }
}

/// Indexes of the columns that an id is made of: the identity's, all where none is flagged; by
/// name, because a leaf may have them in another order than its root.
pub fn columns(table: &Table) -> Vec<usize> {
    let mut columns = match &table.identity {
        Identity::Columns(columns) => columns.clone(),
        Identity::Full | Identity::Nothing => (0..table.columns.len()).collect(),
    };
    columns.sort_by(|a, b| table.columns[*a].name.cmp(&table.columns[*b].name));
    columns
}

/// The id of a message beyond the first that one event and one route make: UUIDv5 of the event's
/// id and its number.
pub fn part(event: Uuid, part: u16) -> Uuid {
    match part {
        0 => event,
        _ => {
            let mut name = [0_u8; 16 + 2];
            name[..16].copy_from_slice(event.as_bytes());
            name[16..].copy_from_slice(&part.to_be_bytes());
            Uuid::new_v5(&PART, &name)
        }
    }
}

/// The id of a route's own message (`message_id = "route"`): UUIDv5(event id, route name).
pub fn of_route(event: Uuid, route: &str) -> Uuid {
    Uuid::new_v5(&event, route.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Column;
    use std::sync::Arc;

    const SOURCE: Origin = Origin {
        namespace: Uuid::from_u128(1),
        lsn: Lsn(0x16B_3748),
        committed_at_us: 1_700_000_000_000_000,
        xid: 731,
    };

    fn table(names: &[&str], identity: Identity) -> Table {
        Table {
            database: Arc::from("shop"),
            oid: 1,
            version: 0,
            schema: "public".into(),
            name: "t".into(),
            full_name: "public.t".into(),
            columns: names.iter().map(|name| Column::new(*name, 25, -1)).collect(),
            key: vec![0],
            identity,
        }
    }

    fn row(values: &[&'static str]) -> Row {
        values.iter().map(|value| Value::Text(value.as_bytes().into())).collect()
    }

    #[test]
    fn a_large_value_gives_the_id_that_it_would_give_in_one_piece() {
        let large = vec![b'x'; COPIED_MAX + 1];
        let text = |bytes: &[u8]| Value::Text(bytes.to_vec().into());
        let id = Ids::default().row(
            SOURCE,
            &[0, 1, 2],
            &[text(b"7"), text(&large), text(b"after")].into(),
        );
        let mut name = Vec::new();
        name.extend_from_slice(&SOURCE.lsn.0.to_be_bytes());
        name.extend_from_slice(&SOURCE.committed_at_us.to_be_bytes());
        name.extend_from_slice(&SOURCE.xid.to_be_bytes());
        name.extend_from_slice(b"\x057");
        // 65,537 bytes, and the kind in the two lowest bits, as a LEB128.
        name.extend_from_slice(b"\x85\x80\x10");
        name.extend_from_slice(&large);
        name.extend_from_slice(b"\x15after");
        assert_eq!(id, Uuid::new_v5(&SOURCE.namespace, &name));
    }

    #[test]
    fn a_row_that_is_read_again_has_its_id_in_the_same_run_only() {
        let (run, other) = (Uuid::from_u128(5), Uuid::from_u128(6));
        let keyed = table(&["id", "note"], Identity::Full);
        let id = of_read(run, &keyed, &row(&["7", "x"]), "");
        assert_eq!(id.to_string(), "e6616c47-a8c2-5a72-a630-9e13eb69520e");
        assert_eq!(of_read(run, &keyed, &row(&["7", "y"]), ""), id);
        assert_ne!(of_read(run, &keyed, &row(&["8", "x"]), ""), id);
        assert_ne!(of_read(other, &keyed, &row(&["7", "x"]), ""), id);
        assert_ne!(of_read(run, &keyed, &row(&["7", "x"]), "0a"), id);
        let renamed = Table { full_name: "public.u".into(), ..keyed };
        assert_ne!(of_read(run, &renamed, &row(&["7", "x"]), ""), id);
    }

    /// The ids of rows with one LSN, one after the other.
    fn of_rows(rows: &[&[&'static str]]) -> Vec<Uuid> {
        let mut ids = Ids::default();
        rows.iter().map(|values| ids.row(SOURCE, &[0, 1], &row(values))).collect()
    }

    #[test]
    fn an_id_is_the_same_in_every_version_of_the_program() {
        let namespace = namespace(7_301_234_567_890_123_456, 1);
        let source = Origin { namespace, ..SOURCE };
        let id = Ids::default().row(source, &[0], &row(&["7"]));
        assert_eq!(id.to_string(), "1c15315b-6c51-580a-b929-1723d1264ca3");
        let id = Ids::default().truncate(source, 16_384);
        assert_eq!(id.to_string(), "8835486c-37e4-539c-9b76-93b578fa7932");
        assert_eq!(part(id, 1).to_string(), "6ffb5856-b0e7-5724-9bd9-178a5bf34656");
        assert_eq!(part(id, 0), id);
    }

    #[test]
    fn whatever_tells_two_changes_apart_tells_their_ids_apart() {
        let changes = [
            SOURCE,
            Origin { namespace: namespace(1, 2), ..SOURCE },
            Origin { lsn: Lsn(1), ..SOURCE },
            // A restored volume hands out the same LSN again.
            Origin { committed_at_us: 1, ..SOURCE },
            Origin { xid: 732, ..SOURCE },
        ];
        let mut ids = Vec::new();
        for source in changes {
            for values in [["7"], ["8"], [""]] {
                ids.push(Ids::default().row(source, &[0], &row(&values)));
            }
            ids.push(Ids::default().row(source, &[0], &[Value::Null].into()));
            ids.push(Ids::default().truncate(source, 7));
        }
        let count = ids.len();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), count);
        // What belongs to which column is part of it.
        assert_eq!(of_rows(&[&["ab", "c"]]).len(), 1);
        assert_ne!(of_rows(&[&["ab", "c"]]), of_rows(&[&["a", "bc"]]));
    }

    #[test]
    fn rows_of_one_copy_have_ids_that_a_row_filter_does_not_shift() {
        let all = of_rows(&[&["1", "a"], &["2", "a"], &["3", "b"]]);
        assert_eq!(of_rows(&[&["1", "a"], &["3", "b"]]), [all[0], all[2]]);
    }

    #[test]
    fn equal_rows_are_numbered_and_start_again_at_the_next_change() {
        let three = of_rows(&[&["1", "a"], &["1", "a"], &["2", "a"], &["1", "a"]]);
        assert!(three[0] != three[1] && three[0] != three[3] && three[1] != three[3]);
        let mut ids = Ids::default();
        let first = ids.row(SOURCE, &[0], &row(&["1"]));
        let later = Origin { lsn: Lsn(SOURCE.lsn.0 + 1), ..SOURCE };
        assert_ne!(ids.row(later, &[0], &row(&["1"])), first);
        assert_eq!(ids.row(SOURCE, &[0], &row(&["1"])), first);
    }

    #[test]
    fn a_leaf_with_its_columns_in_another_order_gives_the_ids_of_its_root() {
        let root = table(&["id", "day", "note"], Identity::Columns(vec![0, 1]));
        let leaf = table(&["note", "day", "id"], Identity::Columns(vec![1, 2]));
        let of = |table: &Table, values: &[&'static str]| {
            Ids::default().row(SOURCE, &columns(table), &row(values))
        };
        assert_eq!(of(&root, &["7", "monday", "x"]), of(&leaf, &["x", "monday", "7"]));
        let whole = table(&["id", "note"], Identity::Nothing);
        assert_ne!(of(&whole, &["7", "x"]), of(&whole, &["7", "y"]));
    }
}
