//! Which endpoint gets a request: first the revision by its share, then the better of two by
//! latency × load (power of two choices, peak EWMA).

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::config::{Endpoint, Service};
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
    latency: Cell<f64>,
    updated: Cell<Instant>,
    pending: Cell<u32>,
    avoid_until: Cell<Option<Instant>>,
}

/// The endpoints of one destination.
#[derive(Debug, Default)]
pub struct Balancer {
    upstreams: RefCell<Vec<Rc<Upstream>>>,
    split: RefCell<Vec<(Arc<str>, u32)>>,
    affinity: Cell<Option<Duration>>,
    /// The endpoint that this pod stays with, and when it was last used.
    last: RefCell<Option<(Rc<Upstream>, Instant)>>,
}

impl Balancer {
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
        if split.is_empty() {
            let chosen = self.kept(&ready).or_else(|| choose(&ready))?;
            if self.affinity.get().is_some() {
                self.last.replace(Some((Rc::clone(&chosen), Instant::now())));
            }
            return Some(chosen);
        }
        let revision = choose_revision(&split, &ready, fastrand::u32(..))?;
        let of_revision: Vec<&Rc<Upstream>> =
            ready.into_iter().filter(|up| up.endpoint.revision == revision).collect();
        choose(&of_revision)
    }
}

/// A revision by its share of those that have a ready endpoint: one without gets no traffic.
fn choose_revision(split: &[(Arc<str>, u32)], ready: &[&Rc<Upstream>], random: u32) -> Option<Arc<str>> {
    let present = |revision: &Arc<str>| ready.iter().any(|up| up.endpoint.revision == *revision);
    let total: u32 = split.iter().filter(|(revision, _)| present(revision)).map(|(_, share)| share).sum();
    let mut point = random.checked_rem(total)?;
    for (revision, share) in split.iter().filter(|(revision, _)| present(revision)) {
        if point < *share {
            return Some(Arc::clone(revision));
        }
        point -= share;
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

    fn endpoint(port: u16, revision: &str, terminating: bool) -> Endpoint {
        Endpoint {
            address: SocketAddr::from(([10, 0, 0, 1], port)),
            identity: None,
            revision: revision.into(),
            terminating,
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
