//! Captured tables that are lost and held, and those that came back.

use serde::Serialize;

use super::Concern;

/// A captured table whose changes do not come (`on_table_lost = "hold"`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LostTable {
    /// `schema.table`.
    pub table: String,
    /// Why.
    pub reason: String,
    /// What to do.
    pub hint: String,
    /// From this LSN on changes of it may be missing.
    pub since_lsn: String,
}

/// A captured table that was lost, and is back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ReturnedTable {
    /// `schema.table`.
    pub table: String,
    /// From this LSN on changes of it may be missing,
    pub from_lsn: String,
    /// and up to this one.
    pub to_lsn: String,
    /// What of it is published differently than before.
    pub differs: Option<String>,
}

/// Both; kept as long as the process lives.
#[derive(Debug, Clone, Default)]
pub(super) struct Tables {
    pub(super) lost: Vec<LostTable>,
    pub(super) returned: Vec<ReturnedTable>,
}

impl Tables {
    /// These are lost now; returns those for which that is news.
    pub(super) fn lose(&mut self, lost: Vec<LostTable>) -> Vec<LostTable> {
        let is_known = |one: &LostTable| {
            let same =
                |before: &LostTable| (&before.table, &before.reason) == (&one.table, &one.reason);
            self.lost.iter().any(same)
        };
        let news = lost.iter().filter(|one| !is_known(one)).cloned().collect();
        self.lost = lost;
        news
    }

    /// This one is back. Only the last return of a table is kept.
    pub(super) fn find(&mut self, back: ReturnedTable) {
        self.returned.retain(|before| before.table != back.table);
        self.returned.push(back);
    }
}

/// What is wrong.
pub(super) fn concerns(lost: &[LostTable], returned: &[ReturnedTable]) -> Vec<Concern> {
    let lost = lost.iter().map(|LostTable { reason, hint, since_lsn, .. }| {
        let text = format!(
            "{reason}: its changes have not been published since {since_lsn} (on_table_lost = \
             \"hold\")"
        );
        Concern::new(text, hint)
    });
    let returned = returned.iter().map(|back| {
        let ReturnedTable { table, from_lsn, to_lsn, differs } = back;
        let differs = differs.iter().map(|what| format!("; published differently now: {what}"));
        let text = format!(
            "captured table {table} was lost and is back: changes committed between {from_lsn} and \
             {to_lsn} while it was out of the publication, or had another name, were not \
             published{}",
            differs.collect::<String>()
        );
        let hint = "it is recorded in watership.resync; bring its consumers up to date. This \
                    warning clears when the relay is next restarted";
        Concern::warning(text, hint)
    });
    lost.chain(returned).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Severity, Status};
    use super::*;

    fn lost(reason: &str) -> LostTable {
        let text = str::to_owned;
        let (table, since_lsn) = (text("public.a"), text("0/1"));
        LostTable { table, reason: text(reason), hint: text("h"), since_lsn }
    }

    #[test]
    fn a_lost_table_is_a_problem_until_it_is_back_and_news_once() {
        let status = Status::new("r", Vec::new());
        status.streaming();
        assert_eq!(status.lost_tables(vec![lost("gone")]), [lost("gone")]);
        assert_eq!(status.lost_tables(vec![lost("gone")]), []);
        assert_eq!(status.lost_tables(vec![lost("left out")]), [lost("left out")]);
        let levels = |status: &Status| {
            let problems = status.snapshot().problems.into_iter();
            problems.map(|problem| problem.level).collect::<Vec<_>>()
        };
        assert_eq!(levels(&status), [Severity::Problem]);
        assert_eq!(status.lost_tables(Vec::new()), []);
        let [from_lsn, to_lsn] = ["0/1", "0/2"].map(str::to_owned);
        let back = ReturnedTable { table: "public.a".into(), from_lsn, to_lsn, differs: None };
        status.returned_table(back.clone());
        status.returned_table(back);
        let problems = status.snapshot().problems;
        assert_eq!(levels(&status), [Severity::Warning]);
        assert!(problems[0].what.contains("between 0/1 and 0/2"), "{problems:?}");
    }
}
