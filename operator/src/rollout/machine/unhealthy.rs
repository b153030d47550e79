//! Pods of the version on trial that crash, have become unready, or fail their requests while the others do not.
//!
//! Clients avoid such a pod, so the judge sees few of its failures: beside good pods it would pass. Until it is well again or
//! gone, the step does not pass. Everything is read from the pods as they are now, so a new leader knows the same.

use k8s_openapi::jiff::SignedDuration;

use super::Evaluation;
use super::gates::STEADY_AFTER;
use super::steps::hold;
use crate::model::{Crashes, PodSeen, WorkloadSeen};

/// The condition that tells of a pod of the new version that holds the step.
pub(super) const HEALTHY: &str = "PodsHealthy";
const CRASHES: &str = "PodCrashes";
const UNREADY: &str = "PodUnready";

/// A pod that was ready and has not been for these seconds holds the step. One that misses a probe does not.
const UNREADY_FOR: i64 = 10;
/// A pod that has crashed once is trusted again after this time at the latest. Kubelet resets its back-off then too.
const TRUSTED_AFTER: SignedDuration = SignedDuration::from_secs(600);

/// What is wrong with a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ailment<'a> {
    Crashes(&'a Crashes),
    Unready,
}

impl Evaluation<'_> {
    /// Whether a pod of the version on trial crashes, or has become unready.
    pub(super) fn has_unhealthy_pod(&self, target: &WorkloadSeen) -> bool {
        self.unhealthy_pod(target).is_some()
    }

    /// The condition at this look. It is there only while it is false: absent, no pod holds the step.
    pub(super) fn show_unhealthy(&mut self, target: &WorkloadSeen) {
        let found = if self.is_on_trial() { self.unhealthy_pod(target) } else { None };
        let Some((pod, ailment)) = found else { return self.drop_condition(HEALTHY) };
        let (reason, until) = match ailment {
            Ailment::Crashes(crashes) => {
                let seconds = self.trusted_after(crashes).as_secs();
                (CRASHES, format!("the step goes on once it has been ready for {seconds} s, or is gone"))
            }
            Ailment::Unready => (UNREADY, "the step goes on once it is ready, or gone".to_owned()),
        };
        let message = format!("{}; {until}", self.sentence(pod, ailment));
        self.condition(HEALTHY, false, reason, &message);
    }

    /// What the column EVIDENCE says of single pods, after what the judge says of all.
    pub(super) fn say_which_pod(&mut self, target: &WorkloadSeen) {
        let unhealthy = self.unhealthy_pod(target).map(|(pod, ailment)| self.sentence(pod, ailment));
        for sentence in unhealthy.into_iter().chain(self.failing_pod(target)) {
            self.status.evidence_summary.push_str("; ");
            self.status.evidence_summary.push_str(&sentence);
        }
    }

    /// The first pod that crashes, or else the first that has become unready. A pod that ends is none of either. What
    /// pods of the stable version do too is no fault of the new one.
    fn unhealthy_pod<'a>(&self, target: &'a WorkloadSeen) -> Option<(&'a PodSeen, Ailment<'a>)> {
        let crashes = |pod: &'a PodSeen| Some((pod, Ailment::Crashes(self.crashes(pod)?)));
        let unready = |pod: &'a PodSeen| self.is_unready(pod).then_some((pod, Ailment::Unready));
        let mut stable = self.pods_of(target, &self.status.approved_revision);
        if stable.any(|pod| self.crashes(pod).is_some() || self.is_unready(pod)) {
            return None;
        }
        let crashing = self.pods_on_trial(target).find_map(crashes);
        crashing.or_else(|| self.pods_on_trial(target).find_map(unready))
    }

    /// The restarts of a pod, while they count against it: kubelet waits to restart it, or it has ended since the trial
    /// began and has not been ready for long enough since.
    fn crashes<'a>(&self, pod: &'a PodSeen) -> Option<&'a Crashes> {
        let crashes = pod.crashes.as_deref()?;
        if crashes.is_looping {
            return Some(crashes);
        }
        let began = self.status.started.as_ref().map_or(0, |started| started.0.as_second());
        let since = pod.containers_since.unwrap_or(0).max(crashes.last_unix);
        let is_long = self.seconds_since(since) >= self.trusted_after(crashes).as_secs();
        let is_trusted = pod.containers_ready && is_long;
        (crashes.last_unix > 0 && crashes.last_unix >= began && !is_trusted).then_some(crashes)
    }

    /// Whether a pod that was ready is not any more. One that starts has never been.
    fn is_unready(&self, pod: &PodSeen) -> bool {
        let is_long = |since: i64| self.seconds_since(since) >= UNREADY_FOR;
        !pod.containers_ready && pod.containers_since.is_some_and(is_long)
    }

    /// How long a pod must have been ready after a crash: as long as the step is held. After a single one, no longer than
    /// [`TRUSTED_AFTER`].
    fn trusted_after(&self, crashes: &Crashes) -> SignedDuration {
        let held = self.step().and_then(hold).unwrap_or(STEADY_AFTER);
        let held = if crashes.restarts > 1 { held } else { held.min(TRUSTED_AFTER) };
        held.max(STEADY_AFTER)
    }

    fn seconds_since(&self, unix: i64) -> i64 {
        self.seen.now.as_second().saturating_sub(unix)
    }

    fn sentence(&self, pod: &PodSeen, ailment: Ailment<'_>) -> String {
        let (name, namespace, revision) = (&pod.name, &self.seen.namespace, &self.status.canary_revision);
        match ailment {
            Ailment::Crashes(crashes) => {
                let what = match crashes.restarts {
                    0 | 1 => "has crashed (1 restart)".to_owned(),
                    restarts => format!("crashes again and again ({restarts} restarts)"),
                };
                format!(
                    "pod {name} of revision {revision} {what}: kubectl -n {namespace} logs {name} -c {} --previous",
                    crashes.container
                )
            }
            Ailment::Unready => format!(
                "pod {name} of revision {revision} was ready and is not any more: kubectl -n {namespace} describe pod {name}"
            ),
        }
    }

    /// A pod with nearly all failures of the version. The share of the version hides it, because clients avoid the pod.
    fn failing_pod(&self, target: &WorkloadSeen) -> Option<String> {
        let failing = self.seen.failing.as_ref()?;
        let pod = self.pods_on_trial(target).find(|pod| *pod.uid == *failing.uid)?;
        Some(format!(
            "pod {} failed {} of its {} requests, the other pods of its revision {} of {}",
            pod.name, failing.failures, failing.attempts, failing.other_failures, failing.other_attempts
        ))
    }
}
