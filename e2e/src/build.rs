//! cargo, with what it is doing on the board, and everything that a cluster needs, made side by side.

use std::path::Path;
use std::process::Command;
use std::thread;

use anyhow::{Result, anyhow};

use crate::cluster;
use crate::host;
use crate::images::{self, Image};
use crate::progress::{Task, task};

/// Installs the machine's programs, compiles the cluster's components and the images' programs: Go and apt use the
/// processors while cargo links, and the other way round.
pub fn prepare(images: &[Image], cluster: &str) -> Result<()> {
    let embedded = cluster == "embedded";
    let components = thread::spawn(move || if embedded { cluster::prepare() } else { Ok(()) });
    let programs = images::compile(images, false);
    let components = components.join().map_err(|_| anyhow!("compiling the cluster's components panicked"))?;
    programs.and(components)
}

/// Runs cargo in the workspace; `name` is what stands on the board.
///
/// # Errors
/// The command line and the end of what cargo said.
pub fn cargo(name: &str, arguments: &[&str]) -> Result<String> {
    cargo_in(host::workspace(), name, arguments, &[])
}

/// Runs cargo in the workspace in `folder`, with variables whose values are paths.
///
/// # Errors
/// The command line and the end of what cargo printed.
pub fn cargo_in(
    folder: &Path,
    name: &str,
    arguments: &[&str],
    variables: &[(&str, &Path)],
) -> Result<String> {
    let task = task(name);
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(folder).args(arguments).envs(variables.iter().copied());
    // Its own progress bar has the counts: crates done, crates in all.
    cargo.env("CARGO_TERM_PROGRESS_WHEN", "always").env("CARGO_TERM_PROGRESS_WIDTH", "160");
    host::watched(&mut cargo, |line| show(&task, line))
}

fn show(task: &Task, line: &str) {
    if let Some((done, all, now)) = progress(line) {
        task.report(&format!(
            "{done} of {all} crates{}",
            if now.is_empty() { "" } else { ", " }.to_owned() + now
        ));
    }
}

/// Reads cargo's progress bar, `Building [===>  ] 12/204: tokio, syn`.
fn progress(line: &str) -> Option<(u32, u32, &str)> {
    let (_, bar) = line.split_once("Building [")?;
    let (_, counts) = bar.split_once("] ")?;
    let (counts, now) = counts.split_once(": ").unwrap_or((counts, ""));
    let (done, all) = counts.trim().split_once('/')?;
    let first = now.split([',', '(']).next().unwrap_or("").trim();
    Some((done.parse().ok()?, all.parse().ok()?, first))
}

#[cfg(test)]
mod tests {
    use super::progress;

    #[test]
    fn the_counts_of_cargos_progress_bar_are_read() {
        assert_eq!(
            progress("    Building [=====>      ] 12/204: tokio, syn(build.rs)..."),
            Some((12, 204, "tokio"))
        );
        assert_eq!(progress("    Building [=====>      ] 204/204"), Some((204, 204, "")));
        assert_eq!(progress("   Compiling tokio v1.54.1"), None);
    }
}
