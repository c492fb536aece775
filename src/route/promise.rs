//! What the rules of a route mean for a table as it is described now, and whether the table still
//! has what the route promised. Pure.
//!
//! A promise is what the route sends of the description that it is agreed with. A description from
//! before the agreement breaks no promise: it was agreed to with all that came in between.

use std::borrow::Cow;
use std::sync::Arc;

use uuid::Uuid;

use super::agreed;
use super::columns::{self, Deciding, Projection};
use super::description::{DescribedColumn, Description, Difference};
use super::filter::Bound;
use super::plan::{At, Plan, TablePlan};
use super::rules::{Map, OnDrift};
use super::schemas::{Agreement, SchemaChange, Schemas};
use super::{Format, Route};
use crate::column::debezium::Writer;
use crate::event::hidden::{Hidden, Hide};
use crate::event::{Event, Table};
use crate::position::{Mark, Position};

/// What a route's rules mean for one table.
pub(super) struct PlanRules {
    /// With the plan of what is sent.
    columns: Option<(Projection, Plan)>,
    drift: Option<Drift>,
    filter: Option<Bound>,
}

/// A table lacks what a route promised, and the route does not want it published so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drift {
    /// Never [`OnDrift::Pass`].
    pub policy: OnDrift,
    /// What is different.
    pub what: String,
}

impl<'a> At<'a> {
    /// Of live changes from `mark` on.
    pub(super) fn of(schemas: &'a Schemas, mark: Mark) -> Self {
        Self { schemas, mark, stored: None, is_read: false }
    }
}

impl std::fmt::Debug for PlanRules {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let hidden = self.columns.as_ref().map(|(columns, _)| &columns.hidden);
        f.debug_struct("PlanRules").field("hidden", &hidden).field("drift", &self.drift).finish()
    }
}

/// The rules of a route for the table of `plan`; absent where they change nothing. Sees to it that
/// the lanes of a hidden key are keyed.
pub(super) fn rules(
    route: &Arc<Route>,
    plan: &mut TablePlan,
    at: &At<'_>,
) -> Option<Box<PlanRules>> {
    let no_hidden = Hidden::default();
    let hidden = at.stored.unwrap_or(&no_hidden);
    if route.rules.is_empty() && hidden.columns.is_empty() {
        return None;
    }
    let agreement = at.schemas.agreement(&route.name, &plan.table.full_name);
    let (rules, table, secret) = (&route.rules.columns, plan.table.clone(), &at.schemas.secret);
    let now = Description::of(&table);
    let agreed = at.schemas.agreed_columns(route, &table.full_name, &now);
    let hidings = columns::hidings(rules, &table, |name| agreed.contains(&name), secret, hidden);
    if plan.key.iter().any(|index| hidings[*index].is_some()) {
        plan.lane_secret = Some(secret.clone());
    }
    let changes = !route.rules.map.is_empty() || hidings.iter().any(Option::is_some);
    let columns = (changes || !rules.is_empty()).then(|| {
        let columns = Projection::new(Deciding {
            table: &table,
            key: &plan.key,
            hidings,
            map: &route.rules.map,
            version: route.version.clone().unwrap_or_default(),
            secret: Some(secret).filter(|_| at.stored.is_none()),
        });
        of_sent(route, plan, columns)
    });
    let drift = agreement.and_then(|agreement| drift(route, agreement, plan, at));
    let filter = route.rules.filter.as_ref().map(|filter| filter.bind(Some(&table), hidden));
    Some(Box::new(PlanRules { columns, drift, filter }))
}

/// The rules of a route for the outbox.
pub(super) fn of_outbox(route: &Route) -> Option<Box<PlanRules>> {
    let filter = route.rules.filter.as_ref()?.bind(None, &Hidden::default());
    Some(Box::new(PlanRules { columns: None, drift: None, filter: Some(filter) }))
}

/// Everything that one of the routes hides, for an event that none of them selects.
pub(super) fn united(
    route: &Arc<Route>,
    routes: &[&Route],
    plan: &mut TablePlan,
    schemas: &Schemas,
) -> Option<Box<PlanRules>> {
    let (table, hidden) = (plan.table.clone(), Hidden::default());
    let now = Description::of(&table);
    let of_route = |route: &&Route| {
        let agreed = schemas.agreed_columns(route, &table.full_name, &now);
        let is_agreed = |name: &str| agreed.contains(&name);
        columns::hidings(&route.rules.columns, &table, is_agreed, &schemas.secret, &hidden)
    };
    let hidings = routes.iter().map(of_route).reduce(columns::union)?;
    if hidings.iter().all(Option::is_none) {
        return None;
    }
    if plan.key.iter().any(|index| hidings[*index].is_some()) {
        plan.lane_secret = Some(schemas.secret.clone());
    }
    let versions: Vec<&str> = routes.iter().filter_map(|route| route.version.as_deref()).collect();
    let columns = Projection::new(Deciding {
        table: &table,
        key: &plan.key,
        hidings,
        map: &Map::default(),
        version: versions.join(" "),
        secret: Some(&schemas.secret),
    });
    let columns = Some(of_sent(route, plan, columns));
    Some(Box::new(PlanRules { columns, drift: None, filter: None }))
}

