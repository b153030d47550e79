//! `cargo xtask test` runs the suite that needs no cluster, then the others, and prints a line per test, a
//! line per suite, and the totals.
//!
//! Tests mostly wait, and each has namespaces of its own, so most of them run side by side, a few at a time.
//! Suites that other tests would disturb ([`Suite::alone`]) run afterwards, one test at a time.

mod admission;
mod applications;
mod browser;
mod conformance;
mod control;
mod faults;
mod framing;
mod helm;
mod lifecycle;
mod mesh;
mod namespace;
mod node;
mod operations;
mod prometheus;
mod resilience;
mod rollouts;
mod routes;
mod seeing;
mod setup;
mod skew;
mod talk;
mod updates;
mod workspace;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Result, anyhow, bail};

use crate::cluster::{self, Cluster};
use crate::collector;
use crate::earlier;
use crate::host;
use crate::images;
use crate::install;
use crate::kubectl::Kube;
use crate::progress::{background, say, step};

/// A test and the sentence that it proves.
pub type Test = (&'static str, fn(&Kube) -> Result<()>);

/// Tests of one subject.
struct Suite {
    name: &'static str,
    tests: &'static [Test],
    /// Whether no other test may run meanwhile: its tests change Tulle itself, or the load of other tests
    /// would change their result.
    alone: bool,
}

/// The suite of formatting, lints and unit tests, which needs no cluster.
const WORKSPACE: &str = "workspace";
const PROMETHEUS: &str = "prometheus";

/// Canaries under load.
const ROLLOUTS: &str = "rollouts";

/// What people and programs see.
const SEEING: &str = "seeing";

/// The official suite of the Gateway API.
const CONFORMANCE: &str = "conformance";

/// The suite whose tests change Tulle itself, with those of traces.
const OPERATIONS: &str = "operations";

/// Sidecars of earlier builds.
const SKEW: &str = "skew";

/// An earlier operator.
const DOWNGRADE: &str = "downgrade";

/// The page in a browser.
const BROWSER: &str = "browser";

/// The suites that need a cluster; those with the longest tests come first.
const SUITES: &[Suite] = &[
    Suite { name: "node", tests: node::TESTS, alone: false },
    Suite { name: "lifecycle", tests: lifecycle::TESTS, alone: false },
    Suite { name: ROLLOUTS, tests: rollouts::TESTS, alone: false },
    Suite { name: SKEW, tests: skew::TESTS, alone: false },
    Suite { name: "admission", tests: admission::TESTS, alone: false },
    Suite { name: "control", tests: control::TESTS, alone: false },
    Suite { name: "mesh", tests: mesh::TESTS, alone: false },
    Suite { name: "resilience", tests: resilience::TESTS, alone: false },
    Suite { name: "routes", tests: routes::TESTS, alone: false },
    Suite { name: SEEING, tests: seeing::TESTS, alone: false },
    Suite { name: BROWSER, tests: browser::TESTS, alone: false },
    Suite { name: "talk", tests: talk::TESTS, alone: false },
    Suite { name: "applications", tests: applications::TESTS, alone: false },
    Suite { name: "framing", tests: framing::TESTS, alone: false },
    Suite { name: PROMETHEUS, tests: prometheus::TESTS, alone: false },
    // The suite gives five hundred requests five seconds, and measures shares meanwhile.
    Suite { name: CONFORMANCE, tests: conformance::TESTS, alone: true },
    // This suite counts lost requests while pods end. A client that learns of an end a second late loses a
    // request, with a mesh and without, so that no other test may keep the machine busy.
    Suite { name: "updates", tests: updates::TESTS, alone: true },
    Suite { name: OPERATIONS, tests: operations::TESTS, alone: true },
    Suite { name: "helm", tests: helm::TESTS, alone: true },
    Suite { name: "setup", tests: setup::TESTS, alone: true },
    Suite { name: DOWNGRADE, tests: skew::DOWNGRADE, alone: true },
    Suite { name: "faults", tests: faults::TESTS, alone: true },
];

/// How many tests run side by side without `--jobs`. Their pods share two cores with the cluster; more tests
/// would wait for processor time.
const JOBS: usize = 4;

/// Which tests run, and where.
pub struct Choice<'a> {
    /// One suite; `None`: all.
    pub suite: Option<&'a str>,
    /// Only tests whose sentence contains this.
    pub only: Option<&'a str>,
    /// `embedded`, or `context:NAME`.
    pub cluster: &'a str,
    /// Leaves the embedded cluster running.
    pub keep: bool,
    /// Tests side by side; `None`: [`JOBS`].
    pub jobs: Option<usize>,
}

