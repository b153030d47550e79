//! The one writer of statuses: a queue with at most one entry per object, a rate limit, and a fence: a replica that
//! does not lead writes nothing. A newer status replaces a queued one, and routes come after everything else.
//!
//! [`Queue`] decides what is written when, without a clock of its own; [`Writer`] writes.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kube::api::DynamicObject;
use kube::core::ApiResource;
use kube::{Api, Client};
use serde_json::Value;
use tokio::sync::{Notify, watch};
use tokio::time::error::Elapsed;
use tokio::time::{sleep, timeout};
use tulle_crds::{MeshConfig, MeshPolicy};

use super::xmesh;
use crate::bucket::Bucket;
use crate::lease::Leadership;
use crate::model::Key;
use crate::model::gateway::RouteKey;
use crate::watch::gateway;

/// Writes per second on average.
const RATE: f64 = 20.0;
/// Writes in a burst.
const BURST: f64 = 50.0;
/// Least time between two writes of one object: while a change reaches the sidecars, the status changes with each of
/// them.
const GAP: Duration = Duration::from_secs(1);
/// Delay after the first failed write; it doubles with each further failure, up to [`LAST_RETRY`].
const FIRST_RETRY: Duration = Duration::from_millis(500);
/// The longest delay.
const LAST_RETRY: Duration = Duration::from_secs(30);
/// The same where the account lacks the right: nothing but an administrator ends that, and a thousand routes that are
/// tried again every half minute would use up the rate.
const FIRST_FORBIDDEN: Duration = Duration::from_secs(5);
/// The longest delay then.
const LAST_FORBIDDEN: Duration = Duration::from_secs(300);
/// Timeout of one write.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// Time between two log lines about a right that is lacking.
const LACKING_AGAIN: Duration = Duration::from_secs(60);
/// How often the queue is looked at while it waits for a time or a token.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The object that a status belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// The MeshConfig.
    Config,
    /// A MeshPolicy.
    Policy(Key),
    /// A route of the Gateway API.
    Route(RouteKey),
    /// The XMesh of this mesh.
    Mesh,
}

impl Target {
    /// Of several statuses that are due, those of the mesh's own objects are written before those of routes, which may
    /// be thousands.
    fn is_route(&self) -> bool {
        match self {
            Self::Route(_) => true,
            Self::Config | Self::Policy(_) | Self::Mesh => false,
        }
    }
}

/// What came of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The object has the status.
    Written,
    /// The object has changed, or the API server did not answer.
    Failed,
    /// The API server refused the write to this account.
    Forbidden,
}

/// A status, and the version of the object that it was computed from.
#[derive(Clone, Debug, PartialEq)]
pub struct Write {
    /// The object's resourceVersion.
    pub version: Option<String>,
    /// The whole status.
    pub status: Value,
    /// The version of the object's kind, where that depends on what is installed.
    pub kind_version: Option<&'static str>,
}

impl Write {
    /// A status of an object whose kind has one version.
    pub fn new(version: Option<String>, status: Value) -> Self {
        Self { version, status, kind_version: None }
    }
}

#[derive(Debug)]
struct Entry {
    write: Write,
    due: Instant,
    /// Order of arrival. Of several that are due, the first is written first.
    number: u64,
    failures: u32,
}

/// Statuses to be written: one per object at most.
#[derive(Debug)]
pub struct Queue {
    entries: HashMap<Target, Entry>,
    written: HashMap<Target, Instant>,
    bucket: Bucket,
    arrivals: u64,
}

impl Queue {
    /// An empty queue.
    pub fn new(now: Instant) -> Self {
        let bucket = Bucket::new(BURST, now);
        Self { entries: HashMap::new(), written: HashMap::new(), bucket, arrivals: 0 }
    }

