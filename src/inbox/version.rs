//! The broker's version, which lapin does not tell: read from `connection.start`, on a connection
//! of its own that goes no further.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::amqp::client::each_address;
use crate::amqp::options::{Options as Broker, Url};
use crate::error::{Error, Result};
use crate::fault::io_error;
use crate::tls;

/// Major and minor.
pub(super) type Version = (u32, u32);

/// From here on a consumer that dies does not change the order of what it gives back.
pub(super) const KEEPS_ORDER: Version = (4, 3);

/// Limit for all of it.
const LIMIT: Duration = Duration::from_secs(5);
/// The greeting is a few hundred bytes.
const GREETING_BYTES_MAX: u64 = 64 * 1024;
/// AMQP 0-9-1, section 4.2.2.
const PROTOCOL_HEADER: &[u8] = b"AMQP\0\0\x09\x01";

/// The version of the first broker that answers; (0, 0) for one that names none.
pub(super) async fn of(broker: &Broker) -> Result<Version> {
    let mut last = Error::config("no broker URL is given");
    for url in &broker.urls {
        let asked = timeout(LIMIT, ask(broker, url)).await.unwrap_or_else(|_| {
            Err(Error::unreachable(format!("no answer within {} s", LIMIT.as_secs())))
        });
        match asked {
            Ok(version) => return Ok(version),
            Err(error) => last = error.context(format!("broker {url}")),
        }
    }
    Err(last)
}

async fn ask(broker: &Broker, url: &Url) -> Result<Version> {
    let tls = broker.tls_for(url)?.map(|options| tls::client_config(&options)).transpose()?;
    let tcp = each_address(&url.host, url.port, LIMIT, TcpStream::connect).await?;
    let greeting = match tls {
        None => greeting(tcp).await?,
        Some(config) => {
            let name = tls::server_name(&url.host)?;
            let stream = TlsConnector::from(config).connect(name, tcp).await;
            greeting(stream.map_err(|e| io_error("TLS handshake with the broker", e))?).await?
        }
    };
    Ok(read(&greeting).unwrap_or_default())
}

/// The payload of the first frame: type, channel, length, payload (AMQP 0-9-1, section 4.2.3).
async fn greeting(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> Result<Vec<u8>> {
    let lost = |e| io_error("asking the broker for its version", e);
    stream.write_all(PROTOCOL_HEADER).await.map_err(lost)?;
    stream.flush().await.map_err(lost)?;
    let mut head = [0; 7];
    stream.read_exact(&mut head).await.map_err(lost)?;
    let [_, _, _, length @ ..] = head;
    let length = u64::from(u32::from_be_bytes(length)).min(GREETING_BYTES_MAX);
    let mut payload = Vec::new();
    stream.take(length).read_to_end(&mut payload).await.map_err(lost)?;
    Ok(payload)
}

/// The field `version`, a long string such as `4.3.1`, among the server's properties.
fn read(payload: &[u8]) -> Option<Version> {
    const FIELD: &[u8] = b"\x07versionS";
    let at = payload.windows(FIELD.len()).position(|window| window == FIELD)? + FIELD.len();
    let length = u32::from_be_bytes(payload.get(at..at + 4)?.try_into().ok()?) as usize;
    let text = std::str::from_utf8(payload.get(at + 4..(at + 4).checked_add(length)?)?).ok()?;
    let mut parts = text.split('.').map(str::parse);
    Some((parts.next()?.ok()?, parts.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_read_from_the_greeting() {
        let of = |text: &str| {
            let mut payload = b"\0\x0a\0\x0a\0\x09\x07product".to_vec();
            payload.extend_from_slice(b"\x07versionS");
            payload.extend_from_slice(&u32::try_from(text.len()).unwrap().to_be_bytes());
            payload.extend_from_slice(text.as_bytes());
            payload
        };
        assert_eq!(read(&of("3.10.8")), Some((3, 10)));
        assert_eq!(read(&of("4.3.0-rc.1")), Some((4, 3)));
        assert!(read(&of("4.2.9")).unwrap() < KEEPS_ORDER);
        assert!(read(&of("10.0.0")).unwrap() > KEEPS_ORDER);
        for broken in [&b"\x07versionS\xff\xff\xff\xff1"[..], b"\x07versionS", b""] {
            assert_eq!(read(broken), None);
        }
    }
}
