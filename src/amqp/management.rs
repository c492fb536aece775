//! Reads exchanges, bindings, queues and policies from RabbitMQ's management plugin, because AMQP
//! cannot list them; `audit` grades what was read. Read-only.
//!
//! <https://www.rabbitmq.com/docs/http-api-reference>

mod client;

use std::sync::atomic::{AtomicBool, Ordering};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::StatusCode;
use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::Mutex;

use super::audit::{BindingFacts, ExchangeFacts, Policies, QueueFacts, Survey};
use super::handshake::SERVES;
use super::options::{Auth, Options};
use crate::error::{Error, Kind, Result};
use crate::secret::{LACKS_AT, Secret, lacks_at, redact_url};
use crate::tls;
use client::{Client, HttpAnswer};

/// Maximum number of exchanges that are read, including those behind other exchanges.
const EXCHANGES_MAX: usize = 1_000;
/// Maximum number of queues that are read; any further ones are graded as missing.
const QUEUES_MAX: usize = 5_000;
/// Without it, the plugin gathers statistics from the whole cluster.
const NO_STATISTICS: &str = "?disable_stats=true";

/// Every management API has it, and no permission of a vhost matters for it.
const OVERVIEW: &str = "/api/overview?disable_stats=true";
/// What to do when something else answers there.
const NO_API: &str = "check port and path prefix in broker.management_url: something else answers";

/// Where the plugin listens, and which vhost is read.
pub struct Management {
    client: Client,
    /// Its overview was seen: what it calls missing is missing.
    known: AtomicBool,
    user: String,
    vhost: String,
    shown: String,
}

#[derive(Deserialize)]
struct Overview {
    rabbitmq_version: String,
}

#[derive(Deserialize)]
struct Policy {
    name: String,
    #[serde(rename = "apply-to", default)]
    apply_to: String,
    definition: Value,
}

/// The policies of the vhost; `None` for what the user may not see.
struct PolicyLists {
    ordinary: Option<Vec<Policy>>,
    operator: Option<Vec<Policy>>,
}

impl PolicyLists {
    /// One may apply to a queue. Which one does, only the queue's statistics say.
    fn may_apply_to_queues(&self) -> bool {
        let of_queues = |policy: &Policy| policy.apply_to != "exchanges";
        let may =
            |list: &Option<Vec<Policy>>| list.as_ref().is_none_or(|l| l.iter().any(of_queues));
        may(&self.ordinary) || may(&self.operator)
    }
}

#[derive(Deserialize)]
struct Owned {
    #[serde(default)]
    owner_pid_details: Value,
}

/// What the plugin says when it refuses.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Refusal {
    reason: Value,
}

