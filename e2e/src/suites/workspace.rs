//! Formatting, lints, unit and property tests: no cluster, no root.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use super::Tally;
use crate::build::{cargo, tool};
use crate::progress::say;
use crate::{book, cluster, host};

/// The release of cargo-deny.
const CARGO_DENY: &str = "0.20.2";

/// Runs every check that needs nothing but cargo.
pub(super) fn run() -> Tally {
    let mut tally = Tally::default();
    if let Err(error) = host::install_packages(host::TOOLCHAIN) {
        eprintln!("warning: {error:#}");
    }
    let checks: [(&str, &[&str]); 3] = [
        ("the code is formatted", &["fmt", "--all", "--check"]),
        (
            "clippy reports nothing",
            &["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"],
        ),
        (
            "the fuzz targets have all dependencies of the workspace in their lock file",
            &["metadata", "--locked", "--format-version", "1", "--manifest-path", "fuzz/Cargo.toml"],
        ),
    ];
    for (sentence, arguments) in checks {
        record(&mut tally, sentence, cargo(sentence, arguments).map(|_| String::new()));
    }
    let sentence = "every dependency has a permissive licence and a known source, and none is banned";
    record(&mut tally, sentence, dependencies().map(|advisories| format!(" ({advisories})")));
    let sentence = "the documentation can be built as a book, and every link in it leads somewhere";
    record(&mut tally, sentence, book::build().map(|_| String::new()));
    let sentence = "h2spec finds nothing in how a sidecar serves HTTP/2";
    if host::is_installed("go") {
        record(&mut tally, sentence, h2spec().map(|tests| format!(" ({tests})")));
    } else {
        tally.skipped += 1;
        say(&format!("skipped workspace: {sentence}: Go is not installed, which compiles it"));
    }
    let sentence = "unit and property tests";
    let tests = cargo(sentence, &["test", "--locked", "--workspace", "--no-fail-fast"]);
    let text = match &tests {
        Ok(text) => text.clone(),
        Err(error) => format!("{error:#}"),
    };
    let (passed, failed) = count(&text);
    if tests.is_err() {
        say(&text);
    }
    if tests.is_err() {
        tally.fail(&format!("FAILED  workspace: {sentence}: {}", failures(&text)));
        // A build that fails counts as a failed test.
        tally.failed += failed.saturating_sub(1);
    }
    tally.passed += passed;
    say(&format!("suite workspace: {} passed, {} failed", tally.passed, tally.failed));
    tally
}

/// Counts a check and prints its sentence, with a remark behind it.
fn record(tally: &mut Tally, sentence: &str, result: Result<String>) {
    match result {
        Ok(remark) => {
            tally.passed += 1;
            say(&format!("ok      workspace: {sentence}{remark}"));
        }
        Err(error) => {
            let line = format!("FAILED  workspace: {sentence}\n{error:#}");
            say(&line);
            tally.fail(&line);
        }
    }
}

/// Checks `deny.toml` with cargo-deny, compiled once and kept outside the clone. Returns the result for the
/// advisories, whose database is the one part that has to be fetched each time.
fn dependencies() -> Result<&'static str> {
    let program = tool("cargo-deny", CARGO_DENY, &[])?;
    let check = |what: &[&str]| {
        let mut deny = Command::new(&program);
        host::output(deny.current_dir(host::workspace()).args(["--log-level", "error", "check"]).args(what))
    };
    check(&["bans", "licenses", "sources"])?;
    match check(&["advisories"]) {
        Ok(_) => Ok("no advisories"),
        Err(error) if format!("{error:#}").contains("advisory database") => {
            Ok("advisories not checked: their database could not be fetched")
        }
        Err(error) => Err(error),
    }
}

/// Runs h2spec, with all that it calls strict, against the example `http2` of the sidecar. Returns how it counts its tests.
fn h2spec() -> Result<String> {
    let suite = cluster::h2spec()?;
    let target = host::workspace().join("target");
    let folder = target.display().to_string();
    cargo(
        "the server for h2spec",
        &["build", "--locked", "--package", "tulle-sidecar", "--example", "http2", "--target-dir", &folder],
    )?;
    // Below the folder of a target, as `.cargo/config.toml` chooses one.
    let triple = target.join(format!("{}-unknown-linux-gnu", std::env::consts::ARCH));
    let places = [triple, target].map(|folder| folder.join("debug/examples/http2"));
    let program = places.iter().find(|program| program.is_file()).context("cargo built no example http2")?;
    let server = Command::new(program).arg("127.0.0.1:0").stdout(Stdio::piped()).spawn();
    let mut server = Ended(server.context("the example http2 cannot be started")?);
    let mut address = String::new();
    let printed = server.0.stdout.take().context("the example http2 has no output")?;
    BufReader::new(printed).read_line(&mut address)?;
    let port = address.trim().rsplit(':').next().unwrap_or_default();
    let mut run = Command::new(suite);
    let text = host::output(run.args(["--strict", "--host", "127.0.0.1", "--port", port, "--timeout", "5"]))?;
    let counts = text.lines().find(|line| line.contains(" tests, ")).unwrap_or_default();
    ensure!(counts.ends_with("0 skipped, 0 failed"), "{text}");
    Ok(counts.to_owned())
}

/// A program that ends with its test.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Adds up the result lines of cargo's tests.
fn count(text: &str) -> (usize, usize) {
    let results = text.lines().filter(|line| line.starts_with("test result:"));
    results.fold((0, 0), |(passed, failed), line| {
        (passed + before(line, " passed"), failed + before(line, " failed"))
    })
}

/// The names of the tests that have failed, or the last words of a build that has.
fn failures(text: &str) -> String {
    let names = text.lines().filter_map(|line| line.strip_prefix("test ")?.strip_suffix(" ... FAILED"));
    let names: Vec<&str> = names.collect();
    if names.is_empty() {
        let last: Vec<&str> = text.lines().filter(|line| line.starts_with("error")).take(5).collect();
        return last.join("; ");
    }
    names.join(", ")
}

fn before(line: &str, word: &str) -> usize {
    let head = line.split(word).next().unwrap_or("");
    head.rsplit(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #[test]
    fn results_of_cargo_are_added_up() {
        let text = "test result: ok. 3 passed; 1 failed; 0 ignored\nx\ntest result: ok. 20 passed; 0 failed; 0 ignored\n";
        assert_eq!(super::count(text), (23, 1));
    }

    #[test]
    fn what_failed_is_told_by_name() {
        let text = "test a::b ... ok\ntest a::c ... FAILED\nerror: test failed, to rerun pass `--lib`\n";
        assert_eq!(super::failures(text), "a::c");
        assert_eq!(super::failures("x\nerror[E0308]: mismatched types\n"), "error[E0308]: mismatched types");
    }
}
