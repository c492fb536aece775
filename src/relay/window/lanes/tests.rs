//! The lanes against a naive model: whatever the outcomes, a key's messages are accepted in the
//! order of admission, a truncate is a barrier, and nothing is forgotten.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::{About, Lanes, Owner, PROBE_FIRST, PROBE_LIMIT, WAIT_LIMIT};
use crate::message::{Builder, ExchangeId, Message, Properties, RouteId};
use crate::position::{Mark, Position};
use crate::publisher::Ticket;
use crate::relay::window::{EntryId, Window};
use crate::route::LaneKeys;
use crate::source::Receipt;
use proptest::prelude::*;
use uuid::Uuid;

pub(super) fn message(id: u128, route: u16) -> Message {
    message_to("key", id, route)
}

pub(super) fn message_to(routing_key: &str, id: u128, route: u16) -> Message {
    let properties = Properties {
        content_type: "text/plain",
        message_id: Uuid::from_u128(id),
        timestamp: 0,
        kind: "test",
        app_id: "test",
    };
    let mut scratch = Vec::new();
    let builder = Builder::new(&mut scratch, routing_key, properties).unwrap();
    builder.finish(ExchangeId(0), RouteId(route), |_| {}).unwrap()
}

pub(super) fn about() -> About {
    About { position: Position::default(), source: "s.t".into(), committed_at_us: 0 }
}

pub(super) fn entry() -> EntryId {
    let receipt = Receipt::new(Position::default(), Some(Mark(1)));
    Window::new().push(receipt, 1, 0)
}

/// Some time to begin with.
pub(super) fn now() -> Instant {
    Instant::now()
}

struct Bench {
    lanes: Lanes,
    now: Instant,
}

impl Bench {
    fn new() -> Self {
        Self { lanes: Lanes::new(), now: now() }
    }

    fn admit(&mut self, id: u128, keys: LaneKeys) {
        self.admit_on(0, id, keys);
    }

    fn admit_on(&mut self, route: u16, id: u128, keys: LaneKeys) {
        self.lanes.admit(message(id, route), about(), keys, Owner::Window(entry()), self.now);
    }

    fn admit_to(&mut self, routing_key: &str, id: u128, keys: LaneKeys) {
        let message = message_to(routing_key, id, 0);
        self.lanes.admit(message, about(), keys, Owner::Window(entry()), self.now);
    }

    /// Everything that may be sent now.
    fn send(&mut self) -> Vec<(Ticket, u128)> {
        let mut sent = Vec::new();
        while let Some((ticket, slot)) = self.lanes.next(self.now) {
            sent.push((ticket, slot.message.id.as_u128()));
        }
        sent
    }

    fn ids(&mut self) -> Vec<u128> {
        self.send().into_iter().map(|(_, id)| id).collect()
    }
}

fn one(lane: u64) -> LaneKeys {
    LaneKeys::One { lane, group: None }
}

fn row(lane: u64) -> LaneKeys {
    LaneKeys::One { lane, group: Some(1) }
}

#[test]
fn what_waits_behind_an_evicted_message_leaves_with_it_and_nothing_else_does() {
    let one = |lane| LaneKeys::One { lane, group: Some(9) };
    let mut bench = Bench::new();
    bench.admit(1, one(1));
    bench.admit(2, one(2));
    bench.admit(3, LaneKeys::Two { lanes: [1, 2], group: 9 });
    bench.admit(4, one(2));
    bench.admit(5, one(3));
    let sent = bench.send();
    assert_eq!(sent.iter().map(|(_, id)| *id).collect::<Vec<_>>(), [1, 2, 5]);
    let gone = bench.lanes.evict(sent[0].0);
    let ids: Vec<u128> = gone.iter().map(|slot| slot.message.id.as_u128()).collect();
    assert_eq!(ids, [1, 3, 4], "by admission");
    bench.lanes.confirmed(sent[1].0, bench.now);
    bench.admit(6, one(1));
    bench.admit(7, one(2));
    assert_eq!(bench.ids(), [6, 7]);
}

