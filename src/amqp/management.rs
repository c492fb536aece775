//! Reads bindings and queues from RabbitMQ's management plugin, because AMQP cannot list them; and
//! grades a queue by what a confirm from it is worth.
//!
//! A client for a handful of GET requests: HTTP/1.0, one request per connection, so a response
//! ends where the connection does. Read-only.
//!
//! <https://www.rabbitmq.com/docs/http-api-reference>

use std::fmt;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::options::Options;
use crate::error::{Error, Result};
use crate::secret::{Secret, redact_url};
use crate::tls;

/// Longest response, in bytes; a broker with 10,000 bindings on an exchange answers about 2 MB.
const RESPONSE_MAX: u64 = 16 << 20;
/// Bounds one request as a whole.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Most exchanges followed from one (bindings between exchanges).
const EXCHANGES_MAX: usize = 100;

/// Where the plugin listens, and which vhost is looked at.
pub struct Management {
    host: String,
    port: u16,
    tls: Option<tls::Options>,
    authorization: Secret,
    vhost: String,
    shown: String,
}

/// A binding of an exchange to a queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bound {
    /// The queue.
    pub queue: String,
    /// The binding key.
    pub routing_key: String,
}

#[derive(Deserialize)]
struct RawBinding {
    destination: String,
    destination_type: String,
    routing_key: String,
}

/// What a confirm from a queue depends on.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct QueueFacts {
    /// Its name.
    pub name: String,
    /// `quorum`, `classic` or `stream`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Survives a restart of the broker.
    pub durable: bool,
    /// Deleted with its last consumer.
    pub auto_delete: bool,
    /// Belongs to one connection.
    pub exclusive: bool,
    arguments: serde_json::Map<String, serde_json::Value>,
    effective_policy_definition: serde_json::Value,
}

/// What a confirm is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Grade {
    /// Confirmed is stored on a majority, and stays until it is consumed.
    Safe,
    /// Confirmed is stored, but power loss or time may take it.
    Weak,
    /// Confirmed may be dropped.
    Unsafe,
}

impl fmt::Display for Grade {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Grade::Safe => "SAFE",
            Grade::Weak => "WEAK",
            Grade::Unsafe => "UNSAFE",
        })
    }
}

impl QueueFacts {
    /// The grade and its reason.
    pub fn grade(&self) -> (Grade, String) {
        if !self.durable {
            return (Grade::Unsafe, "not durable, a restart of the broker empties it".into());
        }
        if self.exclusive || self.auto_delete {
            return (Grade::Unsafe, "it vanishes with its consumer".into());
        }
        let overflow = self.text("overflow").unwrap_or("drop-head");
        let limited = self.has("max-length") || self.has("max-length-bytes");
        if self.kind != "stream" && limited && !overflow.starts_with("reject-publish") {
            let reason = format!("has a length limit and overflow {overflow}: a full queue drops");
            return (Grade::Unsafe, format!("{reason} its oldest messages"));
        }
        if self.has("message-ttl") || self.has("expires") {
            return (Grade::Weak, "messages or the queue expire".into());
        }
        match self.kind.as_str() {
            "quorum" => (Grade::Safe, "quorum queue".into()),
            "stream" => (Grade::Weak, "a stream confirms before fsync, and retention drops".into()),
            _ => (Grade::Weak, "a classic queue is on one node, and confirms before fsync".into()),
        }
    }

    fn value(&self, name: &str) -> Option<&serde_json::Value> {
        let argument = self.arguments.get(&format!("x-{name}"));
        argument.or_else(|| self.effective_policy_definition.get(name))
    }

    fn has(&self, name: &str) -> bool {
        self.value(name).is_some()
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.value(name).and_then(serde_json::Value::as_str)
    }
}

