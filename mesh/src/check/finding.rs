//! What a check has found.

use std::fmt;

use serde::Serialize;

use super::Check;

/// How a check ended. In order: the worst last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// All is well.
    Ok,
    /// It works, and may not for long or not for all.
    Warning,
    /// It does not work.
    Error,
}

/// What a check has found about one thing, or that all is well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// The number of the check.
    pub id: &'static str,
    /// The heading below which the check stands.
    pub category: &'static str,
    /// What was checked.
    pub check: &'static str,
    /// How it ended.
    pub result: Outcome,
    /// What was found.
    pub found: String,
    /// What it means, and what to do. Empty only where all is well.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub hint: String,
    /// The command that repairs it, or that shows more. Empty only where all is well.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub fix: String,
}

impl Check {
    fn finding(&self, result: Outcome, found: String) -> Finding {
        let (id, category, check) = (self.id, self.category, self.title);
        Finding { id, category, check, result, found, hint: String::new(), fix: String::new() }
    }

    /// All is well.
    pub fn ok(&self, found: impl Into<String>) -> Finding {
        self.finding(Outcome::Ok, found.into())
    }

    /// It works, and may not for long or not for all.
    pub fn warning(&self, found: impl Into<String>) -> Finding {
        self.finding(Outcome::Warning, found.into())
    }

    /// It does not work.
    pub fn error(&self, found: impl Into<String>) -> Finding {
        self.finding(Outcome::Error, found.into())
    }

    /// It could not be checked.
    pub fn unknown(&self, what: &str, why: impl fmt::Display) -> Finding {
        self.warning(format!("{what} could not be checked: {why}"))
    }
}

impl Finding {
    /// The same with a hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// The same with a command.
    #[must_use]
    pub fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = fix.into();
        self
    }
}

/// The findings, or that all is well if there are none.
pub fn or_ok(findings: Vec<Finding>, well: impl FnOnce() -> Finding) -> Vec<Finding> {
    if findings.is_empty() { vec![well()] } else { findings }
}
