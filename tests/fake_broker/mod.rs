//! A broker that does as it is told: the server side of AMQP 0-9-1, by hand.

use std::time::Duration;

use amq_protocol::frame::{AMQPContentHeader, AMQPFrame, WriteContext, gen_frame, parse_frame};
use amq_protocol::protocol::basic::AMQPProperties;
use amq_protocol::protocol::{AMQPClass, basic, channel, confirm, connection};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use uuid::Uuid;
use watership::amqp::options::{Options, Url};
use watership::amqp::reply;
use watership::message::{Builder, ExchangeId, Message, Properties, RouteId};

/// Who has waited for so long waits in vain.
const LIMIT: Duration = Duration::from_secs(60);

/// A listener and the URL that leads to it.
pub async fn broker() -> (Url, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("the fake broker works");
    let port = listener.local_addr().expect("the fake broker works").port();
    (url(port), listener)
}

/// The URL of a port where nobody listens, as long as the socket is there.
pub fn closed_port() -> (Url, TcpSocket) {
    let socket = TcpSocket::new_v4().expect("the fake broker works");
    socket.bind(([127, 0, 0, 1], 0).into()).expect("the fake broker works");
    (url(socket.local_addr().expect("the fake broker works").port()), socket)
}

fn url(port: u16) -> Url {
    Url::parse(&format!("amqp://guest:guest@127.0.0.1:{port}/%2f")).expect("the fake broker works")
}

/// Options with these exchanges.
pub fn options(exchanges: &[&str]) -> Options {
    let exchanges = exchanges.iter().map(|e| (*e).to_owned()).collect();
    // The scripts count the frames of one channel.
    let (channels_per_exchange, connect_timeout) = (1, LIMIT);
    Options { exchanges, channels_per_exchange, connect_timeout, ..Options::new(Vec::new()) }
}

/// A message whose id and routing key follow from `n`.
pub fn message(exchange: u16, n: u64, body: &[u8]) -> Message {
    let properties = Properties {
        content_type: "text/plain",
        message_id: Uuid::from_u128(n.into()),
        timestamp: 1_700_000_000,
        kind: "tested",
        app_id: "fake",
    };
    Builder::new(&mut Vec::new(), &format!("key.{n}"), properties)
        .and_then(|b| b.finish(ExchangeId(exchange), RouteId(0), |out| out.extend(body)))
        .expect("the fake broker works")
}

/// A publish as the broker sees it.
pub struct Published {
    pub channel: u16,
    pub exchange: String,
    pub routing_key: String,
    pub properties: AMQPProperties,
    pub body: Vec<u8>,
}

/// The broker's end of one connection.
pub struct Peer {
    stream: TcpStream,
    input: Vec<u8>,
    pub one_byte_at_a_time: bool,
}

impl Peer {
    pub async fn accept(listener: &TcpListener) -> Self {
        let (stream, _) = listener.accept().await.expect("the fake broker works");
        stream.set_nodelay(true).expect("the fake broker works");
        Self { stream, input: Vec::new(), one_byte_at_a_time: false }
    }

    /// Up to `connection.start`.
    pub async fn offers(&mut self, mechanisms: &str) {
        let mut header = [0; 8];
        self.stream.read_exact(&mut header).await.expect("the fake broker works");
        assert_eq!(&header, b"AMQP\0\0\x09\x01");
        self.connection(connection::AMQPMethod::Start(connection::Start {
            version_major: 0,
            version_minor: 9,
            server_properties: Default::default(),
            mechanisms: mechanisms.into(),
            locales: "en_US".into(),
        }))
        .await;
    }

    /// Up to `connection.tune`; returns what the client said of itself.
    pub async fn tunes(&mut self, channel_max: u16) -> connection::StartOk {
        self.offers("PLAIN EXTERNAL").await;
        let start_ok = match self.receive_connection().await {
            connection::AMQPMethod::StartOk(ok) => ok,
            other => panic!("{other:?}"),
        };
        let tune = connection::Tune { channel_max, frame_max: 131_072, heartbeat: 60 };
        self.connection(connection::AMQPMethod::Tune(tune)).await;
        start_ok
    }

