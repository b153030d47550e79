//! Runs the fuzz targets in `fuzz/`.
//!
//! They are compiled by the stable toolchain with the instrumentation of libFuzzer, as `cargo fuzz --sanitizer none`
//! does it; that needs a C++ compiler, and neither a nightly toolchain nor another cargo command.

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::build;
use crate::host;
use crate::progress::{say, task};

/// The targets, each a program in `fuzz/targets/`.
const TARGETS: [&str; 6] = ["http1", "http2", "detection", "wire", "paths", "routes"];

/// Edge coverage and compared values, for libFuzzer to be guided by. They replace the flags of `.cargo/config.toml`.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
     -Cllvm-args=-sanitizer-coverage-trace-compares -Cllvm-args=-simplifycfg-branch-fold-threshold=0";

/// Longest input, in bytes. Everything that is read is bounded, and long inputs only make runs slow.
const MAX_INPUT: usize = 8 * 1024;
/// An input that takes this many seconds is a finding.
const INPUT_SECONDS: u32 = 10;

/// How a target's run went.
struct Outcome {
    target: &'static str,
    executions: u64,
    per_second: u64,
    /// The input that was found, if one was.
    finding: Option<PathBuf>,
    /// The end of what the target printed, when it failed.
    said: String,
}

/// Runs one target or all, for this many seconds each.
///
/// # Errors
/// A target could not be compiled or started, or there are findings.
pub fn run(target: Option<&str>, seconds: u64) -> Result<()> {
    let targets: Vec<&'static str> = match target {
        None => TARGETS.to_vec(),
        Some(name) => TARGETS.into_iter().filter(|target| *target == name).collect(),
    };
    if targets.is_empty() {
        bail!("no fuzz target {:?}; there are {}", target.unwrap_or(""), TARGETS.join(", "));
    }
    host::install_packages(&[("c++", "g++")])?;
    let programs = compile()?;
    let mut findings = 0;
    for target in targets {
        let program = programs.iter().find(|program| program.file_name().is_some_and(|name| name == target));
        let program = program.with_context(|| format!("cargo has built no program {target}"))?;
        let outcome = fuzz(target, program, seconds)?;
        say(&format!(
            "{:<10} {:>12} executions  {:>8} exec/s  {} findings",
            outcome.target,
            outcome.executions,
            outcome.per_second,
            usize::from(outcome.finding.is_some())
        ));
        if let Some(finding) = &outcome.finding {
            findings += 1;
            say(&format!("{}\ninput: {}", outcome.said, finding.display()));
            say(&format!("again: {} {}", program.display(), finding.display()));
        }
    }
    if findings > 0 {
        bail!("{findings} fuzz targets have findings");
    }
    Ok(())
}

fn folder() -> PathBuf {
    host::workspace().join("target/fuzz")
}

/// Compiles the targets; the paths of their programs.
fn compile() -> Result<Vec<PathBuf>> {
    let variables = [
        ("RUSTFLAGS".to_owned(), FLAGS.to_owned()),
        ("CARGO_TARGET_DIR".to_owned(), folder().to_string_lossy().into_owned()),
    ];
    let arguments = ["build", "--release", "--bins", "--locked", "--message-format=json-render-diagnostics"];
    let messages = build::cargo_with(
        &host::workspace().join("fuzz"),
        "compiling the fuzz targets",
        &arguments,
        &variables,
    )?;
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    Ok(messages.filter_map(|message| message["executable"].as_str().map(PathBuf::from)).collect())
}

fn fuzz(target: &'static str, program: &Path, seconds: u64) -> Result<Outcome> {
    let (corpus, findings) = (folder().join("corpus").join(target), folder().join("findings").join(target));
    for folder in [&corpus, &findings] {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    }
    let mut command = Command::new(program);
    command.arg(format!("-max_total_time={seconds}"));
    command.arg(format!("-max_len={MAX_INPUT}")).arg(format!("-timeout={INPUT_SECONDS}"));
    command.args(["-rss_limit_mb=2048", "-print_final_stats=1"]);
    // libFuzzer appends the kind of the finding and its hash.
    command.arg(format!("-artifact_prefix={}/", findings.display()));
    command.arg(&corpus).arg(host::workspace().join("fuzz/seeds").join(target));
    let (status, lines) = watch(target, &mut command)?;
    let said = lines.join("\n");
    let written = lines.iter().rev().find_map(|line| Some(line.split_once("Test unit written to ")?.1));
    // A slow input is written as well, but is not a finding.
    let finding = written.filter(|_| !status.success()).map(|path| PathBuf::from(path.trim()));
    if !status.success() && finding.is_none() {
        bail!("fuzz target {target} failed without an input: {status}\n{said}");
    }
    let statistic = |name: &str| {
        let value = lines.iter().rev().find_map(|line| line.strip_prefix("stat::")?.strip_prefix(name));
        value.and_then(|value| value.trim_start_matches(':').trim().parse().ok()).unwrap_or(0)
    };
    Ok(Outcome {
        target,
        executions: statistic("number_of_executed_units"),
        per_second: statistic("average_exec_per_sec"),
        finding,
        said,
    })
}

/// Runs a target with its progress on the progress line; its status, and the last lines that it printed.
fn watch(target: &str, command: &mut Command) -> Result<(ExitStatus, Vec<String>)> {
    let task = task(&format!("fuzzing {target}"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot run the fuzz target {target}"))?;
    let mut lines: Vec<String> = Vec::new();
    if let Some(errors) = child.stderr.take() {
        let mut pending = Vec::new();
        for byte in std::io::BufReader::new(errors).bytes() {
            let byte = byte?;
            if byte != b'\n' {
                pending.push(byte);
                continue;
            }
            let line = String::from_utf8_lossy(&pending).into_owned();
            pending.clear();
            if line.starts_with('#') {
                task.report(&line);
                continue;
            }
            if lines.len() >= 60 {
                lines.remove(0);
            }
            lines.push(line);
        }
    }
    Ok((child.wait()?, lines))
}