    /// Queues a status. One of the same object that still waits is replaced, and keeps its place.
    pub fn offer(&mut self, target: Target, write: Write, now: Instant) {
        if let Some(waiting) = self.entries.get_mut(&target) {
            waiting.write = write;
            return;
        }
        let due = self.written.get(&target).map_or(now, |at| now.max(*at + GAP));
        self.arrivals += 1;
        self.entries.insert(target, Entry { write, due, number: self.arrivals, failures: 0 });
    }

    /// Takes a status back: the object has it by now, or is gone.
    pub fn withdraw(&mut self, target: &Target) {
        self.entries.remove(target);
    }

    /// Whether a status of this object waits.
    pub fn holds(&self, target: &Target) -> bool {
        self.entries.contains_key(target)
    }

    /// The policies whose status waits.
    pub fn policies(&self) -> impl Iterator<Item = &Key> {
        self.entries.keys().filter_map(|target| match target {
            Target::Policy(key) => Some(key),
            Target::Config | Target::Route(_) | Target::Mesh => None,
        })
    }

    /// The routes whose status waits.
    pub fn routes(&self) -> impl Iterator<Item = &RouteKey> {
        self.entries.keys().filter_map(|target| match target {
            Target::Route(key) => Some(key),
            Target::Config | Target::Policy(_) | Target::Mesh => None,
        })
    }

    /// What to write now, if the rate allows it.
    pub fn next(&mut self, now: Instant) -> Option<(Target, Write)> {
        let due = self.entries.iter().filter(|(_, entry)| entry.due <= now);
        let (target, entry) =
            due.min_by_key(|(target, entry)| (target.is_route(), entry.due, entry.number))?;
        let next = (target.clone(), entry.write.clone());
        self.bucket.take(RATE, BURST, now).then_some(next)
    }

    /// Notes what came of a write. One that succeeded leaves the queue, unless a newer one took its place.
    pub fn done(&mut self, target: &Target, write: &Write, outcome: Outcome, now: Instant) {
        if outcome == Outcome::Written {
            self.written.retain(|_, at| now.saturating_duration_since(*at) < GAP);
            self.written.insert(target.clone(), now);
        }
        let Some(entry) = self.entries.get_mut(target) else { return };
        match outcome {
            Outcome::Written if entry.write == *write => {
                self.entries.remove(target);
            }
            Outcome::Written => (entry.failures, entry.due) = (0, now + GAP),
            Outcome::Failed | Outcome::Forbidden => {
                entry.failures = entry.failures.saturating_add(1);
                entry.due = now + retry_delay(outcome, entry.failures);
            }
        }
    }

    /// Forgets everything: another replica writes.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.written.clear();
    }
}

/// The delay after this many failures in a row, the last of which was this.
fn retry_delay(last: Outcome, failures: u32) -> Duration {
    let (first, longest) = match last {
        Outcome::Forbidden => (FIRST_FORBIDDEN, LAST_FORBIDDEN),
        Outcome::Failed | Outcome::Written => (FIRST_RETRY, LAST_RETRY),
    };
    let doublings = failures.saturating_sub(1).min(8);
    (first * 2_u32.pow(doublings)).min(longest)
}

/// Writes what is in its queue.
#[derive(Debug)]
pub struct Writer {
    queue: Mutex<Queue>,
    offered: Notify,
}

impl Default for Writer {
    fn default() -> Self {
        Self { queue: Mutex::new(Queue::new(Instant::now())), offered: Notify::new() }
    }
}

impl Writer {
    /// The queue.
    pub fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says that the queue was filled.
    pub fn wake(&self) {
        self.offered.notify_one();
    }