    /// Up to `connection.open-ok`; returns what the client said of itself.
    pub async fn handshake(&mut self) -> connection::StartOk {
        let start_ok = self.tunes(2047).await;
        match self.receive_connection().await {
            connection::AMQPMethod::TuneOk(_) => {}
            other => panic!("{other:?}"),
        }
        match self.receive_connection().await {
            connection::AMQPMethod::Open(open) => assert_eq!(open.virtual_host.as_str(), "/"),
            other => panic!("{other:?}"),
        }
        self.connection(connection::AMQPMethod::OpenOk(connection::OpenOk {})).await;
        start_ok
    }

    /// Lets `count` channels be opened and put into confirm mode, from number `first` on.
    pub async fn open_channels(&mut self, first: u16, count: u16) {
        for number in first..first + count {
            let open = channel::AMQPMethod::Open(channel::Open {});
            assert_eq!(self.receive().await, AMQPFrame::Method(number, AMQPClass::Channel(open)));
            self.channel(number, channel::AMQPMethod::OpenOk(channel::OpenOk {})).await;
        }
        for number in first..first + count {
            let select = confirm::AMQPMethod::Select(confirm::Select { nowait: false });
            let expected = AMQPFrame::Method(number, AMQPClass::Confirm(select));
            assert_eq!(self.receive().await, expected);
            let ok = confirm::AMQPMethod::SelectOk(confirm::SelectOk {});
            self.send(AMQPFrame::Method(number, AMQPClass::Confirm(ok))).await;
        }
    }

    /// Waits for that many publishes.
    pub async fn publishes(&mut self, count: usize) -> Vec<Published> {
        let mut all = Vec::with_capacity(count);
        while all.len() < count {
            all.push(self.publish().await);
        }
        all
    }

    async fn publish(&mut self) -> Published {
        let (channel, publish) = match self.receive().await {
            AMQPFrame::Method(channel, AMQPClass::Basic(basic::AMQPMethod::Publish(publish))) => {
                (channel, publish)
            }
            other => panic!("{other:?}"),
        };
        assert!(publish.mandatory);
        let header = match self.receive().await {
            AMQPFrame::Header(number, header) if number == channel => header,
            other => panic!("{other:?}"),
        };
        let mut body = Vec::new();
        while (body.len() as u64) < header.body_size {
            match self.receive().await {
                AMQPFrame::Body(number, piece) if number == channel => body.extend(piece),
                other => panic!("{other:?}"),
            }
        }
        Published {
            channel,
            exchange: publish.exchange.to_string(),
            routing_key: publish.routing_key.to_string(),
            properties: header.properties,
            body,
        }
    }

    /// `basic.return` with its content, the body in two pieces.
    pub async fn give_back(&mut self, publish: &Published) {
        let back = basic::Return {
            reply_code: reply::NO_ROUTE,
            reply_text: "NO_ROUTE".into(),
            exchange: publish.exchange.as_str().into(),
            routing_key: publish.routing_key.as_str().into(),
        };
        self.basic(publish.channel, basic::AMQPMethod::Return(back)).await;
        let header = AMQPContentHeader {
            class_id: 60,
            body_size: publish.body.len() as u64,
            properties: publish.properties.clone(),
        };
        self.send(AMQPFrame::Header(publish.channel, header)).await;
        let (front, rest) = publish.body.split_at(publish.body.len() / 2);
        for piece in [front, rest] {
            self.send(AMQPFrame::Body(publish.channel, piece.to_vec())).await;
        }
    }

    pub async fn ack(&mut self, channel: u16, delivery_tag: u64, multiple: bool) {
        self.basic(channel, basic::AMQPMethod::Ack(basic::Ack { delivery_tag, multiple })).await;
    }

    pub async fn nack(&mut self, channel: u16, delivery_tag: u64, multiple: bool) {
        let nack = basic::Nack { delivery_tag, multiple, requeue: false };
        self.basic(channel, basic::AMQPMethod::Nack(nack)).await;
    }

    /// Sends a heartbeat.
    pub async fn beat(&mut self) {
        self.send(AMQPFrame::Heartbeat).await;
    }

