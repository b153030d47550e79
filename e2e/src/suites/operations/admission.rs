//! Pods are created without a pause while replicas of the webhook stop and start. Every pod must be admitted
//! with a sidecar.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde_json::json;

use super::{SYSTEM, has_settings, pods, restart, rolled_out};
use crate::install;
use crate::kubectl::Kube;
use crate::suites::namespace::TestNamespace;
use crate::suites::{Skip, lifecycle};

/// Interval between two pods.
const EVERY: Duration = Duration::from_millis(150);
/// How long pods are created before the change, at least.
const BEFORE: Duration = Duration::from_secs(3);
/// How long pods are created after the change: a terminating replica serves for some seconds more, and its
/// end is under test.
const AFTER: Duration = Duration::from_secs(8);
/// How long each of both at most, on a machine too slow to create enough pods.
const AFTER_AT_MOST: Duration = Duration::from_secs(60);
/// Fewer pods than this prove nothing.
const ENOUGH: usize = 60;
/// The same for each phase.
const ENOUGH_IN_PHASE: usize = 5;

/// Keeps a pod from being scheduled, so that it costs no more than its creation.
const NEVER_SCHEDULED: &str =
    r#"{"apiVersion": "v1", "spec": {"schedulingGates": [{"name": "tulle.dev/never"}]}}"#;

pub(super) fn restarted(kube: &Kube) -> Result<()> {
    let namespaces = Namespaces::new(kube, "t-ops-restart")?;
    namespaces.create_pods_during(|| restart(kube, "tulle-webhook"))
}

pub(crate) fn drained(kube: &Kube) -> Result<()> {
    let Kube::Embedded(_) = kube else { bail!(Skip("it starts an embedded cluster")) };
    let (_, cluster) = lifecycle::second("drained");
    let outcome = cluster.up(Some(2)).and_then(|()| {
        let kube = Kube::Embedded(cluster);
        drain_under_load(&kube).with_context(|| {
            let pods = kube.run(&["-n", SYSTEM, "get", "pods", "-o", "wide"]);
            format!("the pods at that time:\n{}", pods.unwrap_or_else(|error| error.to_string()))
        })
    });
    let down = lifecycle::gone(&lifecycle::second("drained").1);
    outcome.and(down)
}

fn drain_under_load(kube: &Kube) -> Result<()> {
    install::load_images(kube)?;
    install::tulle(kube)?;
    spread(kube)?;
    let namespaces = Namespaces::new(kube, "t-ops-drain")?;
    namespaces.create_pods_during(|| {
        let draining = AtomicBool::new(true);
        let (fewest, drained) = thread::scope(|scope| {
            let fewest = scope.spawn(|| fewest_available(kube, &draining));
            let drained = drain(kube);
            draining.store(false, Ordering::Relaxed);
            (fewest.join(), drained)
        });
        drained?;
        let fewest = fewest.map_err(|_| anyhow!("counting the available replicas panicked"))??;
        ensure!(fewest >= 1, "a Deployment had no available replica although it has a PodDisruptionBudget");
        Ok(())
    })
}

/// Makes sure that each node has a replica of both workloads, because anti-affinity is only a preference.
fn spread(kube: &Kube) -> Result<()> {
    for app in ["tulle-webhook", "tulle-operator"] {
        kube.wait_for(&format!("{app} to run on both nodes"), 120, || {
            rolled_out(kube, app)?;
            let pods = pods(kube, app)?;
            let nodes: BTreeSet<&str> =
                pods.iter().filter_map(|pod| pod["spec"]["nodeName"].as_str()).collect();
            if nodes.len() == 2 {
                return Ok(true);
            }
            let name = pods.first().and_then(|pod| pod["metadata"]["name"].as_str());
            kube.run(&["-n", SYSTEM, "delete", "pod", name.context("the workload has no pod")?])?;
            Ok(false)
        })?;
    }
    Ok(())
}

/// Drains the second node, and then the first one: by then it has both replicas of both workloads, so that only the
/// PodDisruptionBudgets keep them from being evicted together.
fn drain(kube: &Kube) -> Result<()> {
    for node in ["node-2", "node"] {
        kube.run(&[
            "drain",
            node,
            "--ignore-daemonsets",
            "--delete-emptydir-data",
            "--force",
            "--timeout=120s",
        ])?;
        for app in ["tulle-webhook", "tulle-operator"] {
            rolled_out(kube, app)?;
            let left = pods(kube, app)?;
            ensure!(left.iter().all(|pod| pod["spec"]["nodeName"] != node), "{node} still runs {app}");
        }
        kube.run(&["uncordon", node])?;
    }
    Ok(())
}

