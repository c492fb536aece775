//! Start-up and authentication of every connection, ordinary SQL and replication alike.
//!
//! Invariants: a clear-text password is never sent, an md5 hash only when allowed, and where
//! channel binding or SCRAM is required nothing less lets us in. The start-up packet fixes every
//! setting that changes the text of values, so that a role's own settings cannot.
//!
//! <https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-START-UP>

use std::io;

use postgres_protocol::authentication::md5_hash;
use postgres_protocol::message::backend::{AuthenticationSaslBody, Message, ParameterStatusBody};
use postgres_protocol::message::frontend;
use tokio_postgres::fallible_iterator::FallibleIterator;

use super::connect::{ChannelBinding, Options, Settings};
use super::scram::{Scram, ScramBinding};
use super::socket::{NO_WORD, NOT_POSTGRES};
use super::wire::{Reply, Wire};
use crate::error::{Error, Kind, Result};
use crate::secret::Secret;

/// Settings of every session of ours, replication or not: values come as ISO 8601 and exact, their
/// text does not depend on what the role or the database prefers (it is part of ids), and nothing
/// of `public` is found by an unqualified name.
///
/// A space in a value has to be escaped with a backslash, as in the server's command line.
const SETTINGS: &str = "-c search_path=pg_catalog -c DateStyle=ISO,YMD \
     -c IntervalStyle=iso_8601 -c TimeZone=UTC -c extra_float_digits=3 -c bytea_output=hex \
     -c lc_monetary=C -c quote_all_identifiers=off -c idle_session_timeout=0";

/// The same for a setting that came with Postgres 17, which earlier servers do not know: a role's
/// own limit must not end the decoding of a long transaction.
pub(super) const NO_TRANSACTION_TIMEOUT: &str = "SET transaction_timeout = 0";

/// Whether a server of this `server_version` knows it.
pub(super) fn has_transaction_timeout(server_version: &str) -> bool {
    let major = server_version.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
    major.parse::<u32>().is_ok_and(|major| major >= 17)
}

/// A walsender waits as long as it takes; its statements never time out. Its warnings are needed:
/// one of them reports changes that it leaves out.
const REPLICATION_SETTINGS: &str = " -c statement_timeout=0 -c lock_timeout=0 \
     -c idle_in_transaction_session_timeout=0 \
     -c client_min_messages=warning";

/// Limits of an ordinary session, so that no statement of ours holds a lock indefinitely. Longer
/// work sets its own with `SET LOCAL`.
///
/// Rows that row-level security would hide are an error and never just absent. And a server that
/// was made read-only by its default, as hosting services do when the disk is full, still takes the
/// checkpoint: only that lets it remove WAL.
const LIMITS: &str = " -c statement_timeout=30s -c lock_timeout=5s \
     -c idle_in_transaction_session_timeout=60s -c row_security=off \
     -c default_transaction_read_only=off";

/// Settings that a server reports, and what they are in each session of ours.
const REPORTED: [(&str, &str); 3] =
    [("DateStyle", "ISO, YMD"), ("IntervalStyle", "iso_8601"), ("TimeZone", "UTC")];

const SCRAM: &str = "SCRAM-SHA-256";
const SCRAM_PLUS: &str = "SCRAM-SHA-256-PLUS";

/// What the server asked for as proof.
enum Proof {
    /// Nothing: trust, peer or a client certificate.
    None,
    /// An md5 hash.
    Md5([u8; 4]),
    /// SCRAM.
    Sasl(AuthenticationSaslBody),
}

/// Whether a server that reports this of a session of ours has ignored its settings: a value in
/// another form would be another text, also in ids.
pub(super) fn check_reported(name: &str, value: &str) -> Result<()> {
    match REPORTED.iter().find(|(known, expected)| *known == name && *expected != value) {
        None => Ok(()),
        Some((_, expected)) => Err(Error::refused(format!(
            "the server ignores the settings of this connection: {name} is {value:?}, not \
             {expected:?}"
        ))
        .hint("connect to Postgres itself; a pooler such as PgBouncer ignores them")),
    }
}

