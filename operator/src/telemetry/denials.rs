//! The last requests and connections that access rules or Strict mTLS refused, by workload.
//!
//! In: the few that each report carries. Out: those of the workloads that are wanted, for the page of one, the query API
//! and `tulle denials`. They are in the memory of the replica that leads, and not copied: a new leader begins with none,
//! because sidecars report each once. Bounded in number and in time; `discovery/bounds.rs` has bounded the length of texts.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use tulle_mesh::denial::DenialId;
use tulle_mesh::identity::WorkloadId;
use tulle_mesh::proto::{HistoryDenial, RecentDenial, RecentDenials};
use tulle_mesh::query::{DenialRow, Denials, Party};

use super::history::Reporter;
use super::query;

/// Denials that are kept of one workload.
pub const OF_WORKLOAD: usize = 20;
/// Denials of an answer.
const LISTED: usize = 200;
/// Denials that are kept of the whole mesh, of about 400 bytes each. Beyond, the first of the namespace goes that has most:
/// one that refuses everything does not push out what others have refused.
const OF_MESH: usize = 2_000;
/// How long a denial is kept, in seconds: as long as the counts.
const KEPT_FOR: i64 = 6 * 3_600;

/// The denials that are kept.
#[derive(Debug, Default)]
pub(super) struct DenialLog {
    /// In the order in which they came.
    all: BTreeMap<u64, Kept>,
    /// Keys in `all`, ascending.
    by_workload: HashMap<Reporter, VecDeque<u64>>,
    /// How many each namespace has.
    of_namespace: HashMap<Arc<str>, usize>,
    /// The key of the next one.
    next: u64,
}

#[derive(Debug)]
struct Kept {
    reporter: Reporter,
    /// In Unix seconds, by the clock of the replica that led.
    came: i64,
    denial: RecentDenial,
    /// What its report has counted and not listed, with the first of the report.
    dropped: u64,
}

impl DenialLog {
    /// Takes those of a report.
    pub(super) fn add(&mut self, pod_uid: &str, reporter: &Reporter, report: &RecentDenials, now: i64) {
        let mut dropped = report.dropped;
        for denial in &report.denials {
            let id: Option<DenialId> = denial.id.parse().ok();
            if !id.is_some_and(|id| id.may_be_of(pod_uid)) || row(reporter, denial).is_none() {
                continue;
            }
            let denial = of_the_past(denial, now);
            let dropped = std::mem::take(&mut dropped);
            self.keep(Kept { reporter: reporter.clone(), came: now, denial, dropped });
        }
    }

    /// Takes one that the leader has. It may have come before, by an earlier stream or in this replica's own time as the
    /// leader.
    pub(super) fn copy(&mut self, copied: &HistoryDenial, now: i64) {
        let Some(denial) = &copied.denial else { return };
        let reporter = Reporter {
            namespace: copied.namespace.as_str().into(),
            kind: copied.kind.as_str().into(),
            workload: copied.workload.as_str().into(),
        };
        if row(&reporter, denial).is_some() {
            let (came, dropped) = (copied.came_unix.min(now), copied.dropped);
            let denial = of_the_past(denial, now);
            self.keep(Kept { reporter, came, denial, dropped });
        }
    }

    /// At most `most` denials from this number on, and the number to go on with.
    pub(super) fn since(&self, number: u64, most: usize) -> (Vec<HistoryDenial>, u64) {
        let new: Vec<(&u64, &Kept)> = self.all.range(number..).take(most).collect();
        let next = new.last().map_or(number, |(key, _)| key.wrapping_add(1));
        (new.into_iter().map(|(_, kept)| kept.to_proto()).collect(), next)
    }

    /// Whether it is kept already.
    fn has(&self, reporter: &Reporter, id: &str) -> bool {
        let mut keys = self.by_workload.get(reporter).into_iter().flatten();
        keys.any(|key| self.all.get(key).is_some_and(|kept| kept.denial.id == id))
    }

    fn keep(&mut self, kept: Kept) {
        if self.has(&kept.reporter, &kept.denial.id) {
            return;
        }
        let key = self.next;
        self.next = self.next.wrapping_add(1);
        let of_workload = self.by_workload.entry(kept.reporter.clone()).or_default();
        of_workload.push_back(key);
        let first = if of_workload.len() > OF_WORKLOAD { of_workload.front().copied() } else { None };
        *self.of_namespace.entry(Arc::clone(&kept.reporter.namespace)).or_default() += 1;
        self.all.insert(key, kept);
        if let Some(first) = first {
            self.forget(first);
        }
        if self.all.len() > OF_MESH {
            self.forget_of_most();
        }
    }

