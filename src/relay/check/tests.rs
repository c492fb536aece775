//! Table tests of the comparisons: each doubt, its name, its range and its command.

use super::position::*;
use super::resync::{ResumeFrom, plan};
use super::slot_risk::at_risk;
use crate::error::{Error, Kind, Result};
use crate::pg::publication::{Operations, Publication, PublishedTable, TableName};
use crate::pg::slot::{ServerFacts, SlotState, WalStatus};
use crate::position::{Lsn, Mark, Position};
use crate::relay::checkpoint::Checkpoint;
use crate::source::SourceKind;
use crate::verdict::{RESYNC, Verdict};

fn row() -> Checkpoint {
    Checkpoint {
        kind: SourceKind::Wal,
        position: Position { epoch: 3, mark: Mark(900), ordinal: 2, sub: 0 },
        flush_lsn: Lsn(1000),
        session_no: 7,
        slot: "s".into(),
        system_id: 42,
        timeline: 2,
        publication: "p".into(),
        publication_oid: 500,
    }
}

fn server() -> ServerFacts {
    ServerFacts {
        version_num: 180_004,
        version: "18.4".into(),
        wal_level: "logical".into(),
        max_replication_slots: 10,
        used_replication_slots: 1,
        max_wal_senders: 10,
        used_wal_senders: 0,
        in_recovery: false,
        wal_lsn: Lsn(5000),
        timeline: 2,
        system_identifier: 42,
        max_slot_wal_keep_size: None,
        idle_replication_slot_timeout: None,
        wal_sender_timeout: None,
        database: "d".into(),
        user: "u".into(),
        synchronous_standby_names: String::new(),
    }
}

fn slot() -> SlotState {
    SlotState {
        name: "s".into(),
        plugin: Some("pgoutput".into()),
        database: Some("d".into()),
        temporary: false,
        two_phase: false,
        active_client: None,
        active_pid: None,
        synchronous: Some(false),
        confirmed_flush_lsn: Some(Lsn(1000)),
        restart_lsn: Some(Lsn(800)),
        wal_status: Some(WalStatus::Reserved),
        safe_wal_size: None,
        invalidation_reason: None,
        failover: false,
        synced: false,
        decoded: 5,
        waits_for: Vec::new(),
        lag_bytes: 4000,
        retained_bytes: 4200,
    }
}

fn publication() -> Publication {
    Publication {
        oid: 500,
        altered_by: Some("700".into()),
        name: "p".into(),
        via_root: true,
        all_tables: false,
        operations: Operations { insert: true, update: true, delete: true, truncate: true },
        generated: false,
        tables: vec![table(1, "a"), table(2, "b")],
    }
}

fn table(oid: u32, name: &str) -> PublishedTable {
    let table = TableName::new("public", name);
    PublishedTable { oid, entry: Some(oid + 50), table, row_filter: None, columns: None }
}

/// The name of the verdict and its whole text.
fn told<T: std::fmt::Debug>(result: Result<T>) -> (&'static str, String) {
    let error = result.expect_err("a verdict");
    assert_eq!(error.kind(), Kind::Verdict, "{error}");
    let hint = error.hint_text().expect("what to do").to_owned();
    (error.verdict().expect("a name").name(), format!("{error} -> {hint}"))
}

#[test]
fn a_position_that_nobody_touched_is_fine() {
    assert_eq!(verify(&row(), &server(), Some(&slot()), &[]).unwrap(), Start::AsStored);
    // A crash sets the slot back; the checkpoint skips what comes again.
    let behind = SlotState { confirmed_flush_lsn: Some(Lsn(700)), ..slot() };
    assert_eq!(verify(&row(), &server(), Some(&behind), &[]).unwrap(), Start::AsStored);
    // A checkpoint at the very end of the WAL.
    let end = ServerFacts { wal_lsn: Lsn(1000), ..server() };
    assert!(verify(&row(), &end, Some(&slot()), &[]).is_ok());
}

