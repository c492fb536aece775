//! The publisher against a scripted broker: what a real one does rarely, or never.
//!
//! Each test tells a broker, in the same process, what to answer. Nothing waits for a fixed time,
//! except where a deadline is what is tested; what a deadline did is seen by its words and by the
//! frames that came, never by a clock.

mod fake_broker;

use std::time::Duration;

use amq_protocol::frame::AMQPFrame;
use amq_protocol::protocol::{AMQPClass, channel, connection};
use amq_protocol::types::AMQPValue;
use fake_broker::{Peer, broker, closed_port, message, options};
use futures_util::FutureExt;
use watership::amqp::options::{Auth, Options, SPREAD_FROM};
use watership::amqp::publisher::Connection;
use watership::amqp::reply;
use watership::error::{Error, Kind};
use watership::publisher::{Outcome, Publisher, Ticket};

const HOUR: Duration = Duration::from_secs(3600);

/// Runs `script` as the broker (after the handshake) and `client` against it.
async fn session<S, C>(
    options: Options,
    script: impl FnOnce(Peer) -> S + Send + 'static,
    client: impl FnOnce(Connection) -> C,
) where
    S: Future<Output = ()> + Send + 'static,
    C: Future<Output = ()>,
{
    let (url, listener) = broker().await;
    let channels = (options.exchanges.len() * options.channels_per_exchange) as u16;
    let script = tokio::spawn(async move {
        let mut peer = Peer::accept(&listener).await;
        peer.handshake().await;
        peer.open_channels(2, channels).await;
        script(peer).await;
    });
    let connection =
        Connection::open(&Options { urls: vec![url], ..options }).await.expect("the session lives");
    client(connection).await;
    script.await.expect("the session lives");
}

fn publish(connection: &mut Connection, exchange: u16, tickets: std::ops::RangeInclusive<u64>) {
    for n in tickets {
        connection.send(Ticket(n), &message(exchange, n, b"hello"));
    }
}

/// Waits until `count` outcomes are there.
async fn outcomes(connection: &mut Connection, count: usize) -> Vec<(u64, Outcome)> {
    let mut all = Vec::new();
    while all.len() < count {
        connection.next_outcomes(&mut all).await.expect("the session lives");
    }
    all.into_iter().map(|(ticket, outcome)| (ticket.0, outcome)).collect()
}

async fn failure(connection: &mut Connection) -> Error {
    let mut all = Vec::new();
    let error = loop {
        if let Err(error) = connection.next_outcomes(&mut all).await {
            break error;
        }
    };
    assert!(all.iter().all(|(_, o)| *o == Outcome::Confirmed), "{all:?}");
    error
}

fn confirmed(tickets: impl IntoIterator<Item = u64>) -> Vec<(u64, Outcome)> {
    tickets.into_iter().map(|n| (n, Outcome::Confirmed)).collect()
}

#[tokio::test]
async fn confirms_out_of_order_and_in_ranges_settle_each_publish_once() {
    let script = |mut peer: Peer| async move {
        peer.publishes(10).await;
        peer.ack(2, 3, false).await;
        peer.ack(2, 5, true).await;
        peer.nack(2, 8, true).await;
        peer.ack(2, 10, false).await;
        peer.ack(2, 9, false).await;
    };
    session(options(&["a"]), script, |mut connection| async move {
        publish(&mut connection, 0, 1..=10);
        let got = outcomes(&mut connection, 10).await;
        let mut expected = confirmed([3, 1, 2, 4, 5]);
        expected.extend([6, 7, 8].map(|n| (n, Outcome::Nacked)));
        expected.extend(confirmed([10, 9]));
        assert_eq!(got, expected);
        assert_eq!(connection.unconfirmed(), 0);
    })
    .await;
}

#[tokio::test]
async fn opening_ends_with_the_last_answer_and_waits_for_no_timer() {
    let script = |mut peer: Peer| async move {
        peer.publishes(1).await;
        peer.ack(2, 1, false).await;
    };
    // With these the next timer is minutes away, long after the connect timeout.
    let (heartbeat, confirm_timeout) = (HOUR, HOUR);
    let options = Options { heartbeat, confirm_timeout, ..options(&["a", "b"]) };
    session(options, script, |mut connection| async move {
        publish(&mut connection, 0, 1..=1);
        outcomes(&mut connection, 1).await;
    })
    .await;
}