impl Choice<'_> {
    fn has(&self, suite: &str) -> bool {
        self.suite.is_none_or(|only| only == suite)
    }

    /// Whether the workspace suite runs. `--only` cannot choose its tests, which have no sentences.
    fn has_workspace(&self) -> bool {
        self.has(WORKSPACE) && (self.only.is_none() || self.suite.is_some())
    }

    fn tests(&self, alone: bool) -> VecDeque<(&'static str, Test)> {
        let suites = SUITES.iter().filter(|suite| suite.alone == alone && self.has(suite.name));
        let tests = suites.flat_map(|suite| suite.tests.iter().map(|test| (suite.name, *test)));
        tests.filter(|(_, (sentence, _))| self.only.is_none_or(|only| sentence.contains(only))).collect()
    }
}

/// Why a test cannot run on this cluster; it counts as skipped.
#[derive(Debug)]
struct Skip(&'static str);

impl std::fmt::Display for Skip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Skip {}

#[derive(Clone, Default)]
struct Tally {
    passed: usize,
    failed: usize,
    skipped: usize,
    /// What has failed and why, shortened: the end of a long output may be all that somebody keeps of it.
    failures: Vec<String>,
}

/// Lines of a failure that are told once more at the end.
const TOLD_AGAIN: usize = 8;

/// Runs the tests that were chosen.
pub fn run(choice: &Choice<'_>) -> Result<()> {
    let names: Vec<&str> = [WORKSPACE].into_iter().chain(SUITES.iter().map(|suite| suite.name)).collect();
    if let Some(unknown) = choice.suite.filter(|name| !names.contains(name)) {
        bail!("unknown suite {unknown:?}; the suites are {}", names.join(", "));
    }
    let none = choice.tests(false).is_empty() && choice.tests(true).is_empty();
    if let Some(only) = choice.only.filter(|_| none && choice.suite != Some(WORKSPACE)) {
        bail!("no test's sentence contains {only:?}");
    }
    let mut all = Tally::default();
    let needs_cluster = SUITES.iter().any(|suite| choice.has(suite.name));
    let embedded = needs_cluster && choice.cluster == "embedded";
    let not_root = if embedded { host::require_root().err() } else { None };
    // The cluster is prepared while cargo compiles and the unit tests run.
    let runs = needs_cluster && not_root.is_none();
    let has = |name: &str| choice.tests(true).iter().any(|(suite, _)| *suite == name);
    let (conformance, traces) = (has(CONFORMANCE), has(OPERATIONS));
    let beside = |name: &str| choice.tests(false).iter().any(|(suite, _)| *suite == name);
    let versions = beside(SKEW) || has(DOWNGRADE);
    let (browser, prometheus, seeing) = (beside(BROWSER), beside(PROMETHEUS), beside(SEEING));
    let rollouts = beside(ROLLOUTS);
    let prepared = thread::spawn(move || {
        if embedded && runs {
            cluster::prepare()?;
            host::install_packages(namespace::PROGRAMS)?;
        }
        // The one program that is built with other settings than the tests, so that cargo can do both at once.
        let sidecar = images::TULLE.iter().find(|image| runs && image.profile() == "release");
        if let Some(sidecar) = sidecar {
            images::compile(std::slice::from_ref(sidecar), false)?;
        }
        if runs && versions {
            earlier::archives()?;
        }
        if runs && conformance {
            crate::conformance::prepare(embedded)?;
        }
        if embedded && runs && traces {
            collector::image()?;
        }
        if embedded && runs && browser {
            browser::prepare()?;
        }
        if embedded && runs && prometheus {
            prometheus::prepare()?;
        }
        if embedded && runs && seeing {
            cluster::grpcurl()?;
        }
        if embedded && runs && rollouts {
            cluster::kstatus()?;
        }
        Ok(())
    });
    if choice.has_workspace() {
        all.add(workspace::run());
    }
    let prepared = prepared.join().unwrap_or_else(|_| Err(anyhow!("preparing the cluster panicked")));
    if let Some(why) = not_root {
        all.skipped += choice.tests(false).len() + choice.tests(true).len();
        say(&format!("skipped every suite that needs a cluster: {why}"));
    } else if needs_cluster {
        match prepared.and_then(|()| on_cluster(choice)) {
            Ok(tally) => all.add(tally),
            Err(error) => {
                let line = format!("FAILED  the cluster: {error:#}");
                say(&line);
                all.fail(&line);
            }
        }
    }
    conclude(all, choice)
}

/// Prints the totals. Fails if a test failed, or if no test could run on the embedded cluster.
fn conclude(all: Tally, choice: &Choice<'_>) -> Result<()> {
    all.failures.iter().for_each(|failure| say(failure));
    say(&format!("{} passed, {} failed, {} skipped", all.passed, all.failed, all.skipped));
    if all.failed > 0 {
        bail!("{} tests failed", all.failed);
    }
    if choice.cluster == "embedded" && host::require_root().is_err() && all.skipped > 0 {
        bail!(
            "NOT TESTED: no test ran on a cluster, because the embedded cluster needs root ({} tests skipped). Run it as root, or run only what needs no cluster: cargo xtask test workspace",
            all.skipped
        );
    }
    Ok(())
}

fn on_cluster(choice: &Choice<'_>) -> Result<Tally> {
    let before = host::kernel_settings();
    // With the same selection of packages as the unit tests, cargo compiles nothing again.
    images::compile(images::TULLE, choice.has_workspace())?;
    let _reserved = install::reserve(choice.cluster)?;
    let kube = install::cluster(choice.cluster)?;
    if let Kube::Embedded(cluster) = &kube {
        cluster.set_in_use(true)?;
    }
    install::load_images(&kube)?;
    let needs_tulle = |suite: &str| !["node", "lifecycle"].contains(&suite);
    if SUITES.iter().any(|suite| choice.has(suite.name) && needs_tulle(suite.name)) {
        install::tulle(&kube)?;
        // `required` namespaces need it, and the operator gives users a quarter of a minute to apply their own.
        kube.wait_for("the default MeshConfig", 60, || {
            let found = kube.run(&["get", "meshconfig", "mesh", "--ignore-not-found", "-o", "name"])?;
            Ok(!found.is_empty())
        })?;
    }
    let tallies = Mutex::new(vec![Tally::default(); SUITES.len()]);
    let jobs = choice.jobs.unwrap_or(JOBS).max(1);
    step(&format!("tests, {jobs} side by side"));
    run_tests(choice.tests(false), jobs, &kube, &tallies);
    let alone = choice.tests(true);
    if !alone.is_empty() {
        step("tests that run alone, one at a time");
        run_tests(alone, 1, &kube, &tallies);
    }
    let mut all = Tally::default();
    for (suite, tally) in SUITES.iter().zip(tallies.into_inner().unwrap_or_else(PoisonError::into_inner)) {
        if choice.has(suite.name) {
            let Tally { passed, failed, skipped, .. } = &tally;
            say(&format!("suite {}: {passed} passed, {failed} failed, {skipped} skipped", suite.name));
            all.add(tally);
        }
    }
    if let Kube::Embedded(cluster) = &kube {
        cluster.set_in_use(false)?;
    }
    if let (Kube::Embedded(cluster), false) = (&kube, choice.keep) {
        step("taking the cluster down");
        cluster.down()?;
        all.add(left_behind(cluster, &before));
    }
    Ok(all)
}

/// Runs tests, `jobs` at a time, in their order.
fn run_tests(tests: VecDeque<(&'static str, Test)>, jobs: usize, kube: &Kube, tallies: &Mutex<Vec<Tally>>) {
    let tests = Mutex::new(tests);
    let next = || tests.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some((suite, test)) = next() {
                    let tally = run_test(suite, test, kube);
                    let mut tallies = tallies.lock().unwrap_or_else(PoisonError::into_inner);
                    let its = SUITES.iter().position(|known| known.name == suite);
                    if let Some(sum) = its.and_then(|index| tallies.get_mut(index)) {
                        sum.add(tally);
                    }
                }
            });
        }
    });
}

