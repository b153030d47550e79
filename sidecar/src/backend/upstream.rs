//! An endpoint, and what this worker has seen of it: how long its answers take, how many requests it has in hand, and
//! how often it fails. Both averages fade with time, latency to the median of the service and success to one, so that
//! an endpoint that was slow or failed is tried again.
//!
//! Beside it stands what the endpoint's sidecar reports with its answers: that is of all clients together, and tells one
//! that sends a request a second what its own requests cannot.

use std::cell::{Cell, OnceCell, RefCell};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::breaker::Health;
use crate::config::{CanaryRef, Endpoint};
use crate::telemetry::attempts::{AttemptKey, Attempts};
use crate::telemetry::{PeerSeries, Series, SeriesKey, Telemetry};

/// The latency of a service that has not answered yet, in seconds.
const FIRST_LATENCY: f64 = 0.001;
/// The least and the most that a latency counts as, in seconds: below, differences are noise; above, only the number of
/// requests in hand decides.
const LATENCIES: (f64, f64) = (0.000_1, 1.0);
/// How fast the latency that was seen fades.
const DECAY: Duration = Duration::from_secs(10);
/// How fast failures fade. Slower, because a client that sends a request a second sees one in ten seconds of each of ten
/// endpoints: at 10 s, a server that fails at once gets 7 % of the requests instead of 3 % (`cargo xtask sim`).
const SUCCESS_DECAY: Duration = Duration::from_secs(30);
/// How fast a reported latency fades. It is that of all clients together, and only comes again with a request there: at
/// 10 s, the p99 of such a client beside a slow server is 195 ms instead of 113 ms.
const REPORT_DECAY: Duration = Duration::from_secs(60);
/// The weight of one failure in the average of success: it makes the cost fourfold.
const FAILURE_WEIGHT: f64 = 0.5;
/// The weight of one answer in it.
const ANSWER_WEIGHT: f64 = 0.3;
/// The least success: an endpoint that only fails costs 400 times as much as one that never does.
const LEAST_SUCCESS: f64 = 0.05;
/// How long an endpoint that could not be reached is passed over while others can.
const AVOID: Duration = Duration::from_secs(2);

/// What the endpoints of one backend have in common.
#[derive(Debug)]
pub(super) struct Group {
    /// The namespace that requests are counted under.
    pub(super) namespace: String,
    /// The name that they are counted under.
    pub(super) name: String,
    median: Median,
}

impl Group {
    /// Endpoints without history, whose requests are counted under this namespace and name.
    pub(super) fn named(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.to_owned(), name: name.to_owned(), median: Median::default() }
    }
}

/// An estimate of the median latency of answers, in seconds, that keeps none of them: each answer moves it a step
/// towards itself.
#[derive(Debug, Default)]
struct Median {
    seconds: Cell<f64>,
    answers: Cell<u32>,
}

impl Median {
    /// The step once there are many answers: the estimate then follows a change tenfold within 120 answers.
    const STEP: f64 = 0.02;

    fn get(&self) -> f64 {
        if self.answers.get() == 0 { FIRST_LATENCY } else { self.seconds.get() }
    }

    fn learn(&self, seen: f64) {
        let answers = self.answers.get().saturating_add(1);
        self.answers.set(answers);
        let factor = 1.0 + (1.0 / f64::from(answers)).max(Self::STEP);
        let old = self.seconds.get();
        self.seconds.set(match answers {
            1 => seen,
            _ if seen > old => seen.min(old * factor),
            _ => seen.max(old / factor),
        });
    }
}

/// An endpoint and what this worker has seen of it.
#[derive(Debug)]
pub struct Upstream {
    /// Where and who.
    pub endpoint: Endpoint,
    group: Rc<Group>,
    /// Its identity as a SPIFFE URI, made when it is first asked for.
    identity_text: OnceCell<Bytes>,
    /// What is counted for its revision, by protocol and route: one port may speak several, and serve several.
    series: PeerSeries,
    /// Whose evidence its attempts are.
    evidence: RefCell<Option<Evidence>>,
    seen: Cell<Seen>,
    reported: Cell<Option<Reported>>,
    /// When it became ready as its own clock says, and when that was first seen here.
    ready: Cell<(i64, Instant)>,
    /// What the breaker knows of it.
    pub(super) health: Health,
    /// Its place among all endpoints for requests that have something in common.
    pub(super) hash: u64,
    pending: Cell<u32>,
    avoid_until: Cell<Option<Instant>>,
}

