//! Which endpoint gets a request: first the revision by its share, then the better of two by
//! latency × load (power of two choices, peak EWMA).

#[cfg(test)]
mod tests;

use std::cell::{Cell, OnceCell, RefCell};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::config::{CanaryRef, Endpoint, Service};
use crate::telemetry::attempts::{AttemptKey, Attempts};
use crate::telemetry::{ByProtocol, Series, Telemetry};

/// Latency that an endpoint without history is believed to have.
const FIRST_LATENCY: f64 = 0.001;
/// How fast the average follows.
const DECAY: Duration = Duration::from_secs(10);
/// Latency in seconds that a failure counts as, and the most that an answer does.
const SLOW: f64 = 1.0;
/// How long an endpoint that could not be reached is passed over while others can.
const AVOID: Duration = Duration::from_secs(2);

/// An endpoint and what this worker has seen of it.
#[derive(Debug)]
pub struct Upstream {
    /// Where and who.
    pub endpoint: Endpoint,
    /// The namespace and name that its requests are counted under.
    counted_as: Rc<(String, String)>,
    /// What is counted for its revision, by protocol: one port may speak several.
    series: ByProtocol,
    /// Whose evidence its attempts are.
    evidence: RefCell<Option<Evidence>>,
    latency: Cell<f64>,
    updated: Cell<Instant>,
    pending: Cell<u32>,
    avoid_until: Cell<Option<Instant>>,
}

/// The Canary of an endpoint, and where attempts are counted for it, found when there is the first.
#[derive(Debug)]
struct Evidence {
    canary: Rc<CanaryRef>,
    attempts: OnceCell<Option<Arc<Attempts>>>,
}

/// The endpoints of one destination.
#[derive(Debug, Default)]
pub struct Balancer {
    /// This pod, as a number: all its workers have the same.
    client: u64,
    /// Where this pod stands among all clients, 0 to 1, by which it gets its endpoints where clients stay with
    /// theirs: among workloads, and among versions of one.
    points: Cell<(f64, f64)>,
    upstreams: RefCell<Vec<Rc<Upstream>>>,
    split: RefCell<Vec<(Arc<str>, u32)>>,
    affinity: Cell<Option<Duration>>,
    /// The endpoint that this pod stays with, and when it was last used.
    last: RefCell<Option<(Rc<Upstream>, Instant)>>,
}

impl Balancer {
    /// A balancer without endpoints for the pod with this uid.
    pub fn of_client(pod_uid: &str) -> Self {
        Self { client: hash(pod_uid), ..Self::default() }
    }

    /// Takes a new list of endpoints over; what is known of those that stay is kept.
    pub fn update(&self, service: &Service) {
        let mut upstreams = self.upstreams.borrow_mut();
        let counted_as = Rc::new((service.namespace.clone(), service.name.clone()));
        let fresh = service.endpoints.iter().map(|endpoint| {
            match upstreams.iter().find(|old| old.endpoint == *endpoint) {
                Some(old) => Rc::clone(old),
                None => Upstream::new(endpoint.clone(), &counted_as),
            }
        });
        *upstreams = fresh.collect();
        let canary = service.canary.as_ref().map(|canary| Rc::new(canary.clone()));
        for upstream in upstreams.iter() {
            // What the Canary's versions have no name for is another workload's.
            let revision = &upstream.endpoint.revision;
            let named = !revision.is_empty() && service.split.iter().any(|(name, _)| name == revision);
            upstream.counts_for(canary.as_ref().filter(|_| named));
        }
        // The same over restarts, and whatever the shares are: as one grows, clients come to it and none leaves.
        let point = |of: &str| {
            let hash = hash((self.client, &service.namespace, &service.name, of));
            (hash >> 11) as f64 / (1u64 << 53) as f64
        };
        self.points.set((point("workload"), point("version")));
        self.split.replace(service.split.clone());
        self.affinity.set(service.affinity);
    }

    /// The endpoint of the last request, where clients stay with theirs (`sessionAffinity: ClientIP`; this
    /// pod is the one client), unless it has gone or was tried.
    fn kept(&self, ready: &[&Rc<Upstream>]) -> Option<Rc<Upstream>> {
        let affinity = self.affinity.get()?;
        let last = self.last.borrow();
        let (upstream, _) = last.as_ref().filter(|(_, used)| used.elapsed() < affinity)?;
        ready.iter().find(|up| up.endpoint.address == upstream.endpoint.address).map(|up| Rc::clone(up))
    }

