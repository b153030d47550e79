//! `cargo xtask test`: suites in the order in which what fails fast runs first, a line per test, a line
//! per suite, and the sum.

mod faults;
mod field;
mod framing;
mod lifecycle;
mod mesh;
mod node;
mod rollouts;
mod skew;
mod talk;
mod updates;
mod workspace;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use anyhow::{Result, bail};

use crate::cluster::Cluster;
use crate::host;
use crate::images;
use crate::install;
use crate::kubectl::Kube;
use crate::progress::step;

/// A test and the sentence that it proves.
pub type Test = (&'static str, fn(&Kube) -> Result<()>);

/// Suites, in their order.
const SUITES: &[&str] =
    &["workspace", "node", "lifecycle", "mesh", "talk", "framing", "updates", "rollouts", "skew", "faults"];

/// Why a test cannot run on this cluster; it counts as skipped.
#[derive(Debug)]
struct Skip(&'static str);

impl std::fmt::Display for Skip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Skip {}

#[derive(Default)]
struct Tally {
    passed: usize,
    failed: usize,
    skipped: usize,
}

/// Runs all suites, or one; `only` further restricts to tests whose sentence contains it.
pub fn run(suite: Option<&str>, only: Option<&str>, cluster: &str, keep: bool) -> Result<()> {
    if let Some(unknown) = suite.filter(|name| !SUITES.contains(name)) {
        bail!("there is no suite {unknown:?}; there are {}", SUITES.join(", "));
    }
    let chosen = |name: &str| suite.is_none_or(|only| only == name);
    let mut all = Tally::default();
    if chosen("workspace") {
        all.add(workspace::run());
    }
    if SUITES.iter().skip(1).any(|name| chosen(name)) {
        match on_cluster(&chosen, only, cluster, keep) {
            Ok(tally) => all.add(tally),
            Err(error) => {
                eprintln!("FAILED the cluster: {error:#}");
                all.failed += 1;
            }
        }
    }
    println!("{} passed, {} failed, {} skipped", all.passed, all.failed, all.skipped);
    if all.passed + all.failed + all.skipped == 0 {
        bail!("no test has {:?} in its sentence", only.unwrap_or(""));
    }
    if all.failed > 0 {
        bail!("{} tests failed", all.failed);
    }
    Ok(())
}

fn on_cluster(chosen: &dyn Fn(&str) -> bool, only: Option<&str>, cluster: &str, keep: bool) -> Result<Tally> {
    let mut all = Tally::default();
    let tests: [(&str, &[Test]); 9] = [
        ("node", node::TESTS),
        ("lifecycle", lifecycle::TESTS),
        ("mesh", mesh::TESTS),
        ("talk", talk::TESTS),
        ("framing", framing::TESTS),
        ("updates", updates::TESTS),
        ("rollouts", rollouts::TESTS),
        ("skew", skew::TESTS),
        ("faults", faults::TESTS),
    ];
    if cluster == "embedded" {
        if let Err(why) = host::require_root() {
            for (suite, tests) in tests.iter().filter(|(name, _)| chosen(name)) {
                println!("suite {suite}: {} skipped: {why}", tests.len());
                all.skipped += tests.len();
            }
            return Ok(all);
        }
        host::install_packages(field::PROGRAMS)?;
    }
    let before = host::kernel_settings();
    images::compile(images::TULLE)?;
    let kube = install::cluster(cluster)?;
    install::load_images(&kube)?;
    let mut installed = false;
    for (suite, tests) in tests {
        if !chosen(suite) {
            continue;
        }
        if !["node", "lifecycle"].contains(&suite) && !installed {
            install::tulle(&kube)?;
            installed = true;
        }
        all.add(run_tests(suite, tests, only, &kube));
    }
    if let (Kube::Embedded(cluster), false) = (&kube, keep) {
        step("taking the cluster down");
        cluster.down()?;
        all.add(left_behind(cluster, &before));
    }
    Ok(all)
}

fn run_tests(suite: &str, tests: &[Test], only: Option<&str>, kube: &Kube) -> Tally {
    let mut tally = Tally::default();
    step(&format!("suite {suite}"));
    for (sentence, test) in tests.iter().filter(|(name, _)| only.is_none_or(|only| name.contains(only))) {
        let (start, failed) = (Instant::now(), tally.failed);
        let outcome = catch_unwind(AssertUnwindSafe(|| test(kube)));
        let seconds = start.elapsed().as_secs_f64();
        match outcome {
            Ok(Ok(())) => {
                tally.passed += 1;
                println!("ok      {suite}: {sentence} ({seconds:.1} s)");
            }
            Ok(Err(error)) if error.is::<Skip>() => {
                tally.skipped += 1;
                println!("skipped {suite}: {sentence}: {error}");
            }
            Ok(Err(error)) => {
                tally.failed += 1;
                println!("FAILED  {suite}: {sentence} ({seconds:.1} s)\n        {error:#}");
            }
            Err(_) => {
                tally.failed += 1;
                println!("FAILED  {suite}: {sentence} ({seconds:.1} s): it panicked");
            }
        }
        field::clean_up(kube, tally.failed > failed);
    }
    println!("suite {suite}: {} passed, {} failed, {} skipped", tally.passed, tally.failed, tally.skipped);
    tally
}

/// Nothing of the embedded cluster may be left once it is down.
fn left_behind(cluster: &Cluster, before: &[String]) -> Tally {
    let mut left = cluster.left_behind();
    left.extend(host::kernel_settings().into_iter().filter(|setting| !before.contains(setting)));
    if left.is_empty() {
        println!("ok      node: down leaves no process, mount, file, control group or kernel setting behind");
        return Tally { passed: 1, ..Tally::default() };
    }
    println!("FAILED  node: down left behind: {}", left.join(", "));
    Tally { failed: 1, ..Tally::default() }
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}
