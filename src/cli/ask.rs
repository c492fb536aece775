//! What the commands ask the running relay, at its own HTTP port.

use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::error::{Error, Result};
use crate::relay::status::Concern;

/// Bounds a request.
const LIMIT: Duration = Duration::from_secs(2);
/// Maximum size of an answer, in bytes.
const ANSWER_MAX: u64 = 1 << 20;

/// The /status of relay `own`.
///
/// # Errors
/// Nobody answers, or something that is not this relay does.
pub(super) async fn status(own: &str, address: SocketAddr) -> Result<Value> {
    let (_, body) = get(address, "/status").await?;
    let status: Option<Value> = serde_json::from_str(&body).ok();
    let named = status.and_then(|status| Some((status["name"].as_str()?.to_owned(), status)));
    let Some((name, status)) = named else {
        let what = format!("what answers at {address} is not a relay");
        return Err(Error::protocol(what).hint("another program uses this port: set admin.listen"));
    };
    if name == own {
        return Ok(status);
    }
    let what = format!("the relay at {address} is {name:?}, not {own:?}");
    Err(Error::config(what).hint("give each relay on this machine its own admin.listen"))
}

/// What the relay says is wrong with it.
pub(super) fn problems(status: &Value) -> Vec<Concern> {
    serde_json::from_value(status["problems"].clone()).unwrap_or_default()
}

/// A GET over HTTP/1.0: status code and body.
///
/// # Errors
/// [`crate::error::Kind::Refused`] when nobody listens, [`crate::error::Kind::Unreachable`] when
/// the answer takes too long, [`crate::error::Kind::Protocol`] when it is not HTTP.
pub(super) async fn get(address: SocketAddr, path: &str) -> Result<(u16, String)> {
    let host = reachable(address);
    let request = async {
        let mut socket = TcpStream::connect(host).await?;
        socket.write_all(format!("GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n").as_bytes()).await?;
        let mut response = Vec::new();
        socket.take(ANSWER_MAX).read_to_end(&mut response).await?;
        Ok::<_, io::Error>(String::from_utf8_lossy(&response).into_owned())
    };
    let what = || format!("the relay at http://{host}{path}");
    let response = timeout(LIMIT, request)
        .await
        .map_err(|_| Error::unreachable(format!("{} does not answer", what())))?
        .map_err(|e| match e.kind() {
            io::ErrorKind::ConnectionRefused => {
                Error::refused(format!("nothing listens at {host}"))
                    .hint("start the relay with `watership run`")
            }
            _ => Error::unreachable(format!("{} cannot be reached: {e}", what())),
        })?;
    let (head, body) = response.split_once("\r\n\r\n").unwrap_or((&response, ""));
    let mut words = head.split(' ');
    let code = words.next().filter(|word| word.starts_with("HTTP/")).and_then(|_| words.next());
    let code = code.and_then(|code| code.parse().ok());
    let code = code.ok_or_else(|| Error::protocol(format!("{} is not HTTP", what())))?;
    Ok((code, body.to_owned()))
}

/// An address that stands for all of this machine is asked on its loopback.
fn reachable(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => ([127, 0, 0, 1], v4.port()).into(),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => (Ipv6Addr::LOCALHOST, v6.port()).into(),
        other => other,
    }
}