/// What the ends of requests have said of an endpoint.
#[derive(Clone, Copy, Debug)]
struct Seen {
    /// Seconds; `None`: no answer yet, so it is expected to be like the others.
    latency: Option<f64>,
    /// 0 to 1.
    success: f64,
    at: Instant,
}

/// What an endpoint's sidecar has reported of it.
#[derive(Clone, Copy, Debug)]
struct Reported {
    /// Requests in flight.
    in_flight: Option<u32>,
    /// Seconds.
    latency: Option<f64>,
    at: Instant,
}

/// The Canary of an endpoint, and where attempts are counted for it, found when there is the first.
#[derive(Debug)]
struct Evidence {
    canary: Rc<CanaryRef>,
    attempts: OnceCell<Option<Arc<Attempts>>>,
}

impl Upstream {
    /// An endpoint without history.
    pub(super) fn new(endpoint: Endpoint, group: &Rc<Group>) -> Rc<Self> {
        let now = Instant::now();
        Rc::new(Self {
            ready: Cell::new((endpoint.ready_unix, now)),
            hash: hash((endpoint.address, &*endpoint.pod_uid)),
            endpoint,
            group: Rc::clone(group),
            identity_text: OnceCell::new(),
            series: PeerSeries::default(),
            evidence: RefCell::default(),
            seen: Cell::new(Seen { latency: None, success: 1.0, at: now }),
            reported: Cell::new(None),
            health: Health::default(),
            pending: Cell::new(0),
            avoid_until: Cell::new(None),
        })
    }

    /// Whom its certificate must name, as a SPIFFE URI; empty where it is not meshed. A cheap clone.
    pub fn identity_text(&self) -> Bytes {
        let text =
            || self.endpoint.identity.as_ref().map(|id| Bytes::from(id.to_string())).unwrap_or_default();
        self.identity_text.get_or_init(text).clone()
    }

    /// What is counted for this protocol, and for the route whose rule took the request; `None`: no rule did.
    pub fn series(
        &self,
        telemetry: &Telemetry,
        protocol: &'static str,
        route: Option<&Arc<str>>,
    ) -> Arc<Series> {
        let make = || {
            let Group { namespace, name, .. } = &*self.group;
            let key = SeriesKey::outbound(namespace, name, &self.endpoint.revision, protocol);
            telemetry.series(key.of_route(route).with_mtls(self.is_meshed()))
        };
        self.series.get(protocol, route, make)
    }

    /// Whether it has a sidecar, so that mTLS secures what is sent there.
    pub fn is_meshed(&self) -> bool {
        self.endpoint.identity.is_some()
    }