/// <https://github.com/amqp-rs/lapin/issues/254>
#[tokio::test]
async fn museum_m15_returned_publishes_are_exactly_those_that_came_back() {
    let script = |mut peer: Peer| async move {
        let publishes = peer.publishes(7).await;
        for tag in [2, 4, 6] {
            peer.give_back(&publishes[tag - 1]).await;
        }
        peer.ack(2, 6, true).await;
        peer.ack(2, 7, false).await;
    };
    session(options(&["a"]), script, |mut connection| async move {
        publish(&mut connection, 0, 1..=7);
        for (ticket, outcome) in outcomes(&mut connection, 7).await {
            let returned = [2, 4, 6].contains(&ticket);
            let text = || Outcome::Returned("NO_ROUTE".into());
            assert_eq!(outcome, if returned { text() } else { Outcome::Confirmed }, "{ticket}");
        }
    })
    .await;
}

#[tokio::test]
async fn confirm_that_fits_no_publish_ends_the_session() {
    for (first, second) in [(3, 4), (3, 3), (3, 1), (3, 0)] {
        let script = move |mut peer: Peer| async move {
            peer.publishes(3).await;
            peer.ack(2, first, true).await;
            peer.ack(2, second, false).await;
        };
        session(options(&["a"]), script, |mut connection| async move {
            publish(&mut connection, 0, 1..=3);
            assert_eq!(failure(&mut connection).await.kind(), Kind::Protocol);
        })
        .await;
    }
}

#[tokio::test]
async fn return_that_fits_no_publish_ends_the_session() {
    let script = |mut peer: Peer| async move {
        let publishes = peer.publishes(2).await;
        peer.give_back(&publishes[1]).await;
        peer.give_back(&publishes[1]).await;
    };
    session(options(&["a"]), script, |mut connection| async move {
        publish(&mut connection, 0, 1..=2);
        let error = failure(&mut connection).await;
        assert!(error.to_string().contains("none of the 2 unconfirmed"), "{error}");
    })
    .await;
}

#[tokio::test]
async fn messages_of_an_exchange_share_its_channels_under_load_and_a_sequence_keeps_to_one() {
    const QUIET: u64 = SPREAD_FROM as u64;
    let script = |mut peer: Peer| async move {
        let publishes = peer.publishes(SPREAD_FROM + 24).await;
        let channels = |range: std::ops::Range<usize>| {
            let list = publishes[range].iter().map(|p| p.channel);
            list.collect::<std::collections::BTreeSet<u16>>()
        };
        assert_eq!(channels(0..SPREAD_FROM), [2].into(), "a quiet stream keeps its order");
        let loaded = |from: usize, to: usize| channels(SPREAD_FROM + from..SPREAD_FROM + to);
        assert_eq!(loaded(0, 12), [2, 3, 4].into());
        assert_eq!(loaded(12, 18).len(), 1, "a sequence");
        assert_eq!(loaded(18, 24), [5, 6, 7].into(), "the other exchange has its own");
        let count = |number| publishes.iter().filter(|p| p.channel == number).count() as u64;
        peer.close_channel(3, reply::NOT_FOUND, "NOT_FOUND").await;
        for number in [2, 4, 5, 6, 7] {
            peer.ack(number, count(number), true).await;
        }
    };
    let options = Options { channels_per_exchange: 3, ..options(&["a", "b"]) };
    session(options, script, |mut connection| async move {
        publish(&mut connection, 0, 1..=QUIET + 12);
        for n in QUIET + 13..=QUIET + 18 {
            let mut message = message(0, n, b"hello");
            message.in_sequence = true;
            connection.send(Ticket(n), &message);
        }
        publish(&mut connection, 1, QUIET + 19..=QUIET + 24);
        let got = outcomes(&mut connection, SPREAD_FROM + 24).await;
        let closed = got.iter().filter(|(_, o)| matches!(o, Outcome::ChannelClosed { .. })).count();
        assert_eq!(closed, 4, "a third of what the first exchange got under load: {got:?}");
    })
    .await;
}