/// Checks what the server reports, and keeps its version.
pub(super) fn note_reported(body: &ParameterStatusBody, version: &mut String) -> Result<()> {
    let (name, value) = (body.name().unwrap_or_default(), body.value().unwrap_or_default());
    if name == "server_version" {
        value.clone_into(version);
    }
    check_reported(name, value)
}

/// Sends the start-up packet and authenticates.
///
/// # Errors
/// [`crate::error::Kind::Refused`] when the server asks for what is not allowed, or refuses us.
pub(super) async fn start_up(wire: &mut Wire, options: &Options, replication: bool) -> Result<()> {
    let settings = match (options.settings, replication) {
        (Settings::Relay, true) => format!("{SETTINGS}{REPLICATION_SETTINGS}"),
        (Settings::Relay, false) => format!("{SETTINGS}{LIMITS}"),
        (Settings::Pooled | Settings::Application, _) => String::new(),
    };
    let mut parameters = vec![
        ("user", options.user.as_str()),
        ("database", options.database.as_str()),
        ("client_encoding", "UTF8"),
        ("application_name", options.application_name.as_str()),
    ];
    if options.settings == Settings::Pooled {
        parameters.extend([("DateStyle", "ISO, YMD"), ("TimeZone", "UTC")]);
    }
    // A pooler in between refuses what it does not know, and may be told to.
    if !settings.is_empty() {
        parameters.push(("options", settings.as_str()));
    }
    if replication {
        parameters.push(("replication", "database"));
    }
    frontend::startup_message(parameters, wire.output()).map_err(|e| {
        Error::config("user, database or application name contains a zero byte").caused_by(e)
    })?;
    match asked_proof(wire).await? {
        Proof::None => admit_without_proof(options),
        Proof::Md5(salt) => {
            admit_md5(options)?;
            let password = password(options)?.expose();
            let hash = md5_hash(options.user.as_bytes(), password.as_bytes(), salt);
            frontend::password_message(hash.as_bytes(), wire.output()).map_err(encoding)?;
            authenticated(wire).await
        }
        Proof::Sasl(body) => scram(wire, options, &body).await,
    }
}

async fn asked_proof(wire: &mut Wire) -> Result<Proof> {
    // A server of another protocol shows with its first message, or closes without any.
    let first = wire.reply().await.map_err(|error| match (error.kind(), error.hint_text()) {
        (Kind::Protocol, _) => error.hint(NOT_POSTGRES),
        (Kind::Unreachable, None) => error.hint(NO_WORD),
        _ => error,
    });
    match first? {
        Reply::Message(Message::AuthenticationOk) => Ok(Proof::None),
        Reply::Message(Message::AuthenticationMd5Password(body)) => Ok(Proof::Md5(body.salt())),
        Reply::Message(Message::AuthenticationSasl(body)) => Ok(Proof::Sasl(body)),
        Reply::Message(Message::AuthenticationCleartextPassword) => Err(refuse_clear_text()),
        Reply::Message(
            Message::AuthenticationKerberosV5
            | Message::AuthenticationScmCredential
            | Message::AuthenticationGss
            | Message::AuthenticationSspi,
        ) => Err(Error::refused(
            "the server asks for Kerberos, GSSAPI or SSPI, which are not supported",
        )
        .hint("use scram-sha-256 for this role in pg_hba.conf")),
        other => Err(wire.unexpected(other, "authenticating")),
    }
}

/// The error for a server that asks for the password itself.
fn refuse_clear_text() -> Error {
    Error::refused("the server asks for a clear-text password, which is never sent")
        .hint("use scram-sha-256 instead of `password` for this role in pg_hba.conf")
}

/// Whether a server may let us in without authentication.
fn admit_without_proof(options: &Options) -> Result<()> {
    if options.channel_binding == ChannelBinding::Require {
        let text = "the server requires no authentication, so channel binding is impossible";
        return Err(Error::refused(text)
            .hint("use scram-sha-256 in pg_hba.conf, or drop channel_binding=require"));
    }
    if options.require_scram {
        let text = "the server requires no authentication, but require_auth=scram-sha-256 is set";
        return Err(
            Error::refused(text).hint("use scram-sha-256 in pg_hba.conf, or drop require_auth")
        );
    }
    Ok(())
}

