//! The outbox as statements, and from their rows to events.
//!
//! Invariant: a row of a mapped table goes through the code that reads one of the stream of the
//! WAL, so both modes make the same id, key, headers and body of it.

use std::sync::Arc;

use bytes::{BufMut, BytesMut};
use futures_util::try_join;
use postgres_protocol::escape::{escape_identifier, escape_literal};
use tokio_postgres::{Client, Row};
use uuid::Uuid;

use super::batch::MadeWith;
use super::rows::{PolledRow, RawValue, too_large};
use crate::column::{Types, oid};
use crate::error::{Error, Result};
use crate::event::{Column, Identity, OutboxPayload, Table};
use crate::pg::outbox::MappedColumn;
use crate::pg::pgoutput::{self, ReplicationMessage};
use crate::pg::publication::TableName;
use crate::pg::sqlstate::{INVALID_SCHEMA_NAME, UNDEFINED_COLUMN, UNDEFINED_TABLE, postgres_error};
use crate::pg::statement::fill;
use crate::pg::unnamed;
use crate::source::outbox::{OutboxTable, Polled};
use crate::source::transaction::outbox_row::{OutboxColumns, broken, outbox_row};
use crate::source::transaction::rows::Values;

/// How a mapped table is read: always by its two indexes, never with rows that are hidden, and with
/// values as the stream of the WAL has them. The settings are those of one transaction, so that a
/// pooler gives the connection to the next client as it was.
const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY; \
    SET LOCAL search_path = pg_catalog, pg_temp; SET LOCAL row_security = off; \
    SET LOCAL jit = off; SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off; \
    SET LOCAL enable_sort = off; SET LOCAL enable_incremental_sort = on; \
    SET LOCAL IntervalStyle = iso_8601; SET LOCAL extra_float_digits = 3; \
    SET LOCAL bytea_output = hex; SET LOCAL lc_monetary = 'C'; SET LOCAL DateStyle = 'ISO, YMD'; \
    SET LOCAL TimeZone = 'UTC'; SET LOCAL quote_all_identifiers = off";
/// Columns of `poll_read_mapped.sql` before those of the table.
const BEFORE: usize = 6;

/// An outbox that is polled.
pub struct PolledOutbox {
    /// The table, as `watership.poll_batch` names it.
    pub(super) name: String,
    /// What its batches are made with; absent for the relay's own.
    made_with: Option<MadeWith>,
    look: String,
    read: String,
    rows: Rows,
}

enum Rows {
    /// The relay's own outbox: functions of the schema, whose plans are kept.
    Own(Arc<Table>),
    Mapped(Box<MappedRows>),
}

struct MappedRows {
    /// Asks whether the statements still read what they read at first.
    same: String,
    table: Arc<Table>,
    columns: OutboxColumns,
    types: Types,
    /// OIDs of the types of its columns, as the statement tells them.
    type_oids: String,
    /// Namespace of the ids of rows without one.
    namespace: Uuid,
}

/// How a body is measured, as SQL.
struct Body {
    /// Its bytes.
    length: String,
    /// About its bytes, without unpacking it.
    size: String,
}

impl PolledOutbox {
    /// `watership.outbox`.
    pub fn own(database: &Arc<str>) -> Self {
        let name = TableName::outbox();
        Self {
            name: name.to_string(),
            made_with: None,
            look: include_str!("../../../sql/query/poll_look.sql").into(),
            read: include_str!("../../../sql/query/poll_read.sql").into(),
            rows: Rows::Own(Arc::new(table(database, &name, 0, Vec::new()))),
        }
    }

    /// A table of the application's, whose columns the catalog has; `outbox` knows its domains.
    ///
    /// # Errors
    /// A verdict when a column is missing, which a check of the mapping finds before.
    pub fn mapped(
        database: &Arc<str>,
        (outbox, polled): (&OutboxTable, &Polled),
        columns: &[MappedColumn],
        types: Types,
    ) -> Result<Self> {
        let oid = outbox.catalog.oid.unwrap_or(0);
        let made_with = MadeWith::of(oid, polled, columns);
        let headers = outbox.headers_from.iter().map(|(_, column)| column.as_str());
        let placed = outbox.placed.iter().map(String::as_str);
        let mapped = outbox.needed().into_iter().chain(outbox.optional());
        let shown = outbox.shown.iter().map(String::as_str);
        let names: Vec<&str> = mapped.chain(headers).chain(placed).chain(shown).collect();
        let columns: Vec<&MappedColumn> =
            columns.iter().filter(|column| names.contains(&column.name.as_str())).collect();
        let described = columns.iter().map(|c| {
            Column::new(&c.name, c.type_oid, c.type_modifier).shaped(types.shape(c.type_oid))
        });
        let table = Arc::new(table(database, &outbox.table, oid, described.collect()));
        let type_oids: Vec<String> = columns.iter().map(|c| c.type_oid.to_string()).collect();
        let rows = MappedRows {
            same: same_statement(made_with, polled),
            type_oids: type_oids.join(" "),
            columns: OutboxColumns::find(&table, outbox, false)?,
            table,
            types,
            namespace: outbox.namespace(),
        };
        const LOOK: &str = include_str!("../../../sql/query/poll_look_mapped.sql");
        Ok(Self {
            name: outbox.table.to_string(),
            made_with,
            look: polled.fill(LOOK),
            read: read_statement(polled, outbox, &columns),
            rows: Rows::Mapped(Box::new(rows)),
        })
    }