    /// Forgets the first of the namespace that has most.
    fn forget_of_most(&mut self) {
        let most = self.of_namespace.iter().max_by_key(|(_, count)| **count);
        let Some(most) = most.map(|(namespace, _)| Arc::clone(namespace)) else { return };
        let first = self.all.iter().find(|(_, kept)| kept.reporter.namespace == most);
        if let Some(first) = first.map(|(key, _)| *key) {
            self.forget(first);
        }
    }

    fn forget(&mut self, key: u64) {
        let Some(kept) = self.all.remove(&key) else { return };
        let reporter = &kept.reporter;
        if let Some(of_workload) = self.by_workload.get_mut(reporter) {
            of_workload.retain(|known| *known != key);
            if of_workload.is_empty() {
                self.by_workload.remove(reporter);
            }
        }
        if let Some(count) = self.of_namespace.get_mut(&reporter.namespace) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.of_namespace.remove(&reporter.namespace);
            }
        }
    }

    /// Forgets those that have been kept for long enough.
    pub(super) fn sweep(&mut self, now: i64) {
        while let Some((first, _)) = self.all.first_key_value().filter(|(_, kept)| !kept.is_recent(now)) {
            let first = *first;
            self.forget(first);
        }
    }

    /// The last at the workloads that are wanted.
    pub(super) fn last(&self, wanted: impl Fn(&Reporter) -> bool, now: i64) -> Denials {
        let is_shown = |kept: &&Kept| kept.is_recent(now) && wanted(&kept.reporter);
        let mut found: Vec<&Kept> = self.all.values().rev().filter(is_shown).collect();
        // Stable: of the same time, those that came last stay in front.
        found.sort_by_key(|kept| Reverse(kept.denial.at_unix_ms));
        let left_out = u64::try_from(found.len().saturating_sub(LISTED)).unwrap_or(u64::MAX);
        let dropped = found.iter().fold(left_out, |sum, kept| sum.saturating_add(kept.dropped));
        let rows = found.into_iter().take(LISTED).filter_map(|kept| row(&kept.reporter, &kept.denial));
        // Who leads is known to the caller.
        Denials { leader: false, dropped, rows: rows.collect() }
    }
}

impl Kept {
    fn is_recent(&self, now: i64) -> bool {
        now.saturating_sub(self.came) <= KEPT_FOR
    }

    fn to_proto(&self) -> HistoryDenial {
        HistoryDenial {
            namespace: self.reporter.namespace.to_string(),
            kind: self.reporter.kind.to_string(),
            workload: self.reporter.workload.to_string(),
            came_unix: self.came,
            dropped: self.dropped,
            denial: Some(self.denial.clone()),
        }
    }
}

/// One with a time in the future would stay in front of all others.
fn of_the_past(denial: &RecentDenial, now: i64) -> RecentDenial {
    let at_unix_ms = denial.at_unix_ms.min(now.saturating_mul(1_000));
    RecentDenial { at_unix_ms, ..denial.clone() }
}

