//! What a route does with the events of one table, decided once for each description of it. Pure.
//!
//! Invariant: a plan is made of a route and a description and of nothing else, so the hot path
//! only looks up what was decided: which columns make the key, whether the stream carries it,
//! where the hashes of its lanes begin, and the texts that are the same for every event.

mod asked;

use std::collections::HashMap;
use std::sync::Arc;

use xxhash_rust::xxh64::Xxh64;

use super::database_secret::DatabaseSecret;
use super::lanes::{self, LaneKeys};
use super::promise::{self, PlanRules};
use super::schemas::{SchemaChange, Schemas};
use super::texts::Texts;
use super::{
    DebeziumTable, Format, MessageIdRule, Ordering, Parsed, Policy, Route, RouteRules, Router,
    Select,
};
use crate::column;
use crate::contract::Contracts;
use crate::event::hidden::Hidden;
use crate::event::{Change, Content, Event, Op, Table};
use crate::message::{OwnHeaders, RouteId, route_hash};
use crate::position::{Mark, Position};

/// A route's plan.
#[derive(Debug)]
pub struct Plan {
    /// The route.
    pub route: Arc<Route>,
    /// For a captured table; the outbox needs nothing.
    pub table: Option<TablePlan>,
    /// What its rules mean for this table; almost every route has none.
    pub(super) rules: Option<Box<PlanRules>>,
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
    /// The columns that templates of the route name, with their places where they are sent.
    pub(super) shown: Box<[(String, Option<usize>)]>,
    /// Hash of route and table.
    pub(super) group: u64,
    /// Where the hashes of its rows begin.
    pub(super) hasher: Xxh64,
    /// A column of the key is hidden: the hashes must not be guessed.
    pub(super) lane_secret: Option<Arc<DatabaseSecret>>,
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
    /// By group: as what rows of the table were parked before this session.
    parked: HashMap<u64, Vec<ParkedAs>>,
    schemas: Schemas,
    /// Of the table whose rows a backfill reads, as it describes them.
    read: Rules,
}

/// What the lanes of parked rows were made of, apart from their keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParkedAs {
    /// Name of the table.
    pub table: String,
    /// Whether their hashes are keyed with the secret of the database.
    pub keyed: bool,
}

/// What is known of the captured tables where the stream resumes.
#[derive(Debug, Default)]
pub struct Resumed {
    /// Names of the key's columns of each table, by OID, as it was described there.
    pub keys: HashMap<u32, Vec<String>>,
    /// Names of the captured tables in the configuration, by OID.
    pub names: HashMap<u32, Arc<str>>,
    /// By [`LaneKeys`] group: as what rows of the table are parked.
    pub parked: HashMap<u64, Vec<ParkedAs>>,
    /// What routes are agreed with.
    pub schemas: Schemas,
}

impl std::fmt::Debug for TablePlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let table = &self.table.full_name;
        f.debug_struct("TablePlan").field("table", table).field("key", &self.key).finish()
    }
}

impl Plan {
    /// The plan of a route without rules, for the outbox or for a captured table.
    pub fn new(route: Arc<Route>, table: Option<&Arc<Table>>) -> Self {
        let table = table.map(|table| TablePlan::new(&route, table.clone()));
        Self { route, table, rules: None }
    }

    fn of_outbox(route: Arc<Route>) -> Self {
        let rules = promise::of_outbox(&route);
        Self { route, table: None, rules }
    }

