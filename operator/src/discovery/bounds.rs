//! What of a sidecar's words is taken: whoever holds one certificate must not fill memory, break a label or
//! give evidence about a rollout that it sends nothing to.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use tulle_mesh::counted_event::PolicyDenied;
use tulle_mesh::denial::DenialId;
use tulle_mesh::histogram::BUCKETS;
use tulle_mesh::identity::WorkloadId;
use tulle_mesh::proto::series_key::Direction;
use tulle_mesh::proto::{ReasonCount, RecentDenial, RuleKey, SeriesCounts, SeriesKey, TelemetryReport};
use tulle_mesh::reason::Reason;

use crate::telemetry::counts::{CLASSES, OTHER};

/// Requests or attempts that one report may count of a destination: nobody makes a sum that no other can add
/// to.
const MAX_COUNT: u64 = 100_000_000;
/// Series of one report.
const MAX_SERIES: usize = 2_000;
/// Keys of one report, and counts that name them: a sidecar has 2,000 series, and some for all that have no room.
const MAX_KEYS: usize = 2_048;
/// Rules of one report: a sidecar counts 100 of them apart.
const MAX_RULES: usize = 128;
/// Denials of one report.
const MAX_DENIALS: usize = 5;
/// Bytes of the method of a denial.
const MAX_METHOD: usize = 32;
/// Bytes of the path of a denial.
const MAX_PATH: usize = 256;
/// Bytes that one report may count of a series.
const MAX_BYTES: u64 = 1 << 50;
/// Reasons of failures that one report may count of a series.
const MAX_REASONS: usize = 64;
/// Characters of a name of Kubernetes.
const MAX_NAME: usize = 253;
/// Characters of a reason.
const MAX_REASON: usize = 256;
/// Characters of a revision, as of any label value of Kubernetes.
const MAX_REVISION: usize = 63;
/// Characters of a pod's uid.
const MAX_UID: usize = 64;

/// What a sidecar may speak about.
pub(super) struct Subjects<'a> {
    /// Namespace and name that its requests are counted under: those of Services, and of the service accounts of pods
    /// that it sends to by their own addresses.
    pub services: HashSet<(&'a str, &'a str)>,
    /// Whether there is a Service of this namespace and name. A connection lasts for longer than the subscription to
    /// the address that it was opened to.
    pub exists: &'a dyn Fn(&str, &str) -> bool,
    /// Namespace and name of the Canaries whose shares it was sent.
    pub canaries: HashSet<(&'a str, &'a str)>,
    /// Routes of the Gateway API whose rules it was sent, as `HTTPRoute/namespace/name`.
    pub routes: HashSet<String>,
}

/// A reason for a refusal, as it is shown.
pub(super) fn reason(text: &str) -> String {
    text.chars().filter(|character| !is_unsafe(*character)).take(MAX_REASON).collect()
}