/// Whether an md5 hash may be sent.
fn admit_md5(options: &Options) -> Result<()> {
    if options.channel_binding == ChannelBinding::Require || options.require_scram {
        return Err(Error::refused(
            "the server asks for an md5 password hash, but the URL requires scram-sha-256",
        ));
    }
    if !options.allow_md5 {
        return Err(Error::refused(
            "the server asks for an md5 password hash, which is not allowed",
        )
        .hint(
            "set password_encryption=scram-sha-256 on the server, then set the password again, \
                 or allow md5 with allow_md5=true in the URL",
        ));
    }
    Ok(())
}

/// The password, now that the server asks for one.
fn password(options: &Options) -> Result<&Secret> {
    options.password.as_ref().ok_or_else(|| {
        Error::config(format!("the server asks for the password of {:?}", options.user))
            .hint("put a password in the URL, or set source.password")
    })
}

async fn scram(wire: &mut Wire, options: &Options, body: &AuthenticationSaslBody) -> Result<()> {
    let offered: Vec<&str> = body.mechanisms().collect().map_err(broken)?;
    let (mechanism, binding) = choose(wire, options, &offered)?;
    let mut scram = Scram::new(password(options)?, binding)?;
    let first = scram.first();
    frontend::sasl_initial_response(mechanism, first.as_bytes(), wire.output())
        .map_err(encoding)?;
    let answer = match wire.reply().await? {
        Reply::Message(Message::AuthenticationSaslContinue(body)) => {
            scram.answer(body.data()).await?
        }
        other => return Err(wire.unexpected(other, "authenticating")),
    };
    frontend::sasl_response(answer.as_bytes(), wire.output()).map_err(encoding)?;
    match wire.reply().await? {
        // The server proves here that it knows the password too.
        Reply::Message(Message::AuthenticationSaslFinal(body)) => scram.finish(body.data())?,
        other => return Err(wire.unexpected(other, "authenticating")),
    }
    authenticated(wire).await
}

/// The mechanism and its binding. When we could bind and the server does not offer it, we say so
/// (`y`): a server that did offer it then knows that the list was tampered with.
///
/// <https://www.rfc-editor.org/rfc/rfc5802#section-6>
fn choose(
    wire: &Wire,
    options: &Options,
    offered: &[&str],
) -> Result<(&'static str, ScramBinding)> {
    let wanted = options.channel_binding != ChannelBinding::Disable;
    let hash = wire.socket().channel_binding().filter(|_| wanted);
    let plus = offered.contains(&SCRAM_PLUS);
    if options.channel_binding == ChannelBinding::Require {
        let why = match (&hash, plus) {
            (Some(_), true) => None,
            (None, _) => Some("the server's certificate defines none (Ed25519 or RSA-PSS)"),
            (Some(_), false) => Some("the server does not offer SCRAM-SHA-256-PLUS"),
        };
        if let Some(why) = why {
            return Err(Error::refused(format!("channel_binding=require, but {why}"))
                .hint("use an RSA or ECDSA certificate, or set channel_binding=prefer"));
        }
    }
    match hash {
        Some(hash) if plus => Ok((SCRAM_PLUS, ScramBinding::EndPoint(hash))),
        _ if !offered.contains(&SCRAM) => Err(Error::refused(format!(
            "the server offers {}; allowed: SCRAM-SHA-256, SCRAM-SHA-256-PLUS",
            offered.join(", ")
        ))),
        Some(_) => Ok((SCRAM, ScramBinding::NotOffered)),
        None => Ok((SCRAM, ScramBinding::Impossible)),
    }
}

async fn authenticated(wire: &mut Wire) -> Result<()> {
    match wire.reply().await? {
        Reply::Message(Message::AuthenticationOk) => Ok(()),
        other => Err(wire.unexpected(other, "authenticating")),
    }
}

fn broken(error: io::Error) -> Error {
    Error::refused("the SCRAM exchange with the server failed").caused_by(error)
}

fn encoding(error: io::Error) -> Error {
    Error::config("the password cannot be sent").caused_by(error)
}
