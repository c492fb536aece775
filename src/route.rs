//! Event to exchange and routing key, by rules parsed at start. Pure.
//!
//! An event goes to every rule that selects it; each makes a message of its own. An event that
//! none selects is poison: dropping needs a rule that says so.
//!
//! To change how routing works, open: this file for the rules, `route/template.rs` for the fields
//! of templates, `route/texts.rs` for what is made of them, `route/format.rs` for what messages
//! look like, `route/partition.rs` for which queue a key goes to, `route/plan.rs` for what a route
//! decides once for each table, and `route/lanes.rs` for which messages wait for each other. What a
//! route does with the columns of a table: `route/rules.rs` as it is configured, `route/columns.rs`
//! applied, `route/promise.rs` when the table changes.

mod agreed;
mod columns;
mod database_secret;
pub mod description;
pub mod filter;
mod format;
mod lanes;
mod mismatch;
mod partition;
mod plan;
mod promise;
pub mod rules;
mod schemas;
mod template;
mod texts;

use std::sync::Arc;

use crate::contract::Contracts;
use crate::error::{Error, Result};
use crate::event::Event;
use crate::message::{ExchangeId, KeyPart, OwnHeaders, RouteId, route_hash};
use description::{Description, Difference};
use filter::Filter;
use template::{Field, Fields, Segment, Template};
use texts::Texts;

pub use database_secret::DatabaseSecret;
pub use format::{
    CloudEvents, Debezium, DebeziumTable, EventRouter, EventTime, Format, Placement, TombstoneBody,
    topic_template,
};
pub use lanes::LaneKeys;
pub use partition::{PARTITIONS_MAX, Partitions};
pub use plan::{Decision, ParkedAs, Plan, Plans, Resumed, TablePlan};
pub use promise::Drift;
pub use rules::{OnDrift, RouteRules};
pub use schemas::{Agreement, Recorded, SchemaChange, Schemas};
pub use template::{Facts, ShownRow};
pub use texts::{Address, push_encoded};

/// Most rules that a configuration may have.
pub const RULES_MAX: usize = 1000;

/// Most exchanges that one route may choose from.
pub const EXCHANGES_MAX: usize = 50;

/// How messages of one key follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ordering {
    /// At most one unconfirmed message per key: order survives a selective nack.
    Keyed,
    /// Many unconfirmed messages per key: faster on a hot key, a nack can reorder.
    Pipelined,
}

/// What the `message_id` of a route's messages is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageIdRule {
    /// The event's id.
    Event,
    /// UUIDv5(event id, route name): for routes that meet in one queue.
    Route,
}

/// What happens to a message that can never be published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnPoison {
    /// It goes to `watership.parked`, and later messages of its lane follow it.
    #[default]
    Park,
    /// Its lane waits until someone has fixed the cause; other lanes continue.
    Block,
    /// The relay stops with a verdict.
    Stop,
}

/// When a message that the broker does not take is parked instead of being tried without a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Policy {
    /// A message that can never be published.
    pub on_poison: OnPoison,
    /// Park what no queue is bound for, instead of holding the route.
    pub park_unroutable: bool,
    /// Nacks after which a message is parked, if others of the route were confirmed meanwhile.
    pub nack_limit: Option<u32>,
}

/// Which events a rule selects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Select {
    /// Outbox events of an aggregate type; `*` means all.
    Outbox {
        /// The type, compared exactly.
        aggregate_type: String,
    },
    /// Changes of a captured table, `schema.table`; `*` means all.
    Table {
        /// The name, compared exactly.
        name: String,
    },
}

/// What happens to the selected events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// A message is published.
    Publish {
        /// Where it goes, and with which headers.
        address: Box<Address>,
        /// The queues that its keys are spread over.
        partitions: Option<Partitions>,
        /// What its messages look like.
        format: Format,
        /// What the data in its messages must keep.
        contracts: Contracts,
        /// Order within a key.
        ordering: Ordering,
        /// What the message id is.
        message_id: MessageIdRule,
        /// Columns that make the key of a captured table; empty means its primary key.
        key: Vec<String>,
        /// What is parked.
        policy: Policy,
        /// What it does with the columns of a captured table.
        rules: Box<RouteRules>,
    },
    /// Nothing is published; the event is counted.
    Drop,
}

/// One rule of the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Name, unique; the `ws-route` header.
    pub name: String,
    /// Who is called when it breaks.
    pub owner: String,
    /// Which events.
    pub select: Select,
    /// What happens to them.
    pub action: Action,
}

impl Rule {
    /// The queues that its keys are spread over.
    pub fn partitions(&self) -> Option<&Partitions> {
        match &self.action {
            Action::Publish { partitions, .. } => partitions.as_ref(),
            Action::Drop => None,
        }
    }

