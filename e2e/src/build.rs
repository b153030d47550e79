//! Builds everything that a cluster needs, in parallel, and shows cargo's progress.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Result, anyhow};

use crate::cluster;
use crate::host;
use crate::images::{self, Image};
use crate::install;
use crate::progress::{Task, step, task};

/// Installs the machine's programs, and compiles the cluster's components and the images' programs. In parallel, so that
/// Go and apt use the processors while cargo links, and the other way round.
pub fn prepare(images: &[Image], cluster: &str) -> Result<()> {
    install::check(cluster)?;
    let embedded = cluster == "embedded";
    let components = thread::spawn(move || {
        let done = if embedded { cluster::prepare() } else { Ok(()) };
        if let Err(error) = &done {
            step(&format!("FAILED, while cargo goes on: {error:#}"));
        }
        done
    });
    let programs = images::compile(images, false);
    let components = components.join().map_err(|_| anyhow!("compiling the cluster's components panicked"))?;
    match (programs, components) {
        (Err(programs), Err(components)) => Err(anyhow!("{programs:#}\n\n{components:#}")),
        (programs, components) => programs.and(components),
    }
}

/// Runs cargo in the workspace; `name` names the task in the progress line.
///
/// # Errors
/// The command line and the last lines of cargo's standard error.
pub fn cargo(name: &str, arguments: &[&str]) -> Result<String> {
    cargo_in(host::workspace(), name, arguments)
}

/// Runs cargo in a folder; outside the workspace its settings of targets and flags do not apply.
///
/// # Errors
/// The command line and the end of what cargo printed.
pub fn cargo_in(folder: &Path, name: &str, arguments: &[&str]) -> Result<String> {
    cargo_with(folder, name, arguments, &[])
}

/// Runs cargo in a folder with more environment variables.
///
/// # Errors
/// The command line and the end of what cargo printed.
pub fn cargo_with(
    folder: &Path,
    name: &str,
    arguments: &[&str],
    variables: &[(String, String)],
) -> Result<String> {
    let task = task(name);
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(folder).args(arguments);
    cargo.envs(variables.iter().map(|(name, value)| (name, value)));
    // Its own progress bar has the counts: crates done, crates in all.
    cargo.env("CARGO_TERM_PROGRESS_WHEN", "always").env("CARGO_TERM_PROGRESS_WIDTH", "160");
    host::output_with_progress(&mut cargo, |line| report_progress(&task, line))
}

/// A published program, compiled once and kept outside the clone.
///
/// # Errors
/// It could not be compiled.
pub fn tool(name: &str, version: &str, options: &[&str]) -> Result<PathBuf> {
    let folder = host::cache()?.join(format!("{name}-{version}"));
    let program = folder.join("bin").join(name);
    if !program.is_file() {
        let root = folder.display().to_string();
        let mut arguments = vec!["install", "--locked", "--debug", "--root", &root, "--version", version];
        arguments.extend(options);
        arguments.push(name);
        cargo_in(&host::cache()?, &format!("compiling {name} (once)"), &arguments)?;
    }
    Ok(program)
}

/// Runs an example of a package, optimised, with its output on the terminal.
///
/// # Errors
/// It could not be compiled, or has failed.
pub fn example(package: &str, name: &str) -> Result<()> {
    // As the release, but without the minutes that its link-time optimisation takes.
    let of = ["--locked", "--profile", "measure", "--package", package, "--example", name];
    cargo(&format!("compiling {name}"), &[&["build"][..], &of].concat())?;
    let mut run = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    run.current_dir(host::workspace()).args(["run", "--quiet"]).args(of);
    let status = run.status()?;
    if !status.success() {
        return Err(anyhow!("{name} failed: {status}"));
    }
    Ok(())
}

/// Reports what cargo's progress bar says. Returns whether the line is one of progress.
fn report_progress(task: &Task, line: &str) -> bool {
    if let Some((done, all, now)) = parse_progress(line) {
        task.report(&format!(
            "{done} of {all} crates{}",
            if now.is_empty() { "" } else { ", " }.to_owned() + now
        ));
        return true;
    }
    let verb = line.trim_start().split(' ').next().unwrap_or_default();
    ["Compiling", "Checking", "Building", "Downloading", "Downloaded", "Fresh", "Blocking"].contains(&verb)
}

/// Parses cargo's progress bar, `Building [===>  ] 12/204: tokio, syn`.
fn parse_progress(line: &str) -> Option<(u32, u32, &str)> {
    let (_, bar) = line.split_once("Building [")?;
    let (_, counts) = bar.split_once("] ")?;
    let (counts, now) = counts.split_once(": ").unwrap_or((counts, ""));
    let (done, all) = counts.trim().split_once('/')?;
    let first = now.split([',', '(']).next().unwrap_or("").trim();
    Some((done.parse().ok()?, all.parse().ok()?, first))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::{parse_progress, report_progress};
    use crate::{host, progress};

    #[test]
    fn an_error_of_cargo_stands_alone_without_its_progress() {
        let script = "printf '   Compiling a v1.0.0\\nerror: no such type\\n' >&2
            for n in $(seq 300); do printf '    Building [=>  ] %d/300: b\\r' $n >&2; done; exit 101";
        let task = progress::task("a build that fails");
        let run = host::output_with_progress(Command::new("sh").args(["-c", script]), |line| {
            report_progress(&task, line)
        });
        let error = run.unwrap_err().to_string();
        let (_, printed) = error.split_once("status: 101\n").unwrap();
        assert_eq!(printed, "error: no such type");
    }

    #[test]
    fn the_counts_of_cargos_progress_bar_are_read() {
        assert_eq!(
            parse_progress("    Building [=====>      ] 12/204: tokio, syn(build.rs)..."),
            Some((12, 204, "tokio"))
        );
        assert_eq!(parse_progress("    Building [=====>      ] 204/204"), Some((204, 204, "")));
        assert_eq!(parse_progress("   Compiling tokio v1.54.1"), None);
    }
}
