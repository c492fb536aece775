//! Runs a command with a fresh Postgres database and a fresh RabbitMQ vhost on private servers: for
//! tests that are not in Rust.
//!
//! The command gets DATABASE_URL (a superuser's, with inbox and outbox installed), AMQP_URL (with
//! every right in its vhost), MANAGEMENT_URL, and WATERSHIP, the program. The exit code is the
//! command's.

use std::io::{self, Write as _};
use std::process::{Command, ExitCode};

use watership::dev::{self, Postgres, PostgresOptions, Rabbit, RabbitOptions};
use watership::pg::migrate::{INBOX, OUTBOX, grant_applications};

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    match run(&arguments).await {
        Ok(code) => code,
        Err(error) => {
            // A closed stderr leaves no place to report this.
            let _ = writeln!(io::stderr(), "error: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: &[std::ffi::OsString]) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let [program, rest @ ..] = arguments else { return Err("no command is given".into()) };
    // For what measures: a commit waits for the disk only then.
    let fsync = std::env::var_os("WATERSHIP_FSYNC").is_some();
    let postgres = Postgres::start(PostgresOptions { fsync, ..Default::default() }).await?;
    let rabbit = Rabbit::start(RabbitOptions { management: true, ..Default::default() }).await?;
    let database = "clients";
    postgres.create_database(database).await?;
    let url = postgres.url("postgres", database);
    let (mut client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await?;
    tokio::spawn(connection);
    OUTBOX.apply(&mut client).await?;
    grant_applications(&mut client).await?;
    INBOX.apply(&mut client).await?;
    rabbit.create_vhost(database).await?;
    // Beside this example's folder, where cargo puts it.
    let watership = std::env::current_exe()?.with_file_name("../watership");
    let status = Command::new(program)
        .args(rest)
        .env("DATABASE_URL", url)
        .env("AMQP_URL", rabbit.url(database))
        .env("MANAGEMENT_URL", rabbit.management_url().unwrap_or_default())
        .env("WATERSHIP", watership)
        .env("TMPDIR", dev::home()?)
        .status()?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, Into::into))
}
