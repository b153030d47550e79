//! What is counted: one table of series, read by `/metrics` and by the reports to the operator.
//!
//! No label comes from the wire: services, revisions and namespaces come from the operator, methods
//! and hosts are no labels. An endpoint looks up the handle of its series with the first request of a protocol and
//! route, and keeps it: later requests take no lock.
//!
//! ```text
//!   series      the counters of one peer
//!   attempts    evidence of Canaries
//!   denials     the last refusals
//!   breakers    endpoints that are left alone
//!   rules       what each access rule refuses
//!   prometheus  /metrics
//!   report      deltas for the operator
//!   limited     rate limit of log lines
//! ```

pub mod attempts;
mod breakers;
mod denials;
mod limited;
pub mod prometheus;
pub mod report;
pub mod rules;
mod series;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tulle_mesh::counted_event::{CountedEvent, EvidenceDropped};
use tulle_mesh::proto::series_key::Direction;

use crate::tap::Taps;
use crate::trace::Queue;
use attempts::{AttemptKey, AttemptTable, Attempts};
pub use breakers::{BreakerGauge, Breakers};
pub use denials::Denials;
pub use limited::Limited;
use rules::RuleTable;
pub use series::{CLASS_CLIENT, CLASS_GRPC, CLASS_NONE, PeerSeries, Series};

/// Series beyond this many are counted as one, named `_OTHER`. Each takes about 1.7 KB here, of which 1.3 are its
/// latencies, and 0.5 to 1 KB in the [`report`] for what has been reported of it: 5 MB for all.
const MAX_SERIES: usize = 2_000;
/// Up to so many, none is dropped: a counter that begins anew has lost its sum, and `increase()` does not see what it
/// begins with. The rest is room for peers that come.
const KEPT_SERIES: usize = MAX_SERIES / 4 * 3;
/// Beyond [`KEPT_SERIES`], a series that nobody holds, and that was not used for this long, is dropped: its workload is
/// gone. Long enough for every scrape interval in use, so that Prometheus sees the last counts. Rules that no policy has
/// any more are dropped after this time too.
const UNUSED: Duration = Duration::from_secs(600);

/// What distinguishes a series.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeriesKey {
    /// `outbound` or `inbound`.
    pub direction: &'static str,
    /// Namespace of the peer: the destination's, or the client's.
    pub namespace: String,
    /// The destination Service, or the client's service account.
    pub peer: String,
    /// The destination's revision, or this pod's.
    pub revision: String,
    /// `http1`, `http2` or `opaque`.
    pub protocol: &'static str,
    /// The route whose rule took the requests, `HTTPRoute/namespace/name`; empty: none did.
    pub route: Arc<str>,
    /// Whether mTLS secures them.
    pub mtls: bool,
}

impl SeriesKey {
    /// Of requests to a revision of a Service. No route took them, and nothing secures them.
    pub fn outbound(namespace: &str, service: &str, revision: &str, protocol: &'static str) -> Self {
        Self {
            direction: "outbound",
            namespace: namespace.to_owned(),
            peer: service.to_owned(),
            revision: revision.to_owned(),
            protocol,
            route: Arc::default(),
            mtls: false,
        }
    }

    /// Of requests of a service account to this pod, which is of this revision. Nothing secures them.
    pub fn inbound(namespace: &str, account: &str, revision: &str, protocol: &'static str) -> Self {
        Self { direction: "inbound", ..Self::outbound(namespace, account, revision, protocol) }
    }

    /// The same of those that a rule of this route took.
    pub fn of_route(self, route: Option<&Arc<str>>) -> Self {
        Self { route: route.cloned().unwrap_or_default(), ..self }
    }

    /// The same of those that mTLS secures, or does not.
    pub fn with_mtls(self, mtls: bool) -> Self {
        Self { mtls, ..self }
    }

    /// The direction as the operator is told it.
    pub fn wire_direction(&self) -> Direction {
        if self.direction == "outbound" { Direction::Outbound } else { Direction::Inbound }
    }
}

