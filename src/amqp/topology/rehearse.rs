//! Whether the user may do what `run` will do, by requests that change nothing: each holds a value
//! that the broker must refuse, or names what cannot exist, and permissions are checked before.

use lapin::BasicProperties;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, ExchangeUnbindOptions};

use super::apply::{Hand, on_first, table};
use super::{Argument, Binding, Destination, Mode, Thing, Topology, Wrong};
use crate::amqp::client::{short, step};
use crate::amqp::options::Options;
use crate::amqp::reply;
use crate::error::Result;

/// Arguments whose value is the name of an exchange: a number is refused.
const ALTERNATE: &str = "alternate-exchange";
const DEAD_LETTERS: &str = "x-dead-letter-exchange";
/// Makes another binding of one that may exist: this one cannot.
const NO_BINDING: &str = "watership-check";

/// What of `topology` the user may not declare. For exchanges and queues that do not exist, and for
/// any binding.
///
/// # Errors
/// Only what concerns the connection as a whole.
pub async fn may_declare(options: &Options, topology: &Topology) -> Result<Vec<Wrong>> {
    on_first(options, async |hand| hand.may_declare(topology).await).await
}

/// Whether the user may publish to `exchange` by `routing_key`: what the broker says to a message
/// that it must refuse in any case, after its permissions are checked. Nothing is published.
///
/// # Errors
/// `Refused` when it may not, or the exchange is missing.
pub async fn may_publish(options: &Options, exchange: &str, routing_key: &str) -> Result<()> {
    on_first(options, async |hand| hand.may_publish(exchange, routing_key).await).await
}

impl Hand<'_> {
    async fn may_declare(&mut self, topology: &Topology) -> Result<Vec<Wrong>> {
        let mut wrong = Vec::new();
        for exchange in topology.exchanges.iter().filter(|e| !e.name.is_empty()) {
            let mut refused = exchange.clone();
            set(&mut refused.arguments, ALTERNATE, Argument::Int(0));
            let done = self.exchange(&refused, Mode::Declare).await;
            wrong.extend(self.judge(Thing::Exchange(refused.name), done, topology)?);
        }
        for queue in &topology.queues {
            let mut refused = queue.clone();
            set(&mut refused.arguments, DEAD_LETTERS, Argument::Int(0));
            let done = self.queue(&refused, Mode::Declare).await;
            wrong.extend(self.judge(Thing::Queue(refused.name), done, topology)?);
        }
        for binding in &topology.bindings {
            let done = self.unbind_none(binding).await;
            wrong.extend(self.judge(Thing::Binding(binding.clone()), done, topology)?);
        }
        Ok(wrong)
    }

    /// What is wrong, unless it was refused for the value that was sent to be refused.
    fn judge(&self, thing: Thing, done: Result<()>, all: &Topology) -> Result<Option<Wrong>> {
        let Err(error) = done else { return Ok(None) };
        let error = self.of_thing(error)?;
        let meant = match (error.reply_code(), &thing) {
            (Some(reply::PRECONDITION_FAILED), _) => {
                reply::limit_hint(&error.to_string()).is_none()
            }
            // An end of it is not there yet.
            (Some(reply::NOT_FOUND), Thing::Binding(_)) => true,
            _ => false,
        };
        Ok((!meant).then(|| self.wrong(thing, true, error, all)))
    }

    /// Removes a binding that does not exist, which needs the permissions of making it.
    async fn unbind_none(&mut self, binding: &Binding) -> Result<()> {
        let channel = self.channel().await?;
        let Binding { destination, exchange, routing_key, arguments } = binding;
        let mut arguments = arguments.clone();
        set(&mut arguments, NO_BINDING, Argument::Bool(true));
        let (from, key) = (short(exchange)?, short(routing_key)?);
        let (what, arguments) = (format!("binding of {binding}"), table(&arguments)?);
        match destination {
            Destination::Queue(queue) => {
                let unbind = channel.queue_unbind(short(queue)?, from, key, arguments);
                step(self.limit, &what, unbind).await
            }
            Destination::Exchange(name) => {
                let none = ExchangeUnbindOptions::default();
                let unbind = channel.exchange_unbind(short(name)?, from, key, none, arguments);
                step(self.limit, &what, unbind).await
            }
        }
    }

    async fn may_publish(&mut self, exchange: &str, routing_key: &str) -> Result<()> {
        let channel = self.channel().await?;
        let what = format!("publishing to exchange {exchange:?} with routing key {routing_key:?}");
        let none = ConfirmSelectOptions::default();
        step(self.limit, &what, channel.confirm_select(none)).await?;
        // An expiration is a number: with this one the broker takes no message.
        let refused = BasicProperties::default().with_expiration("none".into());
        let (name, key) = (short(exchange)?, short(routing_key)?);
        let publish = async {
            let options = BasicPublishOptions::default();
            channel.basic_publish(name, key, options, b"", refused).await?.await.map(drop)
        };
        match step(self.limit, &what, publish).await {
            Err(e) if e.reply_code() == Some(reply::PRECONDITION_FAILED) => Ok(()),
            Err(e) if e.reply_code() == Some(reply::ACCESS_REFUSED) => {
                let hint = reply::publish_hint(reply::ACCESS_REFUSED, &e.to_string(), exchange);
                Err(e.hint(hint))
            }
            done => done,
        }
    }
}

fn set(arguments: &mut Vec<(String, Argument)>, name: &str, value: Argument) {
    arguments.retain(|(key, _)| key != name);
    arguments.push((name.to_owned(), value));
}