    /// Chooses an endpoint that is not among `tried`.
    pub fn pick(&self, tried: &[SocketAddr]) -> Option<Rc<Upstream>> {
        let upstreams = self.upstreams.borrow();
        let usable = |up: &&Rc<Upstream>| !tried.contains(&up.endpoint.address);
        let ready: Vec<&Rc<Upstream>> =
            upstreams.iter().filter(usable).filter(|up| !up.endpoint.terminating).collect();
        // As kube-proxy: endpoints that terminate serve on while there is no other.
        let ready = if ready.is_empty() { upstreams.iter().filter(usable).collect() } else { ready };
        let split = self.split.borrow();
        let affinity = self.affinity.get();
        let candidates = if split.is_empty() {
            ready
        } else {
            let entry = match affinity {
                None => choose_entry(&split, &ready, fastrand::f64(), true)?,
                Some(_) => self.entry_of_client(&split, &ready)?,
            };
            ready.into_iter().filter(|up| covers(&split, entry, &up.endpoint.revision)).collect()
        };
        let chosen = self.kept(&candidates).or_else(|| choose(&candidates))?;
        if affinity.is_some() {
            self.last.replace(Some((Rc::clone(&chosen), Instant::now())));
        }
        Some(chosen)
    }

    /// The entry of the shares for a client that stays with its endpoint: it stays with its version too, so that
    /// the shares are those of clients. A Canary of one workload moves nobody to another.
    fn entry_of_client<'a>(&self, split: &'a [(Arc<str>, u32)], ready: &[&Rc<Upstream>]) -> Option<&'a str> {
        let (among_workloads, among_versions) = self.points.get();
        let any = || choose_entry(split, ready, among_workloads, true);
        let shared = split.iter().any(|(name, share)| name.is_empty() && *share > 0);
        let elsewhere = match self.kept(ready) {
            Some(kept) => shared && covers(split, "", &kept.endpoint.revision),
            None => any()?.is_empty(),
        };
        if elsewhere {
            return Some("");
        }
        choose_entry(split, ready, among_versions, false).or_else(any)
    }

    /// Whether an endpoint, as it is known now, is about to end.
    pub fn is_ending(&self, endpoint: &Endpoint) -> bool {
        let same = |up: &Rc<Upstream>| {
            up.endpoint.address == endpoint.address && up.endpoint.pod_uid == endpoint.pod_uid
        };
        self.upstreams.borrow().iter().any(|up| up.endpoint.terminating && same(up))
    }
}

fn hash(value: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// Whether an entry of the shares is that of a revision. One without a name is of every revision that no other
/// names.
fn covers(split: &[(Arc<str>, u32)], entry: &str, revision: &str) -> bool {
    if entry.is_empty() {
        return !split.iter().any(|(name, _)| !name.is_empty() && **name == *revision);
    }
    entry == revision
}

/// An entry by its share of those that have a ready endpoint: one without gets no traffic. `point`, 0 to 1, is
/// where among all; the last named entry, the version on trial, begins at 0. `others`: also one without a name.
fn choose_entry<'a>(
    split: &'a [(Arc<str>, u32)],
    ready: &[&Rc<Upstream>],
    point: f64,
    others: bool,
) -> Option<&'a str> {
    let present = |name: &Arc<str>| ready.iter().any(|up| covers(split, name, &up.endpoint.revision));
    let named = split.iter().rev().filter(|(name, _)| !name.is_empty());
    let rest = split.iter().filter(|(name, _)| name.is_empty() && others);
    let entries = named.chain(rest).filter(|(name, _)| present(name));
    let total: u32 = entries.clone().map(|(_, share)| share).sum();
    let mut left = point * f64::from(total);
    for (name, share) in entries {
        let share = f64::from(*share);
        if left < share {
            return Some(name);
        }
        left -= share;
    }
    // Every endpoint that has a share was tried or has gone. The first entry is the approved version, which serves
    // rather than nobody.
    split.first().filter(|(name, _)| !name.is_empty() && present(name)).map(|(name, _)| &**name)
}

/// The better of two at random.
fn choose(candidates: &[&Rc<Upstream>]) -> Option<Rc<Upstream>> {
    let now = Instant::now();
    let reachable: Vec<&&Rc<Upstream>> =
        candidates.iter().filter(|up| up.avoid_until.get().is_none_or(|until| until < now)).collect();
    let pool: Vec<&Rc<Upstream>> =
        if reachable.is_empty() { candidates.to_vec() } else { reachable.into_iter().copied().collect() };
    match pool.as_slice() {
        [] => None,
        [one] => Some(Rc::clone(one)),
        many => {
            let first = fastrand::usize(..many.len());
            let second = (first + 1 + fastrand::usize(..many.len() - 1)) % many.len();
            let (a, b) = (many.get(first)?, many.get(second)?);
            Some(Rc::clone(if a.cost(now) <= b.cost(now) { a } else { b }))
        }
    }
}

