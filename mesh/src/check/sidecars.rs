//! Sidecars, and pods without one.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Duration;

use super::words::duration;
use super::{Check, Finding, LATE, OLDER, Reader, Version, View, list as checks, or_ok, some_of, version};
use crate::query::{Health, Sidecar};

/// A pod that should have a sidecar and has none.
#[derive(Clone, Copy, Debug)]
pub struct WithoutSidecar<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Its name.
    pub name: &'a str,
    /// It belongs to a Deployment, StatefulSet or DaemonSet, whose restart makes a new one.
    pub is_restartable: bool,
}

/// A pod that should have a sidecar and has none, with the workload that a restart makes its pods anew.
#[derive(Clone, Debug)]
pub struct Uninjected<'a> {
    /// The pod.
    pub pod: WithoutSidecar<'a>,
    /// Its workload as `kubectl rollout restart` takes it, such as `deployment/web`; `None`: not known, or not restartable.
    pub workload: Option<String>,
}

/// Workloads that a command names; above that it names all of the namespace.
const NAMED: usize = 10;

/// T0602: pods that should have a sidecar and have none. One finding for each namespace.
pub fn uninjected<'a>(without: impl IntoIterator<Item = Uninjected<'a>>) -> Vec<Finding> {
    let mut by_namespace: BTreeMap<&str, Vec<Uninjected<'_>>> = BTreeMap::new();
    for one in without {
        by_namespace.entry(one.pod.namespace).or_default().push(one);
    }
    let one = |(namespace, pods): (&str, Vec<Uninjected<'_>>)| {
        let names: Vec<&str> = pods.iter().map(|one| one.pod.name).collect();
        let mut hint = "they were created before the label, or while the webhook was unavailable".to_owned();
        if pods.iter().any(|one| !one.pod.is_restartable) {
            hint.push_str(
                "; those that no Deployment, StatefulSet or DaemonSet manages must be created again",
            );
        }
        let fix = match Restart::of(&pods) {
            Restart::None => format!("kubectl -n {namespace} replace --force -f MANIFEST"),
            Restart::Named(workloads) => {
                format!("kubectl -n {namespace} rollout restart {}", workloads.join(" "))
            }
            Restart::All => {
                hint.push_str(
                    "; the command restarts every workload of the namespace, and a rollout that a Canary has in progress starts again: name single ones, such as deployment/web, to spare the others",
                );
                format!("kubectl -n {namespace} rollout restart deployment,statefulset,daemonset")
            }
        };
        let (count, names) = (pods.len(), some_of(&names));
        checks::INJECTED
            .warning(format!("{count} pods of namespace {namespace} have no sidecar: {names}"))
            .hint(hint)
            .fix(fix)
    };
    or_ok(by_namespace.into_iter().map(one).collect(), || checks::INJECTED.ok("none is without"))
}

/// Which workloads of a namespace are to be restarted.
enum Restart<'a> {
    /// None: no pod belongs to one.
    None,
    /// These.
    Named(Vec<&'a str>),
    /// All: they are too many to be named, or not known.
    All,
}

impl<'a> Restart<'a> {
    fn of(pods: &'a [Uninjected<'_>]) -> Self {
        let restartable: Vec<&Uninjected<'_>> = pods.iter().filter(|one| one.pod.is_restartable).collect();
        if restartable.is_empty() {
            return Self::None;
        }
        let known: Option<BTreeSet<&str>> = restartable.iter().map(|one| one.workload.as_deref()).collect();
        match known {
            Some(workloads) if workloads.len() <= NAMED => Self::Named(workloads.into_iter().collect()),
            _ => Self::All,
        }
    }
}

/// What a pod's object tells about its sidecar.
#[derive(Clone, Copy, Debug)]
pub struct Pod<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Its name.
    pub name: &'a str,
    /// When its node took it, or else when it was created, in Unix seconds; `None`: not known.
    pub started: Option<i64>,
    /// It is being deleted.
    pub terminating: bool,
    /// Why its sidecar does not run; `None`: it runs, or that is not known.
    pub idle: Option<Idle<'a>>,
}

/// The container because of which a sidecar does not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Idle<'a> {
    /// The container.
    pub container: &'a str,
    /// Its state, such as `CrashLoopBackOff`.
    pub state: &'a str,
    /// Its log says why; else the events of its pod do.
    pub is_logged: bool,
}

impl Pod<'_> {
    /// Whether its sidecar connects soon, or never again.
    fn comes_or_goes(&self, now: i64) -> bool {
        self.terminating || self.started.is_some_and(|started| now.saturating_sub(started) < LATE)
    }
}

/// Judges sidecars: T0701 to T0704.
#[derive(Clone, Debug)]
pub struct SidecarJudge<'a> {
    view: View<'a>,
    operator: Option<Version>,
    /// The replica that was asked, if it does not lead: it knows those sidecars only that are connected to it.
    follower: Option<&'a str>,
    /// Pods that come or go, by namespace and name. Nobody waits for their sidecars.
    in_transit: HashSet<(&'a str, &'a str)>,
    /// Sidecars that do not run, by namespace and name of their pods.
    idle: HashMap<(&'a str, &'a str), Idle<'a>>,
    /// For how many seconds a certificate must be valid. A sidecar renews it at half of its lifetime, so that one with less
    /// than a quarter left was not renewed when it was due.
    least_left: i64,
}