#[test]
fn a_barrier_behind_an_evicted_message_takes_all_behind_it_along() {
    let one = |lane| LaneKeys::One { lane, group: Some(9) };
    let mut bench = Bench::new();
    bench.admit(1, one(1));
    bench.admit(2, one(2));
    bench.admit(3, LaneKeys::Barrier { group: 9 });
    bench.admit(4, one(3));
    let sent = bench.send();
    let gone = bench.lanes.evict(sent[0].0);
    assert_eq!(gone.iter().map(|slot| slot.message.id.as_u128()).collect::<Vec<_>>(), [1, 3, 4]);
    bench.lanes.confirmed(sent[1].0, bench.now);
    bench.admit(5, LaneKeys::Barrier { group: 9 });
    assert_eq!(bench.ids(), [5]);
}

#[test]
fn suspects_go_alone_and_the_largest_first() {
    let mut bench = Bench::new();
    for id in 1..=3 {
        bench.admit(id, LaneKeys::Free);
    }
    let sent = bench.send();
    sent.iter().for_each(|(ticket, _)| bench.lanes.suspect(*ticket));
    let alone = bench.send();
    assert_eq!(alone.len(), 1);
    assert!(bench.lanes.is_accused(alone[0].0));
    bench.lanes.confirmed(alone[0].0, bench.now);
    let alone = bench.send();
    assert_eq!(alone.len(), 1);
    bench.lanes.acquit();
    assert_eq!(bench.lanes.evict(alone[0].0).len(), 1);
    assert_eq!(bench.send().len(), 1, "the rest continues");
}

#[test]
fn one_key_waits_for_its_confirm_and_others_do_not() {
    let mut bench = Bench::new();
    bench.admit(1, one(7));
    bench.admit(2, one(7));
    bench.admit(3, one(8));
    let sent = bench.send();
    assert_eq!(sent.iter().map(|s| s.1).collect::<Vec<_>>(), [1, 3]);
    bench.lanes.confirmed(sent[0].0, bench.now);
    assert_eq!(bench.ids(), [2]);
}

#[test]
fn a_nacked_message_holds_back_its_lane_and_new_messages_of_its_destination() {
    let mut bench = Bench::new();
    bench.admit(1, one(7));
    bench.admit(2, one(7));
    bench.admit(3, one(8));
    let sent = bench.send();
    bench.lanes.confirmed(sent[1].0, bench.now);
    bench.lanes.nacked(sent[0].0, bench.now);
    bench.admit(4, one(8));
    bench.admit_to("other", 5, one(9));
    assert_eq!(bench.ids(), [5], "another destination");
    let wake = bench.lanes.wake_at().expect("a retry is due");
    assert!(wake > bench.now && wake <= bench.now + WAIT_LIMIT);
    bench.now = wake;
    let probe = bench.send();
    assert_eq!(probe.iter().map(|sent| sent.1).collect::<Vec<_>>(), [4], "it has no copy yet");
    bench.lanes.confirmed(probe[0].0, bench.now);
    bench.now = bench.lanes.wake_at().expect("the other one is due");
    assert_eq!(bench.ids(), [1], "the nacked message, not its successor");
}

#[test]
fn a_key_change_waits_for_both_keys_and_both_wait_for_it() {
    let mut bench = Bench::new();
    bench.admit(1, row(7));
    bench.admit(2, row(8));
    bench.admit(3, LaneKeys::Two { lanes: [7, 8], group: 1 });
    bench.admit(4, row(7));
    bench.admit(5, row(8));
    let sent = bench.send();
    assert_eq!(sent.len(), 2);
    bench.lanes.confirmed(sent[0].0, bench.now);
    assert!(bench.send().is_empty(), "the old key is free, the new one is not");
    bench.lanes.confirmed(sent[1].0, bench.now);
    let change = bench.send();
    assert_eq!(change.len(), 1);
    assert_eq!(change[0].1, 3);
    bench.lanes.confirmed(change[0].0, bench.now);
    assert_eq!(bench.ids(), [4, 5]);
}