    /// What is new: see `poll_look.sql`.
    pub(super) async fn look(
        &self,
        client: &Client,
        values: &[unnamed::Parameter<'_>],
    ) -> Result<Row> {
        let row = self.query(client, &self.look, values).await?.into_iter().next();
        row.ok_or_else(|| Error::protocol("a poll of the outbox returned no row"))
    }

    /// The next rows of a batch: see `poll_read.sql`.
    pub(super) async fn read(
        &self,
        client: &Client,
        values: &[unnamed::Parameter<'_>],
        max_body: usize,
    ) -> Result<Vec<PolledRow>> {
        let rows = self.query(client, &self.read, values).await?;
        let row = |row: &Row| match &self.rows {
            Rows::Own(_) => PolledRow::read(row, max_body),
            Rows::Mapped(mapped) => mapped.read(row, max_body),
        };
        rows.iter().map(row).collect()
    }

    /// One round trip in both cases.
    async fn query(
        &self,
        client: &Client,
        sql: &str,
        values: &[unnamed::Parameter<'_>],
    ) -> Result<Vec<Row>> {
        let query = unnamed::query(client, sql, values);
        let Rows::Mapped(mapped) = &self.rows else { return query.await.map_err(postgres_error) };
        let (begin, end) = (client.batch_execute(BEGIN), client.batch_execute("COMMIT"));
        let same = unnamed::query_one(client, &mapped.same, &[]);
        let all = try_join!(begin, query, same, end).map_err(postgres_error);
        let (_, rows, same, _) = all.map_err(|error| self.changed(error))?;
        if same.try_get(0).map_err(postgres_error)? {
            return Ok(rows);
        }
        // Rows that were read by other names must not be taken for those of the batch, nor their
        // absence for its end.
        let text = format!("{}, or a column that it is polled by, was replaced", self.name);
        Err(Error::unreachable(text)
            .hint("no action needed: the next session reads the table again"))
    }

    /// A mapped table is read as the session found it. What is missing since then is the table's,
    /// not our schema's.
    fn changed(&self, error: Error) -> Error {
        match error.sqlstate() {
            Some(UNDEFINED_TABLE | UNDEFINED_COLUMN | INVALID_SCHEMA_NAME) => error.hint(format!(
                "{} or a column of it was renamed or dropped; if it stays so, change [outbox]",
                self.name
            )),
            _ => error,
        }
    }

    /// What its batches are made with; absent for the relay's own.
    pub fn made_with(&self) -> Option<MadeWith> {
        self.made_with
    }

    /// How its events are described.
    pub(super) fn table(&self) -> &Arc<Table> {
        match &self.rows {
            Rows::Own(table) => table,
            Rows::Mapped(mapped) => &mapped.table,
        }
    }
}

fn table(database: &Arc<str>, name: &TableName, oid: u32, columns: Vec<Column>) -> Table {
    Table {
        database: database.clone(),
        oid,
        version: 0,
        full_name: name.to_string().into(),
        schema: name.schema.clone(),
        name: name.name.clone(),
        columns,
        key: Vec::new(),
        identity: Identity::Nothing,
    }
}

fn same_statement(made_with: Option<MadeWith>, polled: &Polled) -> String {
    const SAME: &str = include_str!("../../../sql/query/poll_same.sql");
    let (oid, order_by, xid) = MadeWith::stored(made_with);
    let values = [
        ("named", &*escape_literal(&polled.table.quoted())),
        ("oid", &oid.unwrap_or_default().to_string()),
        ("order_name", &escape_literal(&polled.order_by)),
        ("order_number", &order_by.unwrap_or_default().to_string()),
        ("xid_name", &escape_literal(&polled.xid)),
        ("xid_number", &xid.unwrap_or_default().to_string()),
    ];
    fill(SAME, &values)
}

/// Values as their types write them, which a cast to text does not do for all: a boolean would be
/// `true` instead of `t`.
fn read_statement(polled: &Polled, outbox: &OutboxTable, columns: &[&MappedColumn]) -> String {
    const READ: &str = include_str!("../../../sql/query/poll_read_mapped.sql");
    let names = &outbox.columns;
    let (mut inner, mut texts) = (String::new(), Vec::new());
    let (mut sizes, mut too_large, mut types) = (Vec::new(), Vec::new(), Vec::new());
    for (index, column) in columns.iter().enumerate() {
        let (from, to) = (format!("o.{}", escape_identifier(&column.name)), format!("k.c{index}"));
        inner += &format!(", {from} AS c{index}");
        types.push(format!("pg_typeof({to})::oid"));
        let text = format!("format('%s', {to})");
        if [&names.payload, &names.data].contains(&&Some(column.name.clone())) {
            let Body { length, .. } = body(column, &to);
            texts.push(format!("CASE WHEN {length} <= $9 THEN {text} END"));
            too_large.push(format!("CASE WHEN {length} > $9 THEN {length} END"));
            sizes.push(format!("coalesce({}, 0)", body(column, &from).size));
        } else {
            // As IS NOT NULL, which is something else for a row type.
            texts.push(format!("CASE WHEN {to} IS DISTINCT FROM NULL THEN {text} END"));
        }
    }
    let tie = format!("coalesce(o.{}::text, '') COLLATE \"C\"", escape_identifier(&names.id));
    let inner = format!(
        "o.{}::bigint AS place, {tie} AS tie, o.{}::text AS xid, ({})::bigint AS bytes{inner}",
        escape_identifier(&polled.order_by),
        escape_identifier(&polled.xid),
        sizes.join(" + ")
    );
    let values = [
        ("columns", &*inner),
        ("texts", &texts.join(", ")),
        ("types", &format!("concat_ws(' ', {})", types.join(", "))),
        ("too_large", &format!("greatest({})::bigint", too_large.join(", "))),
        ("tie", &tie),
    ];
    polled.fill_with(READ, &values)
}

fn body(column: &MappedColumn, value: &str) -> Body {
    match column.base_oid {
        oid::BYTEA => {
            let length = format!("octet_length({value})");
            Body { size: length.clone(), length }
        }
        // Its text has to be made to be measured; packed it is smaller.
        oid::JSONB => Body {
            length: format!("octet_length({value}::text)"),
            size: format!("pg_column_size({value}) * 4::bigint"),
        },
        _ => {
            let length = format!("octet_length({value}::text)");
            Body { size: length.clone(), length }
        }
    }
}

impl MappedRows {
    /// # Errors
    /// When the columns are not those of the statement.
    fn read(&self, row: &Row, max_body: usize) -> Result<PolledRow> {
        let seq: i64 = row.try_get(0).map_err(postgres_error)?;
        let tie: String = row.try_get(1).map_err(postgres_error)?;
        let xid: &str = row.try_get(2).map_err(postgres_error)?;
        let size: i64 = row.try_get(3).map_err(postgres_error)?;
        let longest: Option<i64> = row.try_get(4).map_err(postgres_error)?;
        let type_oids: &str = row.try_get(5).map_err(postgres_error)?;
        if type_oids != self.type_oids {
            let text = format!("the type of a column of {} has just changed", self.table.full_name);
            return Err(Error::protocol(text)
                .hint("no action needed: the next session reads the catalog again"));
        }
        let message = self.message(row)?.freeze();
        let decoded = pgoutput::decode(&message);
        let Ok(ReplicationMessage::Insert { new, .. }) = decoded else {
            return Err(Error::internal("a row that was polled cannot be read as a tuple"));
        };
        let values = Values::of(&message, &self.table, &self.types, max_body);
        let (id, created_at_us, mut content) = outbox_row(&values, &self.columns, &new);
        let is_broken = matches!(content.payload, OutboxPayload::Broken(_));
        if let Some(length) = longest.filter(|_| !is_broken) {
            let why = too_large(length.unsigned_abs(), max_body);
            content.payload = OutboxPayload::Broken(Box::new(broken(&values, &new, why)));
        }
        // It is parked, and needs an id for that; no text has this character.
        let own = || Uuid::new_v5(&self.namespace, format!("\0{xid}/{seq}").as_bytes());
        Ok(PolledRow {
            seq,
            id: id.unwrap_or_else(own),
            body: size.unsigned_abs(),
            xid: PolledRow::short_xid(xid)?,
            tie,
            created_at_us,
            content,
        })
    }

    /// The values, as an insert in the stream has them.
    fn message(&self, row: &Row) -> Result<BytesMut> {
        let mut message = BytesMut::from(&b"I\0\0\0\0N"[..]);
        let count = self.table.columns.len();
        message.put_u16(u16::try_from(count).map_err(|_| Error::internal("too many columns"))?);
        for index in BEFORE..BEFORE + count {
            let value: Option<RawValue<'_>> = row.try_get(index).map_err(postgres_error)?;
            match value {
                None => message.put_u8(b'n'),
                Some(RawValue(text)) => {
                    message.put_u8(b't');
                    let length = u32::try_from(text.len());
                    message.put_u32(length.map_err(|_| Error::internal("a value above 4 GB"))?);
                    message.put_slice(text);
                }
            }
        }
        Ok(message)
    }
}
