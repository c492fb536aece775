//! `[broker]`: how to reach RabbitMQ and log in.
//!
//! Defaults of a connection are those of [`Options::new`], so that they stand in one place.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use super::load::Filled;
use super::section::Section;
use super::value::quoted;
use super::{DAY, HOUR, SECOND};
use crate::amqp::management::Management;
use crate::amqp::options::{Auth, Options, Scheme, Url};
use crate::error::Result;
use crate::relay::upkeep::route_audit::AuditOptions;
use crate::secret::{Again, Secret};

/// RabbitMQ's own limit of `max_message_size`, in bytes.
const MESSAGE_MAX: u64 = 512 << 20;

/// How to connect, for the relay called `name`. The relay adds exchanges and the lock queue.
pub(super) fn connection(t: &mut Section<'_>, name: &str) -> Options {
    let nodes = urls(t);
    let mut options = Options::new(nodes.read);
    options.urls_again = nodes.again;
    options.auth = t.word("auth", &[("plain", Auth::Plain), ("external", Auth::External)]);
    options.tls.root_cert = t.file("tls_ca");
    options.tls.client_cert = t.file("tls_cert");
    options.tls.client_key = t.file("tls_key");
    options.connect_timeout = t.duration("connect_timeout", options.connect_timeout, SECOND..=HOUR);
    options.heartbeat = t.duration("heartbeat", options.heartbeat, SECOND..=HOUR);
    options.confirm_timeout = t.duration("confirm_timeout", options.confirm_timeout, SECOND..=HOUR);
    options.max_message_size =
        t.size("max_message_size", options.max_message_size, 1..=MESSAGE_MAX);
    options.connection_name = format!("watership {name}");
    check(t, &options);
    options.urls.iter().for_each(|url| check_url(t, url, &options));
    options
}

/// How the broker is looked at from the side.
pub(super) fn audit(t: &mut Section<'_>, broker: &Options) -> AuditOptions {
    const URL: &str = "management_url";
    let interval = t.duration("audit_interval", 60 * SECOND, SECOND..=DAY);
    let url = t.url(URL);
    check_tls_files(t, broker, url.as_ref());
    let Some(url) = url else {
        return AuditOptions { interval, management_url: None, url_again: Again::default() };
    };
    let files = url.files().map(Path::to_owned).collect();
    let read = move || url.text().map(Secret::new);
    let management_url = match read() {
        Ok(url) => Some(url),
        Err(error) => {
            t.error(URL, &error);
            None
        }
    };
    // Without a broker URL there is another problem to report.
    if let Some(url) = management_url.as_ref().filter(|_| !broker.urls.is_empty())
        && let Err(error) = Management::new(url, broker)
    {
        t.error(URL, &error);
    }
    AuditOptions { interval, management_url, url_again: Again::new(files, read) }
}

/// The nodes of one cluster.
struct Nodes {
    read: Vec<Url>,
    again: Again<Vec<Url>>,
}

fn urls(t: &mut Section<'_>) -> Nodes {
    const URL: &str = "url";
    let texts = t.urls(URL, "\"amqp://user@host:5672/vhost\" or a list of such URLs");
    let password = t.password("password");
    let mut urls = Vec::new();
    let templates = texts.unwrap_or_default();
    for template in &templates {
        match read(template, password.as_ref()) {
            Ok((url, own)) => {
                if own {
                    let expected = "expected a user and no password in broker.url";
                    t.problem(URL, format!("broker.password is set; {expected}"));
                }
                urls.push(url);
            }
            Err(error) => t.error(URL, &error),
        }
    }
    // They are tried in turn, for one lock queue and one set of exchanges.
    if let [first, others @ ..] = urls.as_slice()
        && let Some(other) = others.iter().find(|other| other.vhost != first.vhost)
    {
        let (one, two) = (&first.vhost, &other.vhost);
        t.problem(
            URL,
            format!("all nodes in broker.url must use one vhost; found {one:?} and {two:?}"),
        );
    }
    let files = templates.iter().chain(&password).flat_map(Filled::files);
    let files = files.map(Path::to_owned).collect();
    let again = Again::new(files, move || {
        let read = |template| read(template, password.as_ref()).map(|(url, _)| url);
        templates.iter().map(read).collect()
    });
    Nodes { read: urls, again }
}

