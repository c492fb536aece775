//! The statement that reads a chunk. Pure.
//!
//! Invariant: no row lies between two chunks. A chunk begins after the key at which the last one
//! ended, in the order by which it is read; both are the order of the key's index: its operators
//! and collations are written out, because a name such as `>` could find another operator than
//! `ORDER BY` uses (citext), and a value of another type or collation another order.
//!
//! What is not wanted is read all the same and marked, so that the cursor moves on, and so that a
//! chunk is bounded however few rows a condition selects.

use std::fmt::Write as _;
use std::sync::Arc;

use postgres_protocol::escape::{escape_identifier, escape_literal};
use xxhash_rust::xxh64::Xxh64;

use crate::event::{Column, Identity, Table};
use crate::pg::publication::TableName;

/// A table as a backfill reads it.
#[derive(Debug, Clone)]
pub struct TableShape {
    /// How its rows are described; its key are the columns of `key`, in column order.
    pub table: Arc<Table>,
    /// The numbers of its columns, which tell them from others of the same names.
    pub numbers: Vec<i16>,
    /// Its name in the catalog.
    pub name: TableName,
    /// It is the root of partitions, whose rows are its own.
    pub partitioned: bool,
    /// The key, in the order of its index.
    pub key: Vec<KeyColumn>,
    /// The publication's row filter.
    pub filter: Option<String>,
}

/// A column of the key, and what its index compares by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyColumn {
    /// Index of the column in the description.
    pub column: usize,
    /// Type that a value is cast to.
    pub cast: String,
    /// `COLLATE …`, or nothing.
    pub collation: String,
    /// Operators, as `OPERATOR(schema.name)`.
    pub less: String,
    /// The same.
    pub equal: String,
    /// The same.
    pub at_least: String,
    /// The same.
    pub greater: String,
}

/// Where a chunk begins: the texts of the key's columns, in the order of [`TableShape::key`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum From {
    /// At the first row.
    Start,
    /// At the row with this key, or the first one behind it.
    At(Vec<String>),
    /// Behind the row with this key.
    After(Vec<String>),
    /// The rows with these keys, and no others.
    Only(Vec<Vec<String>>),
}

impl TableShape {
    /// A description of a table as the stream would have it, but for its version.
    pub fn describe(
        database: &str,
        oid: u32,
        name: &TableName,
        full_name: &str,
        columns: Vec<Column>,
        key: &[KeyColumn],
    ) -> Arc<Table> {
        let mut key: Vec<usize> = key.iter().map(|key| key.column).collect();
        key.sort_unstable();
        Arc::new(Table {
            database: database.into(),
            oid,
            version: version(name, &columns, &key),
            schema: name.schema.clone(),
            name: name.name.clone(),
            full_name: full_name.into(),
            columns,
            identity: Identity::Columns(key.clone()),
            key,
        })
    }

    /// `COPY (SELECT …) TO STDOUT`: the columns in the order of the description, and as the last
    /// one whether the row is wanted, `t` or `f`.
    pub fn statement(&self, from: &From, condition: Option<&str>, rows: usize) -> String {
        let mut sql = "COPY (SELECT ".to_owned();
        for column in &self.table.columns {
            let _ = write!(sql, "t.{}, ", escape_identifier(&column.name));
        }
        let wanted: Vec<String> = [self.filter.as_deref(), condition]
            .into_iter()
            .flatten()
            .map(|condition| format!("(({condition}\n) IS TRUE)"))
            .collect();
        sql += &if wanted.is_empty() { "true".to_owned() } else { wanted.join(" AND ") };
        // The rows of inheriting tables are not captured with it; those of partitions are.
        let only = if self.partitioned { "" } else { "ONLY " };
        let _ = write!(sql, " FROM {only}{} AS t", self.name.quoted());
        match from {
            From::Start => {}
            From::At(key) => sql += &format!(" WHERE {}", self.begins(key, |key| &key.at_least)),
            From::After(key) => sql += &format!(" WHERE {}", self.begins(key, |key| &key.greater)),
            From::Only(keys) => {
                let each: Vec<String> = keys.iter().map(|key| self.is(key)).collect();
                sql += &format!(" WHERE {}", each.join(" OR "));
            }
        }
        let order = self.key.iter().map(|key| format!("{} USING {}", self.column(key), key.less));
        let order = order.collect::<Vec<_>>().join(", ");
        let _ = write!(sql, " ORDER BY {order} LIMIT {rows}) TO STDOUT");
        sql
    }

