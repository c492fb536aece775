//! The types of a database, as its catalog has them.

use std::collections::HashMap;

use tokio_postgres::GenericClient;

use crate::column::{Types, UserType};
use crate::error::Result;
use crate::pg::sqlstate::postgres_error;
use crate::pg::unnamed;

/// Reads the types of users and extensions.
///
/// # Errors
/// The server's.
pub async fn read_types(client: &impl GenericClient) -> Result<Types> {
    const SQL: &str = include_str!("../../../sql/query/user_types.sql");
    let mut types = HashMap::new();
    for row in unnamed::query(client, SQL, &[]).await.map_err(postgres_error)? {
        let type_oid: u32 = row.try_get(0).map_err(postgres_error)?;
        let base: Option<u32> = row.try_get(1).map_err(postgres_error)?;
        let element: Option<u32> = row.try_get(2).map_err(postgres_error)?;
        let delimiter: i8 = row.try_get(3).map_err(postgres_error)?;
        let send: &str = row.try_get(4).map_err(postgres_error)?;
        let subtype: Option<u32> = row.try_get(5).map_err(postgres_error)?;
        let modifier: i32 = row.try_get(6).map_err(postgres_error)?;
        let what = match (base, element) {
            (Some(base), _) => UserType::Domain(base, modifier),
            (None, Some(element)) => UserType::Array(element, delimiter.cast_unsigned()),
            (None, None) => UserType::of(send, subtype.unwrap_or(0)),
        };
        types.insert(type_oid, what);
    }
    Ok(Types(types))
}
