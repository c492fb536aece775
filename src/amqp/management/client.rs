//! GET requests over one connection that is kept, HTTP/1.1, plain or TLS.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{ACCEPT, AUTHORIZATION, HOST};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::amqp::client::each_address;
use crate::error::{Error, Kind, Result};
use crate::fault::io_error;
use crate::secret::Secret;
use crate::tls;

/// Maximum size of a response, in bytes; 10,000 bindings of an exchange are about 2 MB.
const RESPONSE_MAX: usize = 16 << 20;
/// Bounds one request as a whole, without connecting.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// An HTTP server, and the connection to it.
pub(super) struct Client {
    pub host: String,
    pub port: u16,
    pub tls: Option<tls::Options>,
    /// Stands before every path; begins with a slash, or is empty.
    pub prefix: String,
    pub authorization: Secret,
    pub connect_timeout: Duration,
    pub open: Mutex<Option<SendRequest<Empty<Bytes>>>>,
}

/// Status and body of an answer.
pub(super) struct HttpAnswer {
    pub status: StatusCode,
    pub body: Bytes,
}

impl Client {
    /// # Errors
    /// `Unreachable`, `Refused` for certificates, `Config` for TLS files, `Protocol` for what
    /// is not HTTP.
    pub async fn get(&self, path: &str) -> Result<HttpAnswer> {
        let mut open = self.open.lock().await;
        if let Some(mut kept) = open.take()
            && let Ok(answer) = self.request(&mut kept, path).await
        {
            *open = Some(kept);
            return Ok(answer);
        }
        // Nothing was open, or the server has closed it meanwhile.
        let mut fresh = self.connect().await?;
        let answer = self.request(&mut fresh, path).await?;
        *open = Some(fresh);
        Ok(answer)
    }

    /// Host and port, as they stand in a URL.
    fn authority(&self) -> String {
        match self.host.contains(':') {
            true => format!("[{}]:{}", self.host, self.port),
            false => format!("{}:{}", self.host, self.port),
        }
    }

    async fn connect(&self) -> Result<SendRequest<Empty<Bytes>>> {
        let limit = self.connect_timeout;
        let connecting = each_address(&self.host, self.port, limit, TcpStream::connect);
        let unreachable = |error: Error| match error.kind() {
            Kind::Unreachable => error.hint("is rabbitmq_management enabled, is the port right?"),
            _ => error,
        };
        let socket = connecting.await.map_err(unreachable)?;
        let Some(options) = &self.tls else { return start(socket).await };
        let connector = TlsConnector::from(tls::client_config(options)?);
        let securing = connector.connect(tls::server_name(&self.host)?, socket);
        let secured = timeout(limit, securing).await;
        let secured = secured.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()));
        start(secured.map_err(|e| io_error("TLS handshake", e))?).await
    }

    async fn request(
        &self,
        sender: &mut SendRequest<Empty<Bytes>>,
        path: &str,
    ) -> Result<HttpAnswer> {
        let request = Request::get(format!("{}{path}", self.prefix))
            .header(HOST, self.authority())
            .header(AUTHORIZATION, self.authorization.expose())
            .header(ACCEPT, "application/json")
            .body(Empty::new())
            .map_err(|e| Error::config("HTTP cannot ask for this path").caused_by(e))?;
        let asked = async {
            sender.ready().await.map_err(|e| broken(&e))?;
            let answer = sender.send_request(request).await.map_err(|e| broken(&e))?;
            read(answer).await
        };
        timeout(REQUEST_TIMEOUT, asked).await.unwrap_or_else(|_| {
            Err(Error::unreachable(format!("no answer within {REQUEST_TIMEOUT:?}")))
        })
    }
}

async fn start<S>(socket: S) -> Result<SendRequest<Empty<Bytes>>>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = handshake(TokioIo::new(socket)).await.map_err(|e| broken(&e))?;
    // It moves the bytes, and ends when the sender is dropped. Its errors come to the request.
    tokio::spawn(connection);
    Ok(sender)
}

async fn read(answer: Response<hyper::body::Incoming>) -> Result<HttpAnswer> {
    let status = answer.status();
    let body = Limited::new(answer.into_body(), RESPONSE_MAX).collect().await;
    let body = body.map_err(|e| Error::protocol(format!("the answer cannot be read: {e}")))?;
    Ok(HttpAnswer { status, body: body.to_bytes() })
}

fn broken(error: &hyper::Error) -> Error {
    if error.is_parse() {
        return Error::protocol(format!("the answer is not HTTP: {error}"))
            .hint("is this the port of the management API, and does it speak http or https?");
    }
    Error::unreachable(format!("connection lost: {error}"))
        .hint("does this port speak http or https? see the log of the broker or proxy")
}
