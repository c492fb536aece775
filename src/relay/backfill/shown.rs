//! How far a run is, for people. Pure.

use std::time::Duration;

use serde::Serialize;

use super::runs::{Run, RunState};

/// A run as `/status` and `watership backfill` show it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BackfillView {
    /// Its id.
    pub run: String,
    /// `schema.table`.
    pub table: String,
    /// What it is doing.
    pub state: &'static str,
    /// Rows that were read and are settled.
    pub rows: u64,
    /// Those of them that were not sent.
    pub left_out: u64,
    /// How much of the table that is, about.
    pub percent: Option<f64>,
    /// Rows a second.
    pub rows_per_second: Option<f64>,
    /// Until all is read, about.
    pub eta_seconds: Option<f64>,
    /// Why it does not go on now.
    pub waits: Option<String>,
    /// Why it failed.
    pub error: Option<String>,
}

impl BackfillView {
    /// Of a run that has read `rows` in this time, as far as that is known.
    pub fn new(run: &Run, lately: Option<(u64, Duration)>) -> Self {
        let rate = lately.filter(|(_, time)| !time.is_zero());
        let rate = rate.map(|(rows, time)| rows as f64 / time.as_secs_f64());
        let total = run.total.filter(|total| *total > 0);
        let left = total.map(|total| total.saturating_sub(run.rows));
        let eta = left.zip(rate).filter(|(_, rate)| *rate > 0.0);
        let running = matches!(run.state, RunState::Requested | RunState::Running);
        Self {
            run: run.run.to_string(),
            table: run.table.clone(),
            state: run.state.name(),
            rows: run.rows,
            left_out: run.left_out,
            percent: match run.state {
                RunState::Done => Some(100.0),
                _ => total.map(|total| (run.rows as f64 * 100.0 / total as f64).min(99.9)),
            },
            rows_per_second: rate.filter(|_| running),
            eta_seconds: eta.filter(|_| running).map(|(left, rate)| left as f64 / rate),
            waits: run.waits.clone(),
            error: run.error.clone(),
        }
    }

    /// One line.
    pub fn line(&self) -> String {
        let Self { table, state, rows, .. } = self;
        let mut text = format!("{table}: {state}, {rows} rows");
        if let Some(percent) = self.percent {
            text += &format!(" ({percent:.1} %)");
        }
        if self.left_out > 0 {
            text += &format!(", {} of them not sent", self.left_out);
        }
        if let Some(rate) = self.rows_per_second {
            text += &format!(", {rate:.0} rows/s");
        }
        if let Some(eta) = self.eta_seconds {
            text += &format!(", {eta:.0} s to go");
        }
        if let Some(why) = &self.waits {
            text += &format!("; waits: {why}");
        }
        if let Some(why) = &self.error {
            text += &format!("; {why}");
        }
        text
    }
}

#[cfg(test)]
pub(super) fn run(state: RunState) -> Run {
    Run {
        run: uuid::Uuid::from_u128(5),
        table: "public.orders".into(),
        condition: None,
        first_key: None,
        state,
        waits: None,
        error: None,
        began: None,
        last_key: None,
        rows: 0,
        left_out: 0,
        total: None,
        initial: false,
        requested_at: 0.0,
        started_at: None,
        ended_at: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_told_as_far_as_it_is_known() {
        let mut one = run(RunState::Running);
        let view = BackfillView::new(&one, None);
        assert_eq!(view.line(), "public.orders: running, 0 rows");
        (one.rows, one.total) = (500, Some(2_000));
        let view = BackfillView::new(&one, Some((100, Duration::from_secs(2))));
        let line = "public.orders: running, 500 rows (25.0 %), 50 rows/s, 30 s to go";
        assert_eq!(view.line(), line);
        one.waits = Some("the broker blocks publishing".into());
        let view = BackfillView::new(&one, Some((0, Duration::from_secs(2))));
        assert!(view.line().ends_with("0 rows/s; waits: the broker blocks publishing"));
        // The estimate was too low.
        (one.rows, one.waits) = (2_500, None);
        assert_eq!(BackfillView::new(&one, None).percent, Some(99.9));
        one.state = RunState::Done;
        assert_eq!(BackfillView::new(&one, None).percent, Some(100.0));
        (one.rows, one.left_out) = (2_500, 2_000);
        let line = "public.orders: done, 2500 rows (100.0 %), 2000 of them not sent";
        assert_eq!(BackfillView::new(&one, None).line(), line);
        (one.state, one.error) = (RunState::Failed, Some("the table was truncated".into()));
        assert!(BackfillView::new(&one, None).line().ends_with("; the table was truncated"));
    }
}
