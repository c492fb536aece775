//! Connections to the consumer's database.

use std::fmt;
use std::time::Duration;

use tokio::time::timeout;
use tokio_postgres::Client;

use super::options::Connect;
use crate::error::{Error, Result};
use crate::pg::client;
use crate::pg::connect::{Options, Settings};
use crate::secret::Secret;

/// What the name of a session is without one in the URL.
const DEFAULT_NAME: &str = "watership";
/// A client of the application's own must be there within this time.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);

/// Where the inbox is.
#[derive(Clone)]
pub(super) enum Database {
    Url(Box<Options>),
    By(Connect),
}

impl Database {
    /// By URL.
    pub fn at(url: &Secret, consumer: &str) -> Result<Self> {
        let mut options = Options::parse(url)?;
        options.settings = Settings::Application;
        if options.application_name == DEFAULT_NAME {
            options.application_name = format!("watership inbox {consumer}").replace('\0', "");
        }
        Ok(Self::Url(Box::new(options)))
    }

    /// By clients of the application.
    pub fn by(connect: Connect) -> Self {
        Self::By(connect)
    }

    /// Opens one connection.
    pub async fn connect(&self) -> Result<Client> {
        match self {
            Self::Url(options) => Ok(client::sql(options).await?.client),
            Self::By(connect) => timeout(CONNECT_LIMIT, connect()).await.unwrap_or_else(|_| {
                let limit = CONNECT_LIMIT.as_secs();
                Err(Error::unreachable(format!("no connection within {limit} s")))
            }),
        }
    }
}

impl fmt::Display for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Url(options) => options.fmt(f),
            Self::By(_) => f.write_str("the application's Postgres"),
        }
    }
}
