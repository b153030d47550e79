//! Who leads: a Kubernetes Lease. The decision is a pure function; the loop reads, decides, writes.
//! The writer stops before the lease expires, so that two never write.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use crate::settings::Settings;

/// The Lease's name.
const NAME: &str = "tulle-operator";
/// Another takes over when the holder has not renewed for this long.
const DURATION: Duration = Duration::from_secs(8);
/// The holder renews this often.
const RENEW: Duration = Duration::from_secs(2);
/// One try takes at most this long.
const TURN: Duration = Duration::from_secs(2);
/// A try that failed is repeated after this.
const AGAIN: Duration = Duration::from_millis(500);
/// The holder stops writing when it could not renew for this long.
const GIVE_UP: Duration = Duration::from_secs(6);

/// Who leads, as this replica sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leadership {
    /// This replica leads.
    pub mine: bool,
    /// The leader's address.
    pub address: Option<String>,
    /// Counts up with every change of hands.
    pub epoch: i32,
}

/// What to do about the Lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Write it: it is ours to renew.
    Renew,
    /// Write it: nobody holds it.
    Take,
    /// Leave it: another holds it.
    Follow,
}

/// Decides. `seen_unchanged`: for how long this replica has seen the Lease as it is. Clocks of other
/// machines are not believed: a Lease has expired when we have seen it unchanged for its duration.
pub fn evaluate(lease: &LeaseSpec, me: &str, seen_unchanged: Duration) -> Step {
    match lease.holder_identity.as_deref() {
        Some(holder) if holder == me => Step::Renew,
        None | Some("") => Step::Take,
        Some(_) => {
            let seconds = lease.lease_duration_seconds.and_then(|s| u64::try_from(s).ok()).unwrap_or(8);
            if seen_unchanged > Duration::from_secs(seconds) { Step::Take } else { Step::Follow }
        }
    }
}

/// Tries for the Lease for ever.
pub async fn run(client: Client, settings: Arc<Settings>, leadership: Arc<watch::Sender<Leadership>>) {
    let api = Api::<Lease>::namespaced(client, &settings.namespace);
    let mut candidate =
        Candidate { me: format!("{}/{}", settings.pod_name, settings.pod_ip), seen: None, renewed: None };
    loop {
        // The answer is not waited for beyond the moment at which a holder must have stopped.
        let patience = candidate.renewed.map_or(TURN, |at| GIVE_UP.saturating_sub(at.elapsed()));
        match timeout(patience.min(TURN), candidate.turn(&api)).await {
            Ok(Ok(now)) => {
                leadership.send_if_modified(|known| {
                    let changed = *known != now;
                    if changed {
                        tracing::info!(mine = now.mine, epoch = now.epoch, "leadership changed");
                        *known = now;
                    }
                    changed
                });
                sleep(RENEW).await;
            }
            failed => {
                if candidate.renewed.is_none_or(|at| at.elapsed() >= GIVE_UP) {
                    candidate.renewed = None;
                    leadership.send_if_modified(|known| std::mem::take(&mut known.mine));
                }
                tracing::warn!(error = ?failed.err(), "cannot renew the lease");
                sleep(AGAIN).await;
            }
        }
    }
}

struct Candidate {
    me: String,
    /// The Lease's version and since when it has been that.
    seen: Option<(String, Instant)>,
    renewed: Option<Instant>,
}

impl Candidate {
    async fn turn(&mut self, api: &Api<Lease>) -> Result<Leadership, kube::Error> {
        // Before the write: others count from when they see it, which may be before its answer is here.
        let begun = Instant::now();
        let Some(mut lease) = api.get_opt(NAME).await? else {
            let metadata = ObjectMeta { name: Some(NAME.to_owned()), ..ObjectMeta::default() };
            let lease = Lease { metadata, spec: Some(self.held(0)) };
            api.create(&PostParams::default(), &lease).await?;
            self.renewed = Some(begun);
            return Ok(Leadership { mine: true, address: None, epoch: 0 });
        };
        let spec = lease.spec.clone().unwrap_or_default();
        let version = lease.metadata.resource_version.clone().unwrap_or_default();
        let since = match &self.seen {
            Some((known, since)) if *known == version => *since,
            _ => Instant::now(),
        };
        self.seen = Some((version, since));
        let transitions = spec.lease_transitions.unwrap_or(0);
        let epoch = match evaluate(&spec, &self.me, since.elapsed()) {
            Step::Follow => {
                let holder = spec.holder_identity.unwrap_or_default();
                let address = holder.split_once('/').map(|(_, address)| address.to_owned());
                return Ok(Leadership { mine: false, address, epoch: transitions });
            }
            Step::Renew => transitions,
            Step::Take => transitions + 1,
        };
        // The write carries the version that was read: of two who try, one fails.
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
        assert_eq!(evaluate(&held_by("me"), "me", Duration::ZERO), Step::Renew);
        assert_eq!(evaluate(&held_by("other"), "me", Duration::from_secs(7)), Step::Follow);
        assert_eq!(evaluate(&held_by("other"), "me", Duration::from_secs(9)), Step::Take);
        assert_eq!(evaluate(&held_by(""), "me", Duration::ZERO), Step::Take);
    }

    #[test]
    fn the_holder_stops_writing_before_another_takes_over() {
        assert!(GIVE_UP + RENEW <= DURATION);
    }
}