impl Upstream {
    /// An endpoint without history, whose requests are counted under this namespace and name.
    pub fn new(endpoint: Endpoint, counted_as: &Rc<(String, String)>) -> Rc<Self> {
        Rc::new(Self {
            endpoint,
            counted_as: Rc::clone(counted_as),
            series: ByProtocol::default(),
            evidence: RefCell::default(),
            latency: Cell::new(FIRST_LATENCY),
            updated: Cell::new(Instant::now()),
            pending: Cell::new(0),
            avoid_until: Cell::new(None),
        })
    }

    /// What is counted for this protocol.
    pub fn series(&self, telemetry: &Telemetry, protocol: &'static str) -> Arc<Series> {
        let (namespace, name) = &*self.counted_as;
        self.series.get(protocol, || telemetry.outbound(namespace, name, &self.endpoint.revision, protocol))
    }

    /// Whose evidence attempts are that begin from now on; those under way count where they began.
    fn counts_for(&self, canary: Option<&Rc<CanaryRef>>) {
        let mut evidence = self.evidence.borrow_mut();
        if evidence.as_ref().map(|evidence| &evidence.canary) != canary {
            *evidence =
                canary.map(|canary| Evidence { canary: Rc::clone(canary), attempts: OnceCell::new() });
        }
    }

    /// Where an attempt that begins now is counted when it ends, if it is evidence of a Canary. To be asked
    /// when the endpoint is chosen: the next epoch may come while the attempt runs.
    pub fn attempts(&self, telemetry: &Telemetry) -> Option<Arc<Attempts>> {
        let evidence = self.evidence.borrow();
        let Evidence { canary, attempts } = evidence.as_ref()?;
        let find = || {
            telemetry.attempts_of(AttemptKey {
                namespace: Arc::clone(&canary.namespace),
                canary: Arc::clone(&canary.name),
                epoch: canary.epoch,
                revision: Arc::clone(&self.endpoint.revision),
                pod_uid: Arc::clone(&self.endpoint.pod_uid),
            })
        };
        attempts.get_or_init(find).clone()
    }

    fn cost(&self, now: Instant) -> f64 {
        let age = now.duration_since(self.updated.get()).as_secs_f64();
        let latency = self.latency.get() * (-age / DECAY.as_secs_f64()).exp();
        latency.max(FIRST_LATENCY / 10.0) * f64::from(self.pending.get() + 1)
    }

    /// Counts a request in; the guard counts it out.
    pub fn begin(self: &Rc<Self>) -> InFlight {
        self.pending.set(self.pending.get() + 1);
        InFlight { upstream: Rc::clone(self), since: Instant::now() }
    }

    /// It could not be reached.
    pub fn avoid(&self) {
        self.avoid_until.set(Some(Instant::now() + AVOID));
    }
}

/// What a request says about its endpoint.
#[derive(Clone, Copy, Debug)]
pub enum Outcome {
    /// The head of its answer came then.
    Answered(Instant),
    /// It failed.
    Failed,
    /// Its client gave up waiting: an answer would have taken at least so long.
    Abandoned,
}

/// A request at an endpoint.
#[derive(Debug)]
pub struct InFlight {
    upstream: Rc<Upstream>,
    since: Instant,
}

impl InFlight {
    /// When the request was counted in.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// Counts the request out, with the time until its answer began: what a stream lasts, or a wait for news,
    /// says nothing about its endpoint. One that failed counts as slow: an endpoint that fails fast must not
    /// look fast. `None`: its client gave it up, and nobody knows.
    pub fn end(self, outcome: Option<Outcome>) -> Duration {
        let elapsed = self.since.elapsed();
        let seen = match outcome {
            None => return elapsed,
            Some(Outcome::Failed) => elapsed.as_secs_f64().max(SLOW),
            Some(Outcome::Abandoned) => elapsed.as_secs_f64().min(SLOW),
            Some(Outcome::Answered(at)) => at.duration_since(self.since).as_secs_f64().min(SLOW),
        };
        let now = Instant::now();
        let age = now.duration_since(self.upstream.updated.get()).as_secs_f64();
        let weight = (-age / DECAY.as_secs_f64()).exp();
        let old = self.upstream.latency.get();
        if matches!(outcome, Some(Outcome::Abandoned)) && seen < old {
            return elapsed;
        }
        let new = if seen > old { seen } else { old * weight + seen * (1.0 - weight) };
        self.upstream.latency.set(new);
        self.upstream.updated.set(now);
        elapsed
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.upstream.pending.set(self.upstream.pending.get().saturating_sub(1));
    }
}
