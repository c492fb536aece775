//! `watership resync`: an operator accepts a gap. It is recorded, and the relay resumes past it.
//!
//! Nothing is published or skipped here: the checkpoint moves to where the stream will really
//! begin, in a new epoch, in one transaction with the record in `watership.resync`.

mod poll;

use serde::Serialize;
use tokio_postgres::types::PgLsn;
use tokio_postgres::{Client, Transaction};

use super::gap_rows::{self, GapRows};
use super::{End, Out};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::pg::client::{SqlConnection, sql};
use crate::pg::publication::Publication;
use crate::pg::slot::{create_slot, drop_slot};
use crate::pg::sqlstate::postgres_error;
use crate::pg::unnamed;
use crate::position::Lsn;
use crate::relay::check::lost::Agreed;
use crate::relay::check::position::facts;
use crate::relay::check::resync::{ResumeFrom, ResyncPlan, plan};
use crate::relay::checkpoint;
use crate::relay::session::facts::{self, StartFacts};
use crate::relay::session::wal;
use crate::relay::upkeep::canary;
use crate::source::SourceKind;
use crate::verdict::Verdict;

/// Options of `resync`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  watership --config shop.toml resync    # shows what is wrong\n  \
    watership --config shop.toml resync --accept-gap --reason 'restored the backup from Monday'\n\n\
    Stop the relay first. Accepted gaps are recorded in the table watership.resync.\n\
    Exit codes: 0 accepted, or nothing is wrong; 1 refused; 3 a verdict that is not accepted yet."
)]
pub(super) struct Args {
    /// Accept that events in the reported range of the WAL may never be published.
    #[arg(long, requires = "reason")]
    accept_gap: bool,
    /// Why you accept it; recorded.
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// Your name; recorded. Default: the database role.
    #[arg(long, value_name = "NAME")]
    by: Option<String>,
    /// Where to resume: at the checkpoint, at the slot, or now, with a new slot. Default: the one
    /// that loses least.
    #[arg(long, value_name = "PLACE")]
    from: Option<ResumeFrom>,
    /// Move the checkpoint even if nothing is wrong; needs --from.
    #[arg(long, requires = "from")]
    anyway: bool,
}

impl clap::ValueEnum for ResumeFrom {
    fn value_variants<'a>() -> &'a [Self] {
        &[ResumeFrom::Checkpoint, ResumeFrom::Slot, ResumeFrom::Now]
    }

    fn to_possible_value(&self) -> Option<clap::builder::PossibleValue> {
        Some(clap::builder::PossibleValue::new(self.name()))
    }
}

/// What was done, or would be done.
#[derive(Debug, Serialize)]
struct Report {
    name: String,
    accepted: bool,
    verdicts: Vec<&'static str>,
    errors: Vec<String>,
    from: Option<&'static str>,
    gap_from: Option<String>,
    gap_to: Option<String>,
    resumed_at: Option<String>,
    slot_created: bool,
    epoch: Option<u32>,
    at: Option<String>,
    role: Option<String>,
    who: Option<String>,
    reason: Option<String>,
    /// Outbox rows of the gap that are still there; absent when they could not be counted.
    outbox: Option<GapRows>,
}