/// With the plan of what is sent: formats see the table as it is sent, and no other.
fn of_sent(route: &Arc<Route>, plan: &TablePlan, columns: Projection) -> (Projection, Plan) {
    let (table, key) = (columns.table.clone(), columns.key.clone());
    let table = TablePlan::with_key(route, table, key, plan.identity_has_key);
    (columns, Plan { route: route.clone(), table: Some(table), rules: None })
}

fn drift(route: &Route, agreement: &Agreement, plan: &TablePlan, at: &At<'_>) -> Option<Drift> {
    let policy = route.rules.on_drift;
    if policy == OnDrift::Pass || at.mark < agreement.since {
        return None;
    }
    let (agreed, table) = (&agreement.description, &plan.table);
    let now = at.schemas.described(&table.full_name, table, agreed);
    let mut broken = broken(route, agreed, &now);
    // A row that was read has no old row, which is all that an identity is about.
    broken.retain(|lost| !(at.is_read && matches!(lost, Difference::Identity { .. })));
    let what: Vec<String> = broken.iter().map(ToString::to_string).collect();
    (!what.is_empty()).then(|| Drift { policy, what: what.join("; ") })
}

/// What the route promised of `agreed` and `now` does not keep.
pub(super) fn broken(route: &Route, agreed: &Description, now: &Description) -> Vec<Difference> {
    let rules = &route.rules;
    let needs = |name: &String| {
        let filter = rules.filter.as_ref();
        let filters = filter.is_some_and(|filter| filter.columns().any(|column| column == name));
        filters || route.key.contains(name) || route.texts.columns.contains(name)
    };
    let concerns = |difference: &Difference| match difference {
        Difference::Gone(column) => {
            rules.columns.hide(&column.name) != Some(Hide::Exclude) || needs(&column.name)
        }
        // A mask is the same for every type.
        Difference::Retyped { from, .. } => {
            rules.columns.hide(&from.name) <= Some(Hide::Hash) || needs(&from.name)
        }
        Difference::Key { .. } => route.key.is_empty(),
        Difference::New(_) | Difference::Name { .. } | Difference::Identity { .. } => true,
    };
    let mut found = agreed.differences(now);
    let is_lost = |difference: &Difference| {
        difference.takes_away() || changes_form(&route.format, difference)
    };
    found.retain(|difference| is_lost(difference) && concerns(difference));
    found
}

/// Whether a format that tells types apart writes a column in another way now, although its type
/// holds all that it held.
fn changes_form(format: &Format, difference: &Difference) -> bool {
    let (Format::Debezium(debezium), Difference::Retyped { from, to }) = (format, difference)
    else {
        return false;
    };
    let writer = |column: &DescribedColumn| {
        Writer::of(column.type_oid, column.type_modifier, &debezium.values)
    };
    match (writer(from), writer(to)) {
        (Some(from), Some(to)) => !from.is_like(to),
        (from, to) => from.is_some() != to.is_some(),
    }
}

/// Columns of `now` that the route leaves out because nobody agreed to them. `catalog` is the table
/// as the catalog had it last.
pub(super) fn left_out(
    route: &Route,
    agreed: &Description,
    now: &Description,
    catalog: Option<&Description>,
) -> Vec<String> {
    let rules = &route.rules.columns;
    if rules.is_empty() {
        return Vec::new();
    }
    let agreed = agreed::columns(rules, &route.key, agreed, now, (catalog, &[]));
    let names = now.columns.iter().map(|column| &*column.name);
    let is_new = |name: &&str| !agreed.contains(name) && rules.hide(name).is_none();
    names.filter(is_new).map(str::to_owned).collect()
}