#[test]
fn each_doubt_has_its_name_its_range_and_its_command() {
    type Change = fn(&mut Checkpoint, &mut ServerFacts, &mut Option<SlotState>);
    fn on(slot: &mut Option<SlotState>, change: impl FnOnce(&mut SlotState)) {
        change(slot.as_mut().expect("there is one"));
    }
    let cases: [(&str, &[&str], Change); 15] = [
        ("wal_level", &["\"replica\"", "ALTER SYSTEM"], |_, v, _| v.wal_level = "replica".into()),
        ("other_cluster", &["is 43, not 42", "0/3E8 and 0/1388"], |_, v, _| {
            v.system_identifier = 43;
        }),
        ("timeline_changed", &["timeline 3", "on 2"], |_, v, _| v.timeline = 3),
        ("timeline_changed", &["an older primary came back"], |_, v, _| v.timeline = 1),
        ("checkpoint_ahead", &["between 0/3E7 and 0/3E8"], |_, v, _| v.wal_lsn = Lsn(999)),
        ("slot_missing", &["\"s\"", "0/3E8 and 0/1388"], |_, _, s| *s = None),
        ("slot_unfit", &["plugin test_decoding"], |_, _, s| {
            on(s, |s| s.plugin = Some("test_decoding".into()));
        }),
        ("slot_unfit", &["database other"], |_, _, s| on(s, |s| s.database = Some("other".into()))),
        ("slot_unfit", &["two-phase true"], |_, _, s| on(s, |s| s.two_phase = true)),
        ("slot_unfit", &["temporary true"], |_, _, s| on(s, |s| s.temporary = true)),
        ("slot_lost", &["max_slot_wal_keep_size", "0/3E8 and 0/1388"], |_, _, s| {
            on(s, |s| s.wal_status = Some(WalStatus::Lost));
        }),
        ("slot_lost", &["(idle_timeout)"], |_, _, s| {
            on(s, |s| {
                s.wal_status = Some(WalStatus::Lost);
                s.invalidation_reason = Some("idle_timeout".into());
            });
        }),
        ("slot_ahead", &["is at 0/3E9", "between 0/3E8 and 0/3E9"], |_, _, s| {
            on(s, |s| s.confirmed_flush_lsn = Some(Lsn(1001)));
        }),
        ("slot_ahead", &["is at 0/7D0"], |_, _, s| {
            on(s, |s| {
                s.confirmed_flush_lsn = Some(Lsn(2000));
                s.restart_lsn = Some(Lsn(1900));
            });
        }),
        ("slot_recreated", &["WAL from 0/76C only", "between 0/3E8 and 0/7D0"], |_, _, s| {
            on(s, |s| {
                s.confirmed_flush_lsn = Some(Lsn(2000));
                s.restart_lsn = Some(Lsn(1900));
                s.decoded = 0;
            });
        }),
    ];
    for (name, texts, change) in cases {
        let (mut row, mut server, mut slot) = (row(), server(), Some(slot()));
        change(&mut row, &mut server, &mut slot);
        let (verdict, text) = told(verify(&row, &server, slot.as_ref(), &[]));
        assert_eq!(verdict, name, "{text}");
        assert!(text.starts_with(&format!("{name}: ")), "{text}");
        assert!(name == "wal_level" || text.contains("watership resync"), "{text}");
        for wanted in texts {
            assert!(text.contains(wanted), "{wanted:?} is missing from {text}");
        }
    }
}

#[test]
fn a_standby_is_waited_for_and_is_no_verdict() {
    let standby = ServerFacts { in_recovery: true, timeline: 1, ..server() };
    let error = verify(&row(), &standby, None, &[]).unwrap_err();
    assert_eq!(error.kind(), Kind::Unreachable);
}

#[test]
fn after_a_failover_a_synchronised_slot_tells_where_to_go_on() {
    let history = [(1, Lsn(100)), (2, Lsn(1500))];
    let promoted = ServerFacts { timeline: 3, ..server() };
    let at = |confirmed| SlotState {
        failover: true,
        synced: true,
        confirmed_flush_lsn: Some(Lsn(confirmed)),
        ..slot()
    };
    let start =
        |row: &Checkpoint, confirmed| match verify(row, &promoted, Some(&at(confirmed)), &history)
            .unwrap()
        {
            Start::Failover(f) => (f.timeline, f.switch.0, f.mark.0, f.ordinal, f.flush_lsn.0),
            Start::AsStored => panic!("a failover"),
        };
    // The checkpoint lies on both timelines, so it still says what is settled.
    assert_eq!(start(&row(), 800), (3, 1500, 900, 2, 1000));
    assert_eq!(start(&row(), 950), (3, 1500, 950, 0, 1000));
    // The slot's copy is newer than the row that was replayed.
    assert_eq!(start(&row(), 1400), (3, 1500, 1400, 0, 1400));
    // A checkpoint beyond the switch says nothing about this timeline.
    let beyond = Checkpoint { flush_lsn: Lsn(2000), ..row() };
    assert_eq!(start(&beyond, 800), (3, 1500, 800, 0, 800));
    let open = Checkpoint { position: Position { mark: Mark(1600), ..row().position }, ..row() };
    assert_eq!(start(&open, 800), (3, 1500, 800, 0, 800));
}