    /// Writes for ever, while this replica leads.
    pub async fn run(&self, client: Client, mut leadership: watch::Receiver<Leadership>) {
        let mut lacking: Option<Instant> = None;
        loop {
            // Before each write: the Lease may have been lost during the last one.
            if !leadership.borrow_and_update().mine {
                self.queue().clear();
                if leadership.changed().await.is_err() {
                    return std::future::pending().await;
                }
                continue;
            }
            let (next, empty) = {
                let mut queue = self.queue();
                (queue.next(Instant::now()), queue.entries.is_empty())
            };
            let Some((target, write)) = next else {
                tokio::select! {
                    () = self.offered.notified(), if empty => {}
                    () = sleep(LOOK_EVERY), if !empty => {}
                    _ = leadership.changed() => {}
                }
                continue;
            };
            let written = tokio::select! {
                written = timeout(WRITE_TIMEOUT, patch(&client, &target, &write)) => written,
                // A holder stops leading before its Lease expires: what is on its way is given up then.
                () = lost(leadership.clone()) => continue,
            };
            let outcome = outcome(&written);
            if outcome != Outcome::Written {
                tracing::debug!(?target, ?written, "a status was not written; it is decided and tried again");
            }
            if outcome == Outcome::Forbidden && lacking.is_none_or(|at| at.elapsed() >= LACKING_AGAIN) {
                lacking = Some(Instant::now());
                tracing::error!(
                    ?target,
                    "this account may not write this status; apply the ClusterRole tulle-operator of this operator's version"
                );
            }
            self.queue().done(&target, &write, outcome, Instant::now());
        }
    }
}

fn outcome(written: &Result<anyhow::Result<()>, Elapsed>) -> Outcome {
    let error = match written {
        Ok(Ok(())) => return Outcome::Written,
        Ok(Err(error)) => error,
        Err(_) => return Outcome::Failed,
    };
    match error.downcast_ref::<kube::Error>() {
        Some(kube::Error::Api(status)) if status.is_forbidden() => Outcome::Forbidden,
        _ => Outcome::Failed,
    }
}

/// Waits until this replica does not lead.
async fn lost(mut leadership: watch::Receiver<Leadership>) {
    // An error: the sender is gone, and with it the election.
    let _ = leadership.wait_for(|known| !known.mine).await;
}

