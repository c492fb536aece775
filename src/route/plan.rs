//! What a route does with the events of one table, decided once for each description of it. Pure.
//!
//! Invariant: a plan is made of a route and a description and of nothing else, so the hot path
//! only looks up what was decided: which columns make the key, whether the stream carries it,
//! where the hashes of its lanes begin, and the texts that are the same for every event.

use std::collections::HashMap;
use std::sync::Arc;

use xxhash_rust::xxh64::Xxh64;

use super::lanes::{self, LaneKeys};
use super::{
    DebeziumTable, Format, MessageIdRule, Ordering, Parsed, Policy, Route, Router, Select, Template,
};
use crate::column;
use crate::event::{Change, Content, Event, Op, Table};
use crate::message::{ExchangeId, RouteId, route_hash};

/// A route's plan.
#[derive(Debug)]
pub struct Plan {
    /// The route.
    pub route: Arc<Route>,
    /// For a captured table; the outbox needs nothing.
    pub table: Option<TablePlan>,
}

/// What is the same for all changes of a captured table on one route.
pub struct TablePlan {
    /// The description that it was made of.
    pub table: Arc<Table>,
    /// Indexes of the columns that make the key, in column order unless the route names them.
    pub key: Vec<usize>,
    /// The old row of an update or delete has all of the key.
    pub identity_has_key: bool,
    /// `"source":{"schema":…,"table":…,"commit_lsn":` as JSON.
    pub source_json: Vec<u8>,
    /// What Debezium's format needs, on a route that has it.
    pub debezium: Option<Box<DebeziumTable>>,
    /// Hash of route and table.
    pub(super) group: u64,
    /// Where the hashes of its rows begin.
    pub(super) hasher: Xxh64,
}

/// What a rule decided for an event.
#[derive(Debug, Clone, Copy)]
pub enum Decision<'a> {
    /// Publish by this plan, in these lanes.
    Publish(&'a Plan, LaneKeys),
    /// Count it under this rule and publish nothing.
    Drop(RouteId),
}

/// What a rule does with the events that it selects.
#[derive(Debug)]
enum Planned {
    Publish(Plan),
    Drop(RouteId),
}

/// The plans of all rules for one table, or for the outbox.
#[derive(Debug)]
struct Rules {
    /// With the aggregate type, where only one is selected.
    rules: Vec<(Option<String>, Planned)>,
    /// The table's rows may stand in other lanes than before: the next event waits for all of it.
    barrier: bool,
}

/// The plans of a session.
#[derive(Debug)]
pub struct Plans {
    outbox: Rules,
    /// By OID.
    tables: HashMap<u32, Rules>,
    /// Names of the key's columns of each table, by OID, as it was described last.
    keys: HashMap<u32, Vec<String>>,
    /// Names of the captured tables in the configuration, by OID.
    names: HashMap<u32, Arc<str>>,
    /// By group: the names of the tables under which rows were parked before this session.
    parked: HashMap<u64, Vec<String>>,
    /// Of the table whose rows a backfill reads, as it describes them.
    read: Rules,
}

/// What is known of the captured tables where the stream resumes.
#[derive(Debug, Default)]
pub struct Resumed {
    /// Names of the key's columns of each table, by OID, as it was described there.
    pub keys: HashMap<u32, Vec<String>>,
    /// Names of the captured tables in the configuration, by OID.
    pub names: HashMap<u32, Arc<str>>,
    /// By [`LaneKeys`] group: the names of the tables under which rows are parked.
    pub parked: HashMap<u64, Vec<String>>,
}

impl std::fmt::Debug for TablePlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let table = &self.table.full_name;
        f.debug_struct("TablePlan").field("table", table).field("key", &self.key).finish()
    }
}

impl Plan {
    /// The plan of a route for the outbox, or for a captured table.
    pub fn new(route: Arc<Route>, table: Option<&Arc<Table>>) -> Self {
        let table = table.map(|table| TablePlan::new(&route, table.clone()));
        Self { route, table }
    }

    /// The lanes that the event's message takes.
    pub fn lanes(&self, event: &Event) -> LaneKeys {
        match (self.route.ordering, &event.content, &self.table) {
            (Ordering::Pipelined, ..) => LaneKeys::Free,
            (Ordering::Keyed, Content::Outbox(row), _) => {
                LaneKeys::One { lane: lanes::outbox_lane(self.route.seed, row), group: None }
            }
            (Ordering::Keyed, Content::Change(change), Some(table)) => table.lanes(change),
            (Ordering::Keyed, Content::Change(_), None) => {
                unreachable!("a captured table has a plan of its own")
            }
        }
    }
}

