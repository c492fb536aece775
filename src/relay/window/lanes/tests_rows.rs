//! Rows of a captured table under descriptions that change: whatever the identity in force, two
//! changes of one row, or of one key, are never on their way together.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use uuid::Uuid;

use super::tests::{about, entry, message, now};
use super::{Lanes, Owner};
use crate::event::{Change, Column, Content, Event, Identity, OldRow, Row, Table, Value};
use crate::position::{Mark, Position};
use crate::publisher::Ticket;
use crate::route::{Action, Decision, Plans, Resumed, Router, Rule, default_rules};

/// What is in force between two ALTERs.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Logged {
    Default,
    /// USING INDEX (email), which lacks the key.
    Email,
    /// USING INDEX (id, email).
    Wide,
    Full,
    /// A partition logs its key alone, and its root is not known to log anything.
    Less,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Insert {
        id: usize,
        email: usize,
    },
    Touch(usize),
    MoveId {
        row: usize,
        id: usize,
    },
    MoveEmail {
        row: usize,
        email: usize,
    },
    Delete(usize),
    Truncate,
    Log(Logged),
    /// The key's column gets another name, or another type with another text form.
    Rename(usize),
    Retype(usize),
    RenameTable(usize),
    /// It is not known which columns the key has.
    Known(bool),
}

const IDS: usize = 4;
const EMAILS: usize = 5;
const ROWS: usize = 4;

