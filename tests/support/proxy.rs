//! A TCP proxy that knows where messages begin and end, and breaks what it is told to break.
//!
//! It stands before Postgres or RabbitMQ. What it does to bytes on their way is [`Flow`], for each
//! direction; what it does once, at a byte or at a message, is a [`Trigger`]. A direction that has
//! lost bytes is never healed in the same connection: TCP does not lose a part of a stream.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use super::framing::{Framing, Protocol};
use super::waiting::within;

/// Bytes read at once.
const CHUNK: usize = 64 * 1024;
/// Messages that may be on their way through the proxy, so that a stall is felt by the sender.
const ON_THE_WAY: usize = 4096;

/// From the relay to the server, or back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    ToServer,
    ToRelay,
}

/// How a connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// With RST: the peer gets an error and loses what it has not read.
    Reset,
    /// With FIN: the peer reads the end of the stream.
    Fin,
}

/// What happens to all bytes of a direction.
#[derive(Debug, Clone, Copy, Default)]
pub struct Flow {
    /// Nothing is forwarded; the sender feels it when buffers are full.
    pub stalled: bool,
    /// Bytes vanish, and what comes behind them on the same connection.
    pub dead: bool,
    pub delay: Duration,
    /// Up to so much is added to the delay, by chance; the order stays.
    pub jitter: Duration,
    /// Bytes a second.
    pub bandwidth: Option<u32>,
    /// Largest piece that is written at once.
    pub slice: Option<usize>,
}

/// What happens once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The message is not forwarded and the connection ends.
    CutBefore(How),
    /// Half of the message is forwarded and the connection ends.
    CutInside(How),
    /// The message vanishes.
    Drop,
    /// The first byte of the message is changed.
    CorruptFirst,
    /// The last byte of the message is changed.
    CorruptLast,
    /// The message is not forwarded and the direction stalls.
    StallBefore,
    /// The message is forwarded and then the direction stalls.
    StallAfter,
}

/// At which message what happens; counted over all connections since it was set.
#[derive(Clone, Copy)]
pub struct Trigger {
    pub direction: Direction,
    /// The message, such as [`super::framing::is_ack`].
    pub matches: fn(&[u8]) -> bool,
    /// From 1.
    pub nth: u64,
    pub action: Action,
    /// Every message from the nth on.
    pub for_ever: bool,
}

#[derive(Default)]
struct Control {
    to_server: Flow,
    to_relay: Flow,
    /// A direction was dead since the last healing.
    lossy: bool,
    trigger: Option<Trigger>,
    /// Cut when this many more bytes have passed in this direction.
    cut_after: Option<(Direction, u64, How)>,
    seen: u64,
    /// Times that the trigger or the cut has struck.
    struck: u64,
    accept: Accept,
    /// Connections of lower generations have ended.
    generation: u64,
    how: Option<How>,
    connections: u64,
    /// The port that new connections are led to.
    upstream: u16,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Accept {
    #[default]
    Forward,
    /// A connection is accepted and reset.
    Refuse,
    /// A connection is accepted, and nobody answers.
    Silent,
}

/// The proxy; it ends when dropped.
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
    _tasks: JoinSet<()>,
}

struct Shared {
    control: Mutex<Control>,
    /// Changes with every change of the control.
    changed: watch::Sender<u64>,
    protocol: Protocol,
    /// The port that URLs name.
    named: u16,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Control> {
        self.control.lock().expect("nobody panics while holding the control")
    }

    fn change(&self, change: impl FnOnce(&mut Control)) {
        change(&mut self.lock());
        self.changed.send_modify(|times| *times += 1);
    }

    fn flow(&self, direction: Direction) -> Flow {
        let control = self.lock();
        match direction {
            Direction::ToServer => control.to_server,
            Direction::ToRelay => control.to_relay,
        }
    }
}