impl TablePlan {
    fn new(route: &Route, table: Arc<Table>) -> Self {
        let key: Option<Vec<usize>> = match route.key.as_slice() {
            [] => Some(table.key.clone()),
            // With one of them missing the key is not known: nothing overtakes anything.
            names => names.iter().map(|name| table.column(name)).collect::<Option<_>>(),
        };
        let key = key.unwrap_or_default();
        let hasher = lanes::table_hasher(route.seed, &table);
        let mut source_json = b"\"source\":{\"schema\":".to_vec();
        column::write_string(&mut source_json, &table.schema);
        source_json.extend_from_slice(b",\"table\":");
        column::write_string(&mut source_json, &table.name);
        source_json.extend_from_slice(b",\"commit_lsn\":");
        let debezium = match &route.format {
            Format::Debezium(debezium) => Some(Box::new(DebeziumTable::new(debezium, &table))),
            Format::Raw | Format::Watership | Format::CloudEvents(_) => None,
        };
        Self {
            identity_has_key: table.identity.covers(&key),
            group: lanes::group(route.seed, &table),
            hasher,
            key,
            source_json,
            debezium,
            table,
        }
    }

    /// Whether its route's format has no message for changes of this kind.
    fn skips(&self, op: Op) -> bool {
        self.debezium.as_ref().is_some_and(|debezium| debezium.skipped.contains(&op))
    }

    /// A hash of what the hashes of its lanes are made of, apart from values: the table's name, and
    /// names and types of the key's columns, because another type may have another text.
    fn lanes_hang_on(&self) -> u64 {
        let mut hasher = self.hasher.clone();
        for column in &self.key {
            let column = &self.table.columns[*column];
            hasher.update(&column.name_json);
            hasher.update(&column.type_oid.to_le_bytes());
            hasher.update(&column.type_modifier.to_le_bytes());
        }
        hasher.digest()
    }
}

impl Rules {
    fn of_outbox(router: &Router) -> Self {
        Self::new(router, |select| match select {
            Select::Outbox { aggregate_type } if aggregate_type == "*" => Some((None, None)),
            Select::Outbox { aggregate_type } => Some((Some(aggregate_type.clone()), None)),
            Select::Table { .. } => None,
        })
    }

    fn of_table(router: &Router, table: &Arc<Table>) -> Self {
        Self::new(router, |select| match select {
            Select::Table { name } => {
                (name == "*" || **name == *table.full_name).then_some((None, Some(table)))
            }
            Select::Outbox { .. } => None,
        })
    }

    fn new<'a>(
        router: &Router,
        selects: impl Fn(&Select) -> Option<(Option<String>, Option<&'a Arc<Table>>)>,
    ) -> Self {
        let planned = |(select, parsed): &(Select, Parsed)| {
            let (aggregate_type, table) = selects(select)?;
            let planned = match parsed {
                Parsed::Publish(route) => Planned::Publish(Plan::new(route.clone(), table)),
                Parsed::Drop(id) => Planned::Drop(*id),
            };
            Some((aggregate_type, planned))
        };
        Self { rules: router.rules.iter().filter_map(planned).collect(), barrier: false }
    }

    fn decide<'a>(
        &'a self,
        event: &'a Event,
        barrier: bool,
    ) -> impl Iterator<Item = Decision<'a>> + use<'a> {
        let selected = move |(aggregate_type, _): &&(Option<String>, Planned)| match (
            aggregate_type,
            &event.content,
        ) {
            (Some(wanted), Content::Outbox(row)) => *wanted == *row.aggregate_type,
            (Some(_), Content::Change(_)) => false,
            (None, _) => true,
        };
        self.rules.iter().filter(selected).map(move |(_, planned)| match planned {
            Planned::Publish(Plan { table: Some(table), route }) if table.skips(event.op()) => {
                Decision::Drop(route.id)
            }
            Planned::Publish(plan) => {
                let lanes = match (plan.lanes(event), &plan.table) {
                    (LaneKeys::Free, _) => LaneKeys::Free,
                    (_, Some(table)) if barrier => LaneKeys::Barrier { group: table.group },
                    (lanes, _) => lanes,
                };
                Decision::Publish(plan, lanes)
            }
            Planned::Drop(id) => Decision::Drop(*id),
        })
    }

    /// See [`TablePlan::lanes_hang_on`]; of each route.
    fn lanes_hang_on(&self) -> Vec<u64> {
        self.rules
            .iter()
            .filter_map(|(_, planned)| match planned {
                Planned::Publish(plan) => plan.table.as_ref().map(TablePlan::lanes_hang_on),
                Planned::Drop(_) => None,
            })
            .collect()
    }
}

impl Plans {
    /// Nothing is described yet.
    pub fn new(router: &Router, resumed: Resumed) -> Self {
        let Resumed { keys, names, parked } = resumed;
        let (tables, read) = (HashMap::new(), Rules { rules: Vec::new(), barrier: false });
        Self { outbox: Rules::of_outbox(router), tables, keys, names, parked, read }
    }