impl<'a> SidecarJudge<'a> {
    /// `health`: of the replica that was asked; `None`: it did not say. `pods`: those with a sidecar, as far as they can be
    /// read. `leaf_lifetime`: of certificates.
    pub fn new(
        view: View<'a>,
        health: Option<&'a Health>,
        pods: impl IntoIterator<Item = Pod<'a>>,
        leaf_lifetime: Duration,
    ) -> Self {
        let (mut in_transit, mut idle) = (HashSet::new(), HashMap::new());
        for pod in pods {
            let key = (pod.namespace, pod.name);
            if pod.comes_or_goes(view.now) {
                in_transit.insert(key);
            } else if let Some(why) = pod.idle {
                idle.insert(key, why);
            }
        }
        Self {
            operator: health.and_then(|health| version(&health.version)),
            follower: health.filter(|health| !health.leader).map(|health| health.pod.as_str()),
            in_transit,
            idle,
            least_left: i64::try_from(leaf_lifetime.as_secs() / 4).unwrap_or(i64::MAX),
            view,
        }
    }

    /// Every finding about sidecars.
    pub fn judge(&self, sidecars: &[Sidecar]) -> Vec<Finding> {
        let reported = |sidecar: &Sidecar| !sidecar.version.is_empty();
        let has_certificate = |sidecar: &Sidecar| sidecar.certificate_not_after.is_some();
        let skewed =
            self.skewed(sidecars).unwrap_or_else(|| self.well(&checks::SIDECAR_SKEW, sidecars, reported));
        let mut findings = vec![skewed];
        findings.extend(or_ok(sidecars.iter().filter_map(refused).collect(), || {
            self.well(&checks::REFUSED, sidecars, reported)
        }));
        let count = format!("{} sidecars", sidecars.len());
        findings.extend(or_ok(self.behind(sidecars), || checks::BEHIND.ok(count)));
        let certificates = sidecars.iter().filter_map(|sidecar| self.certificate(sidecar)).collect();
        findings.extend(or_ok(certificates, || self.well(&checks::CERTIFICATE, sidecars, has_certificate)));
        findings
    }

    /// All is well with the sidecars that have reported what the check needs. A leader waits for those that have not in
    /// T0703. A follower never hears of them, so that it cannot say.
    fn well(&self, check: &Check, sidecars: &[Sidecar], reported: impl Fn(&Sidecar) -> bool) -> Finding {
        let (all, silent) = (sidecars.len(), sidecars.iter().filter(|sidecar| !reported(sidecar)).count());
        let known = all.saturating_sub(silent);
        match self.follower {
            _ if silent == 0 => check.ok(format!("{all} sidecars")),
            Some(pod) => self.of_a_follower(check, &format!("{silent} of {all} sidecars"), pod),
            None => {
                check.ok(format!("{known} of {all} sidecars; the others have reported nothing, see T0703"))
            }
        }
    }

    /// What a replica that does not lead cannot say.
    fn of_a_follower(&self, check: &Check, what: &str, pod: &str) -> Finding {
        let why = format!("pod {pod} does not lead, and knows only those that are connected to it");
        let unknown = check.unknown(what, why);
        match self.view.reader {
            Reader::Command => unknown
                .hint(
                    "T0303 says which pod leads: check again when one does, and when you may read the Lease",
                )
                .fix(format!("kubectl -n {} get lease tulle-operator", self.view.system)),
            Reader::Page => unknown.hint("the command opens the page at the leader").fix("tulle dashboard"),
        }
    }

    /// Whether a finding is about this sidecar.
    pub fn is_reported(&self, sidecar: &Sidecar) -> bool {
        self.is_skewed(sidecar)
            || !sidecar.refused.is_empty()
            || self.waits(sidecar).is_some()
            || self.ends_in(sidecar).is_some()
    }

    fn is_skewed(&self, sidecar: &Sidecar) -> bool {
        let known = self.operator.zip(version(&sidecar.version));
        known.is_some_and(|((major, minor, _), (its, own, _))| {
            major != its || own > minor || minor.saturating_sub(own) > OLDER
        })
    }

    fn skewed(&self, sidecars: &[Sidecar]) -> Option<Finding> {
        let named = |sidecar: &Sidecar| format!("{} ({})", pod_of(sidecar), sidecar.version);
        let pods: Vec<String> =
            sidecars.iter().filter(|sidecar| self.is_skewed(sidecar)).map(named).collect();
        let (count, listed) = (pods.len(), some_of(&pods));
        (count > 0).then(|| {
            checks::SIDECAR_SKEW
                .warning(format!(
                    "{count} sidecars have a version that this operator does not support: {listed}"
                ))
                .hint("an operator supports sidecars of its own and the two minor versions before it")
                .fix(format!("kubectl get pods{} -L tulle.dev/sidecar", self.view.scope()))
        })
    }