/// As an object of any content: a policy that this build cannot decode has a status too.
async fn patch(client: &Client, target: &Target, write: &Write) -> anyhow::Result<()> {
    let (api, name) = match target {
        Target::Config => {
            let api = Api::<DynamicObject>::all_with(client.clone(), &ApiResource::erase::<MeshConfig>(&()));
            (api, "mesh")
        }
        Target::Policy(key) => {
            let resource = ApiResource::erase::<MeshPolicy>(&());
            (Api::<DynamicObject>::namespaced_with(client.clone(), &key.0, &resource), &*key.1)
        }
        Target::Route(key) => {
            let resource = gateway::resource(key.kind, write.kind_version.unwrap_or("v1"));
            (Api::<DynamicObject>::namespaced_with(client.clone(), &key.namespace, &resource), &*key.name)
        }
        Target::Mesh => (Api::<DynamicObject>::all_with(client.clone(), &xmesh::resource()), xmesh::NAME),
    };
    super::write(&api, name, write.version.as_deref(), &write.status).await
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn policy(name: &str) -> Target {
        Target::Policy(("shop".into(), name.into()))
    }

    fn status(version: u32) -> Write {
        Write::new(Some(version.to_string()), json!({"observedGeneration": version}))
    }

    #[test]
    fn of_two_statuses_of_an_object_the_newest_is_written_in_the_place_of_the_first() {
        let now = Instant::now();
        let mut queue = Queue::new(now);
        queue.offer(policy("a"), status(1), now);
        queue.offer(policy("b"), status(1), now);
        queue.offer(policy("a"), status(2), now);
        assert_eq!(queue.next(now), Some((policy("a"), status(2))));
        queue.done(&policy("a"), &status(2), Outcome::Written, now);
        assert_eq!(queue.next(now), Some((policy("b"), status(1))));
        queue.done(&policy("b"), &status(1), Outcome::Written, now);
        assert_eq!(queue.next(now), None);
    }

    #[test]
    fn a_status_that_came_during_a_write_is_not_lost() {
        let now = Instant::now();
        let mut queue = Queue::new(now);
        queue.offer(policy("a"), status(1), now);
        queue.next(now).unwrap();
        queue.offer(policy("a"), status(2), now);
        queue.done(&policy("a"), &status(1), Outcome::Written, now);
        assert_eq!(queue.next(now), None, "one object is not written twice within a second");
        assert_eq!(queue.next(now + GAP), Some((policy("a"), status(2))));
    }

    #[test]
    fn writes_are_limited_to_a_burst_and_then_to_the_rate() {
        let now = Instant::now();
        let mut queue = Queue::new(now);
        for number in 0..200 {
            queue.offer(policy(&number.to_string()), status(1), now);
        }
        let mut written = |at: Instant| {
            let mut count = 0;
            while let Some((target, write)) = queue.next(at) {
                queue.done(&target, &write, Outcome::Written, at);
                count += 1;
            }
            count
        };
        assert_eq!(written(now), 50);
        assert_eq!(written(now + Duration::from_millis(1001)), 20);
    }

    #[test]
    fn a_write_that_failed_is_repeated_with_a_growing_delay_and_does_not_delay_others() {
        let now = Instant::now();
        let mut queue = Queue::new(now);
        queue.offer(policy("a"), status(1), now);
        queue.next(now).unwrap();
        queue.done(&policy("a"), &status(1), Outcome::Failed, now);
        queue.offer(policy("b"), status(1), now);
        assert_eq!(queue.next(now).unwrap().0, policy("b"));
        queue.done(&policy("b"), &status(1), Outcome::Written, now);
        assert_eq!(queue.next(now + FIRST_RETRY / 2), None);
        assert_eq!(queue.next(now + FIRST_RETRY).unwrap().0, policy("a"));
        let delays =
            [1, 2, 3, 7, u32::MAX].map(|failures| retry_delay(Outcome::Failed, failures).as_millis());
        assert_eq!(delays, [500, 1000, 2000, 30_000, 30_000]);
    }

    #[test]
    fn a_thousand_routes_whose_status_is_forbidden_leave_the_rate_to_policies() {
        let start = Instant::now();
        let mut queue = Queue::new(start);
        let route = |number: u32| {
            let (kind, name) = (crate::model::gateway::RouteKind::Http, number.to_string().into());
            Target::Route(RouteKey { kind, namespace: "shop".into(), name })
        };
        for number in 0..1000 {
            queue.offer(route(number), status(1), start);
        }
        queue.offer(policy("a"), status(1), start);
        assert_eq!(queue.next(start), Some((policy("a"), status(1))), "before all that came earlier");
        queue.done(&policy("a"), &status(1), Outcome::Written, start);
        let mut tried = 0;
        let mut now = start;
        while now < start + Duration::from_secs(3600) {
            while let Some((target, write)) = queue.next(now) {
                queue.done(&target, &write, Outcome::Forbidden, now);
                tried += usize::from(now >= start + Duration::from_secs(1800));
            }
            now += Duration::from_millis(500);
        }
        assert!(tried <= 7000, "each every five minutes in the end: {tried}");
    }

    #[test]
    fn a_right_that_is_lacking_is_told_from_a_conflict() {
        let refused = |code, reason| {
            let status = kube::core::Status::failure("no", reason).with_code(code);
            Ok(Err(anyhow::Error::from(kube::Error::Api(Box::new(status)))))
        };
        assert_eq!(outcome(&refused(403, "Forbidden")), Outcome::Forbidden);
        assert_eq!(outcome(&refused(409, "Conflict")), Outcome::Failed);
        assert_eq!(outcome(&Ok(Ok(()))), Outcome::Written);
    }

    #[test]
    fn a_status_that_the_object_has_by_now_is_withdrawn() {
        let now = Instant::now();
        let mut queue = Queue::new(now);
        queue.offer(policy("a"), status(1), now);
        queue.withdraw(&policy("a"));
        assert!(!queue.holds(&policy("a")));
        assert_eq!(queue.next(now), None);
    }
}