    /// From here on the table is described so. Where the lanes of its rows may be others now, by
    /// another key, another name of the table, or another text of the same values, its next event
    /// waits for all before it.
    pub fn describe(&mut self, router: &Router, table: &Arc<Table>) {
        let key = key_names(table, &table.key);
        let mut rules = Rules::of_table(router, table);
        let stored = self.keys.insert(table.oid, key.clone());
        let other_key = stored.is_some_and(|stored| stored != key);
        let other_lanes = match self.tables.get(&table.oid) {
            Some(before) => before.barrier || before.lanes_hang_on() != rules.lanes_hang_on(),
            None => self.was_parked_as_another(&rules, table),
        };
        rules.barrier = other_key || other_lanes;
        self.tables.insert(table.oid, rules);
    }

    /// The rows that a backfill reads next are described so. What the stream says of the table is
    /// another matter: it may be behind.
    pub fn describe_read(&mut self, router: &Router, table: &Arc<Table>) {
        let mut rules = Rules::of_table(router, table);
        rules.barrier = self.was_parked_as_another(&rules, table);
        self.read = rules;
    }

    /// Everything that is to be done with the event; empty means that no rule selects it.
    pub fn decide<'a>(
        &'a mut self,
        router: &Router,
        event: &'a Event,
    ) -> impl Iterator<Item = Decision<'a>> + use<'a> {
        match &event.content {
            Content::Outbox(_) => self.outbox.decide(event, false),
            Content::Change(Change::Read { .. }) => {
                let barrier = std::mem::take(&mut self.read.barrier);
                self.read.decide(event, barrier)
            }
            Content::Change(_) => {
                let rules = self.of_table(router, &event.table);
                let barrier = std::mem::take(&mut rules.barrier);
                let rules = &*rules;
                rules.decide(event, barrier)
            }
        }
    }

    /// As [`Self::decide`] for one event on its own, such as a parked one: nothing is
    /// kept, and its table's description is compared with no other.
    pub fn decide_alone(&self, router: &Router, event: &Event, mut each: impl FnMut(Decision<'_>)) {
        match &event.content {
            Content::Outbox(_) => self.outbox.decide(event, false).for_each(each),
            Content::Change(_) => {
                let rules = Rules::of_table(router, &event.table);
                rules.decide(event, false).for_each(&mut each);
            }
        }
    }

    /// The name by which routes know the event's table now; it may have been stored under another.
    pub fn name_as_configured(&self, event: &mut Event) {
        let name = self.names.get(&event.table.oid).filter(|name| **name != event.table.full_name);
        if let Some(name) = name {
            event.table = Arc::new(Table { full_name: name.clone(), ..Table::clone(&event.table) });
        }
    }

    /// The rules of a table. A description that is the stored one was not announced.
    fn of_table(&mut self, router: &Router, table: &Arc<Table>) -> &mut Rules {
        if !self.tables.contains_key(&table.oid) {
            let mut rules = Rules::of_table(router, table);
            rules.barrier = self.was_parked_as_another(&rules, table);
            self.tables.insert(table.oid, rules);
        }
        self.tables.get_mut(&table.oid).expect("it is there by now")
    }

    /// Rows of the table are parked under another name, and so in other lanes: it was renamed, and
    /// the configuration follows.
    fn was_parked_as_another(&self, rules: &Rules, table: &Table) -> bool {
        if self.parked.is_empty() {
            return false;
        }
        let groups = rules.rules.iter().filter_map(|(_, planned)| match planned {
            Planned::Publish(plan) => plan.table.as_ref().map(|table| table.group),
            Planned::Drop(_) => None,
        });
        let mut groups = groups.chain([lanes::group(route_hash(""), table)]);
        groups.any(|group| {
            let names = self.parked.get(&group);
            names.is_some_and(|names| names.iter().any(|name| **name != *table.full_name))
        })
    }
}

fn key_names(table: &Table, key: &[usize]) -> Vec<String> {
    key.iter().map(|column| table.columns[*column].name.clone()).collect()
}

/// The lanes of an event that no route selects, among others of its kind: its own key's.
pub fn unrouted_lanes(event: &Event) -> LaneKeys {
    unrouted(event).lanes(event)
}

/// The plan of an event that no route selects: its own key, on a route without a name.
pub fn unrouted(event: &Event) -> Plan {
    let route = Route {
        id: RouteId(0),
        name: String::new(),
        label: "".into(),
        exchange: ExchangeId(0),
        contracts: Default::default(),
        format: Format::Watership,
        ordering: Ordering::Keyed,
        message_id: MessageIdRule::Event,
        policy: Policy::default(),
        routing_key: Template::default(),
        key: Vec::new(),
        seed: route_hash(""),
    };
    let table = matches!(event.content, Content::Change(_)).then_some(&event.table);
    Plan::new(Arc::new(route), table)
}
