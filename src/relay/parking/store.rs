//! Reads `watership.parked`. Writing goes with the checkpoint, in `checkpoint`.

use std::collections::HashMap;

use tokio_postgres::{Client, Row as SqlRow};

use crate::error::{Error, Result};
use crate::pg::sqlstate::postgres_error;
use crate::pg::unnamed;
use crate::position::{Mark, ORDINAL_END, Position};
use crate::relay::checkpoint::to_sql;
use crate::relay::parking::Known;
use crate::relay::parking::row::{
    Indexed, ParkedKey, ParkedRow, Raw, RowState, Why, keys_to_json, lanes_from_columns,
};
use crate::route::ParkedAs;

/// What was found when the table was looked at.
#[derive(Debug)]
pub enum Found {
    /// As many rows as expected.
    Same,
    /// Something has changed: all unreleased rows.
    Index(Vec<Indexed>),
    /// The contents that were asked for.
    Rows(Vec<ParkedRow>),
}

/// The unreleased rows, unless there are as many as `expected` (parked, retrying).
///
/// # Errors
/// The server's.
pub async fn look(client: &Client, name: &str, expected: (usize, usize)) -> Result<Found> {
    const SQL: &str = include_str!("../../../sql/query/parked_counts.sql");
    let row = unnamed::query_one(client, SQL, &[&name]).await.map_err(postgres_error)?;
    let count = |i: usize| row.try_get::<_, i64>(i).map_err(postgres_error);
    let (parked, retrying) = (count(0)?, count(1)?);
    if (parked, retrying) == (expected.0 as i64, expected.1 as i64) {
        return Ok(Found::Same);
    }
    index(client, name).await.map(Found::Index)
}

/// The unreleased rows.
///
/// # Errors
/// The server's.
pub async fn index(client: &Client, name: &str) -> Result<Vec<Indexed>> {
    const SQL: &str = include_str!("../../../sql/query/parked_index.sql");
    let rows = unnamed::query(client, SQL, &[&name]).await.map_err(postgres_error)?;
    rows.iter()
        .map(|row| {
            let get = Columns(row);
            Ok(Indexed {
                key: get.key()?,
                state: RowState::parse(&get.text(6)?)?,
                why: Why::parse(&get.text(7)?),
                lanes: lanes_from_columns(
                    &row.try_get::<_, Vec<i64>>(8).map_err(postgres_error)?,
                    row.try_get(9).map_err(postgres_error)?,
                    row.try_get(10).map_err(postgres_error)?,
                )?,
                bytes: usize::try_from(row.try_get::<_, i64>(11).map_err(postgres_error)?)
                    .unwrap_or_default(),
                parked_at: row.try_get(12).map_err(postgres_error)?,
            })
        })
        .collect()
}

/// As what unreleased rows of captured tables are parked, by group.
///
/// # Errors
/// The server's.
pub async fn table_names(client: &Client, name: &str) -> Result<HashMap<u64, Vec<ParkedAs>>> {
    const SQL: &str = include_str!("../../../sql/query/parked_table_names.sql");
    let rows = unnamed::query(client, SQL, &[&name]).await.map_err(postgres_error)?;
    let mut names: HashMap<u64, Vec<ParkedAs>> = HashMap::new();
    for row in &rows {
        let group: i64 = row.try_get(0).map_err(postgres_error)?;
        // Postgres has no unsigned numbers; the bits are the same.
        let parked = ParkedAs {
            table: Columns(row).text(1)?,
            keyed: row.try_get(2).map_err(postgres_error)?,
        };
        names.entry(group as u64).or_default().push(parked);
    }
    Ok(names)
}

/// Rows, of any state, that a stream from `position` may bring again.
///
/// # Errors
/// The server's.
pub async fn known(client: &Client, name: &str, position: Position) -> Result<Known> {
    const SQL: &str = include_str!("../../../sql/query/parked_known.sql");
    let mark = to_sql(position.mark.0);
    let rows = unnamed::query(client, SQL, &[&name, &mark]).await.map_err(postgres_error)?;
    let mut known = Known::default();
    for row in &rows {
        let id = row.try_get(0).map_err(postgres_error)?;
        let get = Columns(row);
        known.ids.insert((id, get.text(1)?.into(), get.part(2)?));
        known.until = known.until.max(get.mark(3)?);
    }
    Ok(known)
}

/// The contents of rows that are to be tried again.
///
/// # Errors
/// The server's.
pub async fn rows(client: &Client, name: &str, keys: &[ParkedKey]) -> Result<Found> {
    const SQL: &str = include_str!("../../../sql/query/parked_rows.sql");
    let keys = keys_to_json(keys);
    let rows = unnamed::query(client, SQL, &[&name, &keys]).await.map_err(postgres_error)?;
    rows.iter().map(from_sql).collect::<Result<_>>().map(Found::Rows)
}

fn from_sql(row: &SqlRow) -> Result<ParkedRow> {
    let get = Columns(row);
    let event: Option<String> = row.try_get(17).map_err(postgres_error)?;
    let raw = match event {
        Some(json) => Raw::Event(json),
        None => Raw::Message {
            routing_key: get.text(18)?,
            properties: row.try_get(19).map_err(postgres_error)?,
            body: row.try_get(20).map_err(postgres_error)?,
        },
    };
    let attempts: i32 = row.try_get(9).map_err(postgres_error)?;
    Ok(ParkedRow {
        key: get.key()?,
        state: RowState::parse(&get.text(6)?)?,
        why: Why::parse(&get.text(7)?),
        error: get.text(8)?,
        attempts: u32::try_from(attempts).unwrap_or_default(),
        id: row.try_get(10).map_err(postgres_error)?,
        source: get.text(11)?,
        key_text: get.text(12)?,
        committed_at_us: get.int(13)?,
        lanes: lanes_from_columns(
            &row.try_get::<_, Vec<i64>>(14).map_err(postgres_error)?,
            row.try_get(15).map_err(postgres_error)?,
            row.try_get(16).map_err(postgres_error)?,
        )?,
        lanes_keyed: row.try_get(21).map_err(postgres_error)?,
        rules: row.try_get(22).map_err(postgres_error)?,
        raw,
    })
}

/// The columns of a row, with our errors.
struct Columns<'a>(&'a SqlRow);

impl Columns<'_> {
    /// The first six: epoch, mark, ordinal, sub, route, part.
    fn key(&self) -> Result<ParkedKey> {
        let position = Position {
            epoch: u32::try_from(self.int(0)?).map_err(|_| out_of_range("epoch"))?,
            mark: self.mark(1)?,
            ordinal: u64::try_from(self.int(2)?)
                .ok()
                .filter(|ordinal| *ordinal < ORDINAL_END)
                .ok_or_else(|| out_of_range("ordinal"))?,
            sub: u32::try_from(self.int(3)?).map_err(|_| out_of_range("sub"))?,
        };
        Ok(ParkedKey { position, route: self.text(4)?.into(), part: self.part(5)? })
    }

    fn mark(&self, index: usize) -> Result<Mark> {
        u64::try_from(self.int(index)?).map(Mark).map_err(|_| out_of_range("mark"))
    }

    fn part(&self, index: usize) -> Result<u16> {
        u16::try_from(self.int(index)?).map_err(|_| out_of_range("part"))
    }

    fn text(&self, index: usize) -> Result<String> {
        self.0.try_get(index).map_err(postgres_error)
    }

    fn int(&self, index: usize) -> Result<i64> {
        self.0.try_get(index).map_err(postgres_error)
    }
}

fn out_of_range(column: &str) -> Error {
    Error::protocol(format!("watership.parked.{column} is out of range"))
}
