//! The runs: each a world with its faults, over many seeds.

use super::*;

fn crashing() -> Faults {
    Faults { crash_within: Duration::from_millis(600), crashes: 6, ..Faults::default() }
}

#[test]
fn without_a_fault_every_event_arrives_once_and_in_order() {
    let total = seeds(100, Faults::default(), Ordering::Keyed);
    assert_eq!(total.duplicates, 0);
}

#[test]
fn a_crash_at_any_moment_loses_nothing_and_repeats_only_what_no_checkpoint_covered() {
    let total = seeds(300, crashing(), Ordering::Keyed);
    assert!(total.duplicates > 0, "the crashes must hurt, or they test nothing");
    let per_session = total.allowed / total.sessions as usize;
    assert!(per_session <= WINDOW.events * 2, "{per_session} uncovered events at a fault");
}

#[test]
fn selective_nacks_do_not_reorder_a_key() {
    let total = seeds(200, Faults { nack: 0.1, ..Faults::default() }, Ordering::Keyed);
    assert_eq!(total.duplicates, 0);
}

#[test]
fn a_lost_confirm_ends_the_session_and_nothing_is_lost() {
    let faults = Faults { confirm_lost: 0.005, ..Faults::default() };
    let total = seeds(200, faults, Ordering::Keyed);
    assert!(total.sessions > total.runs);
}

fn broker_lost() -> Faults {
    Faults { cut: 0.004, confirm_lost: 0.002, ..Faults::default() }
}

#[test]
fn after_the_broker_was_lost_only_what_had_no_confirm_is_sent_again() {
    let total = seeds(300, broker_lost(), Ordering::Keyed);
    assert!(total.duplicates > 0 && total.remembered > 0, "{total:?}");
    // Without a memory each loss would cost what was confirmed beyond the settled prefix, too.
    assert!(total.remembered > total.allowed, "{total:?}");
}

#[test]
fn a_checkpoint_that_takes_too_long_does_not_hold_up_the_end_of_the_session() {
    let faults = Faults { slow_store: true, ..broker_lost() };
    let total = seeds(100, faults, Ordering::Keyed);
    assert!(total.broker_lost > 0 && total.remembered > 0, "{total:?}");
}

#[test]
fn what_is_remembered_is_forgotten_when_another_relay_had_the_checkpoint() {
    let crash_within = Duration::from_millis(300);
    let faults = Faults { takeover: 0.5, crash_within, ..broker_lost() };
    let total = seeds(300, faults, Ordering::Keyed);
    assert!(total.broker_lost > total.runs && total.remembered > 0, "{total:?}");
}

#[test]
fn what_is_remembered_is_forgotten_in_a_new_epoch() {
    let faults = Faults { resync: 0.5, ..broker_lost() };
    let total = seeds(300, faults, Ordering::Keyed);
    assert!(total.broker_lost > total.runs && total.remembered > 0, "{total:?}");
}

#[test]
fn a_checkpoint_that_is_restored_under_a_relay_is_a_verdict_and_nothing_is_lost() {
    let faults = Faults { restore: 0.5, ..broker_lost() };
    let total = seeds(300, faults, Ordering::Keyed);
    assert!(total.went_back > total.runs / 2, "{total:?}");
}

#[test]
fn parking_survives_the_loss_of_the_broker() {
    let poison = Faults { poison: 0.01, nack: 0.02, ..broker_lost() };
    let unroutable = Faults { unroutable: 0.01, nack: 0.02, ..broker_lost() };
    for faults in [poison, unroutable] {
        let total = seeds(150, faults, Ordering::Keyed);
        assert!(total.broker_lost > total.runs && total.remembered > 0, "{total:?}");
    }
}

#[test]
fn an_unbound_queue_holds_the_route_and_it_resumes_by_itself() {
    let faults = Faults { unbound: 0.003, ..Faults::default() };
    let total = seeds(200, faults, Ordering::Keyed);
    assert_eq!((total.duplicates, total.sessions), (0, total.runs));
}

#[test]
fn all_faults_together() {
    let faults = Faults {
        nack: 0.05,
        confirm_lost: 0.002,
        cut: 0.003,
        unbound: 0.001,
        poison: 0.005,
        takeover: 0.1,
        captured: 0.5,
        gone: 0.001,
        ..crashing()
    };
    seeds(150, faults, Ordering::Keyed);
}

/// Rows inserted, updated, given other keys, deleted and truncated, in tables of every identity.
fn captured() -> Faults {
    Faults { captured: 0.8, ..Faults::default() }
}

#[test]
fn changes_of_captured_tables_keep_their_order_and_their_ids() {
    let total = seeds(50, captured(), Ordering::Keyed);
    assert_eq!((total.duplicates, total.sessions), (0, total.runs));
    let faults = Faults { nack: 0.05, cut: 0.004, ..captured() };
    let total = seeds(80, faults, Ordering::Keyed);
    assert!(total.broker_lost > total.runs && total.remembered > 0, "{total:?}");
}