impl Management {
    /// Parses `http[s]://[user[:password]@]host[:port]`; user, password and vhost are those of the
    /// first broker URL where the URL has none.
    ///
    /// # Errors
    /// [`crate::error::Kind::Config`], without the password.
    pub fn new(url: &Secret, broker: &Options) -> Result<Self> {
        let shown = redact_url(url.expose());
        let wrong = |what: &str| {
            Error::config(format!("management URL {shown}: {what}"))
                .hint("the form is http[s]://user:password@host:15672")
        };
        let (scheme, rest) = url.expose().split_once("://").ok_or_else(|| wrong("no scheme"))?;
        let tls = match scheme {
            "http" => None,
            "https" => Some(tls::Options { mode: tls::Mode::VerifyFull, ..broker.tls.clone() }),
            _ => return Err(wrong("scheme is neither http nor https")),
        };
        let authority = rest.split(['/', '?']).next().unwrap_or_default();
        let (user_info, address) = authority.rsplit_once('@').unwrap_or(("", authority));
        let default_port = if tls.is_some() { 15671 } else { 15672 };
        let (host, port) = match address.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => {
                (host, port.parse().map_err(|_| wrong("the port is no number"))?)
            }
            Some(_) | None => (address, default_port),
        };
        if host.is_empty() {
            return Err(wrong("no host"));
        }
        let first = broker.urls.first().ok_or_else(|| wrong("no broker URL"))?;
        let credentials = match user_info {
            "" => format!("{}:{}", first.username, first.password.expose()),
            _ => {
                let decode = |text| percent_decode_str(text).decode_utf8_lossy().into_owned();
                let (user, password) = user_info.split_once(':').unwrap_or((user_info, ""));
                format!("{}:{}", decode(user), decode(password))
            }
        };
        Ok(Self {
            host: host.trim_matches(['[', ']']).to_owned(),
            port,
            tls,
            authorization: Secret::new(format!("Basic {}", STANDARD.encode(credentials))),
            vhost: first.vhost.clone(),
            shown,
        })
    }

    /// The queues bound to `exchange` itself; none when it does not exist.
    ///
    /// # Errors
    /// As every request: unreachable, refused, or an answer that is not understood.
    pub async fn bindings(&self, exchange: &str) -> Result<Vec<Bound>> {
        let list = self.raw_bindings(exchange).await?.into_iter();
        let queues = list.filter(|b| b.destination_type == "queue");
        Ok(queues.map(|b| Bound { queue: b.destination, routing_key: b.routing_key }).collect())
    }

    /// The queues that messages of `exchange` can reach, over bindings between exchanges too; each
    /// once. Binding keys are not looked at.
    ///
    /// # Errors
    /// As every request.
    pub async fn queues_behind(&self, exchange: &str) -> Result<Vec<String>> {
        let mut exchanges = vec![exchange.to_owned()];
        let mut queues = Vec::new();
        let mut next = 0;
        while let Some(exchange) = exchanges.get(next).cloned().filter(|_| next < EXCHANGES_MAX) {
            next += 1;
            for binding in self.raw_bindings(&exchange).await? {
                let list =
                    if binding.destination_type == "queue" { &mut queues } else { &mut exchanges };
                if !list.contains(&binding.destination) {
                    list.push(binding.destination);
                }
            }
        }
        Ok(queues)
    }

    /// A queue.
    ///
    /// # Errors
    /// As every request; refused when it does not exist.
    pub async fn queue(&self, name: &str) -> Result<QueueFacts> {
        let path = format!("/api/queues/{}/{}", segment(&self.vhost), segment(name));
        let facts = self.get(&path).await?;
        facts.ok_or_else(|| Error::refused(format!("{}: no queue {name:?}", self.shown)))
    }

    async fn raw_bindings(&self, exchange: &str) -> Result<Vec<RawBinding>> {
        let (vhost, exchange) = (segment(&self.vhost), segment(exchange));
        let path = format!("/api/exchanges/{vhost}/{exchange}/bindings/source");
        Ok(self.get(&path).await?.unwrap_or_default())
    }

    /// The answer to a GET; `None` for 404.
    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<Option<T>> {
        let context = |e: Error| e.context(format!("management API {}{path}", self.shown));
        let request = timeout(REQUEST_TIMEOUT, self.request(path)).await;
        let response = request.unwrap_or_else(|_| {
            Err(Error::unreachable(format!("no answer within {REQUEST_TIMEOUT:?}")))
        });
        parse(&response.map_err(context)?).map_err(context)
    }

    async fn request(&self, path: &str) -> Result<Vec<u8>> {
        let failed = |e: std::io::Error| {
            Error::unreachable(format!("cannot be reached: {e}"))
                .hint("is rabbitmq_management enabled, and the port right?")
        };
        let socket = TcpStream::connect((&*self.host, self.port)).await.map_err(failed)?;
        match &self.tls {
            None => self.exchange(socket, path).await.map_err(failed),
            Some(options) => {
                let connector = TlsConnector::from(tls::client_config(options)?);
                let name = tls::server_name(&self.host)?;
                let socket = connector.connect(name, socket).await.map_err(failed)?;
                self.exchange(socket, path).await.map_err(failed)
            }
        }
    }

    async fn exchange(
        &self,
        mut socket: impl AsyncRead + AsyncWrite + Unpin,
        path: &str,
    ) -> std::io::Result<Vec<u8>> {
        let (host, authorization) = (&self.host, self.authorization.expose());
        let request = format!(
            "GET {path} HTTP/1.0\r\nHost: {host}\r\nAuthorization: {authorization}\r\n\
             Accept: application/json\r\n\r\n"
        );
        socket.write_all(request.as_bytes()).await?;
        let mut response = Vec::new();
        socket.take(RESPONSE_MAX).read_to_end(&mut response).await?;
        Ok(response)
    }
}

