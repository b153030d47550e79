//! Which replica leads: a Kubernetes Lease.
//!
//! In: the Lease as it is read, and how long this replica has seen it unchanged. Out: [`Leadership`]. A holder that
//! cannot renew stops leading before the Lease expires, so that two replicas never write at once. A holder that shuts
//! down releases the Lease, so that another replica takes it at its next attempt. A process that finds the Lease in its own
//! name without having held it follows one of the same pod that has crashed: it releases the Lease too, because another
//! replica has the history that was lost here. [`evaluate`] and [`released`] decide; [`run`] and [`release`] read and
//! write.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep, timeout};

use crate::settings::Settings;

/// Name of the Lease.
const NAME: &str = "tulle-operator";
/// Another replica may take the Lease over when the holder has not renewed it for this long.
const DURATION: Duration = Duration::from_secs(8);
/// Time between two renewals by the holder.
const RENEW_EVERY: Duration = Duration::from_secs(2);
/// Time between two reads by a replica that does not lead. A released Lease is taken after half of this on average.
const READ_EVERY: Duration = Duration::from_secs(1);
/// Timeout of one attempt: a read and a write.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(2);
/// Delay after an attempt that failed.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// How long a process that has released what was left to it stands back, so that another replica can take the Lease. Where
/// there is no other, nobody leads for this long.
const STAND_BACK: Duration = Duration::from_secs(3);
/// The holder stops writing to Kubernetes when it could not renew the Lease for this long.
const STOP_WRITING_AFTER: Duration = Duration::from_secs(6);

/// Who leads, as far as this replica knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leadership {
    /// This replica leads.
    pub mine: bool,
    /// The leader's address.
    pub address: Option<String>,
    /// Incremented whenever another replica takes the Lease (`leaseTransitions`).
    pub epoch: i32,
}

/// What this replica does with the Lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Write it: this replica holds it.
    Renew,
    /// Write it: no replica holds it, or it has expired.
    Take,
    /// Release it: a process of this pod that is no more has held it.
    Release,
    /// Leave it: another replica holds it.
    Follow,
}

/// What this process has to do with the Lease.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Past {
    /// Nothing.
    #[default]
    None,
    /// It has released it for another replica, see [`Step::Release`].
    Released,
    /// It has written its name into it, or tried to.
    Held,
}

/// Decides what to do with the Lease. `seen_unchanged` is how long this replica has seen it unchanged: clocks of other
/// machines are not trusted, so a Lease has expired when it has been seen unchanged for its duration.
pub fn evaluate(lease: &LeaseSpec, me: &str, past: Past, seen_unchanged: Duration) -> Step {
    match lease.holder_identity.as_deref() {
        Some(holder) if holder == me && past == Past::Held => Step::Renew,
        Some(holder) if holder == me => Step::Release,
        None | Some("") if past == Past::Released && seen_unchanged < STAND_BACK => Step::Follow,
        None | Some("") => Step::Take,
        Some(_) => {
            let seconds = lease.lease_duration_seconds.and_then(|s| u64::try_from(s).ok()).unwrap_or(8);
            if seen_unchanged > Duration::from_secs(seconds) { Step::Take } else { Step::Follow }
        }
    }
}

/// The Lease without a holder, so that another replica takes it at once. `None` if `me` does not hold it.
///
/// It keeps its resourceVersion, so that a newer Lease is not overwritten, and its number of transitions, which is
/// incremented when it is taken.
pub fn released(mut lease: Lease, me: &str) -> Option<Lease> {
    let spec = lease.spec.as_mut()?;
    if spec.holder_identity.as_deref() != Some(me) {
        return None;
    }
    spec.holder_identity = Some(String::new());
    Some(lease)
}

/// Competes for the Lease until `stop` is sent or dropped. From then on this replica does not lead, although the Lease
/// still names it until [`release`].
pub async fn run(
    client: Client,
    settings: Arc<Settings>,
    leadership: watch::Sender<Leadership>,
    mut stop: oneshot::Receiver<()>,
) {
    let api = Api::<Lease>::namespaced(client, &settings.namespace);
    let mut candidate = Candidate { me: holder(&settings), past: Past::None, observed: None, renewed: None };
    loop {
        // `stop` does not interrupt an attempt: its write could reach the API server after the release.
        let pause = attempt(&api, &mut candidate, &leadership).await;
        tokio::select! {
            () = sleep(pause) => {}
            _ = &mut stop => break,
        }
    }
    leadership.send_if_modified(|known| std::mem::take(&mut known.mine));
}