    /// Whose evidence attempts are that begin from now on; those under way count where they began.
    pub(super) fn counts_for(&self, canary: Option<&Rc<CanaryRef>>) {
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

    /// What one more request there costs: the latency to expect, for each that is in hand, and the dearer the more of
    /// them fail. An endpoint that fails fast does not look fast. The latency is the mean of what was seen and of what
    /// is reported, where there are both.
    pub(super) fn cost(&self, now: Instant) -> f64 {
        let Seen { latency, success, .. } = self.expected(now);
        let success = success.max(LEAST_SUCCESS);
        let latency = match (latency, self.reported_latency(now)) {
            (Some(seen), Some(reported)) => f64::midpoint(seen, reported),
            (Some(latency), None) | (None, Some(latency)) => latency,
            (None, None) => self.group.median.get(),
        };
        latency * f64::from(self.pending.get() + 1) / (success * success)
    }

    /// What is reported, faded by now.
    fn reported_latency(&self, now: Instant) -> Option<f64> {
        let Reported { latency, at, .. } = self.reported.get()?;
        let median = self.group.median.get();
        latency.map(|latency| median + (latency - median) * weight(at, now, REPORT_DECAY))
    }

    /// Requests in flight there: those of all clients where that was reported lately, else those of this worker.
    pub(super) fn load(&self, now: Instant) -> u32 {
        self.reported_load(now).unwrap_or(0).max(self.pending.get())
    }

    /// Requests in flight that were reported in the last ten seconds.
    pub(super) fn reported_load(&self, now: Instant) -> Option<u32> {
        let Reported { in_flight, at, .. } = self.reported.get()?;
        in_flight.filter(|_| now.duration_since(at) < DECAY)
    }

    /// Requests of this worker in flight there.
    pub(super) fn pending(&self) -> u32 {
        self.pending.get()
    }

    /// Takes over what the endpoint's sidecar reports with an answer whose head came `at`: requests in flight there, and
    /// the average time to the head of an answer in microseconds.
    pub fn report(&self, in_flight: Option<u32>, latency_us: Option<u32>, at: Instant) {
        if in_flight.is_none() && latency_us.is_none() {
            return;
        }
        let (least, most) = LATENCIES;
        let latency = latency_us.map(|us| (f64::from(us) / 1e6).clamp(least, most));
        self.reported.set(Some(Reported { in_flight, latency, at }));
    }

    /// What was seen, faded by now.
    fn expected(&self, now: Instant) -> Seen {
        let Seen { latency, success, at } = self.seen.get();
        let median = self.group.median.get();
        Seen {
            latency: latency.map(|latency| median + (latency - median) * weight(at, now, DECAY)),
            success: 1.0 - (1.0 - success) * weight(at, now, SUCCESS_DECAY),
            at: now,
        }
    }

    /// Takes over how a request ended that began `since`.
    fn learn(&self, outcome: Outcome, since: Instant, now: Instant) {
        let (least, most) = LATENCIES;
        let took = |at: Instant| at.duration_since(since).as_secs_f64().clamp(least, most);
        let weight = weight(self.seen.get().at, now, DECAY);
        let mut seen = self.expected(now);
        match outcome {
            Outcome::Answered(at) => {
                let took = took(at);
                self.group.median.learn(took);
                // A rise is believed at once, a fall with time.
                let latency = match seen.latency {
                    Some(old) if took < old => old * weight + took * (1.0 - weight),
                    _ => took,
                };
                seen.latency = Some(latency);
                seen.success += (1.0 - seen.success) * ANSWER_WEIGHT;
            }
            Outcome::Failed | Outcome::Abandoned => {
                // An answer would have taken at least so long.
                let expected = seen.latency.unwrap_or_else(|| self.group.median.get());
                if took(now) > expected {
                    seen.latency = Some(took(now));
                }
                if matches!(outcome, Outcome::Failed) {
                    seen.success -= seen.success * FAILURE_WEIGHT;
                }
            }
        }
        self.seen.set(seen);
    }

    /// Counts a request or an opaque connection in; the guard counts it out.
    pub fn begin(self: &Rc<Self>) -> InFlight {
        self.begin_at(Instant::now())
    }

    /// The same for who has looked at the clock already.
    pub fn begin_at(self: &Rc<Self>, now: Instant) -> InFlight {
        self.pending.set(self.pending.get() + 1);
        InFlight { upstream: Rc::clone(self), since: now }
    }

    /// When it was first seen here that it became ready then, in seconds since 1970.
    pub(super) fn first_seen_ready(&self, ready_unix: i64, now: Instant) -> Instant {
        let (known, at) = self.ready.get();
        if known == ready_unix {
            return at;
        }
        self.ready.set((ready_unix, now));
        now
    }

    /// It could not be reached.
    pub fn avoid(&self) {
        self.avoid_until.set(Some(Instant::now() + AVOID));
    }

    /// Whether it is passed over while others can be reached.
    pub(super) fn is_avoided(&self, now: Instant) -> bool {
        self.avoid_until.get().is_some_and(|until| until >= now)
    }
}

/// A number that is the same over restarts.
pub(super) fn hash(value: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// What is left of something that was seen `at`, and fades so fast.
fn weight(at: Instant, now: Instant, decay: Duration) -> f64 {
    (-now.duration_since(at).as_secs_f64() / decay.as_secs_f64()).exp()
}

/// How a request ended, as far as it says something of its endpoint.
#[derive(Clone, Copy, Debug)]
pub enum Outcome {
    /// The head of its answer came then.
    Answered(Instant),
    /// It failed.
    Failed,
    /// Its client gave up waiting: an answer would have taken at least so long.
    Abandoned,
}

/// A request or an opaque connection at an endpoint. It is in hand there until this is dropped.
#[derive(Debug)]
pub struct InFlight {
    upstream: Rc<Upstream>,
    since: Instant,
}

impl InFlight {
    /// When it was counted in.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// Counts a request out, with the time until its answer began: what a stream lasts, or a wait for news,
    /// says nothing about its endpoint. `None`: nothing can be learned, as from a client that left or an opaque
    /// connection. Returns how long it was in hand.
    pub fn end(self, outcome: Option<Outcome>) -> Duration {
        self.end_at(outcome, Instant::now())
    }

    /// The same for who has looked at the clock already.
    pub fn end_at(self, outcome: Option<Outcome>, now: Instant) -> Duration {
        if let Some(outcome) = outcome {
            self.upstream.learn(outcome, self.since, now);
        }
        now.duration_since(self.since)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.upstream.pending.set(self.upstream.pending.get().saturating_sub(1));
    }
}
