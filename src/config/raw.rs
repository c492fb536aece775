//! The configuration as it is written: one struct per TOML table, every key with its default.
//!
//! Nothing is checked here beyond types and key names. An empty string or list means "not set";
//! so `Raw::default()` shows every key, and `config/watership.toml` is held against it by a test.
//! No `Debug` where a string may hold a password.

use std::collections::BTreeMap;

use serde::de::{Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

/// The whole file.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Raw {
    /// Name of this relay: checkpoint row, lock queue and `app_id`.
    pub name: String,
    /// Where events come from.
    pub source: Source,
    /// Where messages go.
    pub broker: Broker,
    /// How much is under way, and how often progress is stored.
    pub relay: Relay,
    /// Upkeep of the outbox table.
    pub outbox: Outbox,
    /// HTTP for probes and metrics.
    pub admin: Admin,
    /// Logging.
    pub log: Log,
    /// Exchanges to declare or verify besides those of the routes.
    pub exchange: Vec<Exchange>,
    /// Queues to declare or verify.
    pub queue: Vec<Queue>,
    /// Bindings to declare or verify.
    pub binding: Vec<Binding>,
    /// What goes where.
    pub route: Vec<Route>,
}

/// `[source]`
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "each key is explained in config/watership.toml")]
pub struct Source {
    pub url: String,
    pub password: String,
    pub mode: String,
    pub slot: String,
    pub failover: bool,
    pub publication: String,
    pub tables: Vec<String>,
    pub binary: bool,
}

/// `[broker]`
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "each key is explained in config/watership.toml")]
pub struct Broker {
    #[serde(deserialize_with = "one_or_many", serialize_with = "as_one_or_many")]
    pub url: Vec<String>,
    pub password: String,
    pub auth: String,
    pub topology: String,
    pub management_url: String,
    pub audit_interval: String,
    pub tls_ca: String,
    pub tls_cert: String,
    pub tls_key: String,
    pub connect_timeout: String,
    pub heartbeat: String,
    pub confirm_timeout: String,
    pub max_message_size: String,
}

/// `[relay]`
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "each key is explained in config/watership.toml")]
pub struct Relay {
    pub max_window_events: u64,
    pub max_window_bytes: String,
    pub max_unconfirmed: u64,
    pub checkpoint_interval: String,
    pub drain_timeout: String,
    pub idle_interval: String,
    pub parked_max_rows: u64,
    pub parked_max_keys: u64,
    pub parked_retain: String,
    pub canary_interval: String,
}

/// `[outbox]`
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "each key is explained in config/watership.toml")]
pub struct Outbox {
    pub maintain: bool,
    pub retain: String,
}

/// `[admin]`
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "each key is explained in config/watership.toml")]
pub struct Admin {
    pub listen: String,
    pub allow_remote: bool,
}

/// `[log]`
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "each key is explained in config/watership.toml")]
pub struct Log {
    pub format: String,
    pub level: String,
}

/// `[[exchange]]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "each key is explained in config/watership.toml")]
pub struct Exchange {
    pub name: String,
    pub kind: String,
}

/// `[[queue]]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "each key is explained in config/watership.toml")]
pub struct Queue {
    pub name: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub arguments: BTreeMap<String, toml::Value>,
}

/// `[[binding]]`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "each key is explained in config/watership.toml")]
pub struct Binding {
    pub queue: String,
    pub exchange: String,
    pub routing_key: String,
}

/// `[[route]]`
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "each key is explained in config/watership.toml")]
pub struct Route {
    pub name: String,
    pub owner: String,
    pub outbox: RouteOutbox,
    pub table: String,
    pub exchange: String,
    pub routing_key: String,
    pub key: Vec<String>,
    pub ordering: String,
    pub message_id: String,
    pub on_poison: String,
    pub on_unroutable: String,
    pub nack_limit: u64,
    pub drop: bool,
}

/// `outbox = { … }` of a route.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "each key is explained in config/watership.toml")]
pub struct RouteOutbox {
    pub aggregate_type: String,
}

impl Default for Raw {
    fn default() -> Self {
        Self {
            name: "watership".into(),
            source: Source::default(),
            broker: Broker::default(),
            relay: Relay::default(),
            outbox: Outbox::default(),
            admin: Admin::default(),
            log: Log::default(),
            exchange: Vec::new(),
            queue: Vec::new(),
            binding: Vec::new(),
            route: Vec::new(),
        }
    }
}

impl Default for Source {
    fn default() -> Self {
        Self {
            url: String::new(),
            password: String::new(),
            mode: "wal".into(),
            slot: "watership".into(),
            failover: false,
            publication: "watership".into(),
            tables: Vec::new(),
            binary: false,
        }
    }
}

impl Default for Broker {
    fn default() -> Self {
        Self {
            url: Vec::new(),
            password: String::new(),
            auth: "plain".into(),
            topology: "declare".into(),
            management_url: String::new(),
            audit_interval: "60s".into(),
            tls_ca: String::new(),
            tls_cert: String::new(),
            tls_key: String::new(),
            connect_timeout: "10s".into(),
            heartbeat: "5s".into(),
            confirm_timeout: "30s".into(),
            max_message_size: "16MiB".into(),
        }
    }
}

impl Default for Relay {
    fn default() -> Self {
        Self {
            max_window_events: 8192,
            max_window_bytes: "16MiB".into(),
            max_unconfirmed: 2048,
            checkpoint_interval: "100ms".into(),
            drain_timeout: "10s".into(),
            idle_interval: "30s".into(),
            parked_max_rows: 10_000,
            parked_max_keys: 1_000,
            parked_retain: "7d".into(),
            canary_interval: "10s".into(),
        }
    }
}

impl Default for Outbox {
    fn default() -> Self {
        Self { maintain: true, retain: "7d".into() }
    }
}

impl Default for Admin {
    fn default() -> Self {
        Self { listen: "127.0.0.1:9187".into(), allow_remote: false }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { format: "auto".into(), level: "info".into() }
    }
}

impl Default for Exchange {
    fn default() -> Self {
        Self { name: String::new(), kind: "topic".into() }
    }
}

impl Default for Queue {
    fn default() -> Self {
        Self { name: String::new(), kind: "quorum".into(), arguments: BTreeMap::new() }
    }
}

impl Default for Route {
    fn default() -> Self {
        Self {
            name: String::new(),
            owner: String::new(),
            outbox: RouteOutbox::default(),
            table: String::new(),
            exchange: String::new(),
            routing_key: String::new(),
            key: Vec::new(),
            ordering: "keyed".into(),
            message_id: "event".into(),
            on_poison: "park".into(),
            on_unroutable: "hold".into(),
            nack_limit: 0,
            drop: false,
        }
    }
}

/// Reads `"a"` or `["a", "b"]`; an empty string is an empty list.
fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    struct OneOrMany;
    impl<'de> Visitor<'de> for OneOrMany {
        type Value = Vec<String>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a string or an array of strings")
        }

        fn visit_str<E>(self, one: &str) -> Result<Self::Value, E> {
            Ok(if one.is_empty() { Vec::new() } else { vec![one.to_owned()] })
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
            let mut list = Vec::new();
            while let Some(one) = seq.next_element()? {
                list.push(one);
            }
            Ok(list)
        }
    }
    deserializer.deserialize_any(OneOrMany)
}

fn as_one_or_many<S: serde::Serializer>(list: &[String], out: S) -> Result<S::Ok, S::Error> {
    match list {
        [] => out.serialize_str(""),
        [one] => out.serialize_str(one),
        many => out.collect_seq(many),
    }
}