/// A denial as it is answered. `None`: it names a policy that the workload is not subject to, or no client.
fn row(reporter: &Reporter, denial: &RecentDenial) -> Option<DenialRow> {
    let policy = match denial.policy.split_once('/') {
        Some((namespace, name)) => (*namespace == *reporter.namespace).then_some(name)?,
        None => "",
    };
    let caller = if denial.client.is_empty() {
        Party { kind: "Plain".to_owned(), ..Party::default() }
    } else {
        let id: WorkloadId = denial.client.parse().ok()?;
        query::client(&id.namespace, &id.service_account)
    };
    Some(DenialRow {
        workload: reporter.party(),
        at_unix_ms: denial.at_unix_ms,
        id: denial.id.clone(),
        caller: Some(caller),
        method: denial.method.clone(),
        path: denial.path.clone(),
        cut: denial.cut,
        policy: policy.to_owned(),
        rule: denial.rule.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_800_000_000;

    fn reporter(workload: &str) -> Reporter {
        reporter_in("shop", workload)
    }

    fn reporter_in(namespace: &str, workload: &str) -> Reporter {
        Reporter { namespace: namespace.into(), kind: "Deployment".into(), workload: workload.into() }
    }

    /// A denial of the pod `uid`, `ago` seconds before [`NOW`].
    fn denial(number: u32, ago: i64) -> RecentDenial {
        RecentDenial {
            id: DenialId::new("uid", number).to_string(),
            at_unix_ms: (NOW - ago) * 1_000,
            policy: "shop/web".into(),
            rule: "DenyRule(0)".into(),
            client: "spiffe://cluster.local/ns/pay/sa/cart".into(),
            method: "GET".into(),
            path: format!("/{number}"),
            cut: false,
        }
    }

    fn report(denials: Vec<RecentDenial>, dropped: u64) -> RecentDenials {
        RecentDenials { denials, dropped }
    }

    fn paths(recent: &Denials) -> Vec<&str> {
        recent.rows.iter().map(|row| row.path.as_str()).collect()
    }

    fn of(log: &DenialLog, workload: &str, now: i64) -> Denials {
        log.last(|by| *by == reporter(workload), now)
    }

    #[test]
    fn the_last_twenty_of_a_workload_are_kept_and_the_latest_comes_first() {
        let mut log = DenialLog::default();
        // Two pods whose reports cross.
        log.add("uid", &reporter("web"), &report(vec![denial(1, 9), denial(2, 1)], 7), NOW);
        log.add("uid", &reporter("web"), &report(vec![denial(3, 5)], 2), NOW);
        let recent = of(&log, "web", NOW);
        assert_eq!((paths(&recent), recent.dropped), (vec!["/2", "/3", "/1"], 9));
        let first = recent.rows.last().unwrap();
        let caller = Party { namespace: "pay".into(), kind: "ServiceAccount".into(), name: "cart".into() };
        assert_eq!((first.caller.as_ref(), first.policy.as_str()), (Some(&caller), "web"));
        assert_eq!(of(&log, "api", NOW), Denials::default(), "of another workload");
        for number in 10..30 {
            log.add("uid", &reporter("web"), &report(vec![denial(number, 0)], 0), NOW);
        }
        let recent = of(&log, "web", NOW);
        assert_eq!((recent.rows.len(), recent.dropped), (OF_WORKLOAD, 0));
        assert_eq!((paths(&recent)[0], paths(&recent)[19]), ("/29", "/10"));
        assert_eq!(log.all.len(), OF_WORKLOAD, "those before are forgotten");
    }

    #[test]
    fn the_mesh_has_a_bound_and_what_came_first_goes_first() {
        let mut log = DenialLog::default();
        for number in 0..200 {
            let twenty = report((0..20).map(|of| denial(of, 0)).collect(), 0);
            log.add("uid", &reporter(&format!("web-{number}")), &twenty, NOW);
        }
        assert_eq!((log.all.len(), log.by_workload.len()), (OF_MESH, OF_MESH / OF_WORKLOAD));
        assert!(of(&log, "web-99", NOW).rows.is_empty());
        assert_eq!(of(&log, "web-100", NOW).rows.len(), OF_WORKLOAD);
    }

    #[test]
    fn an_answer_about_several_workloads_is_bounded_and_counts_what_it_leaves_out() {
        let mut log = DenialLog::default();
        for number in 0..11_u32 {
            let twenty = report((0..20).map(|of| denial(of, i64::from(number))).collect(), 1);
            log.add("uid", &reporter(&format!("web-{number}")), &twenty, NOW);
        }
        let pay = RecentDenial { policy: "pay/web".into(), ..denial(1, 0) };
        log.add("uid", &reporter_in("pay", "web"), &report(vec![pay], 0), NOW);
        let found = log.last(|by| *by.namespace == *"shop", NOW);
        assert_eq!((found.rows.len(), found.dropped), (LISTED, 20 + 11), "one workload is left out");
        let names: Vec<_> = found.rows.iter().map(|row| row.workload.name.as_str()).collect();
        assert_eq!((names[0], names[20], names[199]), ("web-0", "web-1", "web-9"));
    }

    #[test]
    fn denials_are_forgotten_with_the_history() {
        let mut log = DenialLog::default();
        log.add("uid", &reporter("web"), &report(vec![denial(1, 0)], 0), NOW);
        log.add("uid", &reporter("web"), &report(vec![denial(2, 0)], 0), NOW + 60);
        assert_eq!(paths(&of(&log, "web", NOW + KEPT_FOR)), ["/2", "/1"]);
        assert_eq!(paths(&of(&log, "web", NOW + KEPT_FOR + 1)), ["/2"]);
        log.sweep(NOW + KEPT_FOR + 1);
        assert_eq!(log.all.len(), 1);
        log.sweep(NOW + KEPT_FOR + 61);
        assert!(log.all.is_empty() && log.by_workload.is_empty() && log.of_namespace.is_empty());
    }

    #[test]
    fn a_namespace_that_refuses_everything_pushes_out_nothing_of_others() {
        let mut log = DenialLog::default();
        let pay = |number| RecentDenial { policy: "pay/web".into(), ..denial(number, 0) };
        log.add("uid", &reporter_in("pay", "web"), &report(vec![pay(1), pay(2)], 0), NOW);
        for number in 0..3 * OF_MESH / OF_WORKLOAD {
            let twenty = report((0..20).map(|of| denial(of, 0)).collect(), 0);
            log.add("uid", &reporter(&format!("web-{number}")), &twenty, NOW);
        }
        assert_eq!(log.all.len(), OF_MESH);
        assert_eq!(paths(&log.last(|by| *by == reporter_in("pay", "web"), NOW)), ["/2", "/1"]);
        assert_eq!(log.of_namespace.values().sum::<usize>(), OF_MESH);
    }

    #[test]
    fn what_a_pod_cannot_have_refused_is_not_kept_and_nothing_is_of_the_future() {
        let mut log = DenialLog::default();
        let wrong = vec![
            RecentDenial { id: DenialId::new("other", 1).to_string(), ..denial(1, 0) },
            RecentDenial { id: "$(reboot)".into(), ..denial(2, 0) },
            RecentDenial { policy: "pay/web".into(), ..denial(3, 0) },
            RecentDenial { client: "cart".into(), ..denial(4, 0) },
            denial(5, -3_600),
        ];
        log.add("uid", &reporter("web"), &report(wrong, 0), NOW);
        let recent = of(&log, "web", NOW);
        assert_eq!(paths(&recent), ["/5"]);
        assert_eq!(recent.rows[0].at_unix_ms, NOW * 1_000);
    }

    #[test]
    fn a_copy_has_each_once_however_often_it_is_sent_and_by_whom() {
        let (mut leader, mut follower) = (DenialLog::default(), DenialLog::default());
        leader.add("uid", &reporter("web"), &report(vec![denial(1, 9), denial(2, 8)], 3), NOW);
        leader.add("uid", &reporter("api"), &report(vec![denial(3, 7)], 0), NOW);
        let (first, next) = leader.since(0, 2);
        let (rest, next) = leader.since(next, 2);
        assert_eq!((first.len(), rest.len()), (2, 1));
        leader.add("uid", &reporter("web"), &report(vec![denial(4, 6)], 0), NOW + 2);
        let (new, end) = leader.since(next, 2);
        assert_eq!((new.len(), leader.since(end, 2)), (1, (Vec::new(), end)));
        for copied in first.iter().chain(&rest).chain(&first).chain(&new) {
            follower.copy(copied, NOW + 2);
        }
        for workload in ["web", "api"] {
            assert_eq!(of(&follower, workload, NOW + 2), of(&leader, workload, NOW + 2));
        }
        // It leads now, and a sidecar whose report was not acknowledged sends it once more.
        follower.add("uid", &reporter("web"), &report(vec![denial(4, 6), denial(5, 0)], 0), NOW + 4);
        assert_eq!(paths(&of(&follower, "web", NOW + 4)), ["/5", "/4", "/2", "/1"]);
        let foreign = HistoryDenial { namespace: "pay".into(), ..new[0].clone() };
        follower.copy(&foreign, NOW + 4);
        assert_eq!(follower.all.len(), 5, "a policy of another namespace");
    }

    #[test]
    fn callers_of_other_namespaces_are_hidden_from_who_sees_one() {
        let mut log = DenialLog::default();
        let own = RecentDenial { client: "spiffe://cluster.local/ns/shop/sa/api".into(), ..denial(2, 2) };
        let plain = RecentDenial { client: String::new(), ..denial(3, 1) };
        log.add("uid", &reporter("web"), &report(vec![denial(1, 3), own, plain], 0), NOW);
        let mut recent = of(&log, "web", NOW);
        recent.hide_callers_outside("shop");
        let callers: Vec<_> = recent.rows.iter().map(|row| row.caller.as_ref()).collect();
        let names: Vec<_> = callers.iter().map(|caller| caller.map(|caller| caller.kind.as_str())).collect();
        assert_eq!(names, [Some("Plain"), Some("ServiceAccount"), None]);
        assert!(!format!("{recent:?}").contains("cart"), "{recent:?}");
    }
}