fn steps() -> impl Strategy<Value = Step> {
    let logged = prop::sample::select(vec![
        Logged::Default,
        Logged::Email,
        Logged::Wide,
        Logged::Full,
        Logged::Less,
    ]);
    prop_oneof![
        6 => (0..IDS, 0..EMAILS).prop_map(|(id, email)| Step::Insert { id, email }),
        8 => (0..ROWS).prop_map(Step::Touch),
        4 => (0..ROWS, 0..IDS).prop_map(|(row, id)| Step::MoveId { row, id }),
        4 => (0..ROWS, 0..EMAILS).prop_map(|(row, email)| Step::MoveEmail { row, email }),
        4 => (0..ROWS).prop_map(Step::Delete),
        1 => Just(Step::Truncate),
        3 => logged.prop_map(Step::Log),
        1 => (0..2_usize).prop_map(Step::Rename),
        1 => (0..2_usize).prop_map(Step::Retype),
        1 => (0..2_usize).prop_map(Step::RenameTable),
        1 => any::<bool>().prop_map(Step::Known),
    ]
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Stored {
    /// Counts rows from their insert to their delete.
    row: usize,
    id: usize,
    email: usize,
}

/// The table as Postgres and the assembler show it.
struct Database {
    rows: Vec<Stored>,
    inserted: usize,
    logged: Logged,
    name: usize,
    kind: usize,
    table: usize,
    known: bool,
}

impl Database {
    fn table(&self) -> Arc<Table> {
        let kind = [23, 1700][self.kind];
        let columns =
            vec![Column::new(["id", "number"][self.name], kind, -1), Column::new("email", 25, -1)];
        let identity = match self.logged {
            Logged::Default => Identity::Columns(vec![0]),
            Logged::Email => Identity::Columns(vec![1]),
            Logged::Wide => Identity::Columns(vec![0, 1]),
            Logged::Full => Identity::Full,
            Logged::Less => Identity::Nothing,
        };
        Arc::new(Table {
            database: "shop".into(),
            oid: 7,
            version: 0,
            schema: "public".into(),
            name: ["t", "u"][self.table].into(),
            full_name: ["public.t", "public.u"][self.table].into(),
            columns,
            key: if self.known || self.logged == Logged::Default { vec![0] } else { vec![] },
            identity,
        })
    }

    fn row(&self, stored: Stored) -> Row {
        let id = format!("{}{}", stored.id, ["", ".00"][self.kind]);
        [id, format!("mail {}", stored.email)].map(|text| Value::Text(text.into())).into()
    }

    /// What is logged of a row before its change.
    fn old(&self, before: Stored, after: Option<Stored>) -> Option<OldRow> {
        let mut row = self.row(before);
        let [id, email] = match self.logged {
            Logged::Default | Logged::Less => [true, false],
            Logged::Email => [false, true],
            Logged::Wide | Logged::Full => [true, true],
        };
        let changed =
            |after: Stored| (id && after.id != before.id) || (email && after.email != before.email);
        if self.logged == Logged::Full {
            return Some(OldRow::Full(row));
        }
        for (column, there) in [id, email].into_iter().enumerate() {
            if !there {
                row[column] = Value::Null;
            }
        }
        after.is_none_or(changed).then_some(OldRow::Key(row))
    }

    /// Applies the step where it is possible; returns the change and the rows that it is about.
    fn apply(&mut self, step: Step) -> Option<(Change, Vec<Stored>)> {
        let free =
            |rows: &[Stored], id, email| !rows.iter().any(|row| row.id == id || row.email == email);
        match step {
            Step::Insert { id, email } if free(&self.rows, id, email) && self.rows.len() < ROWS => {
                self.inserted += 1;
                let stored = Stored { row: self.inserted, id, email };
                self.rows.push(stored);
                return Some((Change::Insert { new: self.row(stored) }, vec![stored]));
            }
            Step::Touch(row) => return self.update(row, |_| ()),
            Step::MoveId { row, id } if !self.rows.iter().any(|row| row.id == id) => {
                return self.update(row, |stored| stored.id = id);
            }
            Step::MoveEmail { row, email } if !self.rows.iter().any(|row| row.email == email) => {
                return self.update(row, |stored| stored.email = email);
            }
            Step::Delete(row) if row < self.rows.len() => {
                let stored = self.rows.remove(row);
                let old = self.old(stored, None).expect("a delete has an old row");
                return Some((Change::Delete { old }, vec![stored]));
            }
            Step::Truncate => return Some((Change::Truncate, std::mem::take(&mut self.rows))),
            Step::Log(logged) => self.logged = logged,
            Step::Rename(name) => self.name = name,
            Step::Retype(kind) => self.kind = kind,
            Step::RenameTable(table) => self.table = table,
            Step::Known(known) => self.known = known,
            Step::Insert { .. }
            | Step::MoveId { .. }
            | Step::MoveEmail { .. }
            | Step::Delete(_) => {}
        }
        None
    }

    fn update(
        &mut self,
        row: usize,
        change: impl FnOnce(&mut Stored),
    ) -> Option<(Change, Vec<Stored>)> {
        let before = *self.rows.get(row)?;
        change(&mut self.rows[row]);
        let after = self.rows[row];
        let old = self.old(before, Some(after));
        Some((Change::Update { old, new: self.row(after) }, vec![before, after]))
    }
}

/// A route whose key is the primary key, or these columns.
fn rule(key: &[&str]) -> Rule {
    let mut rule = default_rules().remove(1);
    let Action::Publish { key: columns, .. } = &mut rule.action else { unreachable!() };
    *columns = key.iter().map(|name| (*name).to_owned()).collect();
    rule
}

/// What two messages must not have in common: the row, and the route's key.
type Subject = (&'static str, usize);

fn subjects(rows: &[Stored], key: &[&str]) -> BTreeSet<Subject> {
    let subject = |stored: &Stored| match key {
        [] => [("row", stored.row), ("key", stored.id)],
        _ => [("row", stored.row), ("key", stored.email)],
    };
    rows.iter().flat_map(subject).collect()
}

/// Sends and settles; checks what is on its way together, and in which order it went first.
struct Watch {
    lanes: Lanes,
    subjects: Vec<BTreeSet<Subject>>,
    flying: Vec<(Ticket, usize)>,
    last: HashMap<Subject, usize>,
    sent: BTreeSet<usize>,
    now: Instant,
}

impl Watch {
    fn send(&mut self) -> Result<(), TestCaseError> {
        while let Some((ticket, slot)) = self.lanes.next(self.now) {
            let number = usize::try_from(slot.message.id.as_u128()).expect("a small number");
            let own = &self.subjects[number];
            for (_, other) in &self.flying {
                let common = own.intersection(&self.subjects[*other]).next();
                prop_assert_eq!(common, None, "{} beside {}", number, other);
            }
            self.flying.push((ticket, number));
            if self.sent.insert(number) {
                for subject in own {
                    let before = self.last.insert(*subject, number);
                    prop_assert!(before < Some(number), "{number} after {before:?}");
                }
            }
        }
        Ok(())
    }

    /// One of those on their way is confirmed or refused.
    fn settle(&mut self, pick: prop::sample::Index, confirm: bool) {
        if self.flying.is_empty() {
            return;
        }
        let (ticket, _) = self.flying.swap_remove(pick.index(self.flying.len()));
        if confirm {
            self.lanes.confirmed(ticket, self.now);
        } else {
            self.lanes.nacked(ticket, self.now);
            self.now += Duration::from_millis(3);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]
    #[test]
    fn no_two_changes_of_one_row_are_on_their_way_together_under_any_identities(
        steps in prop::collection::vec(steps(), 1..120),
        settles in prop::collection::vec((any::<prop::sample::Index>(), 0..8_u8), 1..60),
        by_email in any::<bool>(),
    ) {
        let key: &[&str] = if by_email { &["email"] } else { &[] };
        let router = Router::new(&[rule(key)]).expect("a router");
        let mut plans = Plans::new(&router, Resumed::default());
        let mut described = None;
        let mut database = Database {
            rows: vec![],
            inserted: 0,
            logged: Logged::Default,
            name: 0,
            kind: 0,
            table: 0,
            known: true,
        };
        let mut watch = Watch {
            lanes: Lanes::new(),
            subjects: vec![],
            flying: vec![],
            last: HashMap::new(),
            sent: BTreeSet::new(),
            now: now(),
        };
        let mut settles = settles.into_iter().cycle();
        for (number, step) in steps.into_iter().enumerate() {
            let Some((change, rows)) = database.apply(step) else { continue };
            let event = event(number, database.table(), change);
            if described.as_ref() != Some(&event.table) {
                plans.describe(&router, &event.table, event.position);
                described = Some(event.table.clone());
            }
            let Some(Decision::Publish(_, keys)) = plans.decide(&router, &event).next() else {
                panic!("it is published")
            };
            let number = watch.subjects.len();
            watch.subjects.push(subjects(&rows, key));
            let message = message(number as u128, 0);
            watch.lanes.admit(message, about(), keys, Owner::Window(entry()), watch.now);
            watch.send()?;
            let (pick, what) = settles.next().expect("it cycles");
            if what < 3 {
                watch.settle(pick, what < 2);
            }
        }
        while watch.sent.len() < watch.subjects.len() || !watch.flying.is_empty() {
            watch.now += Duration::from_secs(1);
            watch.send()?;
            watch.settle(settles.next().expect("it cycles").0, true);
        }
    }
}

fn event(number: usize, table: Arc<Table>, change: Change) -> Event {
    let position = Position { epoch: 1, mark: Mark(number as u64), ordinal: 1, sub: 0 };
    Event {
        id: Uuid::from_u128(number as u128),
        position,
        lsn: None,
        occurred_at_us: 0,
        committed_at_us: 0,
        xid: 1,
        table,
        content: Content::Change(change),
    }
}
