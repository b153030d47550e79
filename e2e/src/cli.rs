//! Runs `tulle`, the command line, against the cluster of the demo and the tests.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::host::{self, Ended};
use crate::images;
use crate::kubectl::Kube;

/// Time limit of a call of `tulle`, so that one that hangs does not block the whole run.
const LIMIT: Duration = Duration::from_secs(180);

/// The exit codes of every command.
pub mod exit {
    /// The command has done what it was asked for.
    pub const FINE: i32 = 0;
    /// It could not run.
    pub const FAILED: i32 = 1;
    /// The command line is wrong.
    pub const USAGE: i32 = 2;
    /// It has found what it was asked to look for.
    pub const FINDINGS: i32 = 3;
    /// What was waited for did not happen in time.
    pub const TIMED_OUT: i32 = 4;
}

/// What `tulle` has printed, and how it ended.
#[derive(Clone, Debug)]
pub struct Printed {
    /// The exit code; -1: a signal has ended it.
    pub code: i32,
    /// The result.
    pub stdout: String,
    /// Errors, hints, and what the result lacks.
    pub stderr: String,
}

impl Printed {
    /// The result as JSON.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.stdout).with_context(|| format!("not JSON: {self:?}"))
    }
}

impl Kube {
    /// A program of this machine, where the cluster's API server and the pods' ports can be reached.
    pub fn program(&self, program: &str) -> Result<Command> {
        match self {
            Self::Embedded(cluster) => cluster.inside(program),
            Self::Context(_) => Ok(Command::new(program)),
        }
    }

    /// Program and arguments of a call of `tulle`.
    pub fn tulle_words(&self, arguments: &[&str]) -> Result<Vec<String>> {
        let mut words = vec![images::tulle()?.display().to_string()];
        if let Self::Context(name) = self {
            words.extend(["--context".to_owned(), name.clone()]);
        }
        words.extend(arguments.iter().map(|argument| (*argument).to_owned()));
        Ok(words)
    }

    /// Runs `tulle`, however it ends.
    ///
    /// # Errors
    /// It was not built, or has not ended in time.
    pub fn tulle_ended(&self, arguments: &[&str]) -> Result<Printed> {
        let words = self.tulle_words(arguments)?;
        let (program, rest) = words.split_first().context("a command has a program")?;
        let mut command = self.program(program)?;
        let Ended { status, stdout, stderr } = host::ended_within(command.args(rest), LIMIT)?;
        Ok(Printed { code: status.code().unwrap_or(-1), stdout, stderr })
    }

    /// Runs `tulle` and returns its result.
    ///
    /// # Errors
    /// It ends with another exit code than 0.
    pub fn tulle(&self, arguments: &[&str]) -> Result<String> {
        self.tulle_expecting(exit::FINE, arguments).map(|printed| printed.stdout)
    }

    /// Runs `tulle`, which must end with this code.
    ///
    /// # Errors
    /// It ends with another one.
    pub fn tulle_expecting(&self, code: i32, arguments: &[&str]) -> Result<Printed> {
        let printed = self.tulle_ended(arguments)?;
        if printed.code != code {
            bail!(
                "tulle {}: exit code {}, expected {code}\n{}{}",
                arguments.join(" "),
                printed.code,
                printed.stdout,
                printed.stderr.trim_end()
            );
        }
        Ok(printed)
    }

    /// Runs `tulle` with `-o json` and parses its result.
    pub fn tulle_json(&self, arguments: &[&str]) -> Result<Value> {
        self.tulle_expecting(exit::FINE, &[arguments, &["-o", "json"]].concat())?.json()
    }
}
