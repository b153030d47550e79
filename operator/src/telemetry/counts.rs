//! Counts of a series, and what they say about it.

use std::sync::Arc;

use tulle_mesh::histogram::{BUCKETS, Histogram};
use tulle_mesh::proto::{ReasonCount, RuleCounts, SeriesCounts};
use tulle_mesh::query;
use tulle_mesh::reason::{Blame, Reason};

/// Classes of requests: 1xx to 5xx, gRPC server errors, no answer, given up or got wrong by the client.
pub const CLASSES: usize = 8;
/// What stands for everything that is not told apart.
pub const OTHER: &str = "_OTHER";
/// What a rule of a policy refused, as a reason in the counts of the rule.
const DENIED: &str = "Denied";
/// The same of a policy in Shadow, which let it through.
const WOULD_DENY: &str = "WouldDeny";
/// Reasons that are told apart in one sum. The code of the sidecar knows fewer.
const MAX_REASONS: usize = 32;
/// Bytes of a reason's name.
const MAX_REASON: usize = 63;
/// The most that one number of a report counts, so that a sum over 160 buckets cannot overflow.
const MAX_COUNT: u64 = 1 << 32;

/// What a rule of an access section decided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdicts {
    /// Requests and opaque connections that it refused.
    pub denied: u64,
    /// Those that it would have refused, were its policy not in Shadow.
    pub would_deny: u64,
}

impl Verdicts {
    /// Adds others to these.
    pub fn merge(&mut self, other: Self) {
        self.denied = self.denied.saturating_add(other.denied);
        self.would_deny = self.would_deny.saturating_add(other.would_deny);
    }
}

/// Sums, mergeable by addition.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests by class.
    pub classes: [u64; CLASSES],
    /// How long they took.
    pub latency: Histogram,
    /// Bytes that clients have sent.
    pub bytes_up: u64,
    /// Bytes that servers have sent.
    pub bytes_down: u64,
    /// Opaque connections that have ended.
    pub connections: u64,
    /// Attempts beyond the first of each request.
    pub retries: u64,
    /// Endpoints that breakers ejected, each time.
    pub ejections: u64,
    /// Failures by reason. Of a rule of a policy: [`DENIED`] and [`WOULD_DENY`].
    pub reasons: Vec<(Arc<str>, u64)>,
    /// Opaque connections that failed. In sums of series only, because a slot has just the reasons.
    pub failed_connections: u64,
    /// The same of those that were denied.
    pub denied_connections: u64,
    /// Requests that the server's sidecar denied, as their client's has counted them: in the last class. In sums of series
    /// only.
    pub denied_of_client: u64,
}

impl Counts {
    /// The counts of a report. Pairs of buckets are distances from the pair before, and counts.
    pub fn of(counts: &SeriesCounts) -> Self {
        let mut sums = Self {
            bytes_up: counts.bytes_up,
            bytes_down: counts.bytes_down,
            connections: counts.connections.min(MAX_COUNT),
            retries: counts.retries.min(MAX_COUNT),
            ejections: counts.ejections.min(MAX_COUNT),
            ..Self::default()
        };
        for (class, count) in sums.classes.iter_mut().zip(&counts.classes) {
            *class = (*count).min(MAX_COUNT);
        }
        let mut bucket = 0_u64;
        let (pairs, _) = counts.buckets.as_chunks::<2>();
        for [distance, count] in pairs.iter().take(BUCKETS) {
            bucket = bucket.saturating_add(*distance);
            if *count > 0 {
                let bucket = usize::try_from(bucket).unwrap_or(usize::MAX);
                sums.latency.add(bucket, (*count).min(MAX_COUNT));
            }
        }
        sums.latency.add_sum(counts.sum_micros);
        for reason in counts.reasons.iter().filter(|reason| reason.count > 0) {
            let name = if reason.reason.len() > MAX_REASON { OTHER } else { &reason.reason };
            sums.add_reason(&Arc::from(name), reason.count.min(MAX_COUNT));
        }
        sums
    }

    /// What a report says of a rule.
    pub fn of_rule(counts: &RuleCounts) -> Self {
        let mut sums = Self::default();
        for (name, count) in [(DENIED, counts.denied), (WOULD_DENY, counts.would_deny)] {
            if count > 0 {
                sums.add_reason(&Arc::from(name), count.min(MAX_COUNT));
            }
        }
        sums
    }

    /// What a rule decided, where these are its counts.
    pub fn verdicts(&self) -> Verdicts {
        let of = |wanted: &str| self.of_reasons(|name| name == wanted);
        Verdicts { denied: of(DENIED), would_deny: of(WOULD_DENY) }
    }