fn run_test(suite: &str, (sentence, test): Test, kube: &Kube) -> Tally {
    let start = Instant::now();
    // Shows the test while it runs, so that a test that hangs is noticed.
    let task = background(&format!("{suite}: {sentence}"));
    let outcome = catch_unwind(AssertUnwindSafe(|| test(kube)));
    let outcome = outcome.unwrap_or_else(|_| Err(anyhow!("the test panicked")));
    let seconds = start.elapsed().as_secs_f64();
    let mut tally = Tally::default();
    let line = match outcome {
        Ok(()) => {
            tally.passed += 1;
            format!("ok      {suite}: {sentence} ({seconds:.1} s)")
        }
        Err(error) if error.is::<Skip>() => {
            tally.skipped += 1;
            format!("skipped {suite}: {sentence}: {error}")
        }
        Err(error) => {
            let line = format!("FAILED  {suite}: {sentence} ({seconds:.1} s)\n        {error:#}");
            tally.fail(&line);
            line
        }
    };
    drop(task);
    let seen = namespace::clean_up(kube, tally.failed > 0);
    say(&(line + &seen));
    tally
}

/// Fails if anything of the embedded cluster is left once it is down.
fn left_behind(cluster: &Cluster, before: &[String]) -> Tally {
    let mut left = cluster.left_behind();
    left.extend(host::kernel_settings().into_iter().filter(|setting| !before.contains(setting)));
    if left.is_empty() {
        say("ok      node: down leaves no process, mount, file, control group or kernel setting behind");
        return Tally { passed: 1, ..Tally::default() };
    }
    let line = format!("FAILED  node: down left behind: {}", left.join(", "));
    say(&line);
    let mut tally = Tally::default();
    tally.fail(&line);
    tally
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.failures.extend(other.failures);
    }

    /// Counts a failure, and keeps the begin of what was said of it.
    fn fail(&mut self, line: &str) {
        self.failed += 1;
        let begin: Vec<&str> = line.lines().take(TOLD_AGAIN).collect();
        self.failures.push(begin.join("\n"));
    }
}
