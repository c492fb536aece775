//! Reads exchanges, bindings and queues from RabbitMQ's management plugin, because AMQP cannot list
//! them; `audit` grades what was read.
//!
//! A client for a handful of GET requests: HTTP/1.0, one request per connection, so a response
//! ends where the connection does. Read-only.
//!
//! <https://www.rabbitmq.com/docs/http-api-reference>

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

use super::audit::{BindingFacts, ExchangeFacts, Survey};
use super::options::Options;
use crate::error::{Error, Result};
use crate::secret::{LACKS_AT, Secret, lacks_at, redact_url};
use crate::tls;

/// Maximum size of a response, in bytes; 10,000 bindings of an exchange are about 2 MB.
const RESPONSE_MAX: u64 = 16 << 20;
/// Bounds one request as a whole.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum number of exchanges that are read, including those behind other exchanges.
const EXCHANGES_MAX: usize = 1_000;
/// Maximum number of queues that are read; any further ones are graded as missing.
const QUEUES_MAX: usize = 5_000;

/// Where the plugin listens, and which vhost is read.
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
struct Overview {
    rabbitmq_version: String,
}

impl Management {
    /// Parses `http[s]://[user[:password]@]host[:port]`; user, password and vhost are those of the
    /// first broker URL where the URL has none. A path prefix is not supported, and refused.
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
            "https" => Some(tls::Options { mode: tls::SslMode::VerifyFull, ..broker.tls.clone() }),
            _ => return Err(wrong("scheme is neither http nor https")),
        };
        if lacks_at(rest) {
            return Err(wrong(LACKS_AT));
        }
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        if !path.is_empty() || authority.contains(['?', '#']) {
            return Err(wrong("nothing may follow the port"));
        }
        let (user_info, address) = authority.rsplit_once('@').unwrap_or(("", authority));
        let default_port = if tls.is_some() { 15671 } else { 15672 };
        let (host, port) = match address.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => {
                (host, port.parse().map_err(|_| wrong("the port is not a number"))?)
            }
            Some(_) | None => (address, default_port),
        };
        if host.is_empty() {
            return Err(wrong("no host"));
        }
        let urls = broker.current_urls()?;
        let first = urls.first().ok_or_else(|| wrong("no broker URL"))?;
        let credentials = match user_info {
            "" => format!("{}:{}", first.username, first.password.expose()),
            _ => {
                let decode = |text| percent_decode_str(text).decode_utf8_lossy().into_owned();
                let (user, password) = match user_info.split_once(':') {
                    Some((user, password)) => (user, decode(password)),
                    None => (user_info, first.password.expose().to_owned()),
                };
                format!("{}:{password}", decode(user))
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

    /// The host, where everything goes to it in plain text, the password too.
    pub fn plain_host(&self) -> Option<&str> {
        self.tls.is_none().then_some(&self.host)
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

    /// Everything that can be reached from these exchanges.
    ///
    /// # Errors
    /// As every request.
    pub async fn survey(&self, exchanges: &[String]) -> Result<Survey> {
        let version: Option<Overview> = self.get("/api/overview").await?;
        let version = version.map(|overview| overview.rabbitmq_version).unwrap_or_default();
        let major = version.split('.').next().and_then(|major| major.parse().ok());
        let mut survey = Survey { broker_major: major.unwrap_or(0), ..Survey::default() };
        let mut names: Vec<String> = exchanges.to_vec();
        let mut next = 0;
        while let Some(name) = names.get(next).cloned().filter(|_| next < EXCHANGES_MAX) {
            next += 1;
            let Some(exchange) = self.get::<ExchangeFacts>(&self.path("exchanges", &name)).await?
            else {
                continue;
            };
            let bindings = self.raw_bindings(&name).await?;
            let alternate = exchange.arguments.get("alternate-exchange");
            let alternate = alternate.and_then(|name| name.as_str().map(str::to_owned));
            let onward = bindings.iter().filter(|b| b.destination_type == "exchange");
            for other in onward.map(|b| b.destination.clone()).chain(alternate) {
                if !names.contains(&other) {
                    names.push(other);
                }
            }
            for binding in bindings.iter().filter(|b| b.destination_type == "queue") {
                self.add_queue(&mut survey, &binding.destination).await?;
            }
            survey.exchanges.insert(name.clone(), exchange);
            survey.bindings.insert(name, bindings);
        }
        Ok(survey)
    }

    async fn add_queue(&self, survey: &mut Survey, name: &str) -> Result<()> {
        if survey.queues.contains_key(name) || survey.queues.len() >= QUEUES_MAX {
            return Ok(());
        }
        // It may have been deleted since its binding was listed.
        if let Some(facts) = self.get(&self.path("queues", name)).await? {
            survey.queues.insert(name.to_owned(), facts);
        }
        Ok(())
    }

    fn path(&self, what: &str, name: &str) -> String {
        format!("/api/{what}/{}/{}", segment(&self.vhost), segment(name))
    }

    async fn raw_bindings(&self, exchange: &str) -> Result<Vec<BindingFacts>> {
        let path = format!("{}/bindings/source", self.path("exchanges", exchange));
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
                .hint("is rabbitmq_management enabled, and is the port right?")
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
            .map_err(|e| Error::protocol("the answer has an unexpected form").caused_by(e)),
        "404" => Ok(None),
        "401" | "403" => Err(Error::refused(format!("status {status}: user or password is wrong"))
            .hint(
                "the user needs the tag \"monitoring\" or \"management\", and permissions in the \
                 vhost",
            )),
        _ => Err(Error::refused(format!("unexpected status {status:.20}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::amqp::options::Url;

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
        let half = management("http://admin@h");
        let expected = format!("Basic {}", STANDARD.encode("admin:pw"));
        assert_eq!(half.authorization.expose(), expected);
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
