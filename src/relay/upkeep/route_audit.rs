//! Looks at the broker from the side, at every start of a session and on a timer, and says what a
//! confirm for each route is worth. It has connections of its own, is never waited for, and never
//! ends a session.
//!
//! With the management API it sees bindings, arguments and policies. Without, it sees only by
//! passive declares that something is missing; what is there stays "not verified".

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};

use crate::amqp;
use crate::amqp::audit::{Grade, Graded};
use crate::amqp::management::Management;
use crate::amqp::topology::{self, Mode, Topology};
use crate::error::{Kind, Result};
use crate::metrics::Metrics;
use crate::relay::Options;
use crate::relay::status::{RouteGrade, Status};
use crate::route::{Action, Rule};
use crate::secret::{Again, Secret};

/// Shortest time between two audits, so that flapping sessions do not become a storm of requests.
const GAP: Duration = Duration::from_secs(5);
/// What helps when nobody could look.
const UNSEEN: &str = "set broker.management_url: AMQP shows neither bindings nor policies";

/// What the audit is told.
#[derive(Debug, Clone)]
pub struct AuditOptions {
    /// Time between two audits.
    pub interval: Duration,
    /// The management API, when there is one.
    pub management_url: Option<Secret>,
    /// The same again, where the credentials are in files.
    pub url_again: Again<Secret>,
}

impl AuditOptions {
    /// The management API with the credentials that are in their files today.
    ///
    /// # Errors
    /// A file that cannot be read, or that does not hold what it should.
    pub fn management(&self, broker: &amqp::options::Options) -> Result<Option<Management>> {
        match self.url_again.read().transpose()?.as_ref().or(self.management_url.as_ref()) {
            Some(url) => Management::new(url, broker).map(Some),
            None => Ok(None),
        }
    }
}

/// Runs until it is aborted.
pub async fn run(options: Options, metrics: Arc<Metrics>, status: Arc<Status>) {
    let mut grades: Vec<RouteGrade> = Vec::new();
    let mut due = Instant::now() + options.audit.interval;
    loop {
        // At the very start nothing may be declared yet: the first session comes first.
        tokio::select! {
            () = status.started() => {}
            () = sleep_until(due) => {}
        }
        let next = audit(&options, &metrics).await;
        report(&grades, &next);
        show(&options, &metrics, &next);
        status.graded(next.clone());
        grades = next;
        due = Instant::now() + options.audit.interval;
        sleep(GAP).await;
    }
}

/// Every route that publishes, with its grade.
async fn audit(options: &Options, metrics: &Metrics) -> Vec<RouteGrade> {
    let all_graded = match options.audit.management(&options.broker) {
        Ok(Some(management)) => by_management(options, &management).await,
        Ok(None) => by_declares(options).await,
        Err(error) => Err(error),
    };
    let rules = published(&options.rules);
    let all_graded = all_graded.unwrap_or_else(|error| {
        metrics.audit_failures.increment(1);
        let reason = format!("the broker could not be inspected: {error}");
        let unseen = Graded { grade: Grade::NotVerified, reason };
        rules.iter().map(|_| unseen.clone()).collect()
    });
    let graded = rules.iter().zip(all_graded).map(|((rule, _), graded)| RouteGrade {
        name: rule.name.clone(),
        owner: rule.owner.clone(),
        grade: graded.grade,
        reason: graded.reason,
    });
    graded.collect()
}

/// The rules that publish, with their exchange.
fn published(rules: &[Rule]) -> Vec<(&Rule, &str)> {
    let publishes = rules.iter().filter_map(|rule| match &rule.action {
        Action::Publish { exchange, .. } => Some((rule, exchange.as_str())),
        Action::Drop => None,
    });
    publishes.collect()
}

async fn by_management(options: &Options, management: &Management) -> Result<Vec<Graded>> {
    let rules = published(&options.rules);
    let mut exchanges: Vec<String> = rules.iter().map(|(_, e)| (*e).to_owned()).collect();
    exchanges.sort();
    exchanges.dedup();
    let survey = management.survey(&exchanges).await?;
    let grade =
        |(rule, exchange): &(&Rule, &str)| survey.grade(&rule.name, exchange, &rule.known_key());
    Ok(rules.iter().map(grade).collect())
}

/// What can be said of each route that publishes without the management API: whether its exchange
/// and the queues that configuration binds to it are there.
///
/// # Errors
/// The broker's, unless something is missing: that is a grade.
pub async fn by_declares(options: &Options) -> Result<Vec<Graded>> {
    let things = &options.topology;
    let is_there = async |exchanges, queues| {
        let one = Topology { mode: Mode::Verify, exchanges, queues, bindings: Vec::new() };
        match topology::apply(&options.broker, &one).await {
            Ok(()) => Ok(None),
            Err(error) if error.kind() == Kind::Refused => Ok(Some(error.to_string())),
            Err(error) => Err(error),
        }
    };
    // One connection shows that all is there, which is how it mostly is.
    let all = is_there(things.exchanges.clone(), things.queues.clone()).await?;
    let mut all_graded = Vec::new();
    for (_, exchange) in published(&options.rules) {
        let mut missing = None;
        if all.is_some() {
            let of_route = things.exchanges.iter().filter(|e| e.name == *exchange).cloned();
            let bound = things.bindings.iter().filter(|b| b.exchange == *exchange);
            let names: Vec<&str> = bound.map(|b| b.queue.as_str()).collect();
            let queues = things.queues.iter().filter(|q| names.contains(&&*q.name)).cloned();
            missing = is_there(of_route.collect(), queues.collect()).await?;
        }
        all_graded.push(match missing {
            Some(reason) => Graded { grade: Grade::Unsafe, reason },
            None => Graded { grade: Grade::NotVerified, reason: format!("not verified: {UNSEEN}") },
        });
    }
    Ok(all_graded)
}

/// A line for each route whose grade is another than before.
fn report(before: &[RouteGrade], now: &[RouteGrade]) {
    for (index, RouteGrade { name, owner, grade, reason }) in now.iter().enumerate() {
        let last = before.get(index).map(|route| route.grade);
        if last == Some(*grade) {
            continue;
        }
        let last = last.map_or("none", Grade::label);
        match grade {
            Grade::Safe | Grade::NotVerified => {
                tracing::info!(route = name, owner, %grade, before = last, reason, "route graded");
            }
            Grade::Weak | Grade::Unsafe => {
                tracing::warn!(route = name, owner, %grade, before = last, reason, "route graded");
            }
        }
    }
}

fn show(options: &Options, metrics: &Metrics, grades: &[RouteGrade]) {
    for (rule, series) in options.rules.iter().zip(&metrics.routes) {
        if let Some(route) = grades.iter().find(|route| route.name == rule.name) {
            series.set_grade(route.grade.label());
        }
    }
}