    /// The plan of a route for a captured table, and for a row of it that was stored when `hidden`
    /// says so.
    fn of_table(route: Arc<Route>, table: &Arc<Table>, at: &At<'_>) -> Self {
        let mut plan = TablePlan::new(&route, table.clone());
        let rules = promise::rules(&route, &mut plan, at);
        Self { route, table: Some(plan), rules }
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

/// What a plan is made with, in addition to route and description.
#[derive(Clone, Copy)]
pub(super) struct At<'a> {
    pub(super) schemas: &'a Schemas,
    /// Where the events stand that it is made for.
    pub(super) mark: Mark,
    /// The event was stored, with these values hidden.
    pub(super) stored: Option<&'a Hidden>,
    /// The events are rows that a backfill has read.
    pub(super) is_read: bool,
}

impl Plan {
    /// Whether there are messages of the event, by format and filter.
    fn sends(&self, event: &Event) -> bool {
        let skips = self.table.as_ref().is_some_and(|table| table.skips(event.op()));
        !skips && self.passes(event)
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
        let covers = table.identity.covers(&key);
        Self::with_key(route, table, key, covers)
    }

    /// With these columns as its key, which an old row has or has not.
    pub(super) fn with_key(
        route: &Route,
        table: Arc<Table>,
        key: Vec<usize>,
        identity_has_key: bool,
    ) -> Self {
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
        let place = |name: &String| {
            let sent_as = route.rules.map.name(name);
            (name.clone(), table.column(sent_as))
        };
        Self {
            shown: route.texts.columns.iter().map(place).collect(),
            identity_has_key,
            group: lanes::group(route.seed, &table),
            hasher,
            lane_secret: None,
            key,
            source_json,
            debezium,
            table,
        }
    }

    /// Whether its route's format has no message for changes of some kinds.
    fn skips_some(&self) -> bool {
        self.debezium.as_ref().is_some_and(|debezium| !debezium.skipped.is_empty())
    }

    /// Whether its route's format has no message for changes of this kind.
    fn skips(&self, op: Op) -> bool {
        self.debezium.as_ref().is_some_and(|debezium| debezium.skipped.contains(&op))
    }

    /// A hash of what the hashes of its lanes are made of, apart from values: the table's name,
    /// whether they are keyed, and names and types of the key's columns, because another type may
    /// have another text.
    fn lanes_hang_on(&self) -> u64 {
        let mut hasher = self.hasher.clone();
        hasher.update(&[u8::from(self.lane_secret.is_some())]);
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
        let planned = |(select, parsed): &(Select, Parsed)| {
            let Select::Outbox { aggregate_type } = select else { return None };
            let only = (aggregate_type != "*").then(|| aggregate_type.clone());
            Some((only, parsed.planned(Plan::of_outbox)))
        };
        Self { rules: router.rules.iter().filter_map(planned).collect(), barrier: false }
    }

    fn of_table(router: &Router, table: &Arc<Table>, at: &At<'_>) -> Self {
        let planned = |(select, parsed): &(Select, Parsed)| match select {
            Select::Table { name } if name == "*" || **name == *table.full_name => {
                Some((None, parsed.planned(|route| Plan::of_table(route, table, at))))
            }
            Select::Table { .. } | Select::Outbox { .. } => None,
        };
        Self { rules: router.rules.iter().filter_map(planned).collect(), barrier: false }
    }

    /// The plans of those that publish.
    fn plans(&self) -> impl Iterator<Item = &Plan> {
        self.rules.iter().filter_map(|(_, planned)| match planned {
            Planned::Publish(plan) => Some(plan),
            Planned::Drop(_) => None,
        })
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
            Planned::Publish(Plan { table: Some(table), route, .. }) if table.skips(event.op()) => {
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
        self.plans().filter_map(|plan| plan.table.as_ref()).map(TablePlan::lanes_hang_on).collect()
    }
}

impl Parsed {
    fn planned(&self, plan: impl FnOnce(Arc<Route>) -> Plan) -> Planned {
        match self {
            Parsed::Publish(route) => Planned::Publish(plan(route.clone())),
            Parsed::Drop(id) => Planned::Drop(*id),
        }
    }
}

impl Plans {
    /// Nothing is described yet.
    pub fn new(router: &Router, resumed: Resumed) -> Self {
        let Resumed { keys, names, parked, schemas } = resumed;
        let (tables, read) = (HashMap::new(), Rules { rules: Vec::new(), barrier: false });
        Self { outbox: Rules::of_outbox(router), tables, keys, names, parked, schemas, read }
    }