#[test]
fn a_truncate_is_a_barrier_for_its_table_only() {
    let mut bench = Bench::new();
    bench.admit(1, row(7));
    bench.admit(2, LaneKeys::Barrier { group: 1 });
    bench.admit(3, row(8));
    bench.admit(4, one(9));
    let sent = bench.send();
    assert_eq!(sent.iter().map(|s| s.1).collect::<Vec<_>>(), [1, 4]);
    bench.lanes.confirmed(sent[0].0, bench.now);
    let barrier = bench.send();
    assert_eq!(barrier[0].1, 2);
    assert!(bench.send().is_empty());
    bench.lanes.confirmed(barrier[0].0, bench.now);
    assert_eq!(bench.ids(), [3]);
}

#[test]
fn a_held_route_is_probed_by_its_first_message_and_others_go_on() {
    let mut bench = Bench::new();
    bench.admit_on(0, 1, one(1));
    bench.admit_on(0, 2, one(2));
    let sent = bench.send();
    assert!(bench.lanes.hold(sent[0].0, "no queue".into(), bench.now));
    assert!(!bench.lanes.hold(sent[1].0, "no queue".into(), bench.now), "held already");
    bench.admit_on(0, 3, one(3));
    bench.admit_on(1, 4, one(4));
    assert_eq!(bench.ids(), [4]);
    bench.now += PROBE_FIRST;
    let probe = bench.send();
    assert_eq!(probe.len(), 1);
    assert_eq!(probe[0].1, 1);
    assert!(bench.lanes.hold(probe[0].0, "no exchange".into(), bench.now), "another reason");
    assert!(bench.send().is_empty());
    bench.now += PROBE_FIRST;
    let probe = bench.send();
    assert!(bench.lanes.confirmed(probe[0].0, bench.now).released);
    assert_eq!(bench.ids(), [2, 3]);
    assert_eq!(bench.lanes.holds().count(), 0);
}

#[derive(Debug, Clone)]
enum Outcome {
    Confirm,
    Nack,
    Hold,
}

fn keys() -> impl Strategy<Value = LaneKeys> {
    prop_oneof![
        8 => (0..4_u64).prop_map(row),
        2 => (0..4_u64, 1..4_u64)
            .prop_map(|(a, d)| LaneKeys::Two { lanes: [a, (a + d) % 4], group: 1 }),
        1 => Just(LaneKeys::Barrier { group: 1 }),
    ]
}

fn outcome() -> impl Strategy<Value = Outcome> {
    use Outcome::{Confirm, Hold, Nack};
    prop_oneof![6 => Just(Confirm), 2 => Just(Nack), 1 => Just(Hold)]
}

fn touches(keys: LaneKeys) -> Vec<u64> {
    match keys {
        LaneKeys::One { lane, .. } => vec![lane],
        LaneKeys::Two { lanes, .. } => lanes.to_vec(),
        LaneKeys::Barrier { .. } => (0..4).collect(),
        LaneKeys::Free => vec![],
    }
}