    /// What happens when its table no longer has what it promised.
    pub fn on_drift(&self) -> OnDrift {
        match &self.action {
            Action::Publish { rules, .. } => rules.on_drift,
            Action::Drop => OnDrift::Pass,
        }
    }

    /// Whether what it publishes hangs on which columns its table has, whatever they are called.
    pub fn needs_columns(&self) -> bool {
        match &self.action {
            Action::Publish { rules, .. } => {
                !rules.columns.is_empty() || rules.on_drift != OnDrift::Pass
            }
            Action::Drop => false,
        }
    }

    /// Its routing keys as far as they are known without an event: one for each partition, or one.
    pub fn known_keys(&self) -> Vec<Vec<KeyPart>> {
        match self.partitions() {
            Some(partitions) => {
                partitions.names().into_iter().map(|name| vec![KeyPart::Text(name)]).collect()
            }
            None => vec![self.known_key()],
        }
    }

    /// Empty for a rule that drops, or whose template is wrong.
    fn known_key(&self) -> Vec<KeyPart> {
        let Action::Publish { address, .. } = &self.action else { return Vec::new() };
        let known = match &self.select {
            Select::Outbox { aggregate_type } => {
                vec![(Field::AggregateType, aggregate_type.as_str())]
            }
            Select::Table { name } => {
                let (schema, table) = name.split_once('.').unwrap_or(("*", "*"));
                vec![(Field::Schema, schema), (Field::Table, table)]
            }
        };
        let mut fields = Fields::of(&self.select);
        let parsed = Template::parse("routing_key", &address.routing_key, &mut fields);
        let Ok(Template(segments)) = parsed else { return Vec::new() };
        if segments.is_empty() {
            return vec![KeyPart::Text(String::new())];
        }
        let part = |segment| match segment {
            Segment::Text(text) => KeyPart::Text(text),
            Segment::Partition(_) => unreachable!("no template is parsed into it"),
            Segment::Field(field) => {
                let value = known.iter().find(|(name, _)| *name == field).map(|(_, value)| *value);
                match (value, field) {
                    (Some(value), _) if value != "*" => KeyPart::Text(value.to_owned()),
                    (
                        _,
                        Field::AggregateType
                        | Field::AggregateId
                        | Field::EventType
                        | Field::Key
                        | Field::RecordKey
                        | Field::Column(_),
                    ) => KeyPart::Any,
                    // A captured table is named with one dot, between schema and table.
                    (_, Field::Schema | Field::Table | Field::Op) => KeyPart::Word,
                }
            }
        };
        segments.into_iter().map(part).collect()
    }
}

/// The rules that apply when the configuration has none: everything goes to the topic exchange
/// `watership`.
pub fn default_rules() -> Vec<Rule> {
    let rule = |name: &str, select, format, routing_key: &str| Rule {
        name: name.into(),
        owner: String::new(),
        select,
        action: Action::Publish {
            address: Address::new("watership", routing_key).into(),
            partitions: None,
            format,
            contracts: Contracts::default(),
            ordering: Ordering::Keyed,
            message_id: MessageIdRule::Event,
            key: Vec::new(),
            policy: Policy::default(),
            rules: Box::default(),
        },
    };
    let all = || "*".to_owned();
    let outbox = Select::Outbox { aggregate_type: all() };
    let tables = Select::Table { name: all() };
    vec![
        rule("outbox", outbox, Format::Raw, "{aggregate_type}.{event_type}"),
        rule("tables", tables, Format::Watership, "{schema}.{table}.{op}"),
    ]
}

/// A rule that publishes, parsed.
#[derive(Debug)]
pub struct Route {
    /// Index in the router's list; also of its metrics.
    pub id: RouteId,
    /// Name, the `ws-route` header.
    pub name: String,
    /// The name again, to be shared.
    pub label: Arc<str>,
    /// What its messages look like.
    pub format: Format,
    /// What the data in its messages must keep.
    pub contracts: Contracts,
    /// Order within a key.
    pub ordering: Ordering,
    /// What the message id is.
    pub message_id: MessageIdRule,
    /// What is parked.
    pub policy: Policy,
    /// What it does with the columns of a captured table.
    pub rules: RouteRules,
    /// Version of the rules that messages are made by: the header `ws-rules`. Absent without any.
    pub version: Option<String>,
    /// What each of its messages carries. What is constant for a kind of message is not in a
    /// header: each costs the broker 1.3 µs a message.
    pub own_headers: OwnHeaders,
    texts: Texts,
    key: Vec<String>,
    /// Lanes are hashes that begin here; from the name, because parked lanes outlive a restart in
    /// which the routes' numbers change.
    seed: u64,
}