    /// From `position` on the table is described so. Where the lanes of its rows may be others now,
    /// by another key, another name of the table, or another text of the same values, its next
    /// event waits for all before it. Returns what is different from what was recorded last.
    pub fn describe(
        &mut self,
        router: &Router,
        table: &Arc<Table>,
        position: Position,
    ) -> Option<SchemaChange> {
        let key = key_names(table, &table.key);
        let at = At::of(&self.schemas, position.mark);
        let mut rules = Rules::of_table(router, table, &at);
        let stored = self.keys.insert(table.oid, key.clone());
        let other_key = stored.is_some_and(|stored| stored != key);
        let other_lanes = match self.tables.get(&table.oid) {
            Some(before) => before.barrier || before.lanes_hang_on() != rules.lanes_hang_on(),
            None => self.was_parked_as_another(&rules, table),
        };
        rules.barrier = other_key || other_lanes;
        let routes = rules.plans().map(|plan| &*plan.route);
        let change = promise::changed(&mut self.schemas, routes, table, position);
        self.tables.insert(table.oid, rules);
        change
    }

    /// The plan by which an event went that was decided before.
    pub fn of_route(&self, event: &Event, route: RouteId) -> Option<&Plan> {
        let rules = match &event.content {
            Content::Outbox(_) => &self.outbox,
            Content::Change(Change::Read { .. }) => &self.read,
            Content::Change(_) => self.tables.get(&event.table.oid)?,
        };
        rules.plans().find(|plan| plan.route.id == route)
    }

    /// The plan of an event that no route selects: its own key, on a route without a name, and
    /// hidden whatever one of the table's routes hides.
    pub fn unrouted(&self, router: &Router, event: &Event) -> Plan {
        let route = Arc::new(Route {
            id: RouteId(0),
            name: String::new(),
            label: "".into(),
            contracts: Contracts::default(),
            format: Format::Watership,
            ordering: Ordering::Keyed,
            message_id: MessageIdRule::Event,
            policy: Policy::default(),
            own_headers: OwnHeaders::of(""),
            texts: Texts::none(),
            key: Vec::new(),
            seed: route_hash(""),
            rules: RouteRules::default(),
            version: None,
        });
        if matches!(event.content, Content::Outbox(_)) {
            return Plan::new(route, None);
        }
        let at = At::of(&self.schemas, event.position.mark);
        let routes = Rules::of_table(router, &event.table, &at);
        let routes: Vec<&Route> = routes.plans().map(|plan| &*plan.route).collect();
        let mut plan = TablePlan::new(&route, event.table.clone());
        let rules = promise::united(&route, &routes, &mut plan, &self.schemas);
        Plan { route, table: Some(plan), rules }
    }

    /// Whether the route hides a column of its key in the table with this group of lanes.
    pub fn is_keyed(&self, route: RouteId, lanes: LaneKeys) -> bool {
        let is_it = |table: &&TablePlan| lanes.group() == Some(table.group);
        let plans = self.tables.values().chain([&self.read]).flat_map(Rules::plans);
        let of_route = plans.filter(|plan| plan.route.id == route);
        let mut tables = of_route.filter_map(|plan| plan.table.as_ref()).filter(is_it);
        tables.any(|table| table.lane_secret.is_some())
    }

    /// The rows that a backfill reads next are described so. What the stream says of the table is
    /// another matter: it may be behind.
    pub fn describe_read(&mut self, router: &Router, table: &Arc<Table>, mark: Mark) {
        let at = At { is_read: true, ..At::of(&self.schemas, mark) };
        let mut rules = Rules::of_table(router, table, &at);
        rules.barrier = self.was_parked_as_another(&rules, table);
        self.read = rules;
    }

