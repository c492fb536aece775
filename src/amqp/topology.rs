//! Exchanges, queues and bindings that must be there; `apply` declares or verifies them;
//! `rehearse` asks whether the user may.

mod apply;
mod rehearse;

use std::fmt;

use serde_json::{Map, Value};

use super::audit::{BindingFacts, ExchangeFacts, Survey};

pub use apply::{apply, apply_each, counts};
pub use rehearse::{may_declare, may_publish};

/// Whether missing things are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Make what is missing; what is there must be equivalent.
    #[default]
    Declare,
    /// Change nothing; what is missing is an error.
    Verify,
}

/// The things that must be there.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Topology {
    /// Declare or verify.
    pub mode: Mode,
    /// Exchanges, done first. The default exchange (empty name) is always there.
    pub exchanges: Vec<Exchange>,
    /// Queues, done second.
    pub queues: Vec<Queue>,
    /// Bindings, done last and only when declaring.
    pub bindings: Vec<Binding>,
}

/// One exchange.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exchange {
    /// Its name.
    pub name: String,
    /// `topic`, `direct`, `fanout`, `headers` or a plugin's type.
    pub kind: String,
    /// Whether it survives a restart of the broker.
    pub durable: bool,
    /// Its arguments, such as `alternate-exchange`; they cannot be changed later.
    pub arguments: Vec<(String, Argument)>,
}

/// One durable queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Queue {
    /// Its name.
    pub name: String,
    /// Becomes `x-queue-type`.
    pub kind: QueueKind,
    /// Becomes `x-max-length`, with `x-overflow = reject-publish`: a full queue must say so.
    pub max_length: Option<u32>,
    /// Further arguments; they cannot be changed later.
    pub arguments: Vec<(String, Argument)>,
}

/// The queue types of RabbitMQ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum QueueKind {
    /// Replicated; its confirm means fsync on a majority.
    #[default]
    Quorum,
    /// On one node; its confirm means no fsync.
    Classic,
    /// Append-only, replicated; its confirm means no fsync.
    Stream,
}

impl QueueKind {
    /// The value of `x-queue-type`.
    pub fn name(self) -> &'static str {
        match self {
            QueueKind::Quorum => "quorum",
            QueueKind::Classic => "classic",
            QueueKind::Stream => "stream",
        }
    }
}

/// Value of an argument. Lists and tables are not needed by any argument of RabbitMQ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Argument {
    /// A string.
    Text(String),
    /// A whole number.
    Int(i64),
    /// True or false.
    Bool(bool),
}

/// Messages of `exchange` that match go to `destination`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// Where they go.
    pub destination: Destination,
    /// The exchange that they come from.
    pub exchange: String,
    /// The binding key.
    pub routing_key: String,
    /// What a headers exchange compares: `x-match` and headers.
    pub arguments: Vec<(String, Argument)>,
}

/// Where a binding leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// To a queue.
    Queue(String),
    /// To another exchange.
    Exchange(String),
}

/// One thing of the broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Thing {
    /// An exchange, by name.
    Exchange(String),
    /// A queue, by name.
    Queue(String),
    /// A binding.
    Binding(Binding),
}

/// A thing that is missing, is there in another form, or may not be declared.
#[derive(Debug)]
pub struct Wrong {
    /// Which thing.
    pub thing: Thing,
    /// It does not exist; otherwise it is there, or nobody could see. A binding that was refused
    /// counts as missing: nobody can see it, and what should come through it might not.
    pub missing: bool,
    /// What the broker said.
    pub error: crate::error::Error,
}

impl Topology {
    /// Where messages go if everything is as configured. Queues have no facts.
    pub fn survey(&self) -> Survey {
        let mut survey = Survey::default();
        // How one of these routes is not known, so everything may come through it.
        for Exchange { name, .. } in self.unlisted().exchanges {
            survey.exchanges.insert(name, ExchangeFacts::default());
        }
        for Exchange { name, kind, durable, arguments } in &self.exchanges {
            let facts = ExchangeFacts {
                kind: kind.clone(),
                durable: *durable,
                arguments: json(arguments),
                ..ExchangeFacts::default()
            };
            survey.exchanges.insert(name.clone(), facts);
        }
        for Binding { destination, exchange, routing_key, arguments } in &self.bindings {
            let (kind, name) = destination.kind_and_name();
            survey.bindings.entry(exchange.clone()).or_default().push(BindingFacts {
                destination: name.to_owned(),
                destination_type: kind.to_owned(),
                routing_key: routing_key.clone(),
                arguments: json(arguments),
            });
        }
        survey
    }

