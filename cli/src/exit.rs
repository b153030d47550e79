//! How a command ends: errors, what is printed about them, and exit codes.

use std::io::Write as _;

use crate::output::{Colour, Output, cell, plain_lines};

/// Every exit code and its meaning. All commands share them.
pub const CODES: [ExitCode; 5] = [
    ExitCode { code: 0, meaning: "fine" },
    ExitCode { code: 1, meaning: "the command could not run" },
    ExitCode { code: 2, meaning: "the command line is wrong" },
    ExitCode {
        code: 3,
        meaning: "findings (--fail-on says which count), a request that does not arrive, or a rollout that failed",
    },
    ExitCode { code: 4, meaning: "what was waited for did not happen in time" },
];

/// A row of [`CODES`].
pub struct ExitCode {
    /// The code.
    pub code: u8,
    /// When a command ends with it.
    pub meaning: &'static str,
}

/// Why a command did not do what it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CliError {
    /// The command line asks for something that does not exist or contradicts itself.
    #[error("{0}")]
    Usage(String),
    /// The command could not run.
    #[error("{what}")]
    Failed {
        /// What was tried, and what was found.
        what: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// The command has run, and has already printed what it found.
    #[error("there are findings")]
    Findings,
    /// What was waited for did not happen in the time that the user gave.
    #[error("{0}")]
    TimedOut(String),
    /// Nobody reads standard output any more, as after `| head`.
    #[error("standard output is closed")]
    Closed,
}

impl CliError {
    /// The command could not run.
    pub fn failed(what: impl Into<String>) -> Self {
        Self::Failed { what: what.into(), hint: None }
    }

    /// The command line is wrong.
    pub fn usage(what: impl Into<String>) -> Self {
        Self::Usage(what.into())
    }

    /// Adds what to do about it. Only [`CliError::Failed`] takes a hint.
    #[must_use]
    pub fn hint(self, hint: impl Into<String>) -> Self {
        match self {
            Self::Failed { what, .. } => Self::Failed { what, hint: Some(hint.into()) },
            other => other,
        }
    }

    /// The exit code: one of [`CODES`].
    pub fn code(&self) -> u8 {
        match self {
            Self::Closed => 0,
            Self::Failed { .. } => 1,
            Self::Usage(_) => 2,
            Self::Findings => 3,
            Self::TimedOut(_) => 4,
        }
    }

    /// The lines for standard error; empty where everything has been said.
    pub fn message(&self, output: &Output) -> String {
        let error = output.paint(Colour::Red, "error:");
        match self {
            Self::Findings | Self::Closed => String::new(),
            // Both may quote the cluster.
            Self::Failed { what, hint: Some(hint) } => {
                format!("{error} {}\nhint: {}\n", plain_lines(what), plain_lines(hint))
            }
            Self::Failed { .. } | Self::Usage(_) | Self::TimedOut(_) => {
                format!("{error} {}\n", plain_lines(&self.to_string()))
            }
        }
    }

    /// Prints [`CliError::message`] on standard error.
    pub fn print(&self, output: &Output) {
        let _ = std::io::stderr().write_all(self.message(output).as_bytes());
    }
}

/// Writes a line on standard error, with our own colours and no other control characters: it may quote the cluster. A closed one, as after
/// `2>&-`, does not end the program.
pub fn note(line: &str) {
    let _ = write_note(&mut std::io::stderr(), line);
}

fn write_note(to: &mut impl std::io::Write, line: &str) -> std::io::Result<()> {
    let lines: Vec<String> = line.split('\n').map(cell).collect();
    to.write_all(format!("{}\n", lines.join("\n")).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_ends_with_a_code_of_the_table() {
        let errors = [
            (CliError::Closed, 0),
            (CliError::failed("no"), 1),
            (CliError::usage("no"), 2),
            (CliError::Findings, 3),
            (CliError::TimedOut("no".into()), 4),
        ];
        for (error, code) in errors {
            assert_eq!(error.code(), code, "{error:?}");
            assert!(CODES.iter().any(|row| row.code == code), "{error:?}");
        }
    }

    #[test]
    fn a_note_moves_no_cursor_whatever_it_quotes() {
        let mut written = Vec::new();
        let warning = Output { colour: true, ..Output::default() }.paint(Colour::Yellow, "warning:");
        write_note(&mut written, &format!("{warning} pod a\u{1b}[2J\rb\nc")).unwrap();
        let expected = "\u{1b}[33mwarning:\u{1b}[0m pod a\u{fffd}[2J\u{fffd}b\nc\n";
        assert_eq!(String::from_utf8(written).unwrap(), expected);
    }

    #[test]
    fn an_error_is_printed_with_its_hint_and_findings_are_not_printed_twice() {
        let output = Output::default();
        let error = CliError::failed("Tulle is not installed").hint("tulle install");
        assert_eq!(error.message(&output), "error: Tulle is not installed\nhint: tulle install\n");
        assert_eq!(CliError::usage("which?").hint("none").message(&output), "error: which?\n");
        assert_eq!(CliError::Findings.message(&output), "");
        let evil = CliError::failed("pod a\u{1b}[2J\nb").hint("c\rd");
        assert_eq!(evil.message(&output), "error: pod a\u{fffd}[2J\nb\nhint: c\u{fffd}d\n");
    }
}