/// All rules, parsed.
#[derive(Debug)]
pub struct Router {
    rules: Vec<(Select, Parsed)>,
    exchanges: Vec<String>,
}

#[derive(Debug, Clone)]
enum Parsed {
    Publish(Arc<Route>),
    Drop(RouteId),
}

impl Router {
    /// Parses the rules.
    ///
    /// # Errors
    /// [`crate::error::Kind::Config`] naming the route and what is wrong with it.
    pub fn new(rules: &[Rule]) -> Result<Self> {
        if rules.is_empty() || rules.len() > RULES_MAX {
            let text = format!("{} routes, allowed are 1 to {RULES_MAX}", rules.len());
            return Err(Error::config(text));
        }
        let mut router = Self { rules: Vec::new(), exchanges: Vec::new() };
        for (index, rule) in rules.iter().enumerate() {
            if rules[..index].iter().any(|r| r.name == rule.name) {
                let text = format!("route name {:?} is used twice, names are unique", rule.name);
                return Err(Error::config(text));
            }
            let id = RouteId(u16::try_from(index).expect("RULES_MAX fits"));
            let parsed = router.parse(id, rule)?;
            router.rules.push((rule.select.clone(), parsed));
        }
        Ok(router)
    }

    /// The exchanges of all routes; an [`ExchangeId`] is an index into it.
    pub fn exchanges(&self) -> &[String] {
        &self.exchanges
    }

    /// The publishing route of that name.
    pub fn by_name(&self, name: &str) -> Option<&Arc<Route>> {
        self.rules.iter().find_map(|(_, parsed)| match parsed {
            Parsed::Publish(route) if route.name == name => Some(route),
            Parsed::Publish(_) | Parsed::Drop(_) => None,
        })
    }

    /// All publishing routes.
    pub fn publishing(&self) -> impl Iterator<Item = &Arc<Route>> {
        self.rules.iter().filter_map(|(_, parsed)| match parsed {
            Parsed::Publish(route) => Some(route),
            Parsed::Drop(_) => None,
        })
    }

    /// The publishing route of that number.
    pub fn by_id(&self, id: RouteId) -> &Arc<Route> {
        match &self.rules[usize::from(id.0)].1 {
            Parsed::Publish(route) => route,
            Parsed::Drop(_) => unreachable!("messages have the numbers of publishing routes"),
        }
    }

    /// What the route promised of the description `agreed` and `now` does not keep, and which
    /// columns of `now` it leaves out because nobody agreed to them.
    pub fn against(
        &self,
        route: &str,
        agreed: &Description,
        now: &Description,
    ) -> (Vec<Difference>, Vec<String>) {
        let Some(route) = self.by_name(route) else { return Default::default() };
        (promise::broken(route, agreed, now), promise::left_out(route, agreed, now, Some(now)))
    }

    fn parse(&mut self, id: RouteId, rule: &Rule) -> Result<Parsed> {
        let Action::Publish {
            address,
            partitions,
            format,
            contracts,
            ordering,
            message_id,
            key,
            policy,
            rules,
        } = &rule.action
        else {
            return Ok(Parsed::Drop(id));
        };
        let in_route = |error: Error| error.context(format!("route {:?}", rule.name));
        mismatch::verify(&rule.select, key, format, contracts, rules).map_err(in_route)?;
        let (select, partitions) = (&rule.select, partitions.as_ref());
        let number = |name: &str| self.number(name);
        let texts = Texts::parse(select, address, partitions, format, rules, number);
        Ok(Parsed::Publish(Arc::new(Route {
            id,
            name: rule.name.clone(),
            label: rule.name.as_str().into(),
            format: format.clone(),
            contracts: contracts.clone(),
            ordering: *ordering,
            message_id: *message_id,
            policy: *policy,
            rules: RouteRules::clone(rules),
            version: rules.version(),
            own_headers: OwnHeaders::of(&rule.name),
            seed: route_hash(&rule.name),
            texts: texts.map_err(in_route)?,
            key: key.clone(),
        })))
    }

    /// The number of the exchange.
    fn number(&mut self, exchange: &str) -> ExchangeId {
        let known = self.exchanges.iter().position(|e| e == exchange);
        let index = known.unwrap_or_else(|| {
            self.exchanges.push(exchange.to_owned());
            self.exchanges.len() - 1
        });
        ExchangeId(u16::try_from(index).expect("RULES_MAX and EXCHANGES_MAX fit"))
    }
}