/// The fewest available replicas that a Deployment of Tulle has had.
fn fewest_available(kube: &Kube, draining: &AtomicBool) -> Result<u64> {
    let mut fewest = u64::MAX;
    while draining.load(Ordering::Relaxed) {
        let deployments = kube.json(&["-n", SYSTEM, "get", "deployments"])?;
        for deployment in deployments["items"].as_array().into_iter().flatten() {
            // The field is absent when it is 0.
            fewest = fewest.min(deployment["status"]["availableReplicas"].as_u64().unwrap_or(0));
        }
        thread::sleep(Duration::from_millis(300));
    }
    Ok(fewest)
}

/// The namespaces in which pods are created, one for each injection mode.
struct Namespaces<'a> {
    enabled: TestNamespace<'a>,
    required: TestNamespace<'a>,
}

/// Result of creating pods.
#[derive(Debug, Default)]
struct Created {
    /// Number of pods created before, during and after the change.
    by_phase: [usize; 3],
    /// Why pods were rejected, or that they have no sidecar.
    failures: Vec<String>,
}

/// Positions in [`Created::by_phase`].
const DURING: usize = 1;
const FOLLOWING: usize = 2;

impl<'a> Namespaces<'a> {
    fn new(kube: &'a Kube, name: &str) -> Result<Self> {
        has_settings(kube)?;
        let field = |mode: &str| {
            TestNamespace::new(kube, &format!("{name}-{mode}"), json!({"tulle.dev/inject": mode}))
        };
        let namespaces = Self { enabled: field("enabled")?, required: field("required")? };
        for field in [&namespaces.enabled, &namespaces.required] {
            // There has to be a service account, and the API server has to know the namespace's label.
            field.injects()?;
        }
        Ok(namespaces)
    }

    /// Creates pods before, during and after a change; fails unless every one has got a sidecar.
    fn create_pods_during(&self, change: impl FnOnce() -> Result<()>) -> Result<()> {
        let (phase, number) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let (created, changed) = thread::scope(|scope| {
            let created = scope.spawn(|| self.create_pods(&phase, &number));
            let begun = Instant::now();
            let too_few = || number.load(Ordering::Relaxed) < ENOUGH_IN_PHASE;
            while begun.elapsed() < BEFORE || (too_few() && begun.elapsed() < AFTER_AT_MOST) {
                thread::sleep(EVERY);
            }
            phase.store(DURING, Ordering::Relaxed);
            let changed = change();
            phase.store(FOLLOWING, Ordering::Relaxed);
            (created.join(), changed)
        });
        let Created { by_phase, failures } = created.map_err(|_| anyhow!("creating pods panicked"))?;
        let all: usize = by_phase.iter().sum();
        let sum = format!("{} of {all} pods were rejected or have no sidecar", failures.len());
        changed.with_context(|| format!("the change itself failed; meanwhile {sum}"))?;
        ensure!(failures.is_empty(), "{sum}:\n{}", failures.join("\n"));
        ensure!(
            all >= ENOUGH && by_phase.iter().all(|count| *count >= ENOUGH_IN_PHASE),
            "too few pods were created before, during and after the change: {by_phase:?}"
        );
        Ok(())
    }

    /// Creates pods, in one namespace and the other in turn, until the change is over for long enough. `done`: how many.
    fn create_pods(&self, phase: &AtomicUsize, done: &AtomicUsize) -> Created {
        let mut created = Created::default();
        let mut over: Option<Instant> = None;
        for number in 0_usize.. {
            let (begun, phase) = (Instant::now(), phase.load(Ordering::Relaxed));
            if phase == FOLLOWING {
                let since = over.get_or_insert(begun).elapsed();
                if (since >= AFTER && number >= ENOUGH) || since >= AFTER_AT_MOST {
                    break;
                }
            }
            let field = if number % 2 == 0 { &self.enabled } else { &self.required };
            if let Err(error) = create_pod(field, &format!("pod-{number}")) {
                let at = ["before", "during", "after"][phase];
                created.failures.push(format!("{at} the change, in {}: {error:#}", field.namespace));
            }
            created.by_phase[phase] += 1;
            done.store(number + 1, Ordering::Relaxed);
            thread::sleep(EVERY.saturating_sub(begun.elapsed()));
        }
        created
    }
}

/// Creates a pod; fails when it is rejected, or admitted without a sidecar.
fn create_pod(field: &TestNamespace<'_>, name: &str) -> Result<()> {
    let containers = field.kubectl(&[
        "run",
        name,
        "--image=tulle.local/empty:1",
        "--overrides",
        NEVER_SCHEDULED,
        "-o",
        "jsonpath={.spec.initContainers[*].name}",
    ])?;
    ensure!(containers == "tulle-init tulle-proxy", "pod {name} has the init containers {containers:?}");
    Ok(())
}