    /// The counts as they are reported. The key is 0.
    pub fn to_proto(&self) -> SeriesCounts {
        let mut last = 0;
        let mut buckets = Vec::new();
        for (bucket, count) in self.latency.buckets() {
            buckets.extend([bucket.saturating_sub(last) as u64, count]);
            last = bucket;
        }
        let reason =
            |(name, count): &(Arc<str>, u64)| ReasonCount { reason: name.to_string(), count: *count };
        SeriesCounts {
            key: 0,
            classes: self.classes.to_vec(),
            buckets,
            sum_micros: self.latency.sum_micros(),
            bytes_up: self.bytes_up,
            bytes_down: self.bytes_down,
            connections: self.connections,
            reasons: self.reasons.iter().map(reason).collect(),
            retries: self.retries,
            ejections: self.ejections,
        }
    }

    /// Adds other counts to these.
    pub fn merge(&mut self, other: &Self) {
        for (class, count) in self.classes.iter_mut().zip(&other.classes) {
            *class = class.saturating_add(*count);
        }
        self.latency.merge(&other.latency);
        self.bytes_up = self.bytes_up.saturating_add(other.bytes_up);
        self.bytes_down = self.bytes_down.saturating_add(other.bytes_down);
        self.connections = self.connections.saturating_add(other.connections);
        self.retries = self.retries.saturating_add(other.retries);
        self.ejections = self.ejections.saturating_add(other.ejections);
        self.failed_connections = self.failed_connections.saturating_add(other.failed_connections);
        self.denied_connections = self.denied_connections.saturating_add(other.denied_connections);
        self.denied_of_client = self.denied_of_client.saturating_add(other.denied_of_client);
        for (name, count) in &other.reasons {
            self.add_reason(name, *count);
        }
    }

    /// The part with this number of so many that are as alike as can be, and that are everything together.
    pub(super) fn part(&self, part: u64, of: u64) -> Self {
        let before = |count: u64, part: u64| {
            let share = u128::from(count) * u128::from(part) / u128::from(of.max(1));
            u64::try_from(share).unwrap_or(u64::MAX)
        };
        let share = |count: u64| before(count, part.saturating_add(1)).saturating_sub(before(count, part));
        let mut latency = Histogram::default();
        for (bucket, count) in self.latency.buckets() {
            let count = share(count);
            // Of an empty bucket room would be made.
            if count > 0 {
                latency.add(bucket, count);
            }
        }
        latency.add_sum(share(self.latency.sum_micros()));
        let reasons = self.reasons.iter().map(|(name, count)| (Arc::clone(name), share(*count)));
        Self {
            classes: self.classes.map(share),
            latency,
            bytes_up: share(self.bytes_up),
            bytes_down: share(self.bytes_down),
            connections: share(self.connections),
            retries: share(self.retries),
            ejections: share(self.ejections),
            reasons: reasons.filter(|(_, count)| *count > 0).collect(),
            failed_connections: share(self.failed_connections),
            denied_connections: share(self.denied_connections),
            denied_of_client: share(self.denied_of_client),
        }
    }

    /// Finds out what the reasons of one series are those of, before it is added to others.
    pub(super) fn judge(&mut self, is_opaque: bool) {
        if is_opaque { self.judge_connections() } else { self.judge_requests() }
    }

    /// Finds out how many requests were denied that are in the last class: those that their clients did not give up or
    /// get wrong. A server's sidecar counts what it denies as without an answer.
    fn judge_requests(&mut self) {
        use Reason::{ClientBadRequest, ClientGone, ClientHeadTooLong, PolicyDenied, PolicyPlaintext};
        let of = |wanted: &[Reason]| {
            self.of_reasons(|name| Reason::from_name(name).is_some_and(|reason| wanted.contains(&reason)))
        };
        let [_, _, _, _, _, _, _, abandoned] = self.classes;
        let rest = abandoned.saturating_sub(of(&[ClientBadRequest, ClientGone, ClientHeadTooLong]));
        self.denied_of_client = rest.min(of(&[PolicyDenied, PolicyPlaintext]));
    }

    /// Finds out how many connections failed. For counts of an opaque series: all its reasons are those of connections.
    fn judge_connections(&mut self) {
        let is_of_client =
            |name: &str| Reason::from_name(name).is_some_and(|reason| reason.blames() == Blame::Client);
        self.denied_connections = self.of_reasons(is_denial);
        self.failed_connections = self.of_reasons(|name| !is_denial(name) && !is_of_client(name));
    }