    /// What a sidecar waits for, if it does so for too long.
    fn waits(&self, sidecar: &Sidecar) -> Option<String> {
        let key = (sidecar.namespace.as_str(), sidecar.pod.as_str());
        if self.follower.is_some() || self.in_transit.contains(&key) {
            return None;
        }
        if !sidecar.connected {
            return Some(format!("{} (not connected)", pod_of(sidecar)));
        }
        let waits = sidecar.behind_seconds.is_some_and(|seconds| seconds > LATE.unsigned_abs());
        waits.then(|| format!("{} ({}/{})", pod_of(sidecar), sidecar.acknowledged, sidecar.resources))
    }

    fn behind(&self, sidecars: &[Sidecar]) -> Vec<Finding> {
        if let Some(pod) = self.follower {
            return vec![self.of_a_follower(&checks::BEHIND, "sidecars", pod)];
        }
        let running = sidecars.iter().filter(|sidecar| self.idle(sidecar).is_none());
        let pods: Vec<String> = running.filter_map(|sidecar| self.waits(sidecar)).collect();
        let (count, listed) = (pods.len(), some_of(&pods));
        let behind = (count > 0).then(|| {
            checks::BEHIND
                .warning(format!("{count} sidecars have waited for over {LATE} s or are not connected: {listed}"))
                .hint("those that have started enforce the configuration before; look at their logs, and whether they reach port 26160")
                .fix(format!("tulle pods{}", self.view.scope()))
        });
        self.not_running(sidecars).into_iter().chain(behind).collect()
    }

    /// Why a sidecar that is waited for does not run. One that is connected does, whatever its pod's object says still.
    fn idle(&self, sidecar: &Sidecar) -> Option<Idle<'a>> {
        let key = (sidecar.namespace.as_str(), sidecar.pod.as_str());
        self.idle.get(&key).copied().filter(|_| !sidecar.connected)
    }

    /// Sidecars that do not run: there is nothing that enforces a configuration, and nothing that passes requests on.
    fn not_running(&self, sidecars: &[Sidecar]) -> Option<Finding> {
        let idle: Vec<(&Sidecar, Idle<'_>)> =
            sidecars.iter().filter_map(|sidecar| Some((sidecar, self.idle(sidecar)?))).collect();
        let (first, why) = *idle.first()?;
        let named = |(sidecar, why): &(&Sidecar, Idle<'_>)| {
            format!("{} ({}: {})", pod_of(sidecar), why.container, why.state)
        };
        let pods: Vec<String> = idle.iter().map(named).collect();
        let (count, listed) = (pods.len(), some_of(&pods));
        let fix = match why.is_logged {
            true => format!("kubectl -n {} logs {} -c {}", first.namespace, first.pod, why.container),
            false => format!("kubectl -n {} describe pod {}", first.namespace, first.pod),
        };
        Some(
            checks::BEHIND
                .warning(format!("{count} sidecars do not run: {listed}"))
                .hint("until they do, no request gets in or out of their pods: the command says why the first does not")
                .fix(fix),
        )
    }

    /// The seconds for which a certificate is valid, if they are too few.
    fn ends_in(&self, sidecar: &Sidecar) -> Option<i64> {
        let left = sidecar.certificate_not_after?.saturating_sub(self.view.now);
        (left < self.least_left).then_some(left)
    }

    fn certificate(&self, sidecar: &Sidecar) -> Option<Finding> {
        let left = self.ends_in(sidecar)?;
        let (pod, time) = (pod_of(sidecar), duration(left));
        Some(if left <= 0 {
            checks::CERTIFICATE
                .error(format!("the certificate of {pod} ended {time} ago"))
                .hint("it can neither connect nor be connected to with mTLS")
                .fix(delete(sidecar))
        } else {
            checks::CERTIFICATE
                .warning(format!("the certificate of {pod} ends in {time}"))
                .hint("it is renewed at half of its lifetime: look at the logs of its sidecar")
                .fix(format!("kubectl -n {} logs {} -c tulle-proxy", sidecar.namespace, sidecar.pod))
        })
    }
}

fn refused(sidecar: &Sidecar) -> Option<Finding> {
    let (first, count, pod) = (sidecar.refused.first()?, sidecar.refused.len(), pod_of(sidecar));
    Some(
        checks::REFUSED
            .error(format!("sidecar of {pod} has refused {count} resources: {first}"))
            .hint("it enforces the last version that it could; a restart brings the present sidecar")
            .fix(delete(sidecar)),
    )
}

fn pod_of(sidecar: &Sidecar) -> String {
    format!("{}/{}", sidecar.namespace, sidecar.pod)
}

fn delete(sidecar: &Sidecar) -> String {
    format!("kubectl -n {} delete pod {}", sidecar.namespace, sidecar.pod)
}