    pub async fn blocked(&mut self, reason: &str) {
        let blocked = connection::Blocked { reason: reason.into() };
        self.connection(connection::AMQPMethod::Blocked(blocked)).await;
    }

    pub async fn unblocked(&mut self) {
        self.connection(connection::AMQPMethod::Unblocked(connection::Unblocked {})).await;
    }

    /// Closes a channel and drops what still arrives on it, up to the answer.
    pub async fn close_channel(&mut self, number: u16, code: u16, text: &str) {
        self.channel(
            number,
            channel::AMQPMethod::Close(channel::Close {
                reply_code: code,
                reply_text: text.into(),
                class_id: 60,
                method_id: 40,
            }),
        )
        .await;
        let ok = channel::AMQPMethod::CloseOk(channel::CloseOk {});
        let ok = AMQPFrame::Method(number, AMQPClass::Channel(ok));
        loop {
            let frame = self.receive().await;
            if frame == ok {
                return;
            }
            assert_eq!(frame.channel_id(), number, "{frame:?}");
        }
    }

    pub async fn close_connection(&mut self, code: u16, text: &str) {
        self.connection(connection::AMQPMethod::Close(connection::Close {
            reply_code: code,
            reply_text: text.into(),
            class_id: 0,
            method_id: 0,
        }))
        .await;
    }

    /// Waits for `connection.close` and answers it.
    pub async fn close_ok(&mut self) {
        match self.receive_connection().await {
            connection::AMQPMethod::Close(close) => assert_eq!(close.reply_code, 200),
            other => panic!("{other:?}"),
        }
        self.connection(connection::AMQPMethod::CloseOk(connection::CloseOk {})).await;
    }

    async fn receive_connection(&mut self) -> connection::AMQPMethod {
        match self.receive().await {
            AMQPFrame::Method(0, AMQPClass::Connection(method)) => method,
            other => panic!("{other:?}"),
        }
    }

    /// The next frame that is not a heartbeat.
    pub async fn receive(&mut self) -> AMQPFrame {
        loop {
            let frame = self.receive_any().await;
            if frame != AMQPFrame::Heartbeat {
                return frame;
            }
        }
    }

    pub async fn receive_any(&mut self) -> AMQPFrame {
        loop {
            if let Ok((rest, frame)) = parse_frame(&self.input[..]) {
                let used = self.input.len() - rest.len();
                self.input.drain(..used);
                return frame;
            }
            let read = self.stream.read_buf(&mut self.input);
            let read = tokio::time::timeout(LIMIT, read).await;
            assert_ne!(
                read.expect("a frame comes").expect("the fake broker works"),
                0,
                "client closed the socket"
            );
        }
    }

    /// Reads until the client closes the socket; confirms nothing.
    pub async fn until_gone(&mut self) {
        let mut sink = [0; 4096];
        while !matches!(self.stream.read(&mut sink).await, Ok(0) | Err(_)) {}
    }

    async fn basic(&mut self, channel: u16, method: basic::AMQPMethod) {
        self.send(AMQPFrame::Method(channel, AMQPClass::Basic(method))).await;
    }

    pub async fn channel(&mut self, channel: u16, method: channel::AMQPMethod) {
        self.send(AMQPFrame::Method(channel, AMQPClass::Channel(method))).await;
    }

    async fn connection(&mut self, method: connection::AMQPMethod) {
        self.send(AMQPFrame::Method(0, AMQPClass::Connection(method))).await;
    }

    async fn send(&mut self, frame: AMQPFrame) {
        let bytes = gen_frame::<Vec<u8>>(&frame)(WriteContext::from(Vec::new()))
            .expect("the fake broker works");
        self.raw(&bytes.into_inner().0).await;
    }

    pub async fn raw(&mut self, bytes: &[u8]) {
        let size = if self.one_byte_at_a_time { 1 } else { bytes.len() };
        for segment in bytes.chunks(size) {
            self.stream.write_all(segment).await.expect("the fake broker works");
            if self.one_byte_at_a_time {
                tokio::task::yield_now().await;
            }
        }
    }
}