/// Releases the Lease if it names this replica. Call it when no part writes to Kubernetes any more.
///
/// # Errors
/// The Lease could not be read or written; it then expires.
pub async fn release(client: Client, settings: &Settings) -> Result<(), kube::Error> {
    let api = Api::<Lease>::namespaced(client, &settings.namespace);
    let Some(lease) = api.get_opt(NAME).await? else { return Ok(()) };
    let Some(released) = released(lease, &holder(settings)) else { return Ok(()) };
    api.replace(NAME, &PostParams::default(), &released).await?;
    tracing::info!("released the Lease");
    Ok(())
}

/// The holder identity of this replica. It contains the address at which other replicas reach the leader.
fn holder(settings: &Settings) -> String {
    format!("{}/{}", settings.pod_name, settings.pod_ip)
}

/// Makes one attempt, publishes its result, and returns the pause before the next one.
async fn attempt(
    api: &Api<Lease>,
    candidate: &mut Candidate,
    leadership: &watch::Sender<Leadership>,
) -> Duration {
    // A holder does not wait for an answer beyond the moment at which it must have stopped writing.
    let patience =
        candidate.renewed.map_or(ATTEMPT_TIMEOUT, |at| STOP_WRITING_AFTER.saturating_sub(at.elapsed()));
    match timeout(patience.min(ATTEMPT_TIMEOUT), candidate.attempt(api)).await {
        Ok(Ok(now)) => {
            let pause = if now.mine { RENEW_EVERY } else { READ_EVERY };
            leadership.send_if_modified(|known| {
                let changed = *known != now;
                if changed {
                    tracing::info!(mine = now.mine, epoch = now.epoch, "leadership changed");
                    *known = now;
                }
                changed
            });
            pause
        }
        failed => {
            if candidate.renewed.is_none_or(|at| at.elapsed() >= STOP_WRITING_AFTER) {
                candidate.renewed = None;
                leadership.send_if_modified(|known| std::mem::take(&mut known.mine));
            }
            tracing::warn!(?failed, "cannot read or write the Lease");
            RETRY_AFTER
        }
    }
}

struct Candidate {
    me: String,
    past: Past,
    /// The resourceVersion that was read last, and when it was read first.
    observed: Option<(String, Instant)>,
    renewed: Option<Instant>,
}

impl Candidate {
    async fn attempt(&mut self, api: &Api<Lease>) -> Result<Leadership, kube::Error> {
        // Before the write: other replicas count from when they see it, which may be before this one gets the answer.
        let begun = Instant::now();
        let Some(mut lease) = api.get_opt(NAME).await? else {
            let metadata = ObjectMeta { name: Some(NAME.to_owned()), ..ObjectMeta::default() };
            let lease = Lease { metadata, spec: Some(self.held(0)) };
            self.past = Past::Held;
            api.create(&PostParams::default(), &lease).await?;
            self.renewed = Some(begun);
            return Ok(Leadership { mine: true, address: None, epoch: 0 });
        };
        let spec = lease.spec.clone().unwrap_or_default();
        let version = lease.metadata.resource_version.clone().unwrap_or_default();
        let since = match &self.observed {
            Some((known, since)) if *known == version => *since,
            _ => Instant::now(),
        };
        self.observed = Some((version, since));
        let transitions = spec.lease_transitions.unwrap_or(0);
        let epoch = match evaluate(&spec, &self.me, self.past, since.elapsed()) {
            Step::Release => {
                if let Some(free) = released(lease, &self.me) {
                    api.replace(NAME, &PostParams::default(), &free).await?;
                    tracing::info!("released the Lease of a process of this pod that is no more");
                }
                self.past = Past::Released;
                return Ok(Leadership { mine: false, address: None, epoch: transitions });
            }
            Step::Follow => {
                let holder = spec.holder_identity.unwrap_or_default();
                if !holder.is_empty() {
                    // Another replica has led since: the next Lease that is free is anybody's.
                    self.past = Past::None;
                }
                let address = holder.split_once('/').map(|(_, address)| address.to_owned());
                return Ok(Leadership { mine: false, address, epoch: transitions });
            }
            Step::Renew => transitions,
            Step::Take => transitions + 1,
        };
        // Before the write, whose answer may be lost: this name in the Lease is then of this process.
        self.past = Past::Held;
        // The write carries the resourceVersion that was read: if two replicas try, one fails.
        lease.spec = Some(self.held(epoch));
        api.replace(NAME, &PostParams::default(), &lease).await?;
        self.renewed = Some(begun);
        Ok(Leadership { mine: true, address: None, epoch })
    }