/// A series in the table.
#[derive(Debug)]
struct Kept {
    series: Arc<Series>,
    /// [`Series::activity`] when it was looked at last.
    activity: u64,
    /// Since when the activity has been that, and nobody has held the series.
    unused_since: Option<Instant>,
}

impl Kept {
    fn new(series: Series) -> Self {
        Self { series: Arc::new(series), activity: 0, unused_since: None }
    }
}

/// All series of the process, and the counters that have no peer.
#[derive(Debug, Default)]
pub struct Telemetry {
    series: Mutex<HashMap<Arc<SeriesKey>, Kept>>,
    events: Mutex<HashMap<(&'static str, &'static str), u64>>,
    /// Clients without a sidecar, by [`PLAIN_PROTOCOLS`].
    plain: [OnceLock<Arc<Series>>; 3],
    /// Neither requests, connections nor attempts are counted.
    is_off: bool,
    /// Attempts under Canaries.
    pub attempts: AttemptTable,
    /// Endpoints that are ejected.
    pub breakers: Breakers,
    /// What each access rule has refused, or would have in Shadow.
    pub rules: RuleTable,
    /// The last refusals.
    pub denials: Denials,
    /// Spans that wait to be sent.
    pub spans: Queue,
    /// Who looks at requests now.
    pub taps: Taps,
}

/// The protocols of clients without a sidecar.
const PLAIN_PROTOCOLS: [&str; 3] = ["http1", "http2", "opaque"];

impl Telemetry {
    /// Counts requests, connections and attempts only if `is_on`. What is not a request or connection is counted in
    /// any case, and so is what access rules refuse: who reads it may be looking for an intruder.
    pub fn new(is_on: bool) -> Self {
        Self { is_off: !is_on, ..Self::default() }
    }

    /// The series of requests to a revision of a Service, which no route took and nothing secures.
    pub fn outbound(
        &self,
        namespace: &str,
        service: &str,
        revision: &str,
        protocol: &'static str,
    ) -> Arc<Series> {
        self.series(SeriesKey::outbound(namespace, service, revision, protocol))
    }

    /// The series of requests from a client with a sidecar.
    pub fn inbound(
        &self,
        namespace: &str,
        account: &str,
        revision: &str,
        protocol: &'static str,
    ) -> Arc<Series> {
        self.series(SeriesKey::inbound(namespace, account, revision, protocol).with_mtls(true))
    }

    /// The series of requests from clients without a sidecar to this pod, which is of this revision: `http1`, `http2`
    /// or `opaque`. Looked up once, so that a request takes no lock.
    pub fn inbound_plain(&self, revision: &str, protocol: &'static str) -> Arc<Series> {
        let make = || self.series(SeriesKey::inbound("", "_PLAIN", revision, protocol));
        let slot = PLAIN_PROTOCOLS.iter().position(|known| *known == protocol);
        match slot.and_then(|slot| self.plain.get(slot)) {
            Some(slot) => Arc::clone(slot.get_or_init(make)),
            None => make(),
        }
    }

    /// The series of a key, or the one of all for which the table has no room.
    pub fn series(&self, key: SeriesKey) -> Arc<Series> {
        // Not in the table, so that neither a scrape nor a report has it.
        if self.is_off {
            return Arc::new(Series::off(Arc::new(key)));
        }
        let mut series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = series.get(&key) {
            return Arc::clone(&kept.series);
        }
        if series.len() < MAX_SERIES {
            let new = |key: &Arc<SeriesKey>| Kept::new(Series::new(Arc::clone(key)));
            return Arc::clone(&series.entry(Arc::new(key)).or_insert_with_key(new).series);
        }
        let other = || "_OTHER".to_owned();
        let route = Arc::default();
        let key = SeriesKey { namespace: other(), peer: other(), revision: other(), route, ..key };
        let overflow = |key: &Arc<SeriesKey>| Kept::new(Series::overflow(Arc::clone(key)));
        Arc::clone(&series.entry(Arc::new(key)).or_insert_with_key(overflow).series)
    }