fn segment(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

fn parse<T: DeserializeOwned>(response: &[u8]) -> Result<Option<T>> {
    let end = response.windows(4).position(|w| w == b"\r\n\r\n");
    let end = end.ok_or_else(|| Error::protocol("the answer is not HTTP"))?;
    let head = String::from_utf8_lossy(&response[..end]);
    let status = head.split(' ').nth(1).unwrap_or_default();
    match status {
        "200" => serde_json::from_slice(&response[end + 4..])
            .map(Some)
            .map_err(|e| Error::protocol("the answer is not understood").caused_by(e)),
        "404" => Ok(None),
        "401" | "403" => Err(Error::refused(format!("status {status}: user or password is wrong"))
            .hint(
                "the user needs the tag \"monitoring\" or \"management\" and rights in the vhost",
            )),
        _ => Err(Error::refused(format!("status {status:.20}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::amqp::options::Url;

    #[test]
    fn a_queue_is_graded_by_what_its_confirm_is_worth() {
        let limited = r#","arguments":{"x-max-length":5,"x-overflow":"reject-publish"}"#;
        for (kind, more, grade) in [
            ("quorum", "", Grade::Safe),
            ("quorum", limited, Grade::Safe),
            ("quorum", r#","arguments":{"x-max-length":5}"#, Grade::Unsafe),
            ("quorum", r#","effective_policy_definition":{"max-length":5}"#, Grade::Unsafe),
            ("quorum", r#","effective_policy_definition":[]"#, Grade::Safe),
            ("quorum", r#","arguments":{"x-message-ttl":5}"#, Grade::Weak),
            ("classic", "", Grade::Weak),
            ("stream", r#","arguments":{"x-max-length-bytes":5}"#, Grade::Weak),
            ("classic", r#","auto_delete":true"#, Grade::Unsafe),
        ] {
            let json = format!(r#"{{"type":"{kind}","durable":true{more}}}"#);
            let facts: QueueFacts = serde_json::from_str(&json).unwrap();
            assert_eq!(facts.grade().0, grade, "{json}");
        }
        let transient = QueueFacts { kind: "quorum".into(), ..QueueFacts::default() };
        assert_eq!(transient.grade().0, Grade::Unsafe);
    }

    #[test]
    fn credentials_and_vhost_come_from_the_broker_url_unless_given() {
        let broker = Options::new(vec![Url::parse("amqp://relay:pw@h/shop").unwrap()]);
        let management = |url: &str| Management::new(&Secret::new(url), &broker).unwrap();
        let own = management("http://admin:p%40w@[::1]:1234/");
        assert_eq!((own.host.as_str(), own.port), ("::1", 1234));
        assert_eq!(own.authorization.expose(), format!("Basic {}", STANDARD.encode("admin:p@w")));
        let borrowed = management("http://h");
        assert_eq!((borrowed.port, borrowed.vhost.as_str()), (15672, "shop"));
        let expected = format!("Basic {}", STANDARD.encode("relay:pw"));
        assert_eq!(borrowed.authorization.expose(), expected);
    }

    #[test]
    fn answers_are_told_apart_by_their_status() {
        let parse = |text: &str| parse::<Vec<u8>>(text.as_bytes());
        assert_eq!(parse("HTTP/1.1 200 OK\r\na: b\r\n\r\n[1,2]").unwrap(), Some(vec![1, 2]));
        assert_eq!(parse("HTTP/1.1 404 Object Not Found\r\n\r\n{}").unwrap(), None);
        assert!(parse("HTTP/1.1 401 Unauthorized\r\n\r\n").is_err());
        assert!(parse("HTTP/1.1 200 OK\r\n\r\n[1,").is_err());
        assert!(parse("SSH-2.0").is_err());
    }
}
