//! The proxy does what it is told: a fault that does not happen would prove nothing.

use std::io::ErrorKind;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use crate::support::framing::{Framing, Protocol, is_ack, is_any, is_feedback, is_publish, is_wal};
use crate::support::proxy::{Accept, Action, Direction, Flow, How, Proxy, Trigger};
use crate::support::waiting::LIMIT;

/// What must not come is waited for this long; what has to come, as long as it takes.
const MOMENT: Duration = Duration::from_millis(300);

/// A server that sends back what it gets, behind a proxy.
async fn echo(protocol: Protocol) -> (Proxy, impl AsyncFn() -> TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("it works");
    let port = listener.local_addr().expect("an address").port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = stream.split();
                if protocol == Protocol::Amqp {
                    // Only a client greets like that.
                    let _ = from.read_exact(&mut [0; HEADER.len()]).await;
                }
                let _ = tokio::io::copy(&mut from, &mut to).await;
            });
        }
    });
    let proxy = Proxy::before(port, protocol).await;
    let url = proxy.url(&format!("x://h:{port}/"));
    let address = url.trim_start_matches("x://h:").trim_end_matches('/').to_owned();
    let connect = async move || {
        TcpStream::connect(format!("127.0.0.1:{address}")).await.expect("the proxy listens")
    };
    (proxy, connect)
}

/// What comes back until nothing comes for a moment, and how it ended.
async fn answer(stream: &mut TcpStream) -> (Vec<u8>, Option<ErrorKind>) {
    answer_of(stream, 0).await
}

/// Waits longer for `size` bytes, or for the end.
async fn answer_of(stream: &mut TcpStream, size: usize) -> (Vec<u8>, Option<ErrorKind>) {
    let mut all = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let patience = if all.len() < size { LIMIT } else { MOMENT };
        match timeout(patience, stream.read(&mut chunk)).await {
            Err(_) => return (all, None),
            Ok(Ok(0)) => return (all, Some(ErrorKind::UnexpectedEof)),
            Ok(Ok(size)) => all.extend(&chunk[..size]),
            Ok(Err(error)) => return (all, Some(error.kind())),
        }
    }
}

/// A method frame on channel 1.
fn frame(class: u8, method: u8) -> Vec<u8> {
    vec![1, 0, 1, 0, 0, 0, 4, 0, class, 0, method, 0xCE]
}

const HEADER: &[u8] = b"AMQP\x00\x00\x09\x01";
const EOF: Option<ErrorKind> = Some(ErrorKind::UnexpectedEof);
const RESET: Option<ErrorKind> = Some(ErrorKind::ConnectionReset);

#[tokio::test]
async fn without_a_fault_everything_passes_both_ways() {
    let (proxy, connect) = echo(Protocol::Raw).await;
    let mut stream = connect().await;
    stream.write_all(b"hello").await.expect("it works");
    assert_eq!(answer_of(&mut stream, 5).await, (b"hello".to_vec(), None));
    stream.shutdown().await.expect("it works");
    assert_eq!(answer_of(&mut stream, 1).await, (Vec::new(), EOF));
    assert_eq!((proxy.connections(), proxy.struck()), (1, 0));
}

#[tokio::test]
async fn a_cut_is_a_reset_or_an_end() {
    let (proxy, connect) = echo(Protocol::Raw).await;
    for (how, seen) in [(How::Reset, RESET), (How::Fin, EOF)] {
        let mut stream = connect().await;
        stream.write_all(b"x").await.expect("it works");
        assert_eq!(answer_of(&mut stream, 1).await.0, b"x");
        proxy.cut(how);
        assert_eq!(answer_of(&mut stream, 1).await, (Vec::new(), seen), "{how:?}");
        // It concerns those that were there.
        let mut next = connect().await;
        next.write_all(b"y").await.expect("it works");
        assert_eq!(answer_of(&mut next, 1).await, (b"y".to_vec(), None));
    }
}

#[tokio::test]
async fn a_cut_after_bytes_is_exact() {
    let (proxy, connect) = echo(Protocol::Raw).await;
    proxy.cut_after(Direction::ToRelay, 7, How::Fin);
    let mut stream = connect().await;
    stream.write_all(b"0123456789").await.expect("it works");
    assert_eq!(answer_of(&mut stream, 7).await, (b"0123456".to_vec(), EOF));
    assert_eq!(proxy.struck(), 1);
}

#[tokio::test]
async fn a_stall_keeps_the_bytes_and_a_dead_direction_loses_them() {
    let (proxy, connect) = echo(Protocol::Raw).await;
    let mut stream = connect().await;
    proxy.flow(Direction::ToRelay, Flow { stalled: true, ..Flow::default() });
    stream.write_all(b"kept").await.expect("it works");
    assert_eq!(answer(&mut stream).await, (Vec::new(), None));
    proxy.heal();
    assert_eq!(answer_of(&mut stream, 4).await, (b"kept".to_vec(), None));
    proxy.flow(Direction::ToServer, Flow { dead: true, ..Flow::default() });
    stream.write_all(b"gone").await.expect("it works");
    assert_eq!(answer(&mut stream).await, (Vec::new(), None));
    proxy.flow(Direction::ToServer, Flow::default());
    stream.write_all(b"behind the hole").await.expect("it works");
    assert_eq!(answer(&mut stream).await, (Vec::new(), None));
    proxy.heal();
    assert_eq!(
        answer_of(&mut stream, 1).await,
        (Vec::new(), RESET),
        "a stream with a hole never heals"
    );
}