/// <https://github.com/amqp-rs/lapin/issues/246>
#[tokio::test]
async fn museum_m14_closed_channel_fails_its_own_publishes_and_is_opened_again() {
    for (code, text) in [
        (reply::NOT_FOUND, "NOT_FOUND - no exchange 'a'"),
        (reply::ACCESS_REFUSED, "ACCESS_REFUSED"),
    ] {
        let script = move |mut peer: Peer| async move {
            peer.publishes(6).await;
            peer.ack(2, 1, false).await;
            peer.close_channel(2, code, text).await;
            peer.ack(3, 2, true).await;
            // The next publish to it waits for the channel, and counts from one again.
            peer.open_channels(2, 1).await;
            let again = peer.publishes(1).await;
            assert_eq!((again[0].channel, again[0].exchange.as_str()), (2, "a"));
            peer.ack(2, 1, false).await;
        };
        session(options(&["a", "b"]), script, |mut connection| async move {
            publish(&mut connection, 0, 1..=4);
            publish(&mut connection, 1, 5..=6);
            let mut got = outcomes(&mut connection, 6).await;
            got.sort_by_key(|(ticket, _)| *ticket);
            let closed = || Outcome::ChannelClosed { code, text: text.into() };
            let mut expected = confirmed([1]);
            expected.extend([2, 3, 4].map(|n| (n, closed())));
            expected.extend(confirmed([5, 6]));
            assert_eq!(got, expected);
            publish(&mut connection, 0, 7..=7);
            assert_eq!(outcomes(&mut connection, 1).await, confirmed([7]));
        })
        .await;
    }
}

#[tokio::test]
async fn publishes_on_their_way_into_a_closed_channel_have_an_outcome_too() {
    let script = |mut peer: Peer| async move {
        peer.publishes(1).await;
        peer.close_channel(2, reply::NOT_FOUND, "NOT_FOUND").await;
    };
    session(options(&["a"]), script, |mut connection| async move {
        publish(&mut connection, 0, 1..=1);
        // A single poll writes the first; the broker has no turn before the others are sent.
        let mut all = Vec::new();
        assert!(connection.next_outcomes(&mut all).now_or_never().is_none());
        publish(&mut connection, 0, 2..=50);
        while all.len() < 50 {
            connection.next_outcomes(&mut all).await.unwrap();
        }
        let closed = |(_, o): &(_, Outcome)| {
            matches!(o, Outcome::ChannelClosed { code: reply::NOT_FOUND, .. })
        };
        assert!(all.iter().all(closed), "{all:?}");
    })
    .await;
}

#[tokio::test]
async fn missing_confirm_ends_the_session_at_its_deadline() {
    let script = |mut peer: Peer| async move {
        peer.publishes(3).await;
        peer.ack(2, 1, false).await;
        peer.until_gone().await;
    };
    let mut options = options(&["a"]);
    options.confirm_timeout = Duration::from_secs(2);
    session(options, script, |mut connection| async move {
        publish(&mut connection, 0, 1..=3);
        let error = failure(&mut connection).await;
        assert_eq!(error.kind(), Kind::Unreachable);
        assert!(error.to_string().contains("no confirm for"), "{error}");
    })
    .await;
}

#[tokio::test]
async fn blocked_connection_holds_publishes_keeps_beating_and_resumes() {
    let script = |mut peer: Peer| async move {
        peer.publishes(1).await;
        peer.blocked("low on memory").await;
        peer.ack(2, 1, false).await;
        // Nothing but heartbeats may come, one a second, until far beyond the deadline.
        for _ in 0..3 {
            assert_eq!(peer.receive_any().await, AMQPFrame::Heartbeat);
            peer.beat().await;
        }
        peer.unblocked().await;
        let publishes = peer.publishes(2).await;
        assert_eq!(publishes[1].body, b"hello");
        peer.ack(2, 3, true).await;
    };
    let mut options = options(&["a"]);
    options.confirm_timeout = Duration::from_secs(2);
    options.heartbeat = Duration::from_secs(2);
    session(options, script, |mut connection| async move {
        publish(&mut connection, 0, 1..=1);
        assert_eq!(outcomes(&mut connection, 1).await, confirmed([1]));
        assert!(connection.is_blocked());
        publish(&mut connection, 0, 2..=3);
        assert_eq!(outcomes(&mut connection, 2).await, confirmed([2, 3]));
        assert!(!connection.is_blocked());
    })
    .await;
}

