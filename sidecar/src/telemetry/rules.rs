//! What access rules refuse, by the rule that decides: of enforced policies, and of those in Shadow.
//!
//! An access section finds the counters of a rule with the first refusal, and keeps them: later ones take no lock and
//! make no text. The counters outlive the section, so that a policy that is sent again goes on counting.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use tokio::time::Instant;
use tulle_mesh::policy::Reason;

use super::UNUSED;

/// Rules that are told apart. A pod has one access section that is enforced and one in Shadow, and few rules of them ever
/// refuse anything. Beyond, those of a namespace's policies are counted as one, named `_OTHER`.
const MAX_RULES: usize = 100;

/// What an access section decided by.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleKey {
    /// Namespace of the MeshPolicy.
    pub namespace: String,
    /// Its name.
    pub policy: String,
    /// As in logs: `DenyRule(0)`, `NoAllowMatched`, `AmbiguousPath`.
    pub rule: String,
}

/// Counters of one rule.
#[derive(Debug, Default)]
pub struct RuleCounts {
    denied: AtomicU64,
    would_deny: AtomicU64,
}

impl RuleCounts {
    fn count(&self, shadow: bool) {
        let counter = if shadow { &self.would_deny } else { &self.denied };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// What it has refused, and what it would have refused in Shadow.
    pub fn read(&self) -> RuleTotals {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        RuleTotals { denied: read(&self.denied), would_deny: read(&self.would_deny) }
    }
}

/// Requests, and connections whose content is opaque, on which one rule decided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RuleTotals {
    /// They were refused.
    pub denied: u64,
    /// They were let through, because the policy is in Shadow.
    pub would_deny: u64,
}

/// The counters of one access section, each found when its rule first refuses something.
#[derive(Debug)]
pub struct SectionCounts {
    /// Namespace and name of the policy. `None`: the section is of none.
    policy: Option<(String, String)>,
    /// By [`slot_of`].
    slots: Box<[OnceLock<Arc<RuleCounts>>]>,
}

impl SectionCounts {
    /// Of a policy, as `namespace/name`, that has so many rules that deny.
    pub fn new(policy: &str, deny_rules: usize) -> Self {
        let policy = policy.split_once('/').map(|(namespace, name)| (namespace.to_owned(), name.to_owned()));
        let slots = FIRST_DENY_RULE.saturating_add(deny_rules);
        Self { policy, slots: (0..slots).map(|_| OnceLock::new()).collect() }
    }

    /// Counts a refusal. `shadow`: the section is only tried, and refuses nothing.
    pub fn count(&self, table: &RuleTable, reason: Reason, shadow: bool) {
        let Some((namespace, policy)) = &self.policy else { return };
        let Some(slot) = slot_of(reason).and_then(|slot| self.slots.get(slot)) else { return };
        let find = || {
            let (namespace, policy) = (namespace.clone(), policy.clone());
            table.of(RuleKey { namespace, policy, rule: format!("{reason:?}") })
        };
        slot.get_or_init(find).count(shadow);
    }
}

/// The slot of the first rule of `deny`, behind those of decisions without a rule.
const FIRST_DENY_RULE: usize = 2;

/// Where a refusal is counted. `None`: it is not one.
fn slot_of(reason: Reason) -> Option<usize> {
    match reason {
        Reason::NoAllowMatched => Some(0),
        Reason::AmbiguousPath => Some(1),
        Reason::DenyRule(index) => index.checked_add(FIRST_DENY_RULE),
        Reason::AllowRule(_) | Reason::NothingDenied => None,
    }
}

/// A rule in the table.
#[derive(Debug, Default)]
struct Kept {
    counts: Arc<RuleCounts>,
    /// Since when no section has held the counters.
    unused_since: Option<Instant>,
}

/// The counters of all rules that have refused something.
#[derive(Debug, Default)]
pub struct RuleTable(Mutex<BTreeMap<RuleKey, Kept>>);

impl RuleTable {
    /// The counters of a rule, or of all for which the table has no room.
    fn of(&self, mut key: RuleKey) -> Arc<RuleCounts> {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if table.len() >= MAX_RULES && !table.contains_key(&key) {
            (key.policy, key.rule) = ("_OTHER".to_owned(), "_OTHER".to_owned());
        }
        Arc::clone(&table.entry(key).or_default().counts)
    }