#[tokio::test]
async fn a_delay_holds_back_a_bandwidth_lets_drops_through_and_slices_arrive_whole() {
    let (proxy, connect) = echo(Protocol::Raw).await;
    let mut stream = connect().await;
    let delay = Duration::from_secs(3600);
    proxy.flow(Direction::ToServer, Flow { delay, ..Flow::default() });
    stream.write_all(b"late").await.expect("it works");
    assert_eq!(answer(&mut stream).await, (Vec::new(), None), "it comes in an hour");
    proxy.heal();
    // A byte a second: after the first one nothing comes for a moment.
    let mut stream = connect().await;
    proxy.flow(Direction::ToServer, Flow { bandwidth: Some(1), ..Flow::default() });
    stream.write_all(&[7; 50_000]).await.expect("it works");
    let (drops, end) = answer_of(&mut stream, 1).await;
    assert!((1..50_000).contains(&drops.len()) && end.is_none(), "{} bytes", drops.len());
    proxy.heal();
    let mut stream = connect().await;
    proxy.flows(Flow { slice: Some(1), ..Flow::default() });
    stream.write_all(b"sliced").await.expect("it works");
    assert_eq!(answer_of(&mut stream, 6).await, (b"sliced".to_vec(), None));
}

#[tokio::test]
async fn refused_and_silent_connections() {
    let (proxy, connect) = echo(Protocol::Raw).await;
    proxy.accepts(Accept::Refuse);
    assert_eq!(answer_of(&mut connect().await, 1).await.1, RESET);
    proxy.accepts(Accept::Silent);
    let mut stream = connect().await;
    stream.write_all(b"hello?").await.expect("it works");
    assert_eq!(answer(&mut stream).await, (Vec::new(), None));
}

/// Sends the header and four frames, with this done at the second acknowledgement.
async fn at_the_second_ack(action: Action) -> (Vec<u8>, Option<ErrorKind>) {
    let (proxy, connect) = echo(Protocol::Amqp).await;
    let (direction, for_ever) = (Direction::ToServer, false);
    proxy.trigger(Trigger { direction, matches: is_ack, nth: 2, action, for_ever });
    let mut stream = connect().await;
    let mut bytes = Vec::new();
    for (class, method) in [(60, 80), (60, 40), (60, 80), (60, 50)] {
        bytes.extend(frame(class, method));
    }
    // In pieces that are no frames.
    for piece in [HEADER, &bytes].concat().chunks(9) {
        stream.write_all(piece).await.expect("it works");
    }
    let missing = match action {
        Action::Drop => 1,
        Action::StallBefore => 2,
        Action::StallAfter => 1,
        Action::CorruptFirst | Action::CorruptLast => 0,
        // It ends.
        Action::CutBefore(_) | Action::CutInside(_) => 0,
    };
    let size = bytes.len() - missing * frame(60, 80).len();
    let mut got = answer_of(&mut stream, size).await;
    if matches!(action, Action::StallBefore | Action::StallAfter) {
        proxy.strikes().await;
        let stalled = got.0.len();
        proxy.heal();
        got.0.extend(answer_of(&mut stream, bytes.len() - stalled).await.0);
        assert_eq!(got.0, bytes, "a stall loses nothing");
        got.0.truncate(stalled);
    }
    got
}

#[tokio::test]
async fn triggers_strike_at_the_message_that_they_name() {
    let (ack, publish, back) = (frame(60, 80), frame(60, 40), frame(60, 50));
    let first = [&ack[..], &publish].concat();
    let with = |rest: &[&[u8]]| [&first, &rest.concat()[..]].concat();
    assert_eq!(at_the_second_ack(Action::Drop).await, (with(&[&back]), None));
    let cut = at_the_second_ack(Action::CutBefore(How::Fin)).await;
    assert_eq!((cut.0.len() <= first.len(), cut.1), (true, EOF));
    let inside = at_the_second_ack(Action::CutInside(How::Fin)).await;
    assert!(inside.0.len() <= first.len() + ack.len() / 2);
    let mut changed = ack.clone();
    changed[0] ^= 0x55;
    assert_eq!(at_the_second_ack(Action::CorruptFirst).await.0, with(&[&changed, &back]));
    let mut changed = ack.clone();
    changed[11] ^= 0x55;
    assert_eq!(at_the_second_ack(Action::CorruptLast).await.0, with(&[&changed, &back]));
    assert_eq!(at_the_second_ack(Action::StallBefore).await, (first.clone(), None));
    assert_eq!(at_the_second_ack(Action::StallAfter).await, (with(&[&ack]), None));
}

#[test]
fn messages_are_found_whatever_the_pieces() {
    let (mut client, mut server) = Framing::pair(Protocol::Postgres);
    let startup = [&[0, 0, 0, 12], &[0, 3, 0, 0], &b"user"[..]].concat();
    let tls = [0, 0, 0, 8, 4, 210, 22, 47];
    let copy = |kind: u8| vec![b'd', 0, 0, 0, 6, kind, 1];
    let all = [&tls[..], &startup, &copy(b'r'), &copy(b'x')].concat();
    let got: Vec<Vec<u8>> = all.chunks(5).flat_map(|piece| client.split(piece)).collect();
    assert_eq!(got, [tls.to_vec(), startup, copy(b'r'), copy(b'x')]);
    assert!(is_feedback(&got[2]) && !is_feedback(&got[3]) && is_any(&got[0]));
    let all = [&b"N"[..], &copy(b'w'), &copy(b'k')].concat();
    let got: Vec<Vec<u8>> = all.chunks(3).flat_map(|piece| server.split(piece)).collect();
    assert_eq!(got, [b"N".to_vec(), copy(b'w'), copy(b'k')]);
    assert!(is_wal(&got[1]) && !is_wal(&got[2]));
    assert!(is_publish(&frame(60, 40)) && !is_publish(&frame(60, 80)) && is_ack(&frame(60, 80)));
}