pub(super) async fn execute(config: &Config, args: &Args, out: Out) -> Result<End> {
    if args.reason.as_ref().is_some_and(|reason| reason.trim().is_empty()) {
        return Err(Error::config("--reason is empty; say why the gap is accepted"));
    }
    let SqlConnection { mut client, closed: _closed } = sql(&config.relay.sql).await?;
    if config.relay.kind == SourceKind::Poll {
        return poll::execute(&mut client, config, args, out).await;
    }
    let options = &config.relay;
    let found = facts::read(&client, options).await?;
    let history = wal::ancestors_for(&options.sql, &found).await?;
    let doubts = found.doubts(options, &history);
    if let Some(error) = doubts.iter().position(|doubt| !doubt.kind().is_verdict()) {
        return Err(doubts.into_iter().nth(error).expect("it was found"));
    }
    let mut report = Report {
        name: config.relay.name.clone(),
        accepted: false,
        verdicts: doubts.iter().filter_map(Error::verdict).map(Verdict::name).collect(),
        errors: doubts.iter().map(ToString::to_string).collect(),
        from: None,
        gap_from: None,
        gap_to: None,
        resumed_at: None,
        slot_created: false,
        epoch: None,
        at: None,
        role: None,
        who: None,
        reason: args.reason.clone(),
        outbox: None,
    };
    report.errors.iter().for_each(|error| out.line(&format!("verdict      {error}")));
    if doubts.is_empty() && !args.anyway {
        return nothing_wrong(&config.relay.name, args, &report, out);
    }
    let (row, slot, server) = found.position();
    let plan = plan(row, slot, server, &doubts, args.from)?;
    report.from = Some(plan.from.name());
    // What only the stream can tell, such as missing canaries, may lie before the checkpoint.
    let canary = canary::recorded(&client, &config.relay.name).await?.before;
    let canary = canary.filter(|_| doubts.is_empty()).map(|canary| canary.end);
    let gap_from = canary.map_or(row.flush_lsn, |canary| canary.min(row.flush_lsn));
    report.gap_from = Some(gap_from.to_string());
    report.resumed_at = plan.begin.map(|lsn| lsn.to_string());
    let since = gap_rows::since(&client, &config.relay.name).await?;
    if !args.accept_gap {
        out.line(&format!("would        {}", describe_plan(config, &plan, row.flush_lsn)));
        report.outbox = count_rows(&client, config, since, out).await;
        out.line("\nNothing was changed. To accept the gap: --accept-gap --reason '…'");
        out.data(&report)?;
        return Ok(End::NeedsDecision);
    }
    accept(&mut client, config, args, &found, (&plan, gap_from), &mut report).await?;
    print_result(config, &report, &plan, out);
    report.outbox = count_rows(&client, config, since, out).await;
    report.outbox.iter().for_each(|rows| rows.print_statement(out));
    out.line("\nNext: `watership check`, then `watership run`.");
    out.data(&report)?;
    Ok(End::Fine)
}

/// What is still in the outbox of the gap. The gap is accepted all the same when it cannot be said.
async fn count_rows(
    client: &Client,
    config: &Config,
    since: Option<String>,
    out: Out,
) -> Option<GapRows> {
    let since = since?;
    match gap_rows::count(client, config, &since).await {
        Ok(rows) => {
            out.line(&format!("outbox       {}", rows.say()));
            Some(rows)
        }
        Err(error) => {
            out.line(&format!("outbox       rows since {since} could not be counted: {error}"));
            None
        }
    }
}

fn nothing_wrong(name: &str, args: &Args, report: &impl Serialize, out: Out) -> Result<End> {
    if args.accept_gap {
        return Err(Error::refused(format!(
            "nothing is wrong with the position of relay {name:?}"
        ))
        .hint("start the relay with `watership run`; it has no gap to accept"));
    }
    out.line(&format!("ok           nothing is wrong with the position of relay {name:?}"));
    out.data(report)?;
    Ok(End::Fine)
}

fn describe_plan(config: &Config, plan: &ResyncPlan, checkpoint: Lsn) -> String {
    let slot = &config.relay.slot;
    match (plan.from, plan.begin) {
        (ResumeFrom::Checkpoint, _) => format!("resume at the checkpoint, {checkpoint}"),
        (ResumeFrom::Slot, begin) => {
            let begin = begin.unwrap_or(Lsn::ZERO);
            format!("resume at slot {slot:?}, {begin}; the checkpoint is at {checkpoint}")
        }
        (ResumeFrom::Now, _) => {
            format!("recreate slot {slot:?} and resume there; the checkpoint is at {checkpoint}")
        }
    }
}

/// Where the relay resumes, and what it may have missed by then.
struct Resumed {
    from: ResumeFrom,
    commit_lsn: Lsn,
    flush_lsn: Lsn,
    gap_from: Lsn,
    gap_to: Lsn,
}

