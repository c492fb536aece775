//! The queue of the crash test: made for one run and removed after it, or one that is there and
//! empty.

use std::time::Duration;

use lapin::options::{
    BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection};

use super::{Event, Options};
use crate::amqp::client::{self, Use, queue_counts, short, step, translate};
use crate::amqp::options::{Options as Broker, Url};
use crate::amqp::reply;
use crate::error::{Error, Result};

/// Limit of the connect and of each other step.
const LIMIT: Duration = Duration::from_secs(15);
/// Largest frame, in bytes; RabbitMQ's own default.
const FRAME_MAX: u32 = 131_072;
const SINGLE: &str = "x-single-active-consumer";
/// Arguments that a queue may have, at most: more than RabbitMQ knows.
const ARGUMENTS_MAX: usize = 30;

/// An open queue.
pub(super) struct TestQueue {
    url: String,
    name: String,
    connection: Connection,
    /// With publisher confirms.
    channel: Channel,
    /// This run made it, and removes it.
    is_ours: bool,
}

impl TestQueue {
    /// Makes the queue, or checks whether the existing one can be used.
    pub async fn open(options: &Options) -> Result<Self> {
        if options.queue.contains(',') {
            let text = format!("--queue {:?} names several queues", options.queue);
            return Err(Error::config(text).hint(
                "name one queue; of a consumer with partitions one partition that is empty and \
                 has no consumers, or a name that does not exist, with --ordered",
            ));
        }
        short(&options.queue)?;
        let connection = connect(&options.amqp_url).await?;
        let channel = step(LIMIT, "opening a channel", connection.create_channel()).await?;
        let confirms = channel.confirm_select(ConfirmSelectOptions::default());
        step(LIMIT, "asking for confirms", confirms).await?;
        let mut queue = Self {
            url: options.amqp_url.clone(),
            name: options.queue.clone(),
            connection,
            channel,
            is_ours: false,
        };
        if !queue.is_there_and_unused().await? {
            queue.make(options.ordered).await?;
        } else if options.ordered {
            queue.check_single().await?;
        }
        Ok(queue)
    }

    /// Whether the queue exists; refuses one that holds messages or has consumers.
    async fn is_there_and_unused(&self) -> Result<bool> {
        let (messages, consumers) = match self.counts().await {
            Err(error) if reply::is_missing(&error) => return Ok(false),
            counts => counts?,
        };
        let name = &self.name;
        if messages > 0 {
            let text = format!("queue {name:?} holds {messages} messages");
            return Err(Error::refused(text).hint(
                "name an empty queue, or one that does not exist; if an earlier crash test was \
                 killed and left it, delete it",
            ));
        }
        if consumers > 0 {
            let text = format!("queue {name:?} has {consumers} consumers, which would get events");
            return Err(
                Error::refused(text).hint("stop them first, or name a queue that does not exist")
            );
        }
        Ok(true)
    }

    async fn make(&mut self, ordered: bool) -> Result<()> {
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        // Every kill counts as a delivery of all that the process held.
        arguments.insert("x-delivery-limit".into(), AMQPValue::LongInt(1_000_000));
        if ordered {
            arguments.insert(SINGLE.into(), AMQPValue::Boolean(true));
        }
        self.declare(arguments).await?;
        self.is_ours = true;
        Ok(())
    }

    /// Refuses a queue without single active consumer. A broker does not tell a client which
    /// arguments a queue has, but which argument of a second declaration differs, and how. So the
    /// queue is declared again, each time with one more of its own arguments.
    async fn check_single(&self) -> Result<()> {
        let mut arguments = FieldTable::default();
        arguments.insert(SINGLE.into(), AMQPValue::Boolean(true));
        for _ in 0..ARGUMENTS_MAX {
            let Err(error) = self.declare(arguments.clone()).await else { return Ok(()) };
            if error.reply_code() != Some(reply::PRECONDITION_FAILED) {
                return Err(error);
            }
            match Differs::read(&error.to_string()) {
                Some(differs) if differs.argument == SINGLE => {
                    let text = format!("queue {:?} has no single active consumer", self.name);
                    return Err(Error::refused(text).hint(format!(
                        "leave out --ordered, name a queue that was declared with {SINGLE}, or \
                         one that does not exist"
                    )));
                }
                Some(Differs { argument, value: Some(value) }) => {
                    arguments.insert(argument.into(), value);
                }
                // Not an argument: its durability, for example. Then it cannot be known.
                _ => return Ok(()),
            }
        }
        Ok(())
    }

    /// Declares it; returns the messages that are ready, and the consumers.
    async fn declare(&self, arguments: FieldTable) -> Result<()> {
        // The broker closes the channel of a declaration that it refuses.
        let channel = step(LIMIT, "opening a channel", self.connection.create_channel()).await?;
        let options = QueueDeclareOptions { durable: true, ..Default::default() };
        let declared = channel.queue_declare(self.name.as_str().into(), options, arguments);
        step(LIMIT, &format!("queue {:?}", self.name), declared).await?;
        let close = channel.close(reply::REPLY_SUCCESS, "declared".into());
        step(LIMIT, "closing a channel", close).await
    }

