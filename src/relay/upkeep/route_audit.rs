//! Looks at the broker from the side, and says what a confirm for each route is worth: at every
//! start of a session, when a route is held or released, and on a timer. It has connections of its
//! own, is never waited for, and never ends a session.
//!
//! With the management API it sees bindings, arguments and policies. Without, it sees only by
//! passive declares that something is missing; what is there stays "not verified".

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};

use crate::amqp;
use crate::amqp::audit::{Grade, Graded, Survey};
use crate::amqp::management::Management;
use crate::amqp::topology::{self, Mode, Topology};
use crate::error::Result;
use crate::message::RouteId;
use crate::metrics::Metrics;
use crate::relay::Options;
use crate::relay::session::broken;
use crate::relay::status::{RouteGrade, Status};
use crate::route::{Action, Rule};
use crate::secret::{Again, Secret};

/// Shortest time between two audits.
const GAP: Duration = Duration::from_secs(1);
/// The same as a multiple of what the last one took, so that what flaps does not become a storm of
/// requests.
const GAP_PER_AUDIT: u32 = 4;
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
            () = status.changed() => {}
            () = sleep_until(due) => {}
        }
        let begin = Instant::now();
        let next = audit(&options, &metrics).await;
        report(&grades, &next);
        show(&options, &metrics, &next);
        status.graded(next.clone());
        grades = next;
        due = Instant::now() + options.audit.interval;
        sleep(GAP.max(begin.elapsed() * GAP_PER_AUDIT)).await;
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

/// The rules that publish, with their exchanges.
fn published(rules: &[Rule]) -> Vec<(&Rule, &[String])> {
    let publishes = rules.iter().filter_map(|rule| match &rule.action {
        Action::Publish { address, .. } => Some((rule, address.exchanges())),
        Action::Drop => None,
    });
    publishes.collect()
}

async fn by_management(options: &Options, management: &Management) -> Result<Vec<Graded>> {
    let rules = published(&options.rules);
    let mut exchanges: Vec<String> = rules.iter().flat_map(|(_, e)| e.to_vec()).collect();
    exchanges.sort();
    exchanges.dedup();
    let survey = management.survey(&exchanges).await?;
    Ok(rules.iter().map(|(rule, exchanges)| grade(&survey, rule, exchanges)).collect())
}

/// The grade of the worst of the exchanges that the rule publishes to.
pub fn grade(survey: &Survey, rule: &Rule, exchanges: &[String]) -> Graded {
    let (headers, keys) = (rule.known_headers(), rule.known_keys());
    let of_each = exchanges.iter().map(|exchange| survey.grade_keys(&headers, exchange, &keys));
    let unknown = || Graded { grade: Grade::Unsafe, reason: String::new() };
    of_each
        .reduce(|worst, next| if next.grade > worst.grade { next } else { worst })
        .unwrap_or_else(unknown)
}

/// What can be said of each route that publishes without the management API: whether its exchange
/// and the queues that configuration binds to it are there.
///
/// # Errors
/// The broker's, unless something is missing: that is a grade.
pub async fn by_declares(options: &Options) -> Result<Vec<Graded>> {
    let verify = Topology { mode: Mode::Verify, ..options.topology.clone() };
    let wrong = topology::apply_each(&options.broker, &verify).await?;
    let broken = broken::routes(&options.topology, &options.rules, &wrong);
    let publishes = (0..).map(RouteId).zip(&options.rules);
    let publishes = publishes.filter(|(_, rule)| matches!(rule.action, Action::Publish { .. }));
    let graded =
        publishes.map(|(route, _)| match broken.iter().find(|broken| broken.route == route) {
            Some(broken) => Graded { grade: Grade::Unsafe, reason: broken.reason.clone() },
            None => Graded { grade: Grade::NotVerified, reason: format!("not verified: {UNSEEN}") },
        });
    Ok(graded.collect())
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
