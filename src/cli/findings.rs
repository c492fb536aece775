//! What `check` finds, each with what to do about it.

use serde::Serialize;

use super::{End, Out, printable};
use crate::error::Error;
use crate::relay::status::{Concern, Severity};

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Level {
    Ok,
    /// The relay works; something may go wrong later.
    Warning,
    /// The relay will not work, or messages will not arrive.
    Problem,
    /// Continuing would be a guess: an operator has to decide.
    Verdict,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Finding {
    level: Level,
    area: &'static str,
    what: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

/// All findings, printed as they come.
pub(super) struct Findings {
    list: Vec<Finding>,
    out: Out,
}

#[derive(Serialize)]
struct Report<'a> {
    result: Level,
    findings: &'a [Finding],
}

impl Findings {
    pub(super) fn new(out: Out) -> Self {
        Self { list: Vec::new(), out }
    }

    pub(super) fn ok(&mut self, area: &'static str, what: impl Into<String>) {
        self.add(Level::Ok, area, what.into(), None);
    }

    pub(super) fn warning(
        &mut self,
        area: &'static str,
        what: impl Into<String>,
        hint: impl Into<String>,
    ) {
        self.add(Level::Warning, area, what.into(), Some(hint.into()));
    }

    pub(super) fn problem(
        &mut self,
        area: &'static str,
        what: impl Into<String>,
        hint: impl Into<String>,
    ) {
        self.add(Level::Problem, area, what.into(), Some(hint.into()));
    }

    /// Adds an error, as a verdict if it is one.
    pub(super) fn error(&mut self, area: &'static str, error: &Error) {
        let level = if error.kind().is_verdict() { Level::Verdict } else { Level::Problem };
        self.add(level, area, error.to_string(), error.hint_text().map(str::to_owned));
    }

    /// Adds what the running relay says is wrong with it.
    pub(super) fn reported(&mut self, area: &'static str, problem: Concern) {
        let level = match problem.level {
            Severity::Warning => Level::Warning,
            Severity::Problem => Level::Problem,
            Severity::Verdict => Level::Verdict,
        };
        self.add(level, area, problem.what, Some(problem.hint));
    }

    /// How many are worse than a warning.
    pub(super) fn problems(&self) -> usize {
        self.list.iter().filter(|f| f.level >= Level::Problem).count()
    }

    fn add(&mut self, level: Level, area: &'static str, what: String, hint: Option<String>) {
        let (word, colour) = match level {
            Level::Ok => ("ok", 32),
            Level::Warning => ("warning", 33),
            Level::Problem => ("problem", 31),
            Level::Verdict => ("verdict", 31),
        };
        let word = format!("{word:<8}");
        self.out.marked(colour, &word, &format!(" {area:<12} {}", printable::one_line(&what)));
        if let Some(hint) = &hint {
            self.out.line(&format!("         {:<12} -> {}", "", printable::one_line(hint)));
        }
        self.list.push(Finding { level, area, what, hint });
    }

    /// Prints the totals and returns how the command ends.
    pub(super) fn finish(self) -> crate::error::Result<End> {
        let count = |level| self.list.iter().filter(|f| f.level == level).count();
        let worst = self.list.iter().map(|f| f.level).max().unwrap_or(Level::Ok);
        self.out.line(&format!(
            "\n{} ok, {} warnings, {} problems",
            count(Level::Ok),
            count(Level::Warning),
            count(Level::Problem) + count(Level::Verdict)
        ));
        self.out.data(&Report { result: worst, findings: &self.list })?;
        Ok(match worst {
            Level::Ok | Level::Warning => End::Fine,
            Level::Problem => End::Failed,
            Level::Verdict => End::NeedsDecision,
        })
    }
}
