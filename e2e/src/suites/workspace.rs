//! Formatting, lints, unit and property tests: no cluster, no root.

use std::process::Command;

use super::Tally;
use crate::host;
use crate::progress::step;

/// Runs everything that cargo can.
pub(super) fn run() -> Tally {
    let mut tally = Tally::default();
    if let Err(error) = host::install_packages(host::TOOLCHAIN) {
        eprintln!("warning: {error:#}");
    }
    let checks: [(&str, &[&str]); 2] = [
        ("the code is formatted", &["fmt", "--all", "--check"]),
        (
            "clippy has nothing to say",
            &["clippy", "--quiet", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"],
        ),
    ];
    for (sentence, arguments) in checks {
        step(sentence);
        match host::output(cargo().args(arguments)) {
            Ok(_) => {
                tally.passed += 1;
                println!("ok      workspace: {sentence}");
            }
            Err(error) => {
                tally.failed += 1;
                println!("FAILED  workspace: {sentence}\n{error:#}");
            }
        }
    }
    step("unit and property tests");
    let tests = host::output(cargo().args(["test", "--locked", "--workspace", "--no-fail-fast"]));
    let text = match &tests {
        Ok(text) => text.clone(),
        Err(error) => format!("{error:#}"),
    };
    let (passed, failed) = count(&text);
    if tests.is_err() {
        println!("{text}");
    }
    // A build that fails counts too.
    tally.failed += if tests.is_err() { failed.max(1) } else { 0 };
    tally.passed += passed;
    println!("suite workspace: {} passed, {} failed", tally.passed, tally.failed);
    tally
}

fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(host::workspace());
    cargo
}

/// Adds up the result lines of cargo's tests.
fn count(text: &str) -> (usize, usize) {
    let results = text.lines().filter(|line| line.starts_with("test result:"));
    results.fold((0, 0), |(passed, failed), line| {
        (passed + before(line, " passed"), failed + before(line, " failed"))
    })
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
}