impl Management {
    /// Parses `http[s]://[user[:password]@]host[:port][/prefix]`; user, password and vhost are
    /// those of the first broker URL where the URL has none.
    ///
    /// # Errors
    /// [`Kind::Config`], without the password.
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
        if rest.contains(['?', '#']) {
            return Err(wrong("neither \"?\" nor \"#\" may follow the path"));
        }
        let (user_info, address) = authority.rsplit_once('@').unwrap_or(("", authority));
        let default_port = if tls.is_some() { 15671 } else { 15672 };
        let (host, port) = host_and_port(address).map_err(wrong)?;
        let urls = broker.current_urls()?;
        let first = urls.first().ok_or_else(|| wrong("no broker URL"))?;
        let decode = |text| percent_decode_str(text).decode_utf8_lossy().into_owned();
        let external = first.auth.unwrap_or(broker.auth) == Auth::External;
        let (user, password) = match user_info.split_once(':') {
            Some((user, password)) => (decode(user), decode(password)),
            None if external => {
                return Err(wrong("user and password are needed: the broker knows a certificate"));
            }
            None if user_info.is_empty() => {
                (first.username.clone(), first.password.expose().to_owned())
            }
            None => (decode(user_info), first.password.expose().to_owned()),
        };
        let credentials = STANDARD.encode(format!("{user}:{password}"));
        let prefix = path.trim_end_matches('/');
        let client = Client {
            host: host.to_owned(),
            port: port.unwrap_or(default_port),
            tls,
            prefix: if prefix.is_empty() { String::new() } else { format!("/{prefix}") },
            authorization: Secret::new(format!("Basic {credentials}")),
            connect_timeout: broker.connect_timeout,
            open: Mutex::new(None),
        };
        let known = AtomicBool::new(false);
        Ok(Self { client, known, user, vhost: first.vhost.clone(), shown })
    }

    /// The host, where everything goes to it in plain text, the password too.
    pub fn plain_host(&self) -> Option<&str> {
        self.client.tls.is_none().then_some(&self.client.host)
    }

    /// The bindings that lead from `exchange` itself; none when it does not exist.
    ///
    /// # Errors
    /// As every request: unreachable, refused, or an answer that is not understood.
    pub async fn bindings(&self, exchange: &str) -> Result<Vec<BindingFacts>> {
        let path = format!("{}/bindings/source", self.path("exchanges", exchange));
        Ok(self.get(&path).await?.unwrap_or_default())
    }

    /// Everything that can be reached from these exchanges.
    ///
    /// # Errors
    /// As every request.
    pub async fn survey(&self, exchanges: &[String]) -> Result<Survey> {
        let version = self.overview().await?.rabbitmq_version;
        let major = version.split('.').next().and_then(|major| major.parse().ok());
        let lists = PolicyLists {
            ordinary: self.policies("policies").await?,
            operator: self.policies("operator-policies").await?,
        };
        let of_queues = lists.may_apply_to_queues();
        let named = |list: Vec<Policy>| list.into_iter().map(|p| (p.name, p.definition)).collect();
        let policies: Option<Policies> = lists.ordinary.map(named);
        let mut survey = Survey { broker_major: major.unwrap_or(0), policies, ..Survey::default() };
        let mut names: Vec<String> = exchanges.to_vec();
        let mut next = 0;
        while let Some(name) = names.get(next).cloned().filter(|_| next < EXCHANGES_MAX) {
            next += 1;
            let path = format!("{}{NO_STATISTICS}", self.path("exchanges", &name));
            let Some(exchange) = self.get::<ExchangeFacts>(&path).await? else { continue };
            let bindings = self.bindings(&name).await?;
            let alternate = exchange.alternate(survey.policies.as_ref());
            let onward = bindings.iter().filter(|b| b.destination_type == "exchange");
            for other in onward.map(|b| b.destination.clone()).chain(alternate) {
                if !names.contains(&other) {
                    names.push(other);
                }
            }
            for binding in bindings.iter().filter(|b| b.destination_type == "queue") {
                self.add_queue(&mut survey, &binding.destination, of_queues).await?;
            }
            survey.exchanges.insert(name.clone(), exchange);
            survey.bindings.insert(name, bindings);
        }
        Ok(survey)
    }

    /// The connection that owns an exclusive queue: what it works for and where it comes from;
    /// `None` when the queue does not exist, or its statistics do not show it yet.
    ///
    /// # Errors
    /// As every request.
    pub async fn owner(&self, queue: &str) -> Result<Option<String>> {
        let Some(owned) = self.get::<Owned>(&self.path("queues", queue)).await? else {
            return Ok(None);
        };
        let Some(name) = owned.owner_pid_details.get("name").and_then(Value::as_str) else {
            return Ok(None);
        };
        let path = format!("/api/connections/{}", segment(name));
        let connection: Option<Value> = self.get(&path).await?;
        let properties = connection.as_ref().and_then(|c| c.get("client_properties"));
        let text = |key: &str| properties?.get(key)?.as_str();
        let serves = text(SERVES).or_else(|| text("connection_name")).unwrap_or("unknown");
        Ok(Some(format!("{serves} (connection {name})")))
    }

    /// The vhost's policies, or operator policies; `None` when the user may not see them.
    async fn policies(&self, what: &str) -> Result<Option<Vec<Policy>>> {
        match self.get(&format!("/api/{what}/{}", segment(&self.vhost))).await {
            Ok(list) => Ok(list),
            Err(error) if error.kind() == Kind::Refused => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn add_queue(&self, survey: &mut Survey, name: &str, policies: bool) -> Result<()> {
        if survey.queues.contains_key(name) || survey.queues.len() >= QUEUES_MAX {
            return Ok(());
        }
        // It may have been deleted since its binding was listed.
        let statistics = if policies { "" } else { NO_STATISTICS };
        let path = format!("{}{statistics}", self.path("queues", name));
        if let Some(mut facts) = self.get::<QueueFacts>(&path).await? {
            facts.may_have_policy = policies;
            survey.queues.insert(name.to_owned(), facts);
        }
        Ok(())
    }

    fn path(&self, what: &str, name: &str) -> String {
        format!("/api/{what}/{}/{}", segment(&self.vhost), segment(name))
    }

    /// The answer to a GET; `None` for 404, if it is the management API that says so.
    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<Option<T>> {
        let found = self.ask(path).await?;
        if found.is_none() && !self.known.load(Ordering::Relaxed) {
            self.overview().await?;
        }
        Ok(found)
    }

    /// What the API says of itself. A proxy that does not know the path answers 404, too.
    async fn overview(&self) -> Result<Overview> {
        let Some(overview) = self.ask(OVERVIEW).await? else {
            let shown = &self.shown;
            return Err(Error::refused(format!("no management API at {shown} (404)")).hint(NO_API));
        };
        self.known.store(true, Ordering::Relaxed);
        Ok(overview)
    }

    async fn ask<T: DeserializeOwned>(&self, path: &str) -> Result<Option<T>> {
        let answer = self.client.get(path).await;
        answer.and_then(|answer| self.parse(&answer)).map_err(|error| {
            let path = path.split('?').next().unwrap_or(path);
            error.context(format!("management API {}{path}", self.shown.trim_end_matches('/')))
        })
    }

    fn parse<T: DeserializeOwned>(&self, answer: &HttpAnswer) -> Result<Option<T>> {
        match answer.status {
            StatusCode::OK => serde_json::from_slice(&answer.body).map(Some).map_err(|e| {
                Error::protocol("this is not the answer of a management API")
                    .caused_by(e)
                    .hint(NO_API)
            }),
            StatusCode::NOT_FOUND => Ok(None),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(self.refused(answer)),
            StatusCode::MOVED_PERMANENTLY
            | StatusCode::FOUND
            | StatusCode::TEMPORARY_REDIRECT
            | StatusCode::PERMANENT_REDIRECT => {
                Err(Error::refused(format!("unexpected status {}", answer.status))
                    .hint("set broker.management_url to where it redirects, such as https://"))
            }
            status if status.is_client_error() => {
                Err(Error::refused(format!("unexpected status {status}")).hint(NO_API))
            }
            status => Err(Error::refused(format!("unexpected status {status}"))
                .hint("see the log of the broker, or of the proxy in between")),
        }
    }

    /// Why the user may not look: the plugin gives its reason in words only.
    fn refused(&self, answer: &HttpAnswer) -> Error {
        let refusal: Refusal = serde_json::from_slice(&answer.body).unwrap_or_default();
        let said = refusal.reason.as_str().unwrap_or_default().to_owned();
        let (user, vhost, status) = (&self.user, &self.vhost, answer.status.as_u16());
        let lower = said.to_lowercase();
        let (what, hint) = if lower.contains("management user") {
            (
                format!("user {user:?} lacks the tag \"monitoring\" (or \"management\")"),
                format!("rabbitmqctl set_user_tags {user} monitoring"),
            )
        } else if lower.contains("virtual host") {
            (
                format!("user {user:?} has no permissions in vhost {vhost:?}"),
                format!("rabbitmqctl set_permissions -p {vhost} {user} CONFIGURE WRITE READ"),
            )
        } else {
            (
                format!(
                    "access to the management API denied for user {user:?}: its password is \
                     wrong, or it lacks a tag"
                ),
                format!(
                    "check the password; if it is right: rabbitmqctl set_user_tags {user} \
                     monitoring"
                ),
            )
        };
        let said = if said.is_empty() { String::new() } else { format!(" ({said:.80})") };
        Error::refused(format!("status {status}: {what}{said}")).hint(hint)
    }
}

/// `host`, `host:port`, `[v6]` or `[v6]:port`.
fn host_and_port(address: &str) -> std::result::Result<(&str, Option<u16>), &'static str> {
    let (host, port) = match address.strip_prefix('[') {
        Some(rest) => {
            let (host, after) = rest.split_once(']').ok_or("a \"[\" without \"]\"")?;
            match after.strip_prefix(':') {
                Some(port) => (host, Some(port)),
                None if after.is_empty() => (host, None),
                None => return Err("after \"]\" comes \":\" and the port"),
            }
        }
        None => match address.split_once(':') {
            Some((_, port)) if port.contains(':') => {
                return Err("an IPv6 address is written in brackets: http://[::1]:15672");
            }
            Some((host, port)) => (host, Some(port)),
            None => (address, None),
        },
    };
    if host.is_empty() {
        return Err("no host");
    }
    let port = port.map(|port| port.parse().map_err(|_| "the port is not a number")).transpose()?;
    Ok((host, port))
}