    /// Every rule that has refused something, in order.
    pub fn all(&self) -> Vec<(RuleKey, RuleTotals)> {
        let table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        table.iter().map(|(key, kept)| (key.clone(), kept.counts.read())).collect()
    }

    /// Drops the rules that no section has held for [`UNUSED`], and whose counts have been reported. Returns their keys.
    pub(super) fn evict(
        &self,
        now: Instant,
        is_reported: impl Fn(&RuleKey, RuleTotals) -> bool,
    ) -> Vec<RuleKey> {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut evicted = Vec::new();
        table.retain(|key, kept| {
            // Counters are given out under the lock only: those that are not held now cannot count.
            if Arc::strong_count(&kept.counts) > 1 {
                kept.unused_since = None;
                return true;
            }
            let since = *kept.unused_since.get_or_insert(now);
            let keep = now.duration_since(since) < UNUSED || !is_reported(key, kept.counts.read());
            if !keep {
                evicted.push(key.clone());
            }
            keep
        });
        evicted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(table: &RuleTable) -> Vec<(String, RuleTotals)> {
        table.all().into_iter().map(|(key, totals)| (key.policy + " " + &key.rule, totals)).collect()
    }

    #[test]
    fn each_rule_of_a_policy_is_counted_apart_and_goes_on_when_the_policy_comes_again() {
        let table = RuleTable::default();
        for shadow in [true, false] {
            let section = SectionCounts::new("shop/web", 2);
            section.count(&table, Reason::DenyRule(0), shadow);
            for _ in 0..2 {
                section.count(&table, Reason::DenyRule(1), shadow);
            }
        }
        SectionCounts::new("shop/web", 0).count(&table, Reason::NoAllowMatched, true);
        let totals = |denied, would_deny| RuleTotals { denied, would_deny };
        let expected = [("web DenyRule(0)", totals(1, 1)), ("web DenyRule(1)", totals(2, 2))];
        let expected = expected.into_iter().chain([("web NoAllowMatched", totals(0, 1))]);
        let expected: Vec<_> = expected.map(|(name, totals)| (name.to_owned(), totals)).collect();
        assert_eq!(rules(&table), expected);
    }

    #[test]
    fn what_allows_and_what_is_of_no_policy_is_not_counted() {
        let table = RuleTable::default();
        let section = SectionCounts::new("shop/web", 1);
        for reason in [Reason::AllowRule(0), Reason::NothingDenied, Reason::DenyRule(usize::MAX)] {
            section.count(&table, reason, false);
        }
        SectionCounts::new("", 1).count(&table, Reason::DenyRule(0), false);
        assert!(table.all().is_empty());
    }

    #[test]
    fn more_rules_than_there_is_room_for_are_counted_as_one() {
        let table = RuleTable::default();
        let section = SectionCounts::new("shop/web", MAX_RULES + 5);
        (0..MAX_RULES + 5).for_each(|rule| section.count(&table, Reason::DenyRule(rule), true));
        let rules = rules(&table);
        assert_eq!(rules.len(), MAX_RULES + 1);
        assert!(rules.contains(&("_OTHER _OTHER".to_owned(), RuleTotals { denied: 0, would_deny: 5 })));
    }

    #[test]
    fn a_rule_is_dropped_when_its_policy_is_gone_and_its_counts_have_been_reported() {
        let (table, now) = (RuleTable::default(), Instant::now());
        let section = SectionCounts::new("shop/web", 1);
        section.count(&table, Reason::DenyRule(0), false);
        assert!(table.evict(now + UNUSED, |_, _| true).is_empty(), "the policy is in force");
        drop(section);
        assert!(table.evict(now + UNUSED, |_, _| true).is_empty());
        assert!(table.evict(now + UNUSED * 2, |_, _| false).is_empty(), "not reported");
        assert_eq!(table.evict(now + UNUSED * 2, |_, _| true).len(), 1);
        assert!(table.all().is_empty());
    }
}