impl Proxy {
    /// Listens on a port of its own before `upstream`, a port of this machine.
    pub async fn before(upstream: u16, protocol: Protocol) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("a port").port();
        let shared = Arc::new(Shared {
            control: Mutex::default(),
            changed: watch::Sender::new(0),
            protocol,
            named: upstream,
        });
        shared.lock().upstream = upstream;
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, shared.clone()));
        Self { port, shared, _tasks: tasks }
    }

    /// `url` with the port of the proxy in the place of the server's.
    pub fn url(&self, url: &str) -> String {
        let port = self.shared.named;
        let through = url.replacen(&format!(":{port}"), &format!(":{}", self.port), 1);
        assert_ne!(through, url, "the URL does not name the port {port}");
        through
    }

    /// Changes what happens to all bytes of a direction.
    pub fn flow(&self, direction: Direction, flow: Flow) {
        self.shared.change(|control| {
            control.lossy |= flow.dead;
            match direction {
                Direction::ToServer => control.to_server = flow,
                Direction::ToRelay => control.to_relay = flow,
            }
        });
    }

    /// The same for both directions.
    pub fn flows(&self, flow: Flow) {
        self.flow(Direction::ToServer, flow);
        self.flow(Direction::ToRelay, flow);
    }

    /// What happens to new connections.
    pub fn accepts(&self, accept: Accept) {
        self.shared.change(|control| control.accept = accept);
    }

    /// Leads new connections to another port of this machine.
    pub fn redirect(&self, port: u16) {
        self.shared.change(|control| control.upstream = port);
    }

    /// Sets the one trigger.
    pub fn trigger(&self, trigger: Trigger) {
        self.shared.change(|control| {
            (control.trigger, control.seen, control.struck) = (Some(trigger), 0, 0);
        });
    }

    /// Cuts the connection in which the `bytes`th byte from now passes, wherever that is.
    pub fn cut_after(&self, direction: Direction, bytes: u64, how: How) {
        self.shared.change(|control| {
            (control.cut_after, control.struck) = (Some((direction, bytes, how)), 0);
        });
    }

    /// Ends all connections.
    pub fn cut(&self, how: How) {
        self.shared.change(|control| {
            control.how = Some(how);
            control.generation += 1;
        });
    }

    /// Everything is as at the beginning. Connections that lost bytes are reset.
    pub fn heal(&self) {
        self.shared.change(|control| {
            let drops = control.trigger.is_some_and(|trigger| trigger.action == Action::Drop);
            if std::mem::take(&mut control.lossy) || drops {
                control.how = Some(How::Reset);
                control.generation += 1;
            }
            (control.to_server, control.to_relay) = (Flow::default(), Flow::default());
            (control.trigger, control.cut_after) = (None, None);
            control.accept = Accept::Forward;
        });
    }

    /// How often the trigger or the cut has struck.
    pub fn struck(&self) -> u64 {
        self.shared.lock().struck
    }

    /// Waits until the trigger or the cut has struck.
    pub async fn strikes(&self) {
        let mut changed = self.shared.changed.subscribe();
        let struck = changed.wait_for(|_| self.shared.lock().struck > 0);
        within("the fault strikes", struck).await.expect("the proxy lives");
    }

    /// Connections accepted so far.
    pub fn connections(&self) -> u64 {
        self.shared.lock().connections
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    while let Ok((relay, _)) = listener.accept().await {
        while connections.try_join_next().is_some() {}
        let accept = {
            let mut control = shared.lock();
            control.connections += 1;
            control.accept
        };
        match accept {
            Accept::Refuse => end(relay, How::Reset),
            Accept::Silent | Accept::Forward => {
                let silent = accept == Accept::Silent;
                let shared = shared.clone();
                connections.spawn(async move { connection(relay, &shared, silent).await });
            }
        }
    }
}

fn end(stream: TcpStream, how: How) {
    if how == How::Reset {
        let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
    }
}

/// One connection until one of its sides ends or somebody cuts it.
async fn connection(relay: TcpStream, shared: &Shared, silent: bool) {
    let (generation, upstream) = {
        let control = shared.lock();
        (control.generation, SocketAddr::from(([127, 0, 0, 1], control.upstream)))
    };
    let mut changed = shared.changed.subscribe();
    let cut = async {
        let _ = changed.wait_for(|_| shared.lock().generation > generation).await;
        shared.lock().how.unwrap_or(How::Fin)
    };
    if silent {
        end(relay, cut.await);
        return;
    }
    let Ok(server) = TcpStream::connect(upstream).await else {
        return end(relay, How::Reset);
    };
    let _ = (relay.set_nodelay(true), server.set_nodelay(true));
    let (from_relay, mut to_relay) = relay.into_split();
    let (from_server, mut to_server) = server.into_split();
    let framing = Framing::pair(shared.protocol);
    let how = tokio::select! {
        how = cut => how,
        how = pump(from_relay, &mut to_server, shared, Direction::ToServer, framing.0) => how,
        how = pump(from_server, &mut to_relay, shared, Direction::ToRelay, framing.1) => how,
    };
    if how == How::Reset {
        for half in [to_relay, to_server] {
            let _ = socket2::SockRef::from(half.as_ref()).set_linger(Some(Duration::ZERO));
            // Dropped as usual it would say goodbye with a FIN first.
            half.forget();
        }
    }
}

