//! Which endpoint gets a request: first the revision by its share, then the better of two by
//! latency × load (power of two choices, peak EWMA).

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
    /// Where this pod stands among all clients, 0 to 1: by this it gets a version where clients stay with theirs.
    point: Cell<f64>,
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
        let point = hash((self.client, &service.namespace, &service.name));
        self.point.set((point >> 11) as f64 / (1u64 << 53) as f64);
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
            // A client that stays with its endpoint stays with its version: the shares are those of clients.
            let point = affinity.map_or_else(fastrand::f64, |_| self.point.get());
            let entry = choose_entry(&split, &ready, point)?;
            ready.into_iter().filter(|up| covers(&split, entry, &up.endpoint.revision)).collect()
        };
        let chosen = self.kept(&candidates).or_else(|| choose(&candidates))?;
        if affinity.is_some() {
            self.last.replace(Some((Rc::clone(&chosen), Instant::now())));
        }
        Some(chosen)
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
/// where among all; the last named entry, the version on trial, begins at 0.
fn choose_entry<'a>(split: &'a [(Arc<str>, u32)], ready: &[&Rc<Upstream>], point: f64) -> Option<&'a str> {
    let present = |name: &Arc<str>| ready.iter().any(|up| covers(split, name, &up.endpoint.revision));
    let named = split.iter().rev().filter(|(name, _)| !name.is_empty());
    let rest = split.iter().filter(|(name, _)| name.is_empty());
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
    None
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::attempts::Seen;

    fn endpoint(port: u16, revision: &str, terminating: bool) -> Endpoint {
        Endpoint {
            address: SocketAddr::from(([10, 0, 0, 1], port)),
            identity: None,
            revision: revision.into(),
            terminating,
            pod_uid: format!("pod-{port}").into(),
        }
    }

    fn balancer(endpoints: Vec<Endpoint>, split: &[(&str, u32)]) -> Balancer {
        let service = Service {
            endpoints,
            split: split.iter().map(|(revision, share)| ((*revision).into(), *share)).collect(),
            ..Service::default()
        };
        let balancer = Balancer::default();
        balancer.update(&service);
        balancer
    }

    fn share(balancer: &Balancer, revision: &str) -> f64 {
        let hits =
            (0..20_000).filter(|_| &*balancer.pick(&[]).unwrap().endpoint.revision == revision).count();
        hits as f64 / 20_000.0
    }

    #[test]
    fn revisions_get_their_share_however_many_pods_they_have() {
        let endpoints = vec![
            endpoint(1, "old", false),
            endpoint(2, "old", false),
            endpoint(3, "old", false),
            endpoint(4, "new", false),
        ];
        let seen = share(&balancer(endpoints, &[("old", 950), ("new", 50)]), "new");
        assert!((0.04..0.06).contains(&seen), "{seen}");
    }

    #[test]
    fn a_revision_without_a_ready_endpoint_gets_nothing() {
        let balancer = balancer(
            vec![endpoint(1, "old", false), endpoint(2, "new", true)],
            &[("old", 500), ("new", 500)],
        );
        assert!((share(&balancer, "new") - 0.0).abs() < f64::EPSILON);
    }

    #[test]
    fn a_revision_of_weight_nought_gets_nothing_even_when_it_is_all_there_is() {
        assert!(balancer(vec![endpoint(1, "new", false)], &[("old", 1000), ("new", 0)]).pick(&[]).is_none());
    }

    #[test]
    fn a_revision_that_nobody_named_gets_nothing() {
        let balancer =
            balancer(vec![endpoint(1, "old", false), endpoint(2, "stray", false)], &[("old", 1000)]);
        assert!((share(&balancer, "stray") - 0.0).abs() < f64::EPSILON);
    }

    #[test]
    fn terminating_endpoints_serve_only_while_there_is_no_other() {
        let both = balancer(vec![endpoint(1, "", false), endpoint(2, "", true)], &[]);
        assert!((0..100).all(|_| both.pick(&[]).unwrap().endpoint.address.port() == 1));
        assert_eq!(balancer(vec![endpoint(2, "", true)], &[]).pick(&[]).unwrap().endpoint.address.port(), 2);
    }

    #[test]
    fn one_port_is_counted_by_what_each_connection_speaks() {
        let telemetry = Telemetry::default();
        let one = balancer(vec![endpoint(1, "a", false)], &[]).pick(&[]).unwrap();
        one.series(&telemetry, "opaque").connection(None, (1, 2));
        one.series(&telemetry, "http1").request(&Ok(200), None, Duration::ZERO, (0, 0));
        let protocols: Vec<_> = telemetry.all().into_iter().map(|(key, _)| key.protocol).collect();
        assert_eq!(protocols, ["http1", "opaque"]);
    }

    #[test]
    fn a_client_stays_with_its_endpoint_where_the_service_says_so() {
        let endpoints: Vec<Endpoint> = (1..=4).map(|port| endpoint(port, "", false)).collect();
        let service = Service { endpoints, affinity: Some(Duration::from_secs(60)), ..Service::default() };
        let balancer = Balancer::default();
        balancer.update(&service);
        let first = balancer.pick(&[]).unwrap().endpoint.address;
        assert!((0..100).all(|_| balancer.pick(&[]).unwrap().endpoint.address == first));
        let other = balancer.pick(&[first]).unwrap().endpoint.address;
        assert_ne!(other, first, "one that was tried is left");
        assert_eq!(balancer.pick(&[]).unwrap().endpoint.address, other);
    }

    fn sticky(split: &[(&str, u32)]) -> Service {
        let endpoint = |port| endpoint(port, if port <= 4 { "old" } else { "new" }, false);
        Service {
            endpoints: (1..=8).map(endpoint).collect(),
            split: split.iter().map(|(revision, share)| ((*revision).into(), *share)).collect(),
            affinity: Some(Duration::from_secs(60)),
            ..Service::default()
        }
    }

    #[test]
    fn at_rest_under_a_canary_a_client_stays_with_its_endpoint() {
        for split in [&[("old", 1000)][..], &[("old", 1000), ("new", 0)]] {
            let balancer = Balancer::of_client("client");
            balancer.update(&sticky(&[]));
            let free = balancer.pick(&[]).unwrap().endpoint.clone();
            balancer.update(&sticky(split));
            let first = balancer.pick(&[]).unwrap().endpoint.clone();
            assert!(
                &*free.revision == "new" || first == free,
                "a split that names its revision moves nobody"
            );
            assert_eq!(&*first.revision, "old");
            assert!((0..100).all(|_| balancer.pick(&[]).unwrap().endpoint == first));
        }
    }

    #[test]
    fn a_weight_holds_over_clients_that_stay_and_moves_them_one_way_as_it_grows() {
        let clients: Vec<Balancer> =
            (0..2_000).map(|client| Balancer::of_client(&format!("client-{client}"))).collect();
        let mut before = vec![false; clients.len()];
        for weight in [0, 50, 200, 500, 1000] {
            let split = [("old", 1000 - weight), ("new", weight)];
            let mut moved = 0;
            for (client, was) in clients.iter().zip(&mut before) {
                client.update(&sticky(&split));
                let first = client.pick(&[]).unwrap().endpoint.clone();
                assert!((0..10).all(|_| client.pick(&[]).unwrap().endpoint == first));
                let is = &*first.revision == "new";
                assert!(is || !*was, "nobody goes back while the weight grows");
                *was = is;
                moved += u32::from(is);
            }
            let expected = f64::from(weight) / 1000.0;
            let seen = f64::from(moved) / 2_000.0;
            assert!((seen - expected).abs() < 0.04, "{seen} for {expected}");
        }
    }

    #[test]
    fn all_workers_of_a_pod_send_it_to_the_same_version() {
        let split = [("old", 500), ("new", 500)];
        for client in 0..50 {
            let worker = || {
                let balancer = Balancer::of_client(&format!("client-{client}"));
                balancer.update(&sticky(&split));
                balancer.pick(&[]).unwrap().endpoint.revision.clone()
            };
            assert_eq!(worker(), worker());
        }
    }

    #[test]
    fn a_client_whose_version_has_no_ready_endpoint_uses_the_other_and_comes_back() {
        let balancer = Balancer::of_client("client");
        let all = sticky(&[("old", 1), ("new", 999_999)]);
        balancer.update(&all);
        assert_eq!(&*balancer.pick(&[]).unwrap().endpoint.revision, "new");
        let mut less = all.clone();
        less.endpoints.retain(|endpoint| &*endpoint.revision == "old");
        balancer.update(&less);
        assert_eq!(&*balancer.pick(&[]).unwrap().endpoint.revision, "old");
        balancer.update(&all);
        assert_eq!(&*balancer.pick(&[]).unwrap().endpoint.revision, "new");
    }

    #[test]
    fn a_share_without_a_name_is_that_of_every_revision_that_no_other_names() {
        let endpoints = || {
            vec![
                endpoint(1, "old", false),
                endpoint(2, "new", false),
                endpoint(3, "stray", false),
                endpoint(4, "", false),
            ]
        };
        let split = [("old", 300), ("new", 200), ("", 500)];
        let seen = |revision| share(&balancer(endpoints(), &split), revision);
        for (revision, expected) in [("old", 0.3), ("new", 0.2), ("stray", 0.25), ("", 0.25)] {
            let seen = seen(revision);
            assert!((seen - expected).abs() < 0.02, "{seen} for {revision:?}");
        }
        let only = balancer(vec![endpoint(3, "stray", false)], &split);
        assert!(only.pick(&[]).is_some(), "the others have no endpoint");
    }

    #[test]
    fn only_what_a_canary_names_is_evidence_and_counts_in_the_epoch_that_chose_it() {
        let telemetry = Telemetry::default();
        let canary = |epoch| Some(CanaryRef { namespace: "shop".into(), name: "web".into(), epoch });
        let service = Service {
            endpoints: vec![endpoint(1, "old", false)],
            split: vec![("old".into(), 1000), ("".into(), 0)],
            canary: canary(1),
            ..Service::default()
        };
        let balancer = Balancer::default();
        balancer.update(&service);
        let upstream = balancer.pick(&[]).unwrap();
        let first = upstream.attempts(&telemetry).unwrap();
        balancer.update(&service);
        assert!(Arc::ptr_eq(&first, &upstream.attempts(&telemetry).unwrap()), "nothing has changed");
        balancer.update(&Service { canary: canary(2), ..service.clone() });
        assert!(Rc::ptr_eq(&upstream, &balancer.pick(&[]).unwrap()));
        let second = upstream.attempts(&telemetry).unwrap();
        second.count(Seen::Good, None);
        first.count(Seen::Failed, None);
        let mut taken = telemetry.attempts.take();
        taken.sort_by_key(|counts| counts.epoch);
        let seen: Vec<_> =
            taken.iter().map(|counts| (counts.epoch, counts.attempts, counts.failures)).collect();
        assert_eq!(seen, [(1, 1, 1), (2, 1, 0)]);
        balancer.update(&Service { canary: None, ..service.clone() });
        assert!(upstream.attempts(&telemetry).is_none());
        balancer.update(&Service { split: vec![("".into(), 1000)], ..service });
        assert!(upstream.attempts(&telemetry).is_none(), "it is none of the Canary's versions");
    }

    #[test]
    fn an_endpoint_that_is_known_to_end_is_told_from_one_that_took_its_address() {
        let before = endpoint(1, "old", false);
        let ending = balancer(vec![endpoint(1, "old", true)], &[]);
        assert!(ending.is_ending(&before));
        assert!(!balancer(vec![before.clone()], &[]).is_ending(&before));
        assert!(!ending.is_ending(&Endpoint { pod_uid: "other".into(), ..before }));
    }

    #[test]
    fn an_endpoint_that_was_tried_is_not_tried_again() {
        let two = balancer(vec![endpoint(1, "", false), endpoint(2, "", false)], &[]);
        let first = two.pick(&[]).unwrap().endpoint.address;
        assert_ne!(two.pick(&[first]).unwrap().endpoint.address, first);
    }

    #[test]
    fn an_endpoint_that_could_not_be_reached_is_passed_over() {
        let two = balancer(vec![endpoint(1, "", false), endpoint(2, "", false)], &[]);
        let first = two.pick(&[]).unwrap();
        first.avoid();
        assert!((0..100).all(|_| two.pick(&[]).unwrap().endpoint != first.endpoint));
    }
}