impl Route {
    /// Writes the routing key into `out`, which is cleared first, and returns the exchange.
    ///
    /// # Errors
    /// [`crate::error::Kind::Event`] when a text is longer than 255 bytes, when a column that it
    /// is made of has no text, and for an exchange that the route does not list.
    pub fn address(&self, event: &Event, facts: Facts<'_>, out: &mut String) -> Result<ExchangeId> {
        self.texts.address(&self.name, event, facts, out)
    }

    /// The columns that its templates name.
    pub fn template_columns(&self) -> &[String] {
        &self.texts.columns
    }

    /// The headers of its own with their values, one by one; `out` is scratch space.
    ///
    /// # Errors
    /// Those of `each`; [`crate::error::Kind::Event`] when a column has no text.
    pub fn each_header(
        &self,
        event: &Event,
        facts: Facts<'_>,
        out: &mut String,
        each: impl FnMut(&str, &str) -> Result<()>,
    ) -> Result<()> {
        self.texts.each_header(event, facts, out, each)
    }

    /// The attributes `source` and `type` of a CloudEvent, where the route has templates for them.
    ///
    /// # Errors
    /// [`crate::error::Kind::Event`] when a column has no text.
    pub fn attributes(&self, event: &Event, facts: Facts<'_>) -> Result<[Option<String>; 2]> {
        self.texts.attributes(event, facts)
    }

    /// Whether it sets a header of this name itself.
    pub fn sets_header(&self, name: &str) -> bool {
        self.texts.sets_header(name)
    }

    /// The name of the exchange, where it is one of several: the header `ws-exchange`.
    pub fn chosen(&self, exchange: ExchangeId) -> Option<&str> {
        self.texts.chosen(exchange)
    }

    /// The exchange of a message that was made before; `name` is what its header says.
    ///
    /// # Errors
    /// [`crate::error::Kind::Event`] when the route no longer has it.
    pub fn exchange_called(&self, name: Option<&str>) -> Result<ExchangeId> {
        self.texts.exchange_called(&self.name, name)
    }

    /// The routing key of the partition for the key with this text; absent without partitions.
    pub fn partition_of(&self, key: &str) -> Option<&str> {
        self.texts.partition_of(key)
    }

    /// [`route_hash`] of its name.
    pub fn hash(&self) -> u64 {
        self.seed
    }
}

/// Routes that name key columns for the table `schema.name`, with these columns.
pub fn keys_of<'a>(
    rules: &'a [Rule],
    table: &str,
) -> impl Iterator<Item = (&'a str, &'a [String])> {
    rules.iter().filter_map(move |rule| match (&rule.select, &rule.action) {
        (Select::Table { name }, Action::Publish { key, .. }) if name == "*" || name == table => {
            Some((rule.name.as_str(), key.as_slice()))
        }
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(name: &str, routing_key: &str) -> Rule {
        let mut rule = default_rules().remove(0);
        rule.name = name.into();
        let Action::Publish { address, .. } = &mut rule.action else { unreachable!() };
        address.routing_key = routing_key.into();
        rule
    }

    #[test]
    fn refuses_templates_it_cannot_render() {
        for (template, text) in [
            ("a.{b}", "field \"b\" is not known here, allowed are: aggregate_type, aggregate_id, "),
            ("a.{event_type", "a \"{\" without \"}\""),
            ("a}", "a \"}\" without \"{\""),
            ("{schema}", "field \"schema\" is not known here"),
        ] {
            let error = Router::new(&[rule("r", template)]).unwrap_err().to_string();
            assert!(error.starts_with("route \"r\": routing_key"), "{error}");
            assert!(error.contains(text), "{error}");
        }
    }

    #[test]
    fn what_a_rule_selects_is_known_of_its_routing_key() {
        use KeyPart::{Any, Word};
        let text = |text: &str| KeyPart::Text(text.to_owned());
        let mut rule = rule("a", "x.{aggregate_type}.{event_type}");
        assert_eq!(rule.known_key(), [text("x."), Any, text("."), Any]);
        rule.select = Select::Outbox { aggregate_type: "order".into() };
        assert_eq!(rule.known_key(), [text("x."), text("order"), text("."), Any]);
        let mut tables = default_rules().remove(1);
        tables.select = Select::Table { name: "public.items".into() };
        let known = [text("public"), text("."), text("items"), text("."), Word];
        assert_eq!(tables.known_key(), known);
    }

    #[test]
    fn names_are_unique_and_exchanges_are_shared() {
        let error = Router::new(&[rule("r", "x"), rule("r", "y")]).unwrap_err();
        assert!(error.to_string().contains("used twice"));
        let router = Router::new(&[rule("r", "x"), rule("s", "y")]).unwrap();
        assert_eq!(router.exchanges(), ["watership"]);
    }
}
