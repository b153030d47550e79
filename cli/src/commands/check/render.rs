//! Findings as text and as JSON. No state is shown by colour alone.

use serde::Serialize;
use tulle_mesh::check::list::ALL;
use tulle_mesh::check::{Finding, Outcome};

use crate::output::{Colour, Output};

/// Every finding, below its category.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// The worst of the findings.
    pub result: Outcome,
    pub errors: usize,
    pub warnings: usize,
    pub categories: Vec<Category>,
}

/// The findings of a category.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Category {
    pub name: &'static str,
    pub findings: Vec<Finding>,
}

impl Report {
    /// Sorts findings into their categories, in the order of the list of checks.
    pub fn of(mut findings: Vec<Finding>) -> Self {
        let place = |id: &str| ALL.iter().position(|check| check.id == id).unwrap_or(ALL.len());
        findings.sort_by_key(|finding| place(finding.id));
        let count = |outcome| findings.iter().filter(|finding| finding.result == outcome).count();
        let (errors, warnings) = (count(Outcome::Error), count(Outcome::Warning));
        let result = findings.iter().map(|finding| finding.result).max().unwrap_or(Outcome::Ok);
        let mut categories: Vec<Category> = Vec::new();
        for finding in findings {
            match categories.last_mut().filter(|last| last.name == finding.category) {
                Some(last) => last.findings.push(finding),
                None => categories.push(Category { name: finding.category, findings: vec![finding] }),
            }
        }
        Self { result, errors, warnings, categories }
    }

    /// The numbers of the checks that are not well, one in a line.
    pub fn ids(&self) -> String {
        let findings = self.categories.iter().flat_map(|category| &category.findings);
        let mut ids: Vec<&str> =
            findings.filter(|finding| finding.result != Outcome::Ok).map(|finding| finding.id).collect();
        ids.dedup();
        ids.iter().map(|id| format!("{id}\n")).collect()
    }

    /// For people. `short`: only what is not well.
    pub fn text(&self, output: &Output, short: bool) -> String {
        let mut text = String::new();
        for category in &self.categories {
            let shown: Vec<&Finding> =
                category.findings.iter().filter(|finding| !short || finding.result != Outcome::Ok).collect();
            if shown.is_empty() {
                continue;
            }
            text.push_str(&format!("{}\n{}\n", category.name, "-".repeat(category.name.len())));
            for finding in shown {
                text.push_str(&lines(finding, output));
            }
            text.push('\n');
        }
        text.push_str(&self.summary());
        text
    }

    fn summary(&self) -> String {
        match (self.errors, self.warnings) {
            (0, 0) => "√ all is well\n".to_owned(),
            (0, warnings) => format!("‼ {}, no errors\n", counted(warnings, "warning")),
            (errors, warnings) => {
                format!("× {}, {}\n", counted(errors, "error"), counted(warnings, "warning"))
            }
        }
    }
}

fn counted(count: usize, what: &str) -> String {
    match count {
        0 => format!("no {what}s"),
        1 => format!("1 {what}"),
        _ => format!("{count} {what}s"),
    }
}

fn lines(finding: &Finding, output: &Output) -> String {
    let (colour, mark) = match finding.result {
        Outcome::Ok => (Colour::Green, "√ ok     "),
        Outcome::Warning => (Colour::Yellow, "‼ warning"),
        Outcome::Error => (Colour::Red, "× error  "),
    };
    let mut text = format!("{} {}  {}", output.paint(colour, mark), finding.id, finding.check);
    if finding.result == Outcome::Ok {
        text.push_str(&format!(" ({})\n", finding.found));
        return text;
    }
    text.push_str(&format!("\n    {}\n", finding.found));
    for (name, value) in [("hint", &finding.hint), ("fix", &finding.fix)] {
        if !value.is_empty() {
            text.push_str(&format!("    {name}: {value}\n"));
        }
    }
    text
}