#[tokio::test]
async fn broker_that_closes_the_connection_is_quoted_and_answered() {
    for (code, text, kind) in [
        (reply::CONNECTION_FORCED, "CONNECTION_FORCED - shutdown", Kind::Unreachable),
        (reply::ACCESS_REFUSED, "ACCESS_REFUSED", Kind::Refused),
        (reply::NOT_ALLOWED, "NOT_ALLOWED - vhost deleted", Kind::Refused),
        (reply::FRAME_ERROR, "FRAME_ERROR", Kind::Protocol),
    ] {
        let script = move |mut peer: Peer| async move {
            peer.publishes(1).await;
            peer.close_connection(code, text).await;
            let ok = connection::AMQPMethod::CloseOk(connection::CloseOk {});
            assert_eq!(peer.receive().await, AMQPFrame::Method(0, AMQPClass::Connection(ok)));
        };
        session(options(&["a"]), script, |mut connection| async move {
            publish(&mut connection, 0, 1..=1);
            let error = failure(&mut connection).await;
            assert_eq!((error.kind(), error.reply_code()), (kind, Some(code)));
            assert!(error.to_string().contains(&format!("{code} {text}")), "{error}");
        })
        .await;
    }
}

#[tokio::test]
async fn single_byte_segments_are_put_together() {
    let script = |mut peer: Peer| async move {
        let publishes = peer.publishes(4).await;
        peer.one_byte_at_a_time = true;
        peer.give_back(&publishes[2]).await;
        peer.ack(2, 3, true).await;
        peer.nack(2, 4, false).await;
    };
    session(options(&["a"]), script, |mut connection| async move {
        publish(&mut connection, 0, 1..=4);
        let mut expected = confirmed([1, 2]);
        expected.push((3, Outcome::Returned("NO_ROUTE".into())));
        expected.push((4, Outcome::Nacked));
        assert_eq!(outcomes(&mut connection, 4).await, expected);
    })
    .await;
}

#[tokio::test]
async fn bytes_that_are_no_frames_end_the_session() {
    let mut large = vec![1, 0, 2];
    large.extend_from_slice(&200_000u32.to_be_bytes());
    let table = vec![1, 0, 0, 0, 0, 0, 4, 0, 50, 0, 10, 0xCE];
    let no_end = vec![8, 0, 0, 0, 0, 0, 0, 0];
    for bytes in [large, table, no_end, vec![9; 30], b"AMQP\0\0\x09\x01".to_vec()] {
        let script = move |mut peer: Peer| async move {
            peer.publishes(1).await;
            peer.raw(&bytes).await;
        };
        session(options(&["a"]), script, |mut connection| async move {
            publish(&mut connection, 0, 1..=1);
            assert_eq!(failure(&mut connection).await.kind(), Kind::Protocol);
        })
        .await;
    }
}

#[tokio::test]
async fn connection_cut_in_the_middle_of_a_frame_is_lost() {
    let script = |mut peer: Peer| async move {
        peer.publishes(1).await;
        peer.raw(&[1, 0, 2, 0, 0, 0, 13, 0, 60]).await;
    };
    session(options(&["a"]), script, |mut connection| async move {
        publish(&mut connection, 0, 1..=1);
        assert_eq!(failure(&mut connection).await.kind(), Kind::Unreachable);
    })
    .await;
}

#[tokio::test]
async fn silent_broker_is_given_up_after_twice_the_heartbeat() {
    let script = |mut peer: Peer| async move { peer.until_gone().await };
    let mut options = options(&["a"]);
    options.heartbeat = Duration::from_secs(1);
    session(options, script, |mut connection| async move {
        let error = failure(&mut connection).await;
        assert!(error.to_string().contains("nothing received for"), "{error}");
    })
    .await;
}

#[tokio::test]
async fn dropped_futures_lose_neither_bytes_nor_outcomes() {
    const COUNT: u64 = 100;
    let script = |mut peer: Peer| async move {
        for (i, publish) in peer.publishes(COUNT as usize).await.iter().enumerate() {
            assert_eq!(publish.body, vec![i as u8 + 1; 200_000]);
        }
        for tag in 1..=COUNT {
            peer.ack(2, tag, false).await;
        }
    };
    session(options(&["a"]), script, |mut connection| async move {
        for n in 1..=COUNT {
            connection.send(Ticket(n), &message(0, n, &vec![n as u8; 200_000]));
        }
        let mut all = Vec::new();
        while all.len() < COUNT as usize {
            // Drops the future after a single poll.
            if let Some(result) = connection.next_outcomes(&mut all).now_or_never() {
                result.unwrap();
            }
            tokio::task::yield_now().await;
        }
        let tickets: Vec<u64> = all.iter().map(|(ticket, _)| ticket.0).collect();
        assert_eq!(tickets, (1..=COUNT).collect::<Vec<_>>());
    })
    .await;
}