#[test]
fn a_crash_repeats_changes_of_captured_tables_under_the_same_ids() {
    let faults = Faults { captured: 0.8, ..crashing() };
    let total = seeds(80, faults, Ordering::Keyed);
    assert!(total.duplicates > 0, "{total:?}");
}

#[test]
fn an_exchange_that_is_away_or_refused_holds_its_routes_and_nothing_is_lost() {
    let faults = Faults { gone: 0.003, nack: 0.02, ..captured() };
    let total = seeds(60, faults, Ordering::Keyed);
    assert_eq!(total.sessions, total.runs);
    assert!(total.closed_on > 0, "confirms are lost with their channel: {total:?}");
}

#[test]
fn a_limit_that_the_broker_does_not_announce_is_learnt_and_only_large_messages_are_parked() {
    let faults = Faults { poison: 0.01, unannounced: true, ..captured() };
    let total = seeds(60, faults, Ordering::Keyed);
    assert!(total.sessions > total.runs, "somebody raises the limit: {total:?}");
}

#[test]
fn parked_rows_are_tried_again_under_load_and_keep_their_order() {
    let faults = Faults { poison: 0.02, nack: 0.05, gone: 0.001, ..captured() };
    seeds(40, Faults { unroutable: 0.01, ..faults }, Ordering::Keyed);
    seeds(40, Faults { cut: 0.003, confirm_lost: 0.002, ..faults }, Ordering::Keyed);
}

#[test]
fn after_a_failover_what_the_standby_did_not_have_is_forgotten_and_the_rest_arrives() {
    let faults = Faults { failover: 0.7, cut: 0.006, poison: 0.005, ..captured() };
    let total = seeds(60, faults, Ordering::Keyed);
    assert!(total.failovers > total.runs && total.phantoms > 0, "{total:?}");
}

#[test]
fn a_pipelined_route_keeps_order_while_there_is_no_nack() {
    let faults = Faults { cut: 0.003, ..crashing() };
    seeds(100, faults, Ordering::Pipelined);
}

#[test]
fn the_checker_sees_how_nacks_reorder_a_pipelined_route() {
    let faults = Faults { nack: 0.1, ..Faults::default() };
    let reordered = |seed: &u64| {
        let mut run = finished(*seed, faults, Ordering::Pipelined);
        run.check(false);
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run.check(true))).is_err()
    };
    assert_eq!((0..5).filter(reordered).count(), 5);
}

#[test]
fn poison_is_parked_and_its_key_stays_in_order_through_retries() {
    let total = seeds(200, Faults { poison: 0.01, ..Faults::default() }, Ordering::Keyed);
    assert_eq!((total.duplicates, total.sessions), (0, total.runs));
}

#[test]
fn parking_survives_crashes_at_any_moment() {
    seeds(300, Faults { poison: 0.01, ..crashing() }, Ordering::Keyed);
}

#[test]
fn unroutable_messages_are_parked_with_all_that_follow_them() {
    let faults = Faults { unroutable: 0.01, nack: 0.02, ..crashing() };
    seeds(300, faults, Ordering::Keyed);
}

#[test]
fn shutdown_drains_the_window_and_leaves_nothing_to_repeat() {
    paused(async {
        let world = World::new(5, EVENTS, KEYS, Faults::default());
        let store = MemoryStore::default();
        let start = Position { epoch: 1, mark: Mark(1000), ..Position::default() };
        let rules = default_rules();
        let label = RouteLabel { name: "outbox".into(), owner: String::new() };
        let parts = RelayParts {
            source: SimSource::new(&world, &store, start, Lsn(1000)),
            publisher: SimPublisher::new(&world),
            store: store.clone(),
            progress: Progress::new(start, Mark(1000)),
            parking: Parking::default(),
            router: Arc::new(Router::new(&rules).unwrap()),
            plans: Plans::new(
                &Router::new(&rules).unwrap(),
                Resumed { keys: store.keys(), ..Resumed::default() },
            ),
            metrics: Arc::new(Metrics::new(&[label])),
            status: Status::new("sim", Vec::new()),
            canary: Canary::new(Duration::ZERO),
            broken: Vec::new(),
            missing: Default::default(),
            published: Default::default(),
            recently_parked: Default::default(),
            remembered: Default::default(),
            backfill: Backfill::none(),
        };
        let tuning = TUNING;
        let mut relay = Relay::new(parts, "sim", &tuning);
        let (stop, shutdown) = watch::channel(false);
        let asked = async {
            sleep(Duration::from_millis(150)).await;
            stop.send(true).unwrap();
            std::future::pending::<()>().await;
        };
        tokio::select! { result = relay.run(shutdown) => result.unwrap(), () = asked => {} }
        let (position, flush) = *store.rows.lock().unwrap().last().expect("a checkpoint");
        let world = world.borrow();
        assert!(!world.arrived.is_empty());
        assert_eq!(world.uncovered(position), 0, "all that arrived is covered");
        assert_eq!(world.slot, flush.lsn(), "the source was told");
    });
}