/// Moves one direction until it ends; says how the connection has to end.
async fn pump(
    mut from: OwnedReadHalf,
    to: &mut OwnedWriteHalf,
    shared: &Shared,
    direction: Direction,
    framing: Framing,
) -> How {
    let (sender, mut receiver) = mpsc::channel::<(Instant, Vec<u8>)>(ON_THE_WAY);
    let reading = async move {
        let mut framing = framing;
        let mut chunk = vec![0; CHUNK];
        let mut due = Instant::now();
        loop {
            let size = match from.read(&mut chunk).await {
                Ok(0) => break,
                Ok(size) => size,
                Err(_) => return How::Reset,
            };
            for message in framing.split(&chunk[..size]) {
                let flow = shared.flow(direction);
                let jitter = flow.jitter.mul_f64(fastrand::f64());
                due = due.max(Instant::now() + flow.delay + jitter);
                if sender.send((due, message)).await.is_err() {
                    return How::Fin;
                }
            }
        }
        drop(sender);
        // What is on its way arrives before the end does.
        std::future::pending().await
    };
    let writing = async {
        let mut lost = false;
        while let Some((due, message)) = receiver.recv().await {
            sleep_until(due).await;
            going(shared, direction).await;
            // Behind a gap nothing arrives any more: no network leaves out the middle of a stream.
            lost |= shared.flow(direction).dead;
            if lost {
                continue;
            }
            if let Some(how) = forward(&message, to, shared, direction).await {
                return how;
            }
        }
        How::Fin
    };
    tokio::select! {
        how = reading => how,
        how = writing => how,
    }
}

/// Waits while the direction is stalled.
async fn going(shared: &Shared, direction: Direction) {
    let mut changed = shared.changed.subscribe();
    let _ = changed.wait_for(|_| !shared.flow(direction).stalled).await;
}

/// Forwards one message as the control wants; says how the connection ends, when it does.
async fn forward(
    message: &[u8],
    to: &mut OwnedWriteHalf,
    shared: &Shared,
    direction: Direction,
) -> Option<How> {
    let action = struck(message, shared, direction);
    let mut changed = message.to_vec();
    match action {
        None | Some(Action::StallAfter) => {}
        Some(Action::Drop) => return None,
        Some(Action::CutBefore(how)) => return Some(how),
        Some(Action::CutInside(_)) => changed.truncate(message.len() / 2),
        Some(Action::CorruptFirst) => changed[0] ^= 0x55,
        Some(Action::CorruptLast) => changed[message.len() - 1] ^= 0x55,
        Some(Action::StallBefore) => going(shared, direction).await,
    }
    if let Some(how) = write(&changed, to, shared, direction).await {
        return Some(how);
    }
    match action {
        Some(Action::CutInside(how)) => Some(how),
        _ => None,
    }
}

/// Whether something happens to this message. A stall is in force when this returns.
fn struck(message: &[u8], shared: &Shared, direction: Direction) -> Option<Action> {
    let trigger = shared.lock().trigger?;
    if trigger.direction != direction || !(trigger.matches)(message) {
        return None;
    }
    let mut action = None;
    shared.change(|control| {
        control.seen += 1;
        let now = control.seen == trigger.nth || trigger.for_ever && control.seen > trigger.nth;
        if now {
            control.struck += 1;
            action = Some(trigger.action);
        }
        if now && matches!(trigger.action, Action::StallBefore | Action::StallAfter) {
            match direction {
                Direction::ToServer => control.to_server.stalled = true,
                Direction::ToRelay => control.to_relay.stalled = true,
            }
        }
    });
    action
}

async fn write(
    bytes: &[u8],
    to: &mut OwnedWriteHalf,
    shared: &Shared,
    direction: Direction,
) -> Option<How> {
    let flow = shared.flow(direction);
    let (bytes, how) = up_to_the_cut(bytes, shared, direction);
    let largest = flow.bandwidth.map_or(CHUNK, |bandwidth| bandwidth as usize / 20 + 1);
    for piece in bytes.chunks(flow.slice.unwrap_or(largest)) {
        if let Some(bandwidth) = flow.bandwidth {
            sleep(Duration::from_secs_f64(piece.len() as f64 / f64::from(bandwidth))).await;
        }
        if to.write_all(piece).await.is_err() {
            return Some(How::Reset);
        }
        if flow.slice.is_some() {
            tokio::task::yield_now().await;
        }
    }
    how
}

/// What still passes, and how the connection ends behind it.
fn up_to_the_cut<'b>(
    bytes: &'b [u8],
    shared: &Shared,
    direction: Direction,
) -> (&'b [u8], Option<How>) {
    let mut control = shared.lock();
    let Some((which, left, how)) = control.cut_after else { return (bytes, None) };
    if which != direction {
        return (bytes, None);
    }
    let length = bytes.len() as u64;
    if left > length {
        control.cut_after = Some((which, left - length, how));
        return (bytes, None);
    }
    control.cut_after = None;
    drop(control);
    shared.change(|control| control.struck += 1);
    (&bytes[..usize::try_from(left).expect("not above the length")], Some(how))
}