#[test]
fn a_failover_without_a_synchronised_slot_is_a_verdict() {
    let history = [(1, Lsn(100)), (2, Lsn(1500))];
    let promoted = ServerFacts { timeline: 3, ..server() };
    let copy = |failover, synced| SlotState { failover, synced, ..slot() };
    for (slot, history, text) in [
        (None, &history[..], "does not exist there"),
        (Some(copy(false, false)), &history, "was not synchronised"),
        (Some(copy(true, false)), &history, "was not synchronised"),
        (Some(copy(true, true)), &history[..1], "not among its ancestors"),
    ] {
        let (name, told) = told(verify(&row(), &promoted, slot.as_ref(), history));
        assert_eq!(name, "timeline_changed");
        assert!(told.contains(text), "{told}");
    }
    let lost = SlotState { wal_status: Some(WalStatus::Lost), ..copy(true, true) };
    assert_eq!(told(verify(&row(), &promoted, Some(&lost), &history)).0, "slot_lost");
}

#[test]
fn each_change_of_the_publication_has_its_name() {
    let wanted = ["public.a".to_owned(), "public.b".to_owned()];
    let check = |found: Option<&Publication>, wanted: &[String]| {
        verify_publication(&row(), Lsn(5000), "p", Some(&publication()), found, wanted, &[])
    };
    check(Some(&publication()), &wanted).unwrap();
    type Change = fn(&mut Publication);
    let cases: [(&str, &str, Change); 9] = [
        ("publication_recreated", "(oid 501)", |p| p.oid = 501),
        ("publication_altered", "publishes \"insert, update, delete\" instead", |p| {
            p.operations.truncate = false;
        }),
        ("publication_altered", "publish_via_partition_root is false", |p| p.via_root = false),
        ("publication_altered", "but was altered in between", |p| {
            p.altered_by = Some("701".into());
        }),
        ("publication_altered", "row filter (id > 5) instead of none", |p| {
            p.tables[0].row_filter = Some("(id > 5)".into());
        }),
        ("publication_altered", "columns id instead of all", |p| {
            p.tables[1].columns = Some(vec!["id".into()]);
        }),
        ("table_removed", "table public.b is not in publication", |p| drop(p.tables.pop())),
        ("table_removed", "put back", |p| p.tables[0].entry = Some(99)),
        ("table_recreated", "oid 9, not 1", |p| p.tables[0].oid = 9),
    ];
    for (name, text, change) in cases {
        let mut found = publication();
        change(&mut found);
        let (verdict, told) = told(check(Some(&found), &wanted));
        assert_eq!(verdict, name, "{told}");
        for text in [text, "between 0/3E8 and 0/1388", RESYNC] {
            assert!(told.contains(text), "{text:?} is missing from {told}");
        }
    }
    assert_eq!(told(check(None, &wanted)).0, "publication_missing");
    // What is not read any more may go, and what nobody read may come.
    let mut other = publication();
    other.tables = vec![table(1, "a"), table(7, "c")];
    check(Some(&other), &["public.a".to_owned(), "public.c".to_owned()]).unwrap();
    assert_eq!(facts(&publication(), &wanted[..1]).tables, [table(1, "a")]);
}

#[test]
fn a_held_table_may_come_and_go_but_not_be_narrowed_where_it_is() {
    let wanted = ["public.a".to_owned(), "public.b".to_owned()];
    let held = [TableName::new("public", "a")];
    let check = |change: fn(&mut Publication)| {
        let mut found = publication();
        change(&mut found);
        let (agreed, found) = (Some(publication()), Some(&found));
        verify_publication(&row(), Lsn(5000), "p", agreed.as_ref(), found, &wanted, &held)
    };
    check(|p| drop(p.tables.remove(0))).unwrap();
    check(|p| p.tables[0].oid = 9).unwrap();
    check(|p| p.tables[0].entry = Some(99)).unwrap();
    let narrowed = check(|p| p.tables[0].row_filter = Some("(id > 5)".into()));
    assert_eq!(told(narrowed).0, "publication_altered");
    assert_eq!(told(check(|p| drop(p.tables.pop()))).0, "table_removed", "another one");
}