    /// A condition for the rows at or behind a key; `last` is the operator for the last column.
    fn begins(&self, from: &[String], last: impl Fn(&KeyColumn) -> &String) -> String {
        assert_eq!(from.len(), self.key.len(), "a key has a value for each column");
        let pairs = || self.key.iter().zip(from);
        let same = |operator: &dyn Fn(&KeyColumn) -> &String| {
            self.key.iter().all(|key| operator(key) == operator(&self.key[0]))
        };
        if same(&last) {
            // A row comparison goes by the index as a whole.
            let left: Vec<String> = self.key.iter().map(|key| self.column(key)).collect();
            let right: Vec<String> = pairs().map(|(key, value)| literal(key, value)).collect();
            let (left, right) = (left.join(", "), right.join(", "));
            return match self.key.len() {
                1 => format!("{left} {} {right}", last(&self.key[0])),
                _ => format!("ROW({left}) {} ROW({right})", last(&self.key[0])),
            };
        }
        let mut condition = String::new();
        for (place, (key, value)) in pairs().enumerate().rev() {
            let (column, value) = (self.column(key), literal(key, value));
            condition = if place + 1 == self.key.len() {
                format!("{column} {} {value}", last(key))
            } else {
                format!(
                    "({column} {} {value} OR ({column} {} {value} AND {condition}))",
                    key.greater, key.equal
                )
            };
        }
        let (first, value) = (&self.key[0], &from[0]);
        // For the index.
        let begin = format!("{} {} {}", self.column(first), first.at_least, literal(first, value));
        format!("{begin} AND {condition}")
    }

    /// A condition for the row with this key.
    fn is(&self, key: &[String]) -> String {
        assert_eq!(key.len(), self.key.len(), "a key has a value for each column");
        let each = self.key.iter().zip(key).map(|(key, value)| {
            format!("{} {} {}", self.column(key), key.equal, literal(key, value))
        });
        format!("({})", each.collect::<Vec<_>>().join(" AND "))
    }

    fn column(&self, key: &KeyColumn) -> String {
        let name = escape_identifier(&self.table.columns[key.column].name);
        if key.collation.is_empty() {
            return format!("t.{name}");
        }
        format!("t.{name} {}", key.collation)
    }
}

fn literal(key: &KeyColumn, value: &str) -> String {
    format!("{}::{}", escape_literal(value).trim_start(), key.cast)
}