    fn held(&self, transitions: i32) -> LeaseSpec {
        LeaseSpec {
            holder_identity: Some(self.me.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            renew_time: Some(MicroTime(Timestamp::now())),
            lease_transitions: Some(transitions),
            ..LeaseSpec::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held_by(holder: &str) -> LeaseSpec {
        LeaseSpec {
            holder_identity: Some(holder.into()),
            lease_duration_seconds: Some(8),
            ..LeaseSpec::default()
        }
    }

    #[test]
    fn a_lease_is_taken_only_when_it_was_seen_unchanged_for_its_duration() {
        let evaluate = |holder: &str, past, unchanged| {
            evaluate(&held_by(holder), "me", past, Duration::from_secs(unchanged))
        };
        assert_eq!(evaluate("me", Past::Held, 0), Step::Renew);
        for past in [Past::None, Past::Released, Past::Held] {
            assert_eq!(evaluate("other", past, 7), Step::Follow);
            assert_eq!(evaluate("other", past, 9), Step::Take);
        }
        assert_eq!(evaluate("", Past::None, 0), Step::Take);
        assert_eq!(evaluate("", Past::Held, 0), Step::Take);
    }

    #[test]
    fn a_process_that_follows_one_that_has_crashed_leaves_the_lease_to_another_replica() {
        let lease = Lease { metadata: ObjectMeta::default(), spec: Some(held_by("me")) };
        assert_eq!(evaluate(&held_by("me"), "me", Past::None, Duration::ZERO), Step::Release);
        let free = released(lease, "me").and_then(|lease| lease.spec).unwrap();
        let after = |seconds| evaluate(&free, "me", Past::Released, Duration::from_secs(seconds));
        assert_eq!(evaluate(&free, "other", Past::None, Duration::ZERO), Step::Take);
        assert_eq!(after(0), Step::Follow, "another replica looks once in a second");
        assert_eq!(after(STAND_BACK.as_secs()), Step::Take, "there is no other");
        assert!(STAND_BACK > READ_EVERY * 2);
        // Its write was lost, and it reads its own name again.
        assert_eq!(evaluate(&held_by("me"), "me", Past::Released, Duration::from_secs(1)), Step::Release);
    }

    #[test]
    fn a_released_lease_is_taken_at_once_and_counts_as_a_change_of_hands() {
        let metadata = ObjectMeta { resource_version: Some("41".into()), ..ObjectMeta::default() };
        let spec = LeaseSpec { lease_transitions: Some(7), ..held_by("me") };
        let lease = Lease { metadata, spec: Some(spec) };
        let free = released(lease, "me").unwrap();
        assert_eq!(free.metadata.resource_version.as_deref(), Some("41"), "a newer Lease must not be lost");
        let spec = free.spec.unwrap();
        assert_eq!(spec.lease_transitions, Some(7));
        assert_eq!(evaluate(&spec, "other", Past::None, Duration::ZERO), Step::Take);
    }

    #[test]
    fn a_lease_of_another_replica_is_not_released() {
        let of = |spec| Lease { metadata: ObjectMeta::default(), spec };
        assert_eq!(released(of(Some(held_by("other"))), "me"), None);
        assert_eq!(released(of(Some(LeaseSpec::default())), "me"), None);
        assert_eq!(released(of(None), "me"), None);
    }

    #[test]
    fn the_holder_stops_writing_before_another_takes_over() {
        assert!(STOP_WRITING_AFTER + RENEW_EVERY <= DURATION);
    }
}