#[test]
fn without_a_note_the_oid_in_the_checkpoint_is_compared() {
    let check = |oid| {
        let found = Publication { oid, ..publication() };
        verify_publication(&row(), Lsn(5000), "p", None, Some(&found), &[], &[])
    };
    check(500).unwrap();
    assert_eq!(told(check(501)).0, "publication_recreated");
}

#[test]
fn a_plan_loses_as_little_as_possible() {
    let doubt = |verdict| vec![Error::named(verdict, "x")];
    let plan = |slot: Option<&SlotState>, doubts: &[Error], asked| {
        plan(&row(), slot, &server(), doubts, asked).map(|plan| (plan.from, plan.begin))
    };
    let some = slot();
    for (verdict, from, begin) in [
        (Verdict::TableRemoved, ResumeFrom::Checkpoint, Some(1000)),
        (Verdict::PublicationAltered, ResumeFrom::Checkpoint, Some(1000)),
        (Verdict::SlotAhead, ResumeFrom::Slot, Some(1000)),
        (Verdict::CheckpointAhead, ResumeFrom::Slot, Some(1000)),
        (Verdict::TimelineChanged, ResumeFrom::Slot, Some(1000)),
        (Verdict::PublicationRecreated, ResumeFrom::Now, None),
    ] {
        let made = plan(Some(&some), &doubt(verdict), None).unwrap();
        assert_eq!(made, (from, begin.map(Lsn)), "{verdict:?}");
    }
    let mut both = doubt(Verdict::SlotAhead);
    both.extend(doubt(Verdict::PublicationRecreated));
    assert_eq!(plan(Some(&some), &both, None).unwrap().0, ResumeFrom::Now);
    assert_eq!(
        plan(None, &doubt(Verdict::TimelineChanged), None).unwrap(),
        (ResumeFrom::Now, None)
    );
    let lost = SlotState { wal_status: Some(WalStatus::Lost), ..slot() };
    assert_eq!(
        plan(Some(&lost), &doubt(Verdict::SlotLost), None).unwrap(),
        (ResumeFrom::Now, None)
    );
    // More may be given up than must be, and never less.
    let ahead = doubt(Verdict::SlotAhead);
    assert_eq!(plan(Some(&some), &ahead, Some(ResumeFrom::Now)).unwrap().0, ResumeFrom::Now);
    let error = plan(Some(&some), &ahead, Some(ResumeFrom::Checkpoint)).unwrap_err();
    assert!(error.hint_text().unwrap().contains("--from slot"), "{error:?}");
}

#[test]
fn a_plan_is_refused_where_it_would_do_harm() {
    let plan = |slot: &SlotState, verdict| {
        plan(&row(), Some(slot), &server(), &[Error::named(verdict, "x")], None).unwrap_err()
    };
    let read = SlotState { active_pid: Some(17), ..slot() };
    let busy = plan(&read, Verdict::SlotAhead);
    assert_eq!(busy.kind(), Kind::Busy);
    assert!(busy.to_string().contains("pid 17"), "{busy}");
    let missing = plan(&slot(), Verdict::PublicationMissing);
    assert!(missing.hint_text().unwrap().contains("watership init"));
    for verdict in [Verdict::SlotUnfit, Verdict::WalLevel] {
        assert_eq!(plan(&slot(), verdict).kind(), Kind::Refused);
    }
}

#[test]
fn a_slot_in_danger_is_told_before_it_is_lost() {
    let at = |status, safe| {
        let slot = SlotState { wal_status: Some(status), safe_wal_size: safe, ..slot() };
        at_risk(&slot, safe.map(|_| 400 << 20))
    };
    assert_eq!(at(WalStatus::Reserved, None), None);
    assert_eq!(at(WalStatus::Reserved, Some(100 << 20)), None);
    let raise = "or raise max_slot_wal_keep_size";
    for (status, safe, text, hint) in [
        (WalStatus::Reserved, Some((100 << 20) - 1), "after 99 MiB more", raise),
        (WalStatus::Extended, Some(1 << 20), "after 1 MiB more", raise),
        (WalStatus::Extended, Some(300 << 20), "is extended", raise),
        (WalStatus::Extended, None, "is extended", "so the disk may fill"),
        (WalStatus::Unreserved, Some(-5), "is unreserved", raise),
        (WalStatus::Lost, None, "is lost", "watership resync"),
    ] {
        let risk = at(status, safe).expect("a warning");
        assert!(risk.what.contains(text) && risk.hint.contains(hint), "{risk:?}");
    }
}