proptest! {
    #[test]
    fn every_key_is_accepted_in_order_under_any_outcomes(
        admitted in prop::collection::vec(keys(), 1..60),
        outcomes in prop::collection::vec(
            outcome(),
            0..200,
        ),
        picks in prop::collection::vec(any::<prop::sample::Index>(), 300),
    ) {
        let mut bench = Bench::new();
        for (id, keys) in admitted.iter().enumerate() {
            bench.admit(id as u128, *keys);
        }
        let mut outcomes = outcomes.into_iter();
        let mut picks = picks.into_iter().cycle();
        let mut flying: Vec<(Ticket, u128)> = Vec::new();
        let mut last: HashMap<u64, u128> = HashMap::new();
        let mut accepted = 0;
        while accepted < admitted.len() {
            flying.extend(bench.send());
            if flying.is_empty() {
                let wake = bench.lanes.wake_at();
                prop_assert!(wake.is_some(), "stuck with {} left", admitted.len() - accepted);
                bench.now = wake.unwrap().max(bench.now + Duration::from_millis(1));
                continue;
            }
            let (ticket, id) = flying.swap_remove(picks.next().unwrap().index(flying.len()));
            match outcomes.next().unwrap_or(Outcome::Confirm) {
                Outcome::Nack => { bench.lanes.nacked(ticket, bench.now); }
                Outcome::Hold => { bench.lanes.hold(ticket, "broken".into(), bench.now); }
                Outcome::Confirm => {
                    bench.lanes.confirmed(ticket, bench.now);
                    accepted += 1;
                    for lane in touches(admitted[id as usize]) {
                        let before = last.insert(lane, id);
                        prop_assert!(before < Some(id), "lane {}: {} after {:?}", lane, id, before);
                    }
                }
            }
        }
        prop_assert_eq!(bench.lanes.in_flight(), 0);
        prop_assert_eq!(bench.lanes.wake_at(), None);
    }
}

#[test]
fn a_probe_that_was_on_a_closed_channel_is_sent_again_and_the_route_probed_on() {
    let mut bench = Bench::new();
    bench.admit(1, LaneKeys::Free);
    let first = bench.send()[0].0;
    bench.lanes.hold(first, "no queue".into(), bench.now);
    bench.now += PROBE_FIRST;
    let probe = bench.send()[0].0;
    // Another message made the broker close the channel that the probe was on.
    bench.lanes.suspect(probe);
    let alone = bench.send();
    assert_eq!(alone.len(), 1);
    assert!(bench.lanes.is_accused(alone[0].0));
    bench.lanes.hold(alone[0].0, "still no queue".into(), bench.now);
    bench.now += PROBE_FIRST;
    let probe = bench.send();
    assert_eq!(probe.len(), 1, "the route is probed again");
    bench.lanes.confirmed(probe[0].0, bench.now);
    assert_eq!(bench.lanes.holds().count(), 0);
}

#[test]
fn a_probe_that_is_lost_with_that_of_another_route_leaves_its_route_held_for_its_own_reason() {
    let mut bench = Bench::new();
    bench.admit_on(0, 1, one(1));
    let sent = bench.send()[0].0;
    assert!(bench.lanes.hold(sent, "no queue".into(), bench.now));
    bench.now += PROBE_FIRST;
    let probe = bench.send()[0].0;
    bench.lanes.probe_again(probe, bench.now);
    assert!(bench.send().is_empty(), "it waits as after any probe");
    let reasons: Vec<&str> = bench.lanes.holds().map(|(_, hold)| &*hold.reason).collect();
    assert_eq!(reasons, ["no queue"]);
    bench.now += PROBE_FIRST;
    assert_eq!(bench.send().len(), 1);
}

#[test]
fn a_reload_behind_a_truncate_is_evicted_in_one_pass() {
    let mut bench = Bench::new();
    bench.admit(0, row(1));
    bench.admit(1, LaneKeys::Barrier { group: 1 });
    // Each of them once is a part of a second; each of them for each is many minutes.
    let reload = 80_000;
    (0..reload).for_each(|n| bench.admit(2 + n, row(2 + n as u64)));
    let sent = bench.send();
    let (done, result) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(bench.lanes.evict(sent[0].0)));
    let gone = result.recv_timeout(Duration::from_secs(120)).expect("the eviction comes to an end");
    assert_eq!(gone.len() as u128, 2 + reload);
}

