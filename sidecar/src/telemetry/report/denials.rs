//! The latest refusals, which a report carries beside its counts: few, short, and each once.
//!
//! In: the refusals that the sidecar keeps anyway ([`Denials`]), so that a request costs nothing more. Out: what the
//! operator shows of them. The client's address and the host that it named stay in the pod.

use std::time::Duration;

use prost::Message as _;
use tokio::time::Instant;
use tulle_mesh::proto::{RecentDenial, RecentDenials};
use tulle_mesh::query::Denial;

use crate::telemetry::Denials;

/// Refusals of one report.
const MOST: usize = 5;
/// Bytes that they take. With the number and the length of their field in the report it is 1 KiB.
const MAX_BYTES: usize = 1024 - 4;
/// No report carries refusals earlier than this after one that did, also where attempts under a Canary are reported every
/// second.
const EVERY: Duration = Duration::from_secs(5);
/// Bytes of a method: a longer one is the client's invention.
const MAX_METHOD: usize = 32;
/// In front of the name of a policy in what the sidecar keeps.
const KIND: &str = "MeshPolicy/";

/// How far refusals have been reported.
#[derive(Debug, Default)]
pub(super) struct ReportedDenials {
    /// The number of the first one that was not.
    next: u32,
    /// When more may be reported; `None`: at once.
    due: Option<Instant>,
}

impl ReportedDenials {
    /// The next report has what there is.
    pub(super) fn flush(&mut self) {
        self.due = None;
    }

    /// What is new, for the next report. `None`: nothing is, or it is not due.
    pub(super) fn changed(&mut self, denials: &Denials, now: Instant) -> Option<RecentDenials> {
        if self.due.is_some_and(|due| now < due) {
            return None;
        }
        let since = denials.since(self.next, MOST);
        if since.count == 0 {
            return None;
        }
        self.next = self.next.wrapping_add(since.count);
        self.due = Some(now + EVERY);
        // The longest that this number can be, until it is known how many fit.
        let mut part = RecentDenials { denials: Vec::new(), dropped: since.count.into() };
        for denial in since.latest {
            part.denials.push(described(denial));
            if part.encoded_len() > MAX_BYTES {
                part.denials.pop();
            }
        }
        part.dropped = part.dropped.saturating_sub(part.denials.len() as u64);
        part.denials.reverse();
        part.denials.sort_by_key(|denial| denial.at_unix_ms);
        Some(part)
    }
}

fn described(denial: Denial) -> RecentDenial {
    let Denial { id, at_unix_ms, policy, rule, client, mut method, path, cut, .. } = denial;
    let end = method.floor_char_boundary(MAX_METHOD);
    let cut = cut || end < method.len();
    method.truncate(end);
    let policy = policy.strip_prefix(KIND).unwrap_or(&policy).to_owned();
    RecentDenial { id, at_unix_ms, policy, rule, client, method, path, cut }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tulle_mesh::proto::{TelemetryAck, TelemetryReport};

    use super::*;
    use crate::telemetry::Telemetry;
    use crate::telemetry::report::Reporter;

    fn denial(path: &str) -> Denial {
        Denial {
            policy: "MeshPolicy/shop/web".into(),
            rule: "DenyRule(0)".into(),
            client: "spiffe://cluster.local/ns/pay/sa/cart".into(),
            address: "10.1.0.7:40000".into(),
            host: "web.shop".into(),
            method: "GET".into(),
            path: path.into(),
            ..Denial::default()
        }
    }

    fn ids(part: &RecentDenials) -> Vec<&str> {
        part.denials.iter().map(|denial| denial.id.as_str()).collect()
    }

    #[test]
    fn a_report_carries_the_latest_refusals_once_and_counts_the_others() {
        let telemetry = Arc::new(Telemetry::default());
        let mut reporter = Reporter::new(Arc::clone(&telemetry));
        let mut now = Instant::now();
        let refuse =
            |number: u32| telemetry.denials.remember("uid", denial(&format!("/{number}"))).to_string();
        let refused: Vec<String> = (0..8).map(refuse).collect();
        let first = reporter.next_report(now).unwrap();
        let part = first.denials.clone().unwrap();
        assert_eq!(ids(&part), refused[3..]);
        assert_eq!(part.dropped, 3);
        reporter.reconnected();
        assert_eq!(reporter.next_report(now).unwrap(), first, "the same report under the same number");
        reporter.acknowledged(TelemetryAck { sequence: first.sequence, forgotten: false });
        now += Duration::from_secs(10);
        assert!(reporter.next_report(now).is_none(), "nothing was refused since");
        let last = refuse(8);
        now += Duration::from_secs(10);
        let part = reporter.next_report(now).unwrap().denials.unwrap();
        assert_eq!((ids(&part), part.dropped), (vec![last.as_str()], 0));
    }

    #[test]
    fn refusals_are_reported_every_five_seconds_at_most_unless_the_sidecar_stops() {
        let (denials, mut reported) = (Denials::default(), ReportedDenials::default());
        let now = Instant::now();
        denials.remember("uid", denial("/a"));
        assert!(reported.changed(&denials, now).is_some());
        denials.remember("uid", denial("/b"));
        let soon = now + Duration::from_millis(4_900);
        assert_eq!(reported.changed(&denials, soon), None);
        let second = reported.changed(&denials, now + EVERY).unwrap();
        assert_eq!((second.denials.len(), second.dropped), (1, 0));
        denials.remember("uid", denial("/c"));
        assert_eq!(reported.changed(&denials, now + EVERY), None);
        reported.flush();
        assert!(reported.changed(&denials, now + EVERY).is_some());
    }

    #[test]
    fn long_refusals_take_a_kibibyte_and_those_without_room_are_counted() {
        let (denials, mut reported) = (Denials::default(), ReportedDenials::default());
        let long = || Denial { method: "M".repeat(100), ..denial(&format!("/{}", "a".repeat(400))) };
        for _ in 0..5 {
            denials.remember("uid", long());
        }
        let part = reported.changed(&denials, Instant::now()).unwrap();
        assert_eq!((part.denials.len(), part.dropped), (2, 3));
        assert!(part.denials.iter().all(|denial| denial.cut && denial.method.len() == MAX_METHOD));
        assert!(part.denials.iter().all(|denial| denial.path.len() == 256));
        let report = TelemetryReport { denials: Some(part), ..TelemetryReport::default() };
        assert!(report.encoded_len() <= 1024, "{}", report.encoded_len());
    }

    #[test]
    fn address_and_host_stay_in_the_pod() {
        let (denials, mut reported) = (Denials::default(), ReportedDenials::default());
        let id = denials.remember("uid", denial("/orders")).to_string();
        let part = reported.changed(&denials, Instant::now()).unwrap();
        let expected = RecentDenial {
            id,
            at_unix_ms: part.denials[0].at_unix_ms,
            policy: "shop/web".into(),
            rule: "DenyRule(0)".into(),
            client: "spiffe://cluster.local/ns/pay/sa/cart".into(),
            method: "GET".into(),
            path: "/orders".into(),
            cut: false,
        };
        assert!(expected.at_unix_ms > 0);
        assert_eq!(part.denials, [expected]);
    }
}