#[tokio::test]
async fn broker_that_accepts_and_says_nothing_is_left_at_the_connect_timeout() {
    let (url, _listener) = broker().await;
    let mut options = options(&["a"]);
    options.urls = vec![url];
    options.connect_timeout = Duration::from_millis(100);
    let error = Connection::open(&options).await.err().unwrap();
    assert_eq!(error.kind(), Kind::Unreachable);
    assert!(error.to_string().ends_with("no AMQP connection within 100ms"), "{error}");
}

#[tokio::test]
async fn brokers_are_tried_in_turn_and_all_answers_are_told() {
    let mut options = options(&[]);
    let (closed, kept) = (closed_port(), closed_port());
    options.urls = vec![closed.0, kept.0];
    let error = Connection::open(&options).await.err().unwrap();
    let (first, second) = (options.urls[0].port, options.urls[1].port);
    for port in [first, second] {
        assert!(error.to_string().contains(&format!("127.0.0.1:{port}")), "{error}");
    }
    let (url, listener) = broker().await;
    options.urls[1] = url.clone();
    let script = tokio::spawn(async move {
        let mut peer = Peer::accept(&listener).await;
        peer.handshake().await;
        peer.close_ok().await;
    });
    let connection = Connection::open(&options).await.unwrap();
    connection.close().await;
    script.await.unwrap();
}

#[tokio::test]
async fn login_is_by_password_or_by_certificate_and_tells_who_and_what_we_are() {
    for (auth, mechanism, response) in
        [(Auth::Plain, "PLAIN", &b"\0guest\0guest"[..]), (Auth::External, "EXTERNAL", b"")]
    {
        let (url, listener) = broker().await;
        let options = Options { urls: vec![url], auth, ..options(&[]) };
        let script = tokio::spawn(async move {
            let start_ok = Peer::accept(&listener).await.handshake().await;
            assert_eq!(start_ok.mechanism.as_str(), mechanism);
            assert_eq!(start_ok.response.as_bytes(), response);
            let properties = start_ok.client_properties;
            assert!(properties.contains_key("connection_name"));
            let AMQPValue::FieldTable(capabilities) = &properties.inner()["capabilities"] else {
                panic!("{properties:?}")
            };
            for name in ["connection.blocked", "basic.nack", "authentication_failure_close"] {
                assert_eq!(capabilities.inner()[name], AMQPValue::Boolean(true));
            }
        });
        Connection::open(&options).await.unwrap();
        script.await.unwrap();
    }
}

/// Why a connection to a broker that does what `script` says cannot be opened.
async fn refusal<S>(script: impl FnOnce(Peer) -> S + Send + 'static) -> String
where
    S: Future<Output = Peer> + Send + 'static,
{
    let (url, listener) = broker().await;
    let script = tokio::spawn(async move { script(Peer::accept(&listener).await).await });
    let opened = Connection::open(&Options { urls: vec![url], ..options(&["a"]) }).await;
    let error = opened.err().expect("it is refused");
    drop(script.await.expect("the script ends"));
    error.text_with_hint()
}

#[tokio::test]
async fn what_a_broker_does_not_offer_is_named_with_what_to_do() {
    let text = refusal(async |mut peer: Peer| {
        peer.offers("AMQPLAIN EXTERNAL").await;
        peer
    });
    let text = text.await;
    for part in ["mechanism PLAIN, only AMQPLAIN EXTERNAL", "auth_mechanisms in rabbitmq.conf"] {
        assert!(text.contains(part), "{text}");
    }
    let text = refusal(async |mut peer: Peer| {
        peer.tunes(1).await;
        peer
    });
    let text = text.await;
    for part in ["broker allows 1 channel per connection; 2 are needed", "raise channel_max"] {
        assert!(text.contains(part), "{text}");
    }
}

#[tokio::test]
async fn a_channel_that_is_closed_while_it_is_opened_ends_the_session_in_the_brokers_words() {
    let text = refusal(async |mut peer: Peer| {
        peer.handshake().await;
        let open = channel::AMQPMethod::Open(channel::Open {});
        assert_eq!(peer.receive().await, AMQPFrame::Method(2, AMQPClass::Channel(open)));
        let reply_text = "RESOURCE_ERROR - no more of them".into();
        let close = channel::Close { reply_code: 506, reply_text, class_id: 20, method_id: 10 };
        peer.channel(2, channel::AMQPMethod::Close(close)).await;
        peer
    });
    let text = text.await;
    for part in ["closed channel 2 while it was being opened", "no more of them"] {
        assert!(text.contains(part), "{text}");
    }
}
