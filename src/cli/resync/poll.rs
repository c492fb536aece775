//! The same of a relay that polls: it continues where it is, or starts again after what is visible
//! now. The batch that it stands at says what may have been missed.

use serde::Serialize;
use tokio_postgres::Client;

use super::{Args, count_rows, nothing_wrong};
use crate::cli::gap_rows::{self, GapRows};
use crate::cli::{End, Out};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::pg::sqlstate::postgres_error;
use crate::pg::unnamed;
use crate::relay::check::polling::verify_transactions;
use crate::relay::check::resync::ResumeFrom;
use crate::relay::checkpoint;
use crate::relay::session::poll::{self, PollStart};
use crate::source::poll::MadeWith;
use crate::verdict::Verdict;

/// What was done, or would be done.
#[derive(Debug, Serialize)]
struct Report {
    name: String,
    accepted: bool,
    verdict: Option<&'static str>,
    error: Option<String>,
    from: Option<&'static str>,
    /// The batch that was settled before.
    gap_from_batch: u64,
    resumed_batch: Option<i64>,
    epoch: Option<u32>,
    at: Option<String>,
    role: Option<String>,
    who: Option<String>,
    reason: Option<String>,
    outbox: Option<GapRows>,
}

pub(super) async fn execute(
    client: &mut Client,
    config: &Config,
    args: &Args,
    out: Out,
) -> Result<End> {
    let name = &config.relay.name;
    let found = poll::read(client, &config.relay).await?;
    let doubt = found.verify().err();
    if let Some(error) = doubt.as_ref().filter(|doubt| !may_be_accepted(doubt)) {
        let text = format!("{error}; that is not a gap that can be accepted");
        return Err(Error::refused(text).hint(error.hint_or_kind().to_owned()));
    }
    let mut report = Report {
        name: name.clone(),
        accepted: false,
        verdict: doubt.as_ref().and_then(Error::verdict).map(Verdict::name),
        error: doubt.as_ref().map(ToString::to_string),
        from: None,
        gap_from_batch: found.row.flush().0,
        resumed_batch: None,
        epoch: None,
        at: None,
        role: None,
        who: None,
        reason: args.reason.clone(),
        outbox: None,
    };
    report.error.iter().for_each(|error| out.line(&format!("verdict      {error}")));
    if doubt.is_none() && !args.anyway {
        return nothing_wrong(name, args, &report, out);
    }
    let from = place(args.from, doubt.is_some())?;
    report.from = Some(from.name());
    let since = gap_rows::since(client, name).await?;
    if !args.accept_gap {
        let what = match from {
            ResumeFrom::Checkpoint => "resume at the checkpoint, in a new epoch",
            ResumeFrom::Slot | ResumeFrom::Now => {
                "skip everything that is in the outbox now and start with the next row"
            }
        };
        out.line(&format!("would        {what}; it is at batch {}", found.row.flush().0));
        report.outbox = count_rows(client, config, since, out).await;
        out.line("\nNothing was changed. To accept the gap: --accept-gap --reason '…'");
        out.data(&report)?;
        return Ok(End::NeedsDecision);
    }
    accept(client, (config, args), &found, from, &mut report).await?;
    let batch = report.resumed_batch.unwrap_or_default();
    out.line(&format!("resumes      after batch {batch}, from {}", from.name()));
    out.line(&format!("epoch        {}", report.epoch.unwrap_or_default()));
    report.outbox = count_rows(client, config, since, out).await;
    if from == ResumeFrom::Now {
        report.outbox.iter().for_each(|rows| rows.print_statement(out));
    }
    out.line("\nNext: `watership check`, then `watership run`.");
    out.data(&report)?;
    Ok(End::Fine)
}

/// A verdict about what was published. Rows of another cluster come first: a new beginning would
/// take them for rows of the future, too.
fn may_be_accepted(doubt: &Error) -> bool {
    match doubt.verdict() {
        Some(
            Verdict::OtherCluster
            | Verdict::CheckpointAhead
            | Verdict::BatchMissing
            | Verdict::BatchUnreadable,
        ) => true,
        Some(_) | None => false,
    }
}

/// The snapshot says nothing where there is a doubt; otherwise a person may choose.
fn place(asked: Option<ResumeFrom>, doubt: bool) -> Result<ResumeFrom> {
    match asked {
        Some(ResumeFrom::Slot) => Err(Error::config("--from slot: a relay that polls has no slot")
            .hint("use --from now, or --from checkpoint")),
        Some(ResumeFrom::Checkpoint) if doubt => {
            Err(Error::refused("the relay cannot resume from the checkpoint")
                .hint("use --from now"))
        }
        Some(from) => Ok(from),
        None => Ok(ResumeFrom::Now),
    }
}

/// Moves the row and records it, in one transaction.
async fn accept(
    client: &mut Client,
    (config, args): (&Config, &Args),
    found: &PollStart,
    from: ResumeFrom,
    report: &mut Report,
) -> Result<()> {
    const KEEP: &str = include_str!("../../../sql/query/poll_keep.sql");
    const RESYNC: &str = include_str!("../../../sql/query/poll_resync.sql");
    const RECORD: &str = include_str!("../../../sql/query/poll_resync_record.sql");
    let (row, server) = (&found.row, &found.server);
    let who = args.by.clone().unwrap_or_else(|| server.user.clone());
    let reason = args.reason.clone().unwrap_or_default();
    let (system, timeline) = (server.system_identifier.to_string(), i64::from(server.timeline));
    let tx = client.transaction().await.map_err(postgres_error)?;
    // A new beginning has no base that another cluster's transactions could be compared with.
    if from == ResumeFrom::Now {
        let facts = poll::facts(tx.client(), &config.relay, None).await?;
        verify_transactions(&facts)?;
    }
    let table = config.relay.outbox.table.to_string();
    let (oid, order_by, xid) = MadeWith::stored(found.facts.made_with());
    let values: [unnamed::Parameter<'_>; 8] =
        [&report.name, &row.session_no, &system, &timeline, &table, &oid, &order_by, &xid];
    let (sql, values) = match from {
        ResumeFrom::Checkpoint => (KEEP, &values[..4]),
        ResumeFrom::Slot | ResumeFrom::Now => (RESYNC, &values[..]),
    };
    let moved = unnamed::query_opt(&tx, sql, values).await.map_err(postgres_error)?;
    let moved = moved.ok_or_else(|| checkpoint::taken_over(&report.name))?;
    let epoch: i64 = moved.try_get(0).map_err(postgres_error)?;
    let batch: i64 = moved.try_get(1).map_err(postgres_error)?;
    let verdicts: Vec<&str> = report.verdict.into_iter().collect();
    let values: &[unnamed::Parameter<'_>] =
        &[&report.name, &who, &reason, &verdicts, &from.name(), &batch, &timeline, &epoch];
    let recorded = unnamed::query_one(&tx, RECORD, values).await.map_err(postgres_error)?;
    report.at = Some(recorded.try_get(0).map_err(postgres_error)?);
    report.role = Some(recorded.try_get(1).map_err(postgres_error)?);
    tx.commit().await.map_err(postgres_error)?;
    (report.accepted, report.who) = (true, Some(who));
    (report.resumed_batch, report.epoch) = (Some(batch), u32::try_from(epoch).ok());
    Ok(())
}
