//! `watership resync`: a person accepts a gap. It is recorded, and the relay may go on behind it.
//!
//! Nothing is published or skipped here: the checkpoint is set to where the stream will really
//! begin, in a new epoch, together with the record in `watership.resync`.

use serde::Serialize;
use tokio_postgres::types::PgLsn;
use tokio_postgres::{Client, Transaction};

use super::{End, Out};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::pg::client::{SqlConnection, sql};
use crate::pg::publication::Publication;
use crate::pg::slot::{create_slot, drop_slot};
use crate::pg::sqlstate::postgres_error;
use crate::position::Lsn;
use crate::relay::check::position::facts;
use crate::relay::check::resync::{Plan, ResumeFrom, plan};
use crate::relay::checkpoint;
use crate::relay::session::facts::{self, StartFacts};
use crate::relay::session::wal;
use crate::verdict::Verdict;

/// Options of `resync`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  watership --config shop.toml resync    # says what is wrong\n  \
    watership --config shop.toml resync --accept-gap --reason 'restored the backup of Monday'\n\n\
    Stop the relay first. What was accepted stands in the table watership.resync.\n\
    Exit codes: 0 done, or nothing is wrong; 1 refused; 3 something is wrong and not accepted."
)]
pub(super) struct Args {
    /// Accept that events of the named range of the WAL may never be published.
    #[arg(long, requires = "reason")]
    accept_gap: bool,
    /// Why; recorded.
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// Who accepts it; recorded. Default: the database role.
    #[arg(long, value_name = "NAME")]
    by: Option<String>,
    /// Where the stream begins again: where the checkpoint is, where the slot is, or now, with a
    /// new slot. Default: the one that loses least.
    #[arg(long, value_name = "PLACE")]
    from: Option<ResumeFrom>,
    /// Also when nothing is found wrong; needs --from.
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

/// What was done, or would be.
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
}

pub(super) async fn execute(config: &Config, args: &Args, out: Out) -> Result<End> {
    let SqlConnection { mut client, closed: _closed } = sql(&config.source.sql).await?;
    let options = config.relay_options();
    let found = facts::read(&client, &options).await?;
    let history = wal::ancestors_for(&options.sql, &found).await?;
    let doubts = found.doubts(&options, &history);
    if let Some(error) = doubts.iter().position(|doubt| !doubt.kind().is_verdict()) {
        return Err(doubts.into_iter().nth(error).expect("it was found"));
    }
    let mut report = Report {
        name: config.name.clone(),
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
    };
    report.errors.iter().for_each(|error| out.line(&format!("verdict      {error}")));
    if doubts.is_empty() && !args.anyway {
        return nothing_wrong(config, args, &report, out);
    }
    let (row, slot, server) = found.position();
    let plan = plan(row, slot, server, &doubts, args.from)?;
    report.from = Some(plan.from.name());
    report.gap_from = Some(row.flush_lsn.to_string());
    report.resumed_at = plan.begin.map(|lsn| lsn.to_string());
    if !args.accept_gap {
        out.line(&format!("would        {}", told(config, &plan, row.flush_lsn)));
        out.line("\nNothing was changed. To accept it: --accept-gap --reason '…'");
        out.data(&report)?;
        return Ok(End::NeedsPerson);
    }
    accept(&mut client, config, args, &found, &plan, &mut report).await?;
    tell(config, &report, &plan, out);
    out.data(&report)?;
    Ok(End::Fine)
}

fn nothing_wrong(config: &Config, args: &Args, report: &Report, out: Out) -> Result<End> {
    let name = &config.name;
    if args.accept_gap {
        return Err(Error::refused(format!(
            "nothing is wrong with the position of relay {name:?}"
        ))
        .hint("there is no gap to accept: start it with `watership run`"));
    }
    out.line(&format!("ok           nothing is wrong with the position of relay {name:?}"));
    out.data(report)?;
    Ok(End::Fine)
}

fn told(config: &Config, plan: &Plan, stood: Lsn) -> String {
    let slot = &config.source.slot;
    match (plan.from, plan.begin) {
        (ResumeFrom::Checkpoint, _) => format!("go on where the checkpoint is, at {stood}"),
        (ResumeFrom::Slot, begin) => {
            let begin = begin.unwrap_or(Lsn::ZERO);
            format!("go on where slot {slot:?} is, at {begin}; the checkpoint is at {stood}")
        }
        (ResumeFrom::Now, _) => {
            format!("make slot {slot:?} anew and go on from then; the checkpoint is at {stood}")
        }
    }
}