fn segment(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::amqp::options::Url;

    fn broker() -> Options {
        Options::new(vec![Url::parse("amqp://relay:pw@h/shop").unwrap()])
    }

    fn management(url: &str) -> Management {
        Management::new(&Secret::new(url), &broker()).unwrap()
    }

    #[test]
    fn credentials_and_vhost_come_from_the_broker_url_unless_given() {
        let sent = |m: &Management| m.client.authorization.expose().to_owned();
        let basic = |text: &str| format!("Basic {}", STANDARD.encode(text));
        let own = management("http://admin:p%40w@[::1]:1234/");
        assert_eq!((own.client.host.as_str(), own.client.port), ("::1", 1234));
        assert_eq!(sent(&own), basic("admin:p@w"));
        let borrowed = management("http://h");
        assert_eq!((borrowed.client.port, borrowed.vhost.as_str()), (15672, "shop"));
        assert_eq!(sent(&borrowed), basic("relay:pw"));
        assert_eq!(sent(&management("http://admin@h")), basic("admin:pw"));
    }

    #[test]
    fn a_url_is_read_as_it_is_meant_or_refused_without_its_password() {
        let proxied = management("https://h/rabbit/api-of-shop/");
        assert_eq!((proxied.client.port, &*proxied.client.prefix), (15671, "/rabbit/api-of-shop"));
        for (url, text) in [
            ("http://a:secret@::1", "in brackets"),
            ("http://a:secret@[::1]15672", "after \"]\""),
            ("http://a:secret@[::1", "without"),
            ("http://a:secret@:1", "no host"),
            ("http://a:secret@h:x", "not a number"),
            ("http://a:secret@h/p?q", "may follow"),
            ("ftp://a:secret@h", "neither http nor https"),
        ] {
            let error = Management::new(&Secret::new(url), &broker()).err().unwrap().to_string();
            assert!(error.contains(text) && !error.contains("secret"), "{error}");
        }
        let mut external = broker();
        external.auth = Auth::External;
        assert!(
            Management::new(&Secret::new("http://h"), &external).is_err(),
            "guest is not a user"
        );
        assert!(Management::new(&Secret::new("http://a:b@h"), &external).is_ok());
    }

    #[test]
    fn answers_are_told_apart_by_their_status() {
        let parse = |status: u16, body: &str| {
            let status = StatusCode::from_u16(status).unwrap();
            let body = body.to_owned().into();
            management("http://h").parse::<Vec<u8>>(&HttpAnswer { status, body })
        };
        assert_eq!(parse(200, "[1,2]").unwrap(), Some(vec![1, 2]));
        assert_eq!(parse(404, "{}").unwrap(), None);
        let other = parse(200, "<html></html>").unwrap_err();
        assert!(other.hint_text().unwrap().contains("path prefix"), "{other}");
        let untagged = parse(401, r#"{"reason":"Not management user"}"#).unwrap_err();
        assert!(untagged.to_string().contains("\"relay\" lacks the tag \"monitoring\""));
        assert!(untagged.hint_text().unwrap().contains("set_user_tags relay monitoring"));
        let unknown = parse(401, "not json").unwrap_err();
        assert!(unknown.to_string().contains("password is wrong, or it lacks a tag"));
        assert!(parse(301, "").unwrap_err().hint_text().unwrap().contains("https"));
    }
}