/// Creates the slot if needed, then writes row and record in one transaction.
async fn accept(
    client: &mut Client,
    config: &Config,
    args: &Args,
    found: &StartFacts,
    (plan, gap_from): (&ResyncPlan, Lsn),
    report: &mut Report,
) -> Result<()> {
    let (row, slot, server) = found.position();
    let name = &config.relay.slot;
    let publication = found
        .publication()
        .ok_or_else(|| Error::internal("verification passed without a publication"))?;
    let (commit_lsn, flush_lsn) = match (plan.from, plan.begin) {
        (ResumeFrom::Checkpoint, _) => (row.position.mark.lsn(), row.flush_lsn),
        (ResumeFrom::Slot, Some(begin)) => (begin, begin),
        (ResumeFrom::Slot | ResumeFrom::Now, _) => {
            if slot.is_some() {
                drop_slot(client, name).await?;
            }
            let failover = config.failover && server.version_num >= 170_000;
            let begin = create_slot(client, name, failover).await?;
            report.slot_created = true;
            (begin, begin)
        }
    };
    // When the position stays, the gap is what lies between it and now.
    let gap_to = if plan.from == ResumeFrom::Checkpoint { server.wal_lsn } else { flush_lsn };
    let resumed = Resumed { from: plan.from, commit_lsn, flush_lsn, gap_from, gap_to };
    report.gap_to = Some(gap_to.to_string());
    report.resumed_at = Some(flush_lsn.to_string());
    let tx = client.transaction().await.map_err(postgres_error)?;
    let epoch = move_checkpoint(&tx, config, found, publication, &resumed).await?;
    canary::accept(&tx, &config.relay.name).await?;
    let agreed = Agreed::whole(facts(publication, &config.relay.wanted()));
    checkpoint::agree(&tx, &config.relay.name, &agreed).await?;
    report.epoch = Some(epoch);
    record(&tx, config, args, found, &resumed, report).await?;
    tx.commit().await.map_err(postgres_error)?;
    report.accepted = true;
    Ok(())
}

async fn move_checkpoint(
    tx: &Transaction<'_>,
    config: &Config,
    found: &StartFacts,
    publication: &Publication,
    resumed: &Resumed,
) -> Result<u32> {
    const SQL: &str = include_str!("../../sql/query/checkpoint_resync.sql");
    let (row, _, server) = found.position();
    let moved = unnamed::query_opt(
        tx,
        SQL,
        &[
            &config.relay.name,
            &row.session_no,
            &checkpoint::to_sql(resumed.commit_lsn.0),
            &checkpoint::to_sql(resumed.flush_lsn.0),
            &server.system_identifier.to_string(),
            &i64::from(server.timeline),
            &publication.name,
            &publication.oid,
        ],
    )
    .await
    .map_err(postgres_error)?;
    let epoch = moved.ok_or_else(|| checkpoint::taken_over(&config.relay.name))?;
    let epoch: i64 = epoch.try_get(0).map_err(postgres_error)?;
    u32::try_from(epoch).map_err(|_| Error::protocol("watership.checkpoint.epoch is out of range"))
}

async fn record(
    tx: &Transaction<'_>,
    config: &Config,
    args: &Args,
    found: &StartFacts,
    resumed: &Resumed,
    report: &mut Report,
) -> Result<()> {
    const SQL: &str = include_str!("../../sql/query/resync_record.sql");
    let (_, _, server) = found.position();
    let who = args.by.clone().unwrap_or_else(|| server.user.clone());
    let reason = args.reason.clone().unwrap_or_default();
    let recorded = unnamed::query_one(
        tx,
        SQL,
        &[
            &config.relay.name,
            &who,
            &reason,
            &report.verdicts,
            &PgLsn::from(resumed.gap_from.0),
            &PgLsn::from(resumed.gap_to.0),
            &resumed.from.name(),
            &PgLsn::from(resumed.flush_lsn.0),
            &config.relay.slot,
            &report.slot_created,
            &i64::from(server.timeline),
            &i64::from(report.epoch.unwrap_or_default()),
        ],
    )
    .await
    .map_err(postgres_error)?;
    report.at = Some(recorded.try_get(0).map_err(postgres_error)?);
    report.role = Some(recorded.try_get(1).map_err(postgres_error)?);
    report.who = Some(who);
    Ok(())
}

fn print_result(config: &Config, report: &Report, plan: &ResyncPlan, out: Out) {
    let line = |what: &str, text: String| out.line(&format!("{what:<12} {text}"));
    let shown = |text: &Option<String>| text.clone().unwrap_or_default();
    line("accepted", format!("{} to {}", shown(&report.gap_from), shown(&report.gap_to)));
    let slot = &config.relay.slot;
    let created = if report.slot_created { " (recreated)" } else { "" };
    let at = shown(&report.resumed_at);
    line("resumes", format!("at {at}, from {}, slot {slot:?}{created}", plan.from.name()));
    line("epoch", report.epoch.unwrap_or_default().to_string());
    let (at, who) = (shown(&report.at), shown(&report.who));
    line("recorded", format!("in watership.resync, by {who} at {at}"));
}
