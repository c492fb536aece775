//! A broker that confirms every message at once and keeps none: it shows what the relay can do if
//! the broker costs nothing.
//!
//! It is a proxy in front of the real one. It confirms publishes itself and drops them; everything
//! else passes through, so connections, topology and the lock queue are real.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use watership::error::{Error, Result};

/// "AMQP", and the version.
const PREAMBLE: usize = 8;
/// Type, channel and size come before the payload of a frame, its end after it.
const HEAD: usize = 7;
const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;
const CHANNEL_OPEN: [u8; 4] = [0, 20, 0, 10];
const BASIC_PUBLISH: [u8; 4] = [0, 60, 0, 40];
const BASIC_ACK: [u8; 4] = [0, 60, 0, 80];
const FRAME_END: u8 = 0xCE;
const CHUNK: usize = 256 * 1024;

/// Listens until it is dropped.
pub struct NullBroker {
    pub port: u16,
    listening: JoinHandle<()>,
}

impl NullBroker {
    /// Starts one in front of the broker at this port.
    pub async fn start(broker: u16) -> Result<Self> {
        let failed = |e| Error::unreachable("a broker that takes everything").caused_by(e);
        let listener = TcpListener::bind("127.0.0.1:0").await.map_err(failed)?;
        let port = listener.local_addr().map_err(failed)?.port();
        let listening = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(connection(client, broker));
            }
        });
        Ok(Self { port, listening })
    }
}

impl Drop for NullBroker {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

/// Ends when either side does.
async fn connection(client: TcpStream, broker: u16) {
    let Ok(broker) = TcpStream::connect(("127.0.0.1", broker)).await else { return };
    let _slower = (client.set_nodelay(true), broker.set_nodelay(true));
    let (from_client, to_client) = client.into_split();
    let (from_broker, to_broker) = broker.into_split();
    let to_client = Arc::new(Mutex::new(to_client));
    tokio::select! {
        _ended = take(from_client, to_broker, to_client.clone()) => {}
        _ended = pass(from_broker, to_client) => {}
    }
}

/// Handles what the relay sends: confirms publishes, and passes on the rest.
async fn take(
    mut from: OwnedReadHalf,
    mut to_broker: OwnedWriteHalf,
    to_client: Arc<Mutex<OwnedWriteHalf>>,
) -> std::io::Result<()> {
    let mut preamble = [0; PREAMBLE];
    from.read_exact(&mut preamble).await?;
    to_broker.write_all(&preamble).await?;
    let (mut input, mut channels) = (Vec::with_capacity(CHUNK), BTreeMap::new());
    loop {
        if from.read_buf(&mut input).await? == 0 {
            return Ok(());
        }
        let (mut forward, mut at) = (Vec::new(), 0);
        while let Some(frame) = first_frame(&input[at..]) {
            at += frame.len();
            let number = u16::from_be_bytes([frame[1], frame[2]]);
            if !channels.entry(number).or_insert_with(Channel::default).swallows(frame) {
                forward.extend_from_slice(frame);
            }
        }
        input.drain(..at);
        to_broker.write_all(&forward).await?;
        let acks: Vec<u8> = channels.iter_mut().flat_map(|(n, c)| c.ack(*n)).collect();
        to_client.lock().await.write_all(&acks).await?;
    }
}

/// Passes on what the broker sends, in whole frames, so that confirms fit in between.
async fn pass(
    mut from: OwnedReadHalf,
    to_client: Arc<Mutex<OwnedWriteHalf>>,
) -> std::io::Result<()> {
    let mut input = Vec::with_capacity(CHUNK);
    while from.read_buf(&mut input).await? > 0 {
        let mut at = 0;
        while let Some(frame) = first_frame(&input[at..]) {
            at += frame.len();
        }
        to_client.lock().await.write_all(&input[..at]).await?;
        input.drain(..at);
    }
    Ok(())
}

/// The first frame, if it is complete.
fn first_frame(input: &[u8]) -> Option<&[u8]> {
    let size = u32::from_be_bytes(input.get(3..HEAD)?.try_into().ok()?);
    input.get(..HEAD + usize::try_from(size).ok()? + 1)
}

/// A channel that may be in the middle of a message.
#[derive(Default)]
struct Channel {
    /// A message was announced, and its header has not arrived.
    begun: bool,
    /// Bytes of its body that have not arrived.
    left: u64,
    /// Messages that are complete, and how many of them are confirmed.
    complete: u64,
    confirmed: u64,
}

impl Channel {
    /// True for a frame that belongs to a message.
    fn swallows(&mut self, frame: &[u8]) -> bool {
        let payload = &frame[HEAD..frame.len() - 1];
        match frame[0] {
            METHOD if payload.starts_with(&CHANNEL_OPEN) => {
                *self = Self::default();
                return false;
            }
            METHOD if payload.starts_with(&BASIC_PUBLISH) => {
                self.begun = true;
                return true;
            }
            HEADER if self.begun && payload.len() >= 12 => {
                let size = payload[4..12].try_into().unwrap_or_default();
                self.left = u64::from_be_bytes(size);
                self.begun = false;
            }
            BODY if self.left > 0 => self.left -= (payload.len() as u64).min(self.left),
            _ => return false,
        }
        if self.left == 0 {
            self.complete += 1;
        }
        true
    }

    /// A confirm of all complete messages; empty if there are no new ones.
    fn ack(&mut self, number: u16) -> Vec<u8> {
        if self.complete == self.confirmed {
            return Vec::new();
        }
        self.confirmed = self.complete;
        let mut frame = vec![METHOD];
        frame.extend(number.to_be_bytes());
        frame.extend(13_u32.to_be_bytes());
        frame.extend(BASIC_ACK);
        frame.extend(self.complete.to_be_bytes());
        // Multiple: it and all before it.
        frame.extend([1, FRAME_END]);
        frame
    }
}