    fn of_reasons(&self, is_wanted: impl Fn(&str) -> bool) -> u64 {
        let wanted = self.reasons.iter().filter(|(name, _)| is_wanted(name));
        wanted.fold(0, |sum: u64, (_, count)| sum.saturating_add(*count))
    }

    /// Adds failures for a reason.
    pub fn add_reason(&mut self, name: &Arc<str>, count: u64) {
        let full = self.reasons.len() >= MAX_REASONS;
        let known = self.reasons.iter().position(|(known, _)| known == name);
        // The last one takes what does not fit: by then it is a sidecar that makes names up.
        let known = known.or_else(|| full.then(|| self.reasons.len().saturating_sub(1)));
        match known.and_then(|known| self.reasons.get_mut(known)) {
            Some((_, total)) => *total = total.saturating_add(count),
            None => self.reasons.push((Arc::clone(name), count)),
        }
    }

    /// Whether all of it had no endpoint to go to, so that nothing was sent.
    pub fn went_nowhere(&self) -> bool {
        let nowhere = |name: &str| Reason::from_name(name).is_some_and(Reason::has_no_endpoint);
        let carried = self.requests().saturating_add(self.connections);
        carried > 0 && self.of_reasons(nowhere) >= carried
    }

    /// Whether nothing was counted.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Requests that have ended.
    pub fn requests(&self) -> u64 {
        self.classes.iter().fold(0, |sum: u64, count| sum.saturating_add(*count))
    }

    /// Requests that have failed: 5xx, gRPC server errors, and those without an answer.
    pub fn failures(&self) -> u64 {
        let [_, _, _, _, server, grpc, unanswered, _] = self.classes;
        server.saturating_add(grpc).saturating_add(unanswered)
    }

    /// What these counts of so many seconds say.
    pub fn golden(&self, seconds: u64) -> query::Golden {
        let [_, _, _, client_errors, _, _, unanswered, abandoned] = self.classes;
        let denied = self.of_reasons(is_denial);
        // A request that is denied is counted as one without an answer, and by its client's sidecar in the last class.
        let denied_elsewhere = self.denied_connections.saturating_add(self.denied_of_client);
        let denied_requests = denied.saturating_sub(denied_elsewhere).min(unanswered);
        let (requests, failures) = (self.requests(), self.failures().saturating_sub(denied_requests));
        // A request that its client gave up or got wrong, or that was refused as somebody wants it, says nothing about
        // the server.
        let judged = requests.saturating_sub(abandoned).saturating_sub(denied_requests);
        // A retry is sent when the attempt before it has failed, so there are as many failed attempts more.
        let attempts = judged.saturating_add(self.retries);
        let millis = |q: f64| self.latency.quantile(q).map(|micros| micros / 1000.0);
        let reason =
            |(name, count): &(Arc<str>, u64)| query::Reason { name: name.to_string(), count: *count };
        let mut reasons: Vec<query::Reason> = self.reasons.iter().map(reason).collect();
        reasons.sort_by(|a, b| b.count.cmp(&a.count).then_with(|| a.name.cmp(&b.name)));
        query::Golden {
            requests,
            failures,
            client_errors,
            abandoned: abandoned.saturating_sub(self.denied_of_client),
            denied,
            rps: requests as f64 / seconds.max(1) as f64,
            success: (judged > 0).then(|| 1.0 - failures as f64 / judged as f64),
            attempt_success: (judged > 0).then(|| judged.saturating_sub(failures) as f64 / attempts as f64),
            p50_ms: millis(0.5),
            p95_ms: millis(0.95),
            p99_ms: millis(0.99),
            retries: self.retries,
            timeouts: self.of_reasons(is_timeout),
            reasons,
            connections: self.connections,
            failed_connections: self.failed_connections,
            bytes_up: self.bytes_up,
            bytes_down: self.bytes_down,
            ejections: self.ejections,
        }
    }
}

/// Whether something was given up because a time was over.
fn is_timeout(name: &str) -> bool {
    use Reason::{DeadlineExceeded, IdleTimeout, Timeout, UpstreamTimeout};
    let reason = Reason::from_name(name);
    matches!(reason, Some(UpstreamTimeout | DeadlineExceeded | IdleTimeout | Timeout))
}

/// Whether a policy or a limit has refused what has this reason: that is what its author wants, and no failure of the
/// server.
fn is_denial(name: &str) -> bool {
    Reason::from_name(name)
        .is_some_and(|reason| reason.blames() == Blame::Policy || reason == Reason::OursOverloaded)
}
