//! Reads `watership.parked`. Writing goes with the checkpoint, in `checkpoint`.

use tokio_postgres::types::PgLsn;
use tokio_postgres::{Client, Row as SqlRow};

use crate::error::{Error, Result};
use crate::pg::sqlstate::postgres_error;
use crate::position::{Lsn, Position};
use crate::relay::parked::{
    Indexed, Key, Raw, Row, RowState, Why, keys_to_json, lanes_from_columns,
};
use crate::relay::parking::Known;

/// What was found when the table was looked at.
#[derive(Debug)]
pub enum Found {
    /// As many rows as expected.
    Same,
    /// Something has changed: all unreleased rows.
    Index(Vec<Indexed>),
    /// The contents that were asked for.
    Rows(Vec<Row>),
}

/// The unreleased rows, unless there are as many as `expected` (parked, retrying).
///
/// # Errors
/// The server's.
pub async fn look(client: &Client, name: &str, expected: (usize, usize)) -> Result<Found> {
    const SQL: &str = include_str!("../../../sql/query/parked_counts.sql");
    let row = client.query_one(SQL, &[&name]).await.map_err(postgres_error)?;
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
    let rows = client.query(SQL, &[&name]).await.map_err(postgres_error)?;
    rows.iter()
        .map(|row| {
            let get = Columns(row);
            Ok(Indexed {
                key: get.key()?,
                state: RowState::parse(&get.text(5)?)?,
                why: Why::parse(&get.text(6)?),
                lanes: lanes_from_columns(
                    &row.try_get::<_, Vec<i64>>(7).map_err(postgres_error)?,
                    row.try_get(8).map_err(postgres_error)?,
                    row.try_get(9).map_err(postgres_error)?,
                )?,
                bytes: usize::try_from(row.try_get::<_, i32>(10).map_err(postgres_error)?)
                    .unwrap_or_default(),
                parked_at: row.try_get(11).map_err(postgres_error)?,
            })
        })
        .collect()
}

/// Rows, of any state, that a stream from `position` may bring again.
///
/// # Errors
/// The server's.
pub async fn known(client: &Client, name: &str, position: Position) -> Result<Known> {
    const SQL: &str = include_str!("../../../sql/query/parked_known.sql");
    let lsn = PgLsn::from(position.commit_lsn.0);
    let rows = client.query(SQL, &[&name, &lsn]).await.map_err(postgres_error)?;
    let mut known = Known::default();
    for row in &rows {
        let id = row.try_get(0).map_err(postgres_error)?;
        known.ids.insert((id, Columns(row).text(1)?.into()));
        let lsn: PgLsn = row.try_get(2).map_err(postgres_error)?;
        known.until = known.until.max(Lsn(lsn.into()));
    }
    Ok(known)
}

/// The contents of rows that are to be tried again.
///
/// # Errors
/// The server's.
pub async fn rows(client: &Client, name: &str, keys: &[Key]) -> Result<Found> {
    const SQL: &str = include_str!("../../../sql/query/parked_rows.sql");
    let keys = keys_to_json(keys);
    let rows = client.query(SQL, &[&name, &keys]).await.map_err(postgres_error)?;
    rows.iter().map(from_sql).collect::<Result<_>>().map(Found::Rows)
}

fn from_sql(row: &SqlRow) -> Result<Row> {
    let get = Columns(row);
    let event: Option<String> = row.try_get(16).map_err(postgres_error)?;
    let raw = match event {
        Some(json) => Raw::Event(json),
        None => Raw::Message {
            routing_key: get.text(17)?,
            properties: row.try_get(18).map_err(postgres_error)?,
            body: row.try_get(19).map_err(postgres_error)?,
        },
    };
    let attempts: i32 = row.try_get(8).map_err(postgres_error)?;
    Ok(Row {
        key: get.key()?,
        state: RowState::parse(&get.text(5)?)?,
        why: Why::parse(&get.text(6)?),
        error: get.text(7)?,
        attempts: u32::try_from(attempts).unwrap_or_default(),
        id: row.try_get(9).map_err(postgres_error)?,
        source: get.text(10)?,
        key_text: get.text(11)?,
        committed_at_us: get.int(12)?,
        lanes: lanes_from_columns(
            &row.try_get::<_, Vec<i64>>(13).map_err(postgres_error)?,
            row.try_get(14).map_err(postgres_error)?,
            row.try_get(15).map_err(postgres_error)?,
        )?,
        raw,
    })
}

/// The columns of a row, with our errors.
struct Columns<'a>(&'a SqlRow);

impl Columns<'_> {
    /// The first five: epoch, commit LSN, ordinal, sub-ordinal, route.
    fn key(&self) -> Result<Key> {
        let wrong =
            |what: &str| Error::protocol(format!("watership.parked.{what} is out of range"));
        let lsn: PgLsn = self.0.try_get(1).map_err(postgres_error)?;
        let position = Position {
            epoch: u32::try_from(self.int(0)?).map_err(|_| wrong("epoch"))?,
            commit_lsn: Lsn(lsn.into()),
            ordinal: u64::try_from(self.int(2)?).map_err(|_| wrong("ordinal"))?,
            sub: u16::try_from(self.int(3)?).map_err(|_| wrong("sub"))?,
        };
        Ok(Key { position, route: self.text(4)?.into() })
    }

    fn text(&self, index: usize) -> Result<String> {
        self.0.try_get(index).map_err(postgres_error)
    }

    fn int(&self, index: usize) -> Result<i64> {
        self.0.try_get(index).map_err(postgres_error)
    }
}