/// One node, and whether it has a password beside that of `broker.password`. A URL without a user
/// means guest, whose password is known.
fn read(url: &Filled, password: Option<&Filled>) -> Result<(Url, bool)> {
    let mut url = Url::parse(&url.text()?)?;
    let Some(password) = password else { return Ok((url, false)) };
    let own = !url.password.expose().is_empty();
    url.password = Secret::new(password.text()?);
    Ok((url, own))
}

fn check(t: &Section<'_>, options: &Options) {
    if options.tls.client_cert.is_some() != options.tls.client_key.is_some() {
        t.problem(
            "tls_cert",
            "broker.tls_cert and broker.tls_key belong together; set both or neither",
        );
    }
    if options.auth == Auth::External && options.tls.client_cert.is_none() {
        t.problem("auth", "broker.auth = \"external\" needs broker.tls_cert and broker.tls_key");
    }
    if options.heartbeat.subsec_millis() != 0 {
        t.invalid("heartbeat", quoted(options.heartbeat), "whole seconds");
    }
    if let Some(heartbeat) = too_slow(options, options.heartbeat) {
        let heartbeat = quoted(heartbeat);
        let expected = format!("more than twice broker.heartbeat, which is {heartbeat}");
        t.invalid("confirm_timeout", quoted(options.confirm_timeout), expected);
    }
}

/// Certificates beside URLs of which none uses TLS: who meant `amqps://` would send in plain text.
fn check_tls_files(t: &Section<'_>, options: &Options, management: Option<&Filled>) {
    let text = management.and_then(|url| url.text().ok()).unwrap_or_default();
    let used =
        text.starts_with("https://") || options.urls.iter().any(|u| u.scheme == Scheme::Amqps);
    let files = [("tls_ca", &options.tls.root_cert), ("tls_cert", &options.tls.client_cert)];
    let Some((key, _)) = files.iter().find(|(_, file)| file.is_some()) else { return };
    // External authentication has a problem of its own.
    if !used && !options.urls.is_empty() && options.auth == Auth::Plain {
        let what = format!(
            "broker.{key} is set, but broker.url is amqp://, which is plain text; use amqps://, or \
             remove {key}"
        );
        t.problem(key, what);
    }
}

/// The heartbeat, when a confirm may be given up before a silent broker is.
fn too_slow(options: &Options, heartbeat: Duration) -> Option<Duration> {
    (options.confirm_timeout <= heartbeat * 2).then_some(heartbeat)
}

/// Parameters of a URL take precedence over the keys; the same rules hold for them.
fn check_url(t: &Section<'_>, url: &Url, options: &Options) {
    let problem = |what: &str| t.problem("url", format!("broker.url {url}: {what}"));
    if url.heartbeat.and_then(|heartbeat| too_slow(options, heartbeat)).is_some() {
        problem("broker.confirm_timeout must be more than twice its heartbeat");
    }
    if url.auth.unwrap_or(options.auth) == Auth::External {
        if url.scheme == Scheme::Amqp {
            problem("external authentication needs amqps://");
        }
        if options.tls.client_cert.is_none() && url.auth.is_some() {
            problem("external authentication needs broker.tls_cert and broker.tls_key");
        }
    }
}

/// What is allowed but weak.
pub(super) fn warnings(options: &Options, audit: &AuditOptions) -> Vec<String> {
    let local =
        |host: &str| host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    let plain = |url: &&Url| url.scheme == Scheme::Amqp && !local(&url.host);
    let mut list: Vec<String> = options
        .urls
        .iter()
        .filter(plain)
        .map(|url| format!("broker.url {url} is plain text over the network; use amqps://"))
        .collect();
    let management = audit.management_url.as_ref();
    let management = management.and_then(|url| Management::new(url, options).ok());
    if let Some(host) = management.as_ref().and_then(Management::plain_host).filter(|h| !local(h)) {
        list.push(format!(
            "broker.management_url sends a password in plain text to {host}; use https://"
        ));
    }
    list
}
