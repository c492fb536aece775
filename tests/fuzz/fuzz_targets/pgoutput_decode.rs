//! Any bytes as a pgoutput message: decoded, and everything in it walked.
//!
//! Run:
//! `scripts/fuzz 60 pgoutput_decode`

#![no_main]

use std::hint::black_box;

use libfuzzer_sys::fuzz_target;
use watership::pg::pgoutput::{ReplicationMessage, Tuple, TupleValue, decode};

fuzz_target!(|data: &[u8]| {
    match decode(data) {
        Ok(message) => walk(message),
        Err(error) => {
            assert!(error.offset <= data.len());
            black_box(error.to_string());
        }
    }
});

/// Touches every byte that the message gives out: the sanitizer sees a read outside.
fn walk(message: ReplicationMessage<'_>) {
    match message {
        ReplicationMessage::Begin { .. } | ReplicationMessage::Commit { .. } => {}
        ReplicationMessage::Origin { name, .. } => touch(name.as_bytes()),
        ReplicationMessage::Relation(relation) => {
            touch(relation.namespace.as_bytes());
            touch(relation.name.as_bytes());
            let count = relation.columns().len();
            let walked = relation.columns().inspect(|column| touch(column.name.as_bytes()));
            assert_eq!(walked.count(), count);
        }
        ReplicationMessage::Type { namespace, name, .. } => {
            touch(namespace.as_bytes());
            touch(name.as_bytes());
        }
        ReplicationMessage::Insert { new, .. } => walk_tuple(&new),
        ReplicationMessage::Update { old, new, .. } => {
            old.iter().for_each(|old| walk_tuple(&old.tuple));
            walk_tuple(&new);
        }
        ReplicationMessage::Delete { old, .. } => walk_tuple(&old.tuple),
        ReplicationMessage::Truncate(truncate) => {
            black_box(truncate.relations().fold(0, |sum, id| sum ^ id));
        }
        ReplicationMessage::Logical { prefix, content, .. } => {
            touch(prefix.as_bytes());
            touch(content);
        }
    }
}

fn walk_tuple(tuple: &Tuple<'_>) {
    let mut walked = 0;
    for value in tuple.columns() {
        walked += 1;
        match value {
            TupleValue::Null | TupleValue::Unchanged => {}
            TupleValue::Text(value) | TupleValue::Binary(value) => touch(value),
        }
    }
    assert_eq!(walked, tuple.len());
}

fn touch(bytes: &[u8]) {
    black_box(bytes.iter().fold(0u8, |sum, byte| sum ^ byte));
}