    async fn counts(&self) -> Result<(u32, u32)> {
        queue_counts(&self.connection, &self.name, LIMIT).await
    }

    /// Messages that wait in the queue.
    pub async fn ready(&self) -> Result<u32> {
        Ok(self.counts().await?.0)
    }

    /// Publishes an event, and waits until the broker has it. `time` is in seconds since 1970.
    pub async fn publish(&self, event: &Event, time: u64) -> Result<()> {
        let Event { id, key, number } = event;
        let mut headers = FieldTable::default();
        headers.insert("ws-key".into(), AMQPValue::LongString(key.as_str().into()));
        let properties = BasicProperties::default()
            .with_message_id(id.as_str().into())
            .with_timestamp(time)
            .with_content_type("application/json".into())
            .with_type("torture".into())
            .with_app_id("torture".into())
            .with_delivery_mode(2)
            .with_headers(headers);
        let body = serde_json::json!({ "key": key, "number": number }).to_string();
        let mandatory = BasicPublishOptions { mandatory: true, ..Default::default() };
        let queue = self.name.as_str().into();
        let sent =
            self.channel.basic_publish("".into(), queue, mandatory, body.as_bytes(), properties);
        let failed = |error: lapin::Error| translate(&error).context("publishing");
        let confirm = sent.await.map_err(failed)?.await.map_err(failed)?;
        if !confirm.is_ack() || confirm.take_message().is_some() {
            return Err(Error::refused(format!("queue {:?} refuses messages", self.name)));
        }
        Ok(())
    }

    /// Deletes the queue if this run made it; on another connection if its own is lost.
    pub async fn remove(&self) -> Result<()> {
        if !self.is_ours {
            return Ok(());
        }
        if delete(&self.connection, &self.name).await.is_ok() {
            return Ok(());
        }
        delete(&connect(&self.url).await?, &self.name).await
    }
}

async fn delete(connection: &Connection, name: &str) -> Result<()> {
    let what = format!("deleting queue {name:?}");
    let channel = step(LIMIT, &what, connection.create_channel()).await?;
    let deleted = channel.queue_delete(name.into(), QueueDeleteOptions::default());
    step(LIMIT, &what, deleted).await.map(drop)
}

async fn connect(url: &str) -> Result<Connection> {
    let url = Url::parse(url)?;
    let broker = Broker::new(vec![url.clone()]);
    let kind = Use { name: "watership torture".into(), frame_max: FRAME_MAX, heartbeat: Some(30) };
    client::connect(&broker, &url, LIMIT, &kind).await.map_err(|error| {
        if error.reply_code() != Some(reply::ACCESS_REFUSED) {
            return error.context(format!("broker {url}"));
        }
        let text =
            format!("the broker refused user {:?}: wrong password, or no such user", url.username);
        Error::refused(text).hint(
            "correct the URL of --amqp; unless configured otherwise, RabbitMQ lets guest in from \
             its own host only",
        )
    })
}

/// What a refused declaration says: the first argument that differs, and what the queue has.
#[derive(Debug, PartialEq)]
struct Differs {
    argument: String,
    /// None: the queue does not have the argument, or its value is of a type that queues have not.
    value: Option<AMQPValue>,
}

impl Differs {
    /// "inequivalent arg 'x-max-length' for queue 'q' in vhost '/': received none but current is
    /// the value '10' of type 'signedint'"
    fn read(text: &str) -> Option<Self> {
        let (_, rest) = text.split_once("inequivalent arg '")?;
        let (argument, rest) = rest.split_once('\'')?;
        let current = rest.split_once("current is the value '").map(|(_, current)| current);
        let value = current.and_then(|current| {
            let (value, kind) = current.rsplit_once("' of type '")?;
            Some(match kind.split('\'').next()? {
                "longstr" => AMQPValue::LongString(value.into()),
                "bool" => AMQPValue::Boolean(value == "true"),
                _ => AMQPValue::LongLongInt(value.parse().ok()?),
            })
        });
        Some(Self { argument: argument.to_owned(), value })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_declaration_says_what_the_queue_has() {
        let differs = |of: &str, what: &str| {
            Differs::read(&format!(
                "queue \"q\": 406 PRECONDITION_FAILED - inequivalent arg '{of}' for queue 'it's' \
                 in vhost '/': received none but current is {what}"
            ))
            .expect("read")
        };
        let text = differs("x-queue-type", "the value 'quorum' of type 'longstr'");
        assert_eq!(text.argument, "x-queue-type");
        assert_eq!(text.value, Some(AMQPValue::LongString("quorum".into())));
        let number = differs("x-delivery-limit", "the value '100' of type 'signedint'");
        assert_eq!(number.value, Some(AMQPValue::LongLongInt(100)));
        let quoted =
            differs("x-dead-letter-exchange", "the value 'a' of type 'b' of type 'longstr'");
        assert_eq!(quoted.value, Some(AMQPValue::LongString("a' of type 'b".into())));
        assert_eq!(differs(SINGLE, "none").value, None);
        assert_eq!(Differs::read("403 ACCESS_REFUSED"), None);
    }
}