/// The same for the same description.
fn version(name: &TableName, columns: &[Column], key: &[usize]) -> u64 {
    let mut hasher = Xxh64::new(0);
    let mut add = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    add(name.schema.as_bytes());
    add(name.name.as_bytes());
    for (index, column) in columns.iter().enumerate() {
        add(column.name.as_bytes());
        add(&column.type_oid.to_le_bytes());
        add(&column.type_modifier.to_le_bytes());
        add(&[u8::from(key.contains(&index))]);
    }
    hasher.digest()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(column: usize, schema: &str, cast: &str, collation: &str) -> KeyColumn {
        let operator = |name: &str| format!("OPERATOR({schema}.{name})");
        KeyColumn {
            column,
            cast: cast.into(),
            collation: collation.into(),
            less: operator("<"),
            equal: operator("="),
            at_least: operator(">="),
            greater: operator(">"),
        }
    }

    fn shape(key: Vec<KeyColumn>) -> TableShape {
        let columns = ["id", "no\"te", "c"].map(|name| Column::new(name, 25, -1)).into();
        let name = TableName::new("public", "T");
        let table = TableShape::describe("shop", 7, &name, "public.T", columns, &key);
        TableShape { table, numbers: vec![1, 2, 3], name, partitioned: false, key, filter: None }
    }

    #[test]
    fn a_chunk_begins_behind_the_last_key_in_the_order_of_the_index() {
        let one = shape(vec![key(0, "pg_catalog", "bigint", "")]);
        assert_eq!(
            one.statement(&From::Start, None, 5),
            "COPY (SELECT t.\"id\", t.\"no\"\"te\", t.\"c\", true FROM ONLY \"public\".\"T\" AS t \
             ORDER BY t.\"id\" USING OPERATOR(pg_catalog.<) LIMIT 5) TO STDOUT"
        );
        let sql = one.statement(&From::After(vec!["7".into()]), None, 5);
        assert!(sql.contains(" WHERE t.\"id\" OPERATOR(pg_catalog.>) '7'::bigint ORDER"), "{sql}");
        let sql = one.statement(&From::At(vec!["a'b\\".into()]), None, 5);
        let begin = " WHERE t.\"id\" OPERATOR(pg_catalog.>=) E'a''b\\\\'::bigint ORDER";
        assert!(sql.contains(begin), "{sql}");
    }

    #[test]
    fn a_composite_key_is_compared_as_a_row_where_one_operator_does_it() {
        let c = "COLLATE pg_catalog.\"C\"";
        let two = shape(vec![key(2, "pg_catalog", "text", c), key(0, "pg_catalog", "uuid", "")]);
        let sql = two.statement(&From::After(vec!["x".into(), "7".into()]), None, 5);
        let condition = " WHERE ROW(t.\"c\" COLLATE pg_catalog.\"C\", t.\"id\") \
            OPERATOR(pg_catalog.>) ROW('x'::text, '7'::uuid) ORDER BY t.\"c\" COLLATE \
            pg_catalog.\"C\" USING OPERATOR(pg_catalog.<), t.\"id\" USING";
        assert!(sql.contains(condition), "{sql}");
        assert_eq!(two.table.key, [0, 2], "in column order");
        let two = shape(vec![key(2, "public", "citext", ""), key(0, "pg_catalog", "int", "")]);
        let sql = two.statement(&From::At(vec!["x".into(), "7".into()]), None, 5);
        let condition = " WHERE t.\"c\" OPERATOR(public.>=) 'x'::citext AND \
            (t.\"c\" OPERATOR(public.>) 'x'::citext OR (t.\"c\" OPERATOR(public.=) 'x'::citext \
            AND t.\"id\" OPERATOR(pg_catalog.>=) '7'::int)) ORDER BY";
        assert!(sql.contains(condition), "{sql}");
    }

    #[test]
    fn rows_with_certain_keys_are_found_by_all_columns_of_the_key() {
        let two = shape(vec![key(2, "public", "citext", ""), key(0, "pg_catalog", "int", "")]);
        let keys = [["x", "7"], ["y", "8"]].map(|key| key.map(str::to_owned).to_vec()).to_vec();
        let sql = two.statement(&From::Only(keys), None, 3);
        let condition = " WHERE (t.\"c\" OPERATOR(public.=) 'x'::citext AND t.\"id\" \
            OPERATOR(pg_catalog.=) '7'::int) OR (t.\"c\" OPERATOR(public.=) 'y'::citext AND \
            t.\"id\" OPERATOR(pg_catalog.=) '8'::int) ORDER BY";
        assert!(sql.contains(condition), "{sql}");
    }

    #[test]
    fn rows_that_are_not_wanted_are_marked_and_a_comment_ends_with_its_line() {
        let mut one = shape(vec![key(0, "pg_catalog", "bigint", "")]);
        (one.filter, one.partitioned) = (Some("(c > 1)".into()), true);
        let sql = one.statement(&From::Start, Some("id < 5 -- all"), 5);
        let wanted = "(((c > 1)\n) IS TRUE) AND ((id < 5 -- all\n) IS TRUE) FROM \"public\".\"T\"";
        assert!(sql.contains(wanted), "{sql}");
    }

    #[test]
    fn another_description_has_another_version() {
        let one = shape(vec![key(0, "pg_catalog", "bigint", "")]).table.version;
        assert_eq!(one, shape(vec![key(0, "x", "y", "z")]).table.version);
        assert_ne!(one, shape(vec![key(1, "pg_catalog", "bigint", "")]).table.version);
    }
}