/// What is different from the description before that; it is the last one from now on.
pub(super) fn changed<'a>(
    schemas: &mut Schemas,
    routes: impl Iterator<Item = &'a Route>,
    table: &Table,
    position: Position,
) -> Option<SchemaChange> {
    let name = table.full_name.to_string();
    let before = schemas.recorded.get(&name)?.before(position)?;
    let description = schemas.described(&name, table, before);
    let differences = before.differences(&description);
    if differences.is_empty() {
        return None;
    }
    let (mut not_kept, mut not_sent) = (Vec::new(), Vec::new());
    for route in routes {
        let Some(agreement) = schemas.agreement(&route.name, &name) else { continue };
        let agreed = &agreement.description;
        let is_older = position.mark < agreement.since;
        let lost = broken(route, agreed, &schemas.described(&name, table, agreed));
        if !is_older && !lost.is_empty() {
            not_kept.push((route.name.clone(), lost));
        }
        let unknown = left_out(route, agreed, &description, schemas.now.get(&name));
        if !unknown.is_empty() {
            not_sent.push((route.name.clone(), unknown));
        }
    }
    let recorded = schemas.recorded.entry(name.clone()).or_default();
    recorded.changed = Some((position, description.clone()));
    Some(SchemaChange {
        table: name,
        relation: table.oid,
        position,
        description,
        differences,
        broken: not_kept,
        left_out: not_sent,
    })
}

impl Plan {
    /// The event as it is sent, and the plan for that: what formats see, and brokers.
    pub fn sent<'a>(&'a self, event: &'a Event) -> (Cow<'a, Event>, &'a Plan) {
        match self.columns() {
            None => (Cow::Borrowed(event), self),
            Some((columns, plan)) => (Cow::Owned(columns.sent(event)), plan),
        }
    }

    /// The event as it may be stored, and what is hidden of it.
    pub fn kept<'a>(&'a self, event: &'a Event) -> (Cow<'a, Event>, Option<&'a Hidden>) {
        match self.columns() {
            None => (Cow::Borrowed(event), None),
            Some((columns, _)) => (Cow::Owned(columns.kept(event)), Some(&columns.hidden)),
        }
    }

    /// The id of the event, as it may be known.
    pub fn event_id(&self, id: Uuid) -> Uuid {
        self.columns().map_or(id, |(columns, _)| columns.id(id))
    }

    /// Whether the plan publishes events as they come.
    pub fn is_plain(&self) -> bool {
        self.rules.is_none()
    }

    /// Whether the route's filter lets the event pass.
    pub fn passes(&self, event: &Event) -> bool {
        let filter = self.rules.as_ref().and_then(|rules| rules.filter.as_ref());
        filter.is_none_or(|filter| filter.passes(event))
    }

    /// The table lacks what the route promised.
    pub fn drift(&self) -> Option<&Drift> {
        self.rules.as_ref()?.drift.as_ref()
    }

    /// Whether it hides one of these columns of its table.
    pub(super) fn hides(&self, columns: &[usize]) -> bool {
        self.columns().is_some_and(|(of_rows, _)| of_rows.hidden.has_any(columns))
    }

    /// Whether the hashes of its lanes are keyed.
    pub fn has_keyed_lanes(&self) -> bool {
        self.table.as_ref().is_some_and(|table| table.lane_secret.is_some())
    }

    fn columns(&self) -> Option<&(Projection, Plan)> {
        self.rules.as_ref()?.columns.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::column::debezium::ValueForms;
    use crate::column::oid;
    use crate::route::{
        Action, Debezium, EventRouter, EventTime, Router, Select, TombstoneBody, default_rules,
    };

    fn described(type_oid: u32, type_modifier: i32) -> Description {
        let column = DescribedColumn { name: "c".into(), type_oid, type_modifier };
        Description { columns: vec![column], ..Description::default() }
    }

    #[test]
    fn a_wider_type_breaks_a_format_that_writes_it_in_another_way() {
        let judged = |format: Format, from: Description, to: Description| {
            let mut rule = default_rules().remove(1);
            rule.select = Select::Table { name: "public.t".into() };
            let Action::Publish { format: of_rule, .. } = &mut rule.action else { unreachable!() };
            *of_rule = format;
            let router = Router::new(&[rule]).expect("a route");
            !router.against("tables", &from, &to).0.is_empty()
        };
        let debezium = || {
            Format::Debezium(Arc::new(Debezium {
                values: ValueForms::default(),
                topic_prefix: String::new(),
                version: String::new(),
                event_time: EventTime::Commit,
                tombstones: false,
                tombstone_body: TombstoneBody::Empty,
                skipped: Vec::new(),
                router: EventRouter::default(),
            }))
        };
        for (from, to) in [
            ((oid::NUMERIC, (10 << 16 | 2) + 4), (oid::NUMERIC, -1)),
            ((oid::TIMESTAMP, 3), (oid::TIMESTAMP, 6)),
            ((oid::TIME, 3), (oid::TIME, -1)),
        ] {
            let (from, to) = (described(from.0, from.1), described(to.0, to.1));
            assert!(!judged(Format::Watership, from.clone(), to.clone()), "{to:?}");
            assert!(judged(debezium(), from, to.clone()), "{to:?}");
        }
        let longer = (described(oid::VARCHAR, 14), described(oid::VARCHAR, 24));
        assert!(!judged(debezium(), longer.0, longer.1));
    }
}
