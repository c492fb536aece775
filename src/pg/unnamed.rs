//! Statements without a name: parsed, bound and run in one round trip.
//!
//! tokio-postgres prepares a statement under a name first. Behind a pooler in transaction mode the
//! name is left on one server connection while the next message goes to another, so everything that
//! a relay says to a database that it polls goes this way.

use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Error, GenericClient, Row};

/// A parameter of a statement.
pub type Parameter<'a> = &'a (dyn ToSql + Sync);

/// What parameters are declared as: the first of these that the value can be sent as. The statement
/// casts where it wants another type.
const TYPES: [Type; 16] = [
    Type::TEXT,
    Type::INT8,
    Type::INT4,
    Type::OID,
    Type::BOOL,
    Type::UUID,
    Type::PG_LSN,
    Type::JSONB,
    Type::TIMESTAMPTZ,
    Type::FLOAT8,
    Type::BYTEA,
    Type::TEXT_ARRAY,
    Type::INT8_ARRAY,
    Type::INT4_ARRAY,
    Type::UUID_ARRAY,
    Type::OID_ARRAY,
];

/// Rows.
///
/// # Errors
/// The server's.
pub async fn query(
    client: &impl GenericClient,
    sql: &str,
    parameters: &[Parameter<'_>],
) -> Result<Vec<Row>, Error> {
    client.query_typed(sql, &typed(parameters)).await
}

/// Exactly one row.
///
/// # Errors
/// The server's, or that there is another number of rows.
pub async fn query_one(
    client: &impl GenericClient,
    sql: &str,
    parameters: &[Parameter<'_>],
) -> Result<Row, Error> {
    client.query_typed_one(sql, &typed(parameters)).await
}

/// A row or none.
///
/// # Errors
/// The server's, or that there are more rows.
pub async fn query_opt(
    client: &impl GenericClient,
    sql: &str,
    parameters: &[Parameter<'_>],
) -> Result<Option<Row>, Error> {
    client.query_typed_opt(sql, &typed(parameters)).await
}

/// The number of rows that were changed.
///
/// # Errors
/// The server's.
pub async fn execute(
    client: &impl GenericClient,
    sql: &str,
    parameters: &[Parameter<'_>],
) -> Result<u64, Error> {
    client.execute_typed(sql, &typed(parameters)).await
}

fn typed<'a>(parameters: &[Parameter<'a>]) -> Vec<(Parameter<'a>, Type)> {
    parameters.iter().map(|parameter| (*parameter, type_of(*parameter))).collect()
}

/// The type that a value is sent as. What can be sent as none of them is a mistake of ours, and the
/// statement fails with the name of the type.
fn type_of(value: Parameter<'_>) -> Type {
    let fits = |declared: &&Type| {
        value.to_sql_checked(declared, &mut tokio_postgres::types::private::BytesMut::new()).is_ok()
    };
    TYPES.iter().find(fits).cloned().unwrap_or(Type::UNKNOWN)
}

#[cfg(test)]
mod tests {
    use tokio_postgres::types::PgLsn;
    use uuid::Uuid;

    use super::*;

    #[test]
    fn each_value_has_the_type_that_its_statement_expects() {
        let (text, list, none): (&str, &[&str], Option<String>) = ("a", &["a"], None);
        let expected: [(Parameter<'_>, Type); 12] = [
            (&text, Type::TEXT),
            (&none, Type::TEXT),
            (&1_i64, Type::INT8),
            (&None::<i64>, Type::INT8),
            (&1_i32, Type::INT4),
            (&1_u32, Type::OID),
            (&true, Type::BOOL),
            (&Uuid::nil(), Type::UUID),
            (&PgLsn::from(1), Type::PG_LSN),
            (&serde_json::Value::Null, Type::JSONB),
            (&list, Type::TEXT_ARRAY),
            (&vec![Uuid::nil()], Type::UUID_ARRAY),
        ];
        for (value, expected) in expected {
            assert_eq!(type_of(value), expected, "{value:?}");
        }
    }
}