/// Control characters, and those that change the direction of writing: what is read would not be what was sent.
fn is_unsafe(character: char) -> bool {
    character.is_control() || matches!(character, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// The version of a sidecar, as it is shown.
pub(super) fn version(text: &str) -> Arc<str> {
    let is_shown = |character: &char| character.is_ascii_alphanumeric() || ".-_+".contains(*character);
    text.chars().filter(is_shown).take(MAX_REVISION).collect::<String>().into()
}

/// A report without what is not believed. Returns how many series were dropped or are not believed to be of what they
/// name, and how many denials were dropped.
pub(super) fn telemetry(report: &mut TelemetryReport, subjects: &Subjects<'_>) -> usize {
    destinations(report, subjects) + series(report, subjects) + rules(report) + denials(report)
}

/// Single denials. Whether their ids and policies are those of the pod is checked where they are kept.
fn denials(report: &mut TelemetryReport) -> usize {
    let Some(part) = &mut report.denials else { return 0 };
    let before = part.denials.len();
    part.denials.truncate(MAX_DENIALS);
    part.denials.retain_mut(bound_denial);
    part.dropped = part.dropped.min(MAX_COUNT);
    before - part.denials.len()
}

/// Returns whether a denial is accepted. Its texts are cut: a path has no query, because what stands there may be a
/// secret.
fn bound_denial(denial: &mut RecentDenial) -> bool {
    if let Some(query) = denial.path.find(['?', '#']) {
        denial.path.truncate(query);
    }
    for (text, most) in [(&mut denial.method, MAX_METHOD), (&mut denial.path, MAX_PATH)] {
        text.retain(|character| !is_unsafe(character));
        let end = text.floor_char_boundary(most);
        denial.cut |= end < text.len();
        text.truncate(end);
    }
    let is_object = |(namespace, name): (&str, &str)| {
        !namespace.is_empty() && !name.is_empty() && is_name(namespace) && is_name(name)
    };
    let is_policy = denial.policy.is_empty() || denial.policy.split_once('/').is_some_and(is_object);
    let is_client = denial.client.is_empty() || denial.client.parse::<WorkloadId>().is_ok();
    let is_decision = is_rule(&denial.rule) || denial.rule == PolicyDenied::Plaintext.name();
    is_policy && is_client && is_decision && denial.id.parse::<DenialId>().is_ok()
}

/// Counts by rule. Which policies a pod is subject to is checked where the counts are shown: the policy that has just
/// refused something may have been deleted since.
fn rules(report: &mut TelemetryReport) -> usize {
    report.rule_keys.truncate(MAX_RULES);
    let others = report.rule_keys.iter_mut().map(bound_rule);
    let others = others.filter(|is_other| *is_other).count();
    report.rules.truncate(MAX_RULES);
    for counts in &mut report.rules {
        counts.denied = counts.denied.min(MAX_COUNT);
        counts.would_deny = counts.would_deny.min(MAX_COUNT);
    }
    others
}

/// Returns whether the key has become that of others, as with [`bound_key`].
fn bound_rule(key: &mut RuleKey) -> bool {
    let is_believed = is_name(&key.namespace) && is_name(&key.policy) && is_rule(&key.rule);
    if !is_believed {
        let other = || OTHER.to_owned();
        *key = RuleKey { id: key.id, namespace: other(), policy: other(), rule: other() };
    }
    !is_believed
}

/// What an access section can decide by: a closed set, because it becomes a label.
fn is_rule(text: &str) -> bool {
    let is_index = |index: &str| index.parse::<u16>().is_ok_and(|number| number.to_string() == index);
    let deny = text.strip_prefix("DenyRule(").and_then(|rest| rest.strip_suffix(')'));
    matches!(text, "NoAllowMatched" | "AmbiguousPath" | OTHER) || deny.is_some_and(is_index)
}

/// Counts by keys. A key that is not believed is kept as that of others: its number comes again, and a number that the
/// leader does not know would have the report sent again and again.
fn series(report: &mut TelemetryReport, subjects: &Subjects<'_>) -> usize {
    let before = report.series.len();
    report.keys.truncate(MAX_KEYS);
    let others = report.keys.iter_mut().map(|key| bound_key(key, subjects));
    let others = others.filter(|is_other| *is_other).count();
    report.series.retain(|counts| are_distances(&counts.buckets));
    report.series.truncate(MAX_KEYS);
    report.series.iter_mut().for_each(bound_counts);
    others + before - report.series.len()
}

/// Returns whether the key has become that of others.
fn bound_key(key: &mut SeriesKey, subjects: &Subjects<'_>) -> bool {
    if !is_revision(&key.revision) {
        key.revision = String::new();
    }
    if !key.route.is_empty() && !subjects.routes.contains(&key.route) {
        key.route = String::new();
    }
    if !is_revision(&key.protocol) {
        key.protocol = String::new();
    }
    let (namespace, peer) = (key.namespace.as_str(), key.peer.as_str());
    let is_believed = match (key.direction(), namespace, peer) {
        // A pod without a sidecar has no name that its client knows.
        (_, OTHER, OTHER) | (Direction::Outbound, "", "_PASSTHROUGH" | "pod") => true,
        (Direction::Outbound, ..) => {
            subjects.services.contains(&(namespace, peer)) || (subjects.exists)(namespace, peer)
        }
        // Anybody may call it.
        (Direction::Inbound, ..) => is_name(namespace) && is_name(peer),
        (Direction::Unspecified | Direction::Policy, ..) => false,
    };
    if !is_believed {
        let id = key.id;
        let (direction, protocol, mtls) = (key.direction, std::mem::take(&mut key.protocol), key.mtls);
        *key = SeriesKey { id, direction, protocol, mtls, ..SeriesKey::default() };
        (key.namespace, key.peer) = (OTHER.to_owned(), OTHER.to_owned());
    }
    !is_believed
}

fn bound_counts(counts: &mut SeriesCounts) {
    counts.classes.truncate(CLASSES);
    bound_buckets(&mut counts.buckets);
    bound_reasons(&mut counts.reasons);
    let of_reasons = counts.reasons.iter_mut().map(|reason| &mut reason.count);
    let others = [&mut counts.connections, &mut counts.retries, &mut counts.ejections];
    for count in counts.classes.iter_mut().chain(of_reasons).chain(others) {
        *count = (*count).min(MAX_COUNT);
    }
    // Who takes part in a sum leaves room for others.
    for sum in [&mut counts.sum_micros, &mut counts.bytes_up, &mut counts.bytes_down] {
        *sum = (*sum).min(MAX_BYTES);
    }
}

/// Each reason once, by the names that there are.
fn bound_reasons(reasons: &mut Vec<ReasonCount>) {
    reasons.truncate(MAX_REASONS);
    let mut sums: BTreeMap<&'static str, u64> = BTreeMap::new();
    for reason in reasons.drain(..) {
        let name = Reason::from_name(&reason.reason).map_or(OTHER, Reason::name);
        let sum = sums.entry(name).or_default();
        *sum = sum.saturating_add(reason.count);
    }
    let bounded = |(name, count): (&str, u64)| ReasonCount { reason: name.to_owned(), count };
    *reasons = sums.into_iter().map(bounded).collect();
}

/// Counts by destination, of earlier sidecars, and attempts.
fn destinations(report: &mut TelemetryReport, subjects: &Subjects<'_>) -> usize {
    let before = report.counts.len() + report.attempts.len();
    report.counts.retain(|counts| {
        subjects.services.contains(&(counts.namespace.as_str(), counts.service.as_str()))
            && is_revision(&counts.revision)
            && are_buckets(&counts.buckets)
    });
    report.counts.truncate(MAX_SERIES);
    for counts in &mut report.counts {
        // The two are read one after the other.
        counts.requests = counts.requests.min(MAX_COUNT);
        counts.failures = counts.failures.min(counts.requests);
        bound_buckets(&mut counts.buckets);
    }
    report.attempts.retain(|counts| {
        subjects.canaries.contains(&(counts.namespace.as_str(), counts.canary.as_str()))
            && is_revision(&counts.revision)
            && counts.pod_uid.len() <= MAX_UID
            && are_buckets(&counts.buckets)
    });
    report.attempts.truncate(MAX_SERIES.saturating_sub(report.counts.len()));
    for counts in &mut report.attempts {
        counts.attempts = counts.attempts.min(MAX_COUNT);
        counts.failures = counts.failures.min(counts.attempts);
        counts.unreached = counts.unreached.min(counts.failures);
        counts.client_errors = counts.client_errors.min(counts.attempts);
        bound_buckets(&mut counts.buckets);
    }
    before - report.counts.len() - report.attempts.len()
}

/// A value that a label may have; empty: no revision.
fn is_revision(text: &str) -> bool {
    text.len() <= MAX_REVISION
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
}

/// A name of Kubernetes, or one that a sidecar gives to many.
fn is_name(text: &str) -> bool {
    text.len() <= MAX_NAME && text.split('.').all(is_revision)
}

/// Pairs of a bucket's distance to the one before and a count.
fn are_distances(buckets: &[u64]) -> bool {
    let (pairs, rest) = buckets.as_chunks::<2>();
    let last = pairs.iter().try_fold(0_u64, |sum, [distance, _]| sum.checked_add(*distance));
    rest.is_empty() && pairs.len() <= BUCKETS && last.is_some_and(|last| last < BUCKETS as u64)
}

fn are_buckets(buckets: &[u64]) -> bool {
    let (pairs, rest) = buckets.as_chunks::<2>();
    let known = |bucket: u64| usize::try_from(bucket).is_ok_and(|bucket| bucket < BUCKETS);
    rest.is_empty() && pairs.len() <= BUCKETS && pairs.iter().all(|[bucket, _]| known(*bucket))
}

fn bound_buckets(buckets: &mut [u64]) {
    let (pairs, _) = buckets.as_chunks_mut::<2>();
    for [_, count] in pairs {
        *count = (*count).min(MAX_COUNT);
    }
}

#[cfg(test)]
mod tests {
    use tulle_mesh::proto::{AttemptCounts, ReasonCount, RecentDenials, RequestCounts, RuleCounts};

    use super::*;

    fn exists(namespace: &str, name: &str) -> bool {
        (namespace, name) == ("shop", "redis")
    }

    fn subjects() -> Subjects<'static> {
        Subjects {
            services: [("shop", "web")].into(),
            exists: &exists,
            canaries: [("shop", "web")].into(),
            routes: ["HTTPRoute/shop/web".to_owned()].into(),
        }
    }

    fn attempts(change: impl FnOnce(&mut AttemptCounts)) -> TelemetryReport {
        let mut counts = AttemptCounts {
            namespace: "shop".into(),
            canary: "web".into(),
            epoch: 3,
            revision: "r1".into(),
            pod_uid: "u".into(),
            attempts: 10,
            failures: 2,
            ..Default::default()
        };
        change(&mut counts);
        TelemetryReport { attempts: vec![counts], ..Default::default() }
    }

    #[test]
    fn what_a_sidecar_may_not_say_is_dropped() {
        let changes: [fn(&mut AttemptCounts); 6] = [
            |counts| counts.canary = "other".into(),
            |counts| counts.revision = "a\"b".into(),
            |counts| counts.revision = "a".repeat(64),
            |counts| counts.pod_uid = "a".repeat(65),
            |counts| counts.buckets = vec![160, 1],
            |counts| counts.buckets = vec![1],
        ];
        for change in changes {
            let mut report = attempts(change);
            assert_eq!(telemetry(&mut report, &subjects()), 1, "{report:?}");
            assert!(report.attempts.is_empty());
        }
        let mut good = attempts(|_| {});
        assert_eq!(telemetry(&mut good, &subjects()), 0);
        assert_eq!(good, attempts(|_| {}));
    }

    #[test]
    fn no_count_exceeds_what_it_is_a_part_of() {
        let mut report = attempts(|counts| {
            counts.attempts = u64::MAX;
            counts.failures = u64::MAX;
            counts.unreached = u64::MAX;
            counts.client_errors = u64::MAX;
        });
        telemetry(&mut report, &subjects());
        let counts = report.attempts.first().unwrap();
        assert_eq!((counts.attempts, counts.failures), (MAX_COUNT, MAX_COUNT));
        assert_eq!((counts.unreached, counts.client_errors), (MAX_COUNT, MAX_COUNT));
    }

    #[test]
    fn a_report_has_a_bounded_number_of_series() {
        let series = RequestCounts { namespace: "shop".into(), service: "web".into(), ..Default::default() };
        let mut report = TelemetryReport { counts: vec![series; 3000], ..attempts(|_| {}) };
        assert_eq!(telemetry(&mut report, &subjects()), 1001);
        assert_eq!(report.counts.len() + report.attempts.len(), MAX_SERIES);
    }

    fn key(direction: Direction, namespace: &str, peer: &str) -> SeriesKey {
        SeriesKey {
            id: 7,
            direction: direction.into(),
            namespace: namespace.into(),
            peer: peer.into(),
            revision: "r1".into(),
            route: "HTTPRoute/shop/web".into(),
            protocol: "http1".into(),
            mtls: true,
        }
    }

    #[test]
    fn a_key_of_what_a_sidecar_may_not_speak_about_is_kept_as_that_of_others() {
        use Direction::{Inbound, Outbound, Unspecified};
        for (direction, namespace, peer, is_believed) in [
            (Outbound, "shop", "web", true),
            (Outbound, "shop", "other", false),
            (Outbound, "shop", "redis", true),
            (Outbound, "payments", "redis", false),
            (Outbound, "", "pod", true),
            (Outbound, "", "_PASSTHROUGH", true),
            (Outbound, "_OTHER", "_OTHER", true),
            (Inbound, "payments", "checkout.v1", true),
            (Inbound, "", "_PLAIN", true),
            (Inbound, "payments", "a\"b", false),
            (Unspecified, "shop", "web", false),
        ] {
            let sent = key(direction, namespace, peer);
            let counts = SeriesCounts { key: 7, ..SeriesCounts::default() };
            let mut report =
                TelemetryReport { keys: vec![sent.clone()], series: vec![counts], ..Default::default() };
            assert_eq!(telemetry(&mut report, &subjects()), usize::from(!is_believed), "{sent:?}");
            let (key, series) = (report.keys.first().unwrap(), report.series.len());
            let (namespace, peer) = if is_believed { (namespace, peer) } else { (OTHER, OTHER) };
            assert_eq!((key.namespace.as_str(), key.peer.as_str(), key.id, series), (namespace, peer, 7, 1));
        }
    }

    #[test]
    fn a_route_whose_rules_a_sidecar_was_not_sent_is_none() {
        let mut other = key(Direction::Outbound, "shop", "web");
        other.route = "HTTPRoute/payments/web".into();
        let keys = vec![key(Direction::Outbound, "shop", "web"), other];
        let mut report = TelemetryReport { keys, ..Default::default() };
        telemetry(&mut report, &subjects());
        let routes: Vec<_> = report.keys.iter().map(|key| key.route.as_str()).collect();
        assert_eq!(routes, ["HTTPRoute/shop/web", ""]);
    }

    #[test]
    fn what_no_access_section_decides_by_is_kept_as_that_of_others() {
        for (policy, rule, is_believed) in [
            ("web", "DenyRule(0)", true),
            ("web", "NoAllowMatched", true),
            ("_OTHER", "_OTHER", true),
            ("web", "DenyRule(00)", false),
            ("web", "DenyRule(65536)", false),
            ("web", "GET /secret", false),
            ("we\"b", "DenyRule(0)", false),
        ] {
            let key = RuleKey { id: 7, namespace: "shop".into(), policy: policy.into(), rule: rule.into() };
            let counts = RuleCounts { key: 7, denied: u64::MAX, would_deny: 1 };
            let mut report =
                TelemetryReport { rule_keys: vec![key], rules: vec![counts], ..Default::default() };
            assert_eq!(telemetry(&mut report, &subjects()), usize::from(!is_believed), "{policy} {rule}");
            let (key, counts) = (&report.rule_keys[0], &report.rules[0]);
            let expected = if is_believed { rule } else { OTHER };
            assert_eq!((key.id, key.rule.as_str(), counts.denied), (7, expected, MAX_COUNT));
        }
        let mut report = TelemetryReport { rules: vec![RuleCounts::default(); 200], ..Default::default() };
        telemetry(&mut report, &subjects());
        assert_eq!(report.rules.len(), MAX_RULES);
    }

    /// What remains of a report of these denials, and how many of them were dropped.
    fn bounded(denials: Vec<RecentDenial>) -> (RecentDenials, usize) {
        let part = RecentDenials { denials, dropped: u64::MAX };
        let mut report = TelemetryReport { denials: Some(part), ..Default::default() };
        let dropped = telemetry(&mut report, &subjects());
        (report.denials.unwrap(), dropped)
    }

    #[test]
    fn denials_are_few_and_short_and_name_what_there_can_be() {
        let good = RecentDenial {
            id: DenialId::new("uid", 1).to_string(),
            at_unix_ms: 1,
            policy: "shop/web.v1".into(),
            rule: "DenyRule(0)".into(),
            client: "spiffe://cluster.local/ns/pay/sa/cart".into(),
            method: "GET".into(),
            path: "/orders".into(),
            cut: false,
        };
        let plain = RecentDenial { policy: String::new(), rule: "Plaintext".into(), ..good.clone() };
        let opaque = RecentDenial { client: String::new(), method: String::new(), ..good.clone() };
        let (part, dropped) = bounded(vec![good.clone(), plain.clone(), opaque.clone()]);
        assert_eq!((part.denials, part.dropped, dropped), (vec![good.clone(), plain, opaque], MAX_COUNT, 0));
        let (part, dropped) = bounded(vec![good.clone(); 9]);
        assert_eq!((part.denials.len(), dropped), (MAX_DENIALS, 4));
        let changes: [fn(&mut RecentDenial); 6] = [
            |denial| denial.id = "$(reboot)".into(),
            |denial| denial.policy = "web".into(),
            |denial| denial.policy = "shop/".into(),
            |denial| denial.policy = "shop/a\"b".into(),
            |denial| denial.rule = "GET /secret".into(),
            |denial| denial.client = "cart".into(),
        ];
        for change in changes {
            let mut wrong = good.clone();
            change(&mut wrong);
            let (part, dropped) = bounded(vec![wrong.clone()]);
            assert_eq!((part.denials.len(), dropped), (0, 1), "{wrong:?}");
        }
        let path = format!("/\u{202e}{}?token=s3cret", "\u{e9}".repeat(200));
        let long = RecentDenial { method: "M\n".repeat(100), path, ..good.clone() };
        let secret = RecentDenial { path: "/\u{2066}a?token=s3cret".into(), ..good };
        let (part, _) = bounded(vec![long, secret]);
        let [long, secret] = part.denials.try_into().unwrap();
        assert_eq!((long.method.as_str(), long.path.len(), long.cut), ("M".repeat(32).as_str(), 255, true));
        assert_eq!((secret.path.as_str(), secret.cut), ("/a", false));
    }

    #[test]
    fn counts_of_a_series_are_bounded_and_those_of_buckets_that_do_not_exist_dropped() {
        let of = |buckets: Vec<u64>| SeriesCounts {
            classes: vec![u64::MAX; 9],
            buckets,
            sum_micros: u64::MAX,
            bytes_up: u64::MAX,
            connections: u64::MAX,
            reasons: vec![ReasonCount { reason: "UpstreamReset".into(), count: u64::MAX }; 100],
            ..SeriesCounts::default()
        };
        let wrong = [vec![1], vec![160, 1], vec![150, 1, 10, 1], vec![1, 1, u64::MAX, 1]];
        let mut series: Vec<_> = wrong.into_iter().map(of).collect();
        series.push(of(vec![150, u64::MAX, 9, 1]));
        let mut report = TelemetryReport { series, ..Default::default() };
        assert_eq!(telemetry(&mut report, &subjects()), 4);
        let counts = report.series.first().unwrap();
        assert_eq!(counts.buckets, [150, MAX_COUNT, 9, 1]);
        assert_eq!(counts.classes, [MAX_COUNT; 8]);
        let reason = ReasonCount { reason: "UpstreamReset".into(), count: MAX_COUNT };
        assert_eq!((counts.reasons.as_slice(), counts.connections), ([reason].as_slice(), MAX_COUNT));
        assert_eq!((counts.bytes_up, counts.sum_micros), (MAX_BYTES, MAX_BYTES));
    }

    #[test]
    fn reasons_are_those_that_there_are_and_each_is_there_once() {
        let reason = |name: &str, count| ReasonCount { reason: name.into(), count };
        let reasons = vec![
            reason("UpstreamReset", 1),
            reason("Nonsense", 2),
            reason("PolicyDenied", 3),
            reason("a\"b", 4),
            reason("UpstreamReset", 5),
        ];
        let series = vec![SeriesCounts { reasons, ..SeriesCounts::default() }];
        let mut report = TelemetryReport { series, ..Default::default() };
        telemetry(&mut report, &subjects());
        let expected = [reason("PolicyDenied", 3), reason("UpstreamReset", 6), reason(OTHER, 6)];
        assert_eq!(report.series.first().unwrap().reasons, expected);
    }

    #[test]
    fn a_reason_is_short_and_on_one_line() {
        assert_eq!(reason("too\nnew\u{1b}[31m\u{202e}"), "toonew[31m");
        assert_eq!(reason(&"ä".repeat(1000)).chars().count(), 256);
    }
}
