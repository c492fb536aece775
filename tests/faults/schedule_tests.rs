//! The soak's schedule and its checkers: each is shown a log that was tampered with.

use std::time::Duration;

use crate::support::schedule::{Duplicates, Fault, Step, WEIGHTS, growth, last_life, schedule};

#[test]
fn a_seed_brings_the_same_schedule_and_another_seed_another() {
    let interval = Duration::from_secs(20);
    let make = |seed| schedule(seed, 600, interval);
    assert_eq!(make(7), make(7));
    assert_ne!(make(7), make(8));
    assert_eq!(make(7).len(), 29);
    assert_eq!(make(7)[0].at, interval);
}

#[test]
fn every_kind_of_fault_is_drawn() {
    let many = schedule(1, 100_000, Duration::from_secs(20));
    let kinds: std::collections::HashSet<_> =
        many.iter().map(|step| std::mem::discriminant(&step.fault)).collect();
    assert_eq!(kinds.len(), WEIGHTS.len());
}

#[test]
fn duplicates_are_allowed_within_a_fault_only() {
    let mut log = Duplicates::default();
    log.begins("a", 0);
    log.recovered(10);
    log.begins("b", 10);
    log.recovered(14);
    assert_eq!((log.wrong.len(), log.most()), (0, 10));
    log.begins("c", 15);
    assert_eq!(log.wrong, ["1 duplicates without a fault, before c"]);
    log.recovered(26);
    assert_eq!((log.wrong.len(), log.most()), (1, 11));
}

#[test]
fn growth_is_seen_and_noise_is_not() {
    let each_second = |sample: fn(u64) -> u64| {
        (0..300).map(|n| (n as f64, sample(n))).collect::<Vec<(f64, u64)>>()
    };
    assert_eq!(growth(&[]), 0.0);
    assert_eq!(growth(&[(1.0, 7)]), 0.0);
    assert!((growth(&each_second(|n| 1000 + n)) - 600.0).abs() < 1e-6);
    let noise = growth(&each_second(|n| 1000 + n * 7919 % 100));
    assert!(noise.abs() < 20.0, "{noise}");
}

#[test]
fn one_process_lives_through_the_later_part() {
    for seed in 0..50 {
        let steps = schedule(seed, 600, Duration::from_secs(20));
        let killed = |step: &&Step| step.fault == Fault::KillRelay;
        assert!(steps.iter().filter(killed).all(|step| step.at < last_life(600)));
    }
}