/// A destination that comes back `outage` after its route was held; each answer takes `answer`.
/// Returns when the route continues, and how many probes that took.
fn continues_after(outage: Duration, answer: Duration) -> (Duration, u32) {
    let mut bench = Bench::new();
    let begin = bench.now;
    bench.admit(1, LaneKeys::Free);
    let mut out = bench.send()[0].0;
    bench.lanes.hold(out, "no queue".into(), begin);
    for probes in 1.. {
        bench.now = bench.lanes.wake_at().expect("a probe is due");
        out = bench.send()[0].0;
        let works = bench.now >= begin + outage;
        bench.now += answer;
        if works {
            assert!(bench.lanes.confirmed(out, bench.now).released, "the hold ends");
            return (bench.now - begin, probes);
        }
        bench.lanes.hold(out, "still no queue".into(), bench.now);
    }
    unreachable!("the loop ends by itself")
}

#[test]
fn a_held_route_goes_on_within_a_third_of_the_outage_and_five_seconds() {
    let answer = Duration::from_millis(10);
    for milliseconds in (0..120_000).step_by(37) {
        let outage = Duration::from_millis(milliseconds);
        let (at, probes) = continues_after(outage, answer);
        let late = at - outage;
        assert!(late <= outage / 3 + PROBE_FIRST + answer, "{late:?} after {outage:?}");
        assert!(late <= PROBE_LIMIT + answer, "{late:?} after {outage:?}");
        // Each probe may cost a channel: few at first, then one in some seconds.
        assert!(probes <= 24 + u32::try_from(milliseconds / 4_000).unwrap(), "{probes}");
    }
}

/// Two held routes share a channel. The first one's answer is quick and closes it; the second one's
/// takes long, and is lost when the channel closes.
#[test]
fn a_probe_that_closes_the_channel_does_not_keep_another_route_from_its_answer() {
    for (quick, slow) in [(0, 1), (1, 0)] {
        let (answer, confirm) = (Duration::from_millis(2), Duration::from_millis(900));
        let mut bench = Bench::new();
        bench.admit_on(quick, 1, one(1));
        bench.admit_on(slow, 2, one(2));
        for (ticket, _) in bench.send() {
            bench.lanes.hold(ticket, "closed".into(), bench.now);
        }
        let end = bench.now + Duration::from_secs(60);
        let mut out: Vec<(Ticket, u128, Instant)> = Vec::new();
        while bench.lanes.holds().count() == 2 {
            assert!(bench.now < end, "route {slow} never gets its answer");
            let due = |id| if id == 1 { answer } else { confirm };
            let now = bench.now;
            out.extend(bench.send().into_iter().map(|(ticket, id)| (ticket, id, now + due(id))));
            let next = out.iter().map(|(.., at)| *at).chain(bench.lanes.wake_at()).min();
            bench.now = next.expect("something happens");
            let landed = out.iter().filter(|(.., at)| *at <= bench.now).map(|(_, id, _)| *id);
            match landed.min() {
                Some(1) => {
                    for (ticket, ..) in out.drain(..) {
                        bench.lanes.hold(ticket, "closed".into(), bench.now);
                    }
                }
                Some(_) => {
                    let at = out.iter().position(|(_, id, _)| *id == 2).expect("it landed");
                    let ticket = out.remove(at).0;
                    assert!(bench.lanes.confirmed(ticket, bench.now).released, "the hold ends");
                }
                None => {}
            }
        }
        assert!(bench.lanes.holds().all(|(route, _)| route.0 == quick));
    }
}

#[test]
fn a_route_is_not_held_without_a_message_when_nothing_is_wrong_any_more() {
    let mut bench = Bench::new();
    for route in [0, 1] {
        bench.lanes.hold_route(RouteId(route), "no permission".into(), false, bench.now);
    }
    bench.admit_on(1, 1, one(1));
    assert!(bench.send().is_empty(), "it waits for its turn as a probe");
    assert!(bench.lanes.end_idle_hold(RouteId(0)));
    assert!(!bench.lanes.end_idle_hold(RouteId(1)), "its message probes");
    assert_eq!(bench.lanes.holds().map(|(route, _)| route.0).collect::<Vec<_>>(), [1]);
    assert!(!bench.lanes.end_idle_hold(RouteId(2)), "it was not held");
}