    /// Whether every route that sends a row which a backfill has read sends this change, too.
    pub fn replaces(
        &mut self,
        router: &Router,
        change: &Event,
        read: impl FnOnce() -> Event,
    ) -> bool {
        let is_picky = |plan: &Plan| plan.table.as_ref().is_some_and(TablePlan::skips_some);
        if !self.read.plans().any(|plan| is_picky(plan) || !plan.is_plain()) {
            return true;
        }
        let read = read();
        let needed = self.read.plans().filter(|plan| plan.sends(&read));
        let needed: Vec<RouteId> = needed.map(|plan| plan.route.id).collect();
        let sent = self.of_table(router, change).plans().filter(|plan| plan.sends(change));
        let sent: Vec<RouteId> = sent.map(|plan| plan.route.id).collect();
        needed.iter().all(|route| sent.contains(route))
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
                let rules = self.of_table(router, event);
                let barrier = std::mem::take(&mut rules.barrier);
                let rules = &*rules;
                rules.decide(event, barrier)
            }
        }
    }

    /// As [`Self::decide`] for one event that was stored, with these values hidden: nothing is
    /// kept, and its table's description is compared with no other. What is hidden of its key is
    /// not in its lanes, so it waits for everything before it.
    pub fn decide_alone(
        &self,
        router: &Router,
        event: &Event,
        hidden: &Hidden,
        mut each: impl FnMut(Decision<'_>),
    ) {
        match &event.content {
            Content::Outbox(_) => self.outbox.decide(event, false).for_each(each),
            Content::Change(_) => {
                let (mark, stored) = (event.position.mark, Some(hidden));
                let is_read = matches!(event.content, Content::Change(Change::Read { .. }));
                let at = At { schemas: &self.schemas, mark, stored, is_read };
                let rules = Rules::of_table(router, &event.table, &at);
                rules.decide(event, false).for_each(|decision| {
                    each(match decision {
                        Decision::Publish(plan @ Plan { table: Some(table), .. }, lanes)
                            if lanes != LaneKeys::Free && hidden.has_any(&table.key) =>
                        {
                            Decision::Publish(plan, LaneKeys::Barrier { group: table.group })
                        }
                        decision => decision,
                    });
                });
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
    fn of_table(&mut self, router: &Router, event: &Event) -> &mut Rules {
        let table = &event.table;
        if !self.tables.contains_key(&table.oid) {
            let mark = event.position.mark;
            let at = At::of(&self.schemas, mark);
            let mut rules = Rules::of_table(router, table, &at);
            rules.barrier = self.was_parked_as_another(&rules, table);
            self.tables.insert(table.oid, rules);
        }
        self.tables.get_mut(&table.oid).expect("it is there by now")
    }

    /// Rows of the table are parked in other lanes: under another name, because it was renamed and
    /// the configuration follows, or with other hashes, because a column of the key is hidden now.
    fn was_parked_as_another(&self, rules: &Rules, table: &Table) -> bool {
        if self.parked.is_empty() {
            return false;
        }
        let of_plan = |plan: &TablePlan| (plan.group, plan.lane_secret.is_some());
        let mut routes = rules.plans().filter_map(|plan| plan.table.as_ref()).map(of_plan);
        let is_another = |(group, keyed): (u64, bool)| {
            let as_before =
                |parked: &ParkedAs| *parked.table == *table.full_name && keyed == parked.keyed;
            self.parked.get(&group).is_some_and(|rows| !rows.iter().all(as_before))
        };
        // See `Self::unrouted`.
        let hidden = rules.plans().any(|plan| plan.hides(&table.key));
        is_another((lanes::group(route_hash(""), table), hidden)) || routes.any(is_another)
    }
}

fn key_names(table: &Table, key: &[usize]) -> Vec<String> {
    key.iter().map(|column| table.columns[*column].name.clone()).collect()
}