    /// Drops as many series as there are beyond [`KEPT_SERIES`], of those that nobody holds, that were not used for
    /// [`UNUSED`], and whose counts have been reported: the longest unused first. Returns their keys. To be called at
    /// regular intervals.
    fn evict(&self, now: Instant, is_reported: impl Fn(&SeriesKey, &Series) -> bool) -> Vec<SeriesKey> {
        let mut table = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        let excess = table.len().saturating_sub(KEPT_SERIES);
        let mut unused = Vec::new();
        for (key, kept) in table.iter_mut() {
            // A handle is given out under the lock only: one that is not held now cannot count.
            let is_held = Arc::strong_count(&kept.series) > 1;
            let activity = kept.series.activity();
            if is_held || activity != kept.activity {
                kept.activity = activity;
                kept.unused_since = None;
                continue;
            }
            let since = *kept.unused_since.get_or_insert(now);
            if excess > 0 && now.duration_since(since) >= UNUSED && is_reported(key, &kept.series) {
                unused.push((since, Arc::clone(key)));
            }
        }
        unused.sort_unstable();
        unused.truncate(excess);
        unused.iter().for_each(|(_, key)| drop(table.remove(key)));
        unused.into_iter().map(|(_, key)| SeriesKey::clone(&key)).collect()
    }

    /// Where attempts of a Canary are counted; `None`: too much is counted already, or nothing is counted, and these are
    /// no evidence.
    pub fn attempts_of(&self, key: AttemptKey) -> Option<Arc<Attempts>> {
        if self.is_off {
            return None;
        }
        let attempts = self.attempts.of(key);
        if attempts.is_none() {
            self.event(EvidenceDropped::TableFull);
        }
        attempts
    }

    /// Counts something that is neither request nor connection: a refused certificate, say.
    pub fn event(&self, event: impl Into<CountedEvent>) {
        let event: CountedEvent = event.into();
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        *events.entry((event.kind(), event.reason())).or_default() += 1;
    }

    /// Every series, sorted.
    pub fn all(&self) -> Vec<(SeriesKey, Arc<Series>)> {
        let series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> =
            series.iter().map(|(key, kept)| (SeriesKey::clone(key), Arc::clone(&kept.series))).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }

    /// Every event, sorted.
    pub fn events(&self) -> Vec<((&'static str, &'static str), u64)> {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = events.iter().map(|(key, count)| (*key, *count)).collect();
        all.sort_unstable();
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Failure;

    fn fill(telemetry: &Telemetry) {
        for number in 0..MAX_SERIES {
            telemetry.inbound("shop", &number.to_string(), "", "http1").request(
                &Ok(200),
                None,
                Duration::ZERO,
                (0, 0),
            );
        }
    }

    #[test]
    fn series_of_workloads_that_are_gone_make_room_for_others() {
        let (telemetry, mut now) = (Telemetry::default(), Instant::now());
        fill(&telemetry);
        let held = telemetry.inbound("shop", "0", "", "http1");
        let other = telemetry.inbound("shop", "new", "", "http1");
        assert!(other.is_overflow);
        drop(other);
        // The first look sees their activity, the second that there was none since.
        assert!(telemetry.evict(now, |_, _| true).is_empty());
        now += Duration::from_secs(60);
        assert!(telemetry.evict(now, |_, _| true).is_empty());
        telemetry.inbound("shop", "1", "", "http1").request(&Ok(200), None, Duration::ZERO, (0, 0));
        now += UNUSED;
        // Of a handful only the counts have been reported, so that no other may go.
        let reported = ["0", "1", "3", "4"];
        let evicted = telemetry.evict(now, |key, _| reported.contains(&key.peer.as_str()));
        let mut evicted: Vec<_> = evicted.into_iter().map(|key| key.peer).collect();
        evicted.sort_unstable();
        assert_eq!(evicted, ["3", "4"], "0 is held, 1 was used since, the others are not reported");
        assert!(!telemetry.inbound("shop", "new", "", "http1").is_overflow);
        telemetry.evict(now, |_, _| true);
        assert_eq!(telemetry.all().len(), KEPT_SERIES, "no more than what makes room");
        assert!(telemetry.evict(now + 2 * UNUSED, |_, _| true).is_empty());
        drop(held);
    }

    #[test]
    fn the_counts_of_a_quiet_peer_stay_as_long_as_there_is_room_and_then_the_longest_unused_go_first() {
        let (telemetry, mut now) = (Telemetry::default(), Instant::now());
        let fails = |peer: &str| {
            let failure = Err(Failure::UpstreamReset);
            telemetry.inbound("shop", peer, "", "http1").request(&failure, None, Duration::ZERO, (0, 0));
        };
        let counted = |peer: &str| telemetry.inbound("shop", peer, "", "http1").failures();
        for hour in 1..5_u64 {
            fails("old");
            for _ in 0..60 {
                now += Duration::from_secs(60);
                assert!(telemetry.evict(now, |_, _| true).is_empty());
            }
            assert_eq!(counted("old"), [("UpstreamReset", hour)], "increase() sees each of them");
        }
        fails("younger");
        for _ in 0..12 {
            now += Duration::from_secs(60);
            assert!(telemetry.evict(now, |_, _| true).is_empty());
        }
        (1..KEPT_SERIES).for_each(|number| fails(&number.to_string()));
        let evicted = telemetry.evict(now, |_, _| true);
        let evicted: Vec<_> = evicted.iter().map(|key| key.peer.as_str()).collect();
        assert_eq!(evicted, ["old"], "there is one too many, although two are unused");
    }

    #[test]
    fn a_peer_of_a_full_table_gets_its_own_series_as_soon_as_there_is_room() {
        let telemetry = Telemetry::default();
        fill(&telemetry);
        let peer = PeerSeries::default();
        let get = || peer.get("http1", None, || telemetry.outbound("shop", "web", "", "http1"));
        assert!(get().is_overflow);
        let now = Instant::now();
        for at in [now, now, now + UNUSED] {
            telemetry.evict(at, |_, _| true);
        }
        let own = get();
        assert!(!own.is_overflow);
        assert!(Arc::ptr_eq(&own, &get()));
    }

    #[test]
    fn plain_clients_are_counted_in_one_series_per_protocol_that_is_looked_up_once() {
        let telemetry = Telemetry::default();
        for protocol in PLAIN_PROTOCOLS {
            let first = telemetry.inbound_plain("r1", protocol);
            assert!(Arc::ptr_eq(&first, &telemetry.inbound_plain("r1", protocol)));
            assert!(!Arc::ptr_eq(&first, &telemetry.inbound("", "_PLAIN", "r1", protocol)), "one is mTLS");
        }
        let lock = telemetry.series.lock().unwrap();
        drop(telemetry.inbound_plain("r1", "http2"));
        let plain = lock.keys().filter(|key| !key.mtls && key.peer == "_PLAIN");
        assert_eq!(plain.count(), PLAIN_PROTOCOLS.len());
    }

    #[test]
    fn requests_of_one_peer_are_counted_by_the_route_that_took_them() {
        let telemetry = Telemetry::default();
        let peer = PeerSeries::default();
        let get = |route: Option<&Arc<str>>| {
            peer.get("http1", route, || {
                let key = SeriesKey::outbound("shop", "web", "", "http1");
                telemetry.series(key.of_route(route).with_mtls(true))
            })
        };
        let [route, same]: [Arc<str>; 2] = ["HTTPRoute/shop/web".into(), "HTTPRoute/shop/web".into()];
        assert!(
            Arc::ptr_eq(&get(Some(&route)), &get(Some(&same))),
            "rules that came again name the same route"
        );
        assert!(!Arc::ptr_eq(&get(Some(&route)), &get(None)));
        for number in 0..50 {
            get(Some(&format!("HTTPRoute/shop/preview-{number}").into()));
        }
        let held = telemetry.all().into_iter().filter(|(_, series)| Arc::strong_count(series) > 2).count();
        assert!(held <= 16, "{held} series are kept for routes that are gone");
    }
}