/// Makes the slot where that is needed, then row and record in one transaction.
async fn accept(
    client: &mut Client,
    config: &Config,
    args: &Args,
    found: &StartFacts,
    plan: &Plan,
    report: &mut Report,
) -> Result<()> {
    let (row, slot, server) = found.position();
    let name = &config.source.slot;
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
            let failover = config.source.failover && server.version_num >= 170_000;
            let begin = create_slot(client, name, failover).await?;
            report.slot_created = true;
            (begin, begin)
        }
    };
    // Where the position is kept, what was left out lies between it and now.
    let gap_to = if plan.from == ResumeFrom::Checkpoint { server.wal_lsn } else { flush_lsn };
    report.gap_to = Some(gap_to.to_string());
    report.resumed_at = Some(flush_lsn.to_string());
    let tx = client.transaction().await.map_err(postgres_error)?;
    let epoch = move_checkpoint(&tx, config, found, publication, commit_lsn, flush_lsn).await?;
    checkpoint::agree(&tx, &config.name, &facts(publication, &config.relay_options().wanted()))
        .await?;
    report.epoch = Some(epoch);
    record(&tx, config, args, found, (plan.from, flush_lsn, gap_to), report).await?;
    tx.commit().await.map_err(postgres_error)?;
    report.accepted = true;
    Ok(())
}

async fn move_checkpoint(
    tx: &Transaction<'_>,
    config: &Config,
    found: &StartFacts,
    publication: &Publication,
    commit_lsn: Lsn,
    flush_lsn: Lsn,
) -> Result<u32> {
    const SQL: &str = include_str!("../../sql/query/checkpoint_resync.sql");
    let (row, _, server) = found.position();
    let moved = tx
        .query_opt(
            SQL,
            &[
                &config.name,
                &row.session_no,
                &checkpoint::to_sql(commit_lsn.0),
                &checkpoint::to_sql(flush_lsn.0),
                &server.system_identifier.to_string(),
                &i64::from(server.timeline),
                &publication.name,
                &publication.oid,
            ],
        )
        .await
        .map_err(postgres_error)?;
    let epoch = moved.ok_or_else(|| checkpoint::taken_over(&config.name))?;
    let epoch: i64 = epoch.try_get(0).map_err(postgres_error)?;
    u32::try_from(epoch).map_err(|_| Error::protocol("watership.checkpoint.epoch is out of range"))
}

async fn record(
    tx: &Transaction<'_>,
    config: &Config,
    args: &Args,
    found: &StartFacts,
    (from, resumed_at, gap_to): (ResumeFrom, Lsn, Lsn),
    report: &mut Report,
) -> Result<()> {
    const SQL: &str = include_str!("../../sql/query/resync_record.sql");
    let (row, _, server) = found.position();
    let who = args.by.clone().unwrap_or_else(|| server.user.clone());
    let reason = args.reason.clone().unwrap_or_default();
    let recorded = tx
        .query_one(
            SQL,
            &[
                &config.name,
                &who,
                &reason,
                &report.verdicts,
                &PgLsn::from(row.flush_lsn.0),
                &PgLsn::from(gap_to.0),
                &from.name(),
                &PgLsn::from(resumed_at.0),
                &config.source.slot,
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

fn tell(config: &Config, report: &Report, plan: &Plan, out: Out) {
    let line = |what: &str, text: String| out.line(&format!("{what:<12} {text}"));
    let shown = |text: &Option<String>| text.clone().unwrap_or_default();
    line("accepted", format!("{} to {}", shown(&report.gap_from), shown(&report.gap_to)));
    let slot = &config.source.slot;
    let made = if report.slot_created { " (made anew)" } else { "" };
    let at = shown(&report.resumed_at);
    line("goes on", format!("at {at}, from {}, slot {slot:?}{made}", plan.from.name()));
    line("epoch", report.epoch.unwrap_or_default().to_string());
    let (at, who) = (shown(&report.at), shown(&report.who));
    line("recorded", format!("in watership.resync, by {who} at {at}"));
    out.line("\nNext: `watership check`, then `watership run`.");
}