    /// The exchanges and queues that bindings name and that are not listed: nobody declares them
    /// here, so they can only be looked at.
    pub fn unlisted(&self) -> Topology {
        let mut unlisted = Topology { mode: Mode::Verify, ..Topology::default() };
        for binding in &self.bindings {
            let exchange = match &binding.destination {
                Destination::Exchange(name) => Some(name),
                Destination::Queue(_) => None,
            };
            for name in exchange.into_iter().chain([&binding.exchange]) {
                let is_it = |exchange: &Exchange| exchange.name == *name;
                if name.is_empty() || self.exchanges.iter().chain(&unlisted.exchanges).any(is_it) {
                    continue;
                }
                let (name, kind) = (name.clone(), "topic".to_owned());
                let exchange = Exchange { name, kind, durable: true, arguments: Vec::new() };
                unlisted.exchanges.push(exchange);
            }
            let Destination::Queue(name) = &binding.destination else { continue };
            let is_it = |queue: &Queue| queue.name == *name;
            if !self.queues.iter().chain(&unlisted.queues).any(is_it) {
                let (name, kind) = (name.clone(), QueueKind::default());
                unlisted.queues.push(Queue { name, kind, max_length: None, arguments: Vec::new() });
            }
        }
        unlisted
    }

    /// What to do when this binding cannot be made because one of its ends is missing.
    pub fn hint_for_ends(&self, binding: &Binding) -> String {
        let alone = Topology { bindings: vec![binding.clone()], ..self.clone() }.unlisted();
        let names = alone.exchanges.iter().map(|e| ("exchange", &e.name));
        let names: Vec<(&str, &String)> =
            names.chain(alone.queues.iter().map(|q| ("queue", &q.name))).collect();
        let list = |text: fn(&(&str, &String)) -> String, between: &str| {
            names.iter().map(text).collect::<Vec<_>>().join(between)
        };
        match (self.mode, names.is_empty()) {
            (_, true) => "it is made once its exchange and its queue are there".to_owned(),
            (Mode::Declare, false) => format!(
                "add {} to the configuration, or create it in the broker: the binding follows",
                list(|(kind, name)| format!("[[{kind}]] name = {name:?}"), " and ")
            ),
            (Mode::Verify, false) => format!(
                "create {}, and bind it",
                list(|(kind, name)| format!("{kind} {name:?}"), " and ")
            ),
        }
    }
}

impl Binding {
    /// What it leads to, and the exchange that it comes from.
    pub fn ends(&self) -> [Thing; 2] {
        let to = match &self.destination {
            Destination::Queue(name) => Thing::Queue(name.clone()),
            Destination::Exchange(name) => Thing::Exchange(name.clone()),
        };
        [to, Thing::Exchange(self.exchange.clone())]
    }

    /// It is the one that the management API shows.
    pub fn is(&self, found: &BindingFacts) -> bool {
        let (kind, name) = self.destination.kind_and_name();
        found.destination_type == kind
            && found.destination == name
            && found.routing_key == self.routing_key
            && found.arguments == json(&self.arguments)
    }
}

impl Destination {
    /// `queue` or `exchange`, and its name.
    fn kind_and_name(&self) -> (&'static str, &str) {
        match self {
            Destination::Queue(name) => ("queue", name),
            Destination::Exchange(name) => ("exchange", name),
        }
    }
}

/// Arguments as the management API shows them.
fn json(arguments: &[(String, Argument)]) -> Map<String, Value> {
    let value = |argument: &Argument| match argument {
        Argument::Text(text) => Value::from(text.as_str()),
        Argument::Int(number) => Value::from(*number),
        Argument::Bool(yes) => Value::from(*yes),
    };
    arguments.iter().map(|(name, argument)| (name.clone(), value(argument))).collect()
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, name) = self.kind_and_name();
        write!(f, "{kind} {name:?}")
    }
}

impl fmt::Display for Binding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { destination, exchange, routing_key, arguments } = self;
        write!(f, "{destination} to exchange {exchange:?} with routing key {routing_key:?}")?;
        if arguments.is_empty() {
            return Ok(());
        }
        write!(f, " and arguments {}", Value::Object(json(arguments)))
    }
}

impl fmt::Display for Thing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Thing::Exchange(name) => write!(f, "exchange {name:?}"),
            Thing::Queue(name) => write!(f, "queue {name:?}"),
            Thing::Binding(binding) => write!(f, "binding of {binding}"),
        }
    }
}
