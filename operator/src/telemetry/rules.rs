//! What rules of policies have refused, or would have refused in Shadow.
//!
//! In: the counts of each report, by the rule that decided. Out: sums per rule, over all pods for `/metrics`, and over
//! those of one workload for its page. A pod is subject to the policies of its own namespace only, so what it reports of
//! others is not counted.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use tulle_mesh::query::Party;

use super::counts::{OTHER, Verdicts};
use super::history::{Direction, SeriesId, Sum};
use crate::model::Key;

/// Rules that are summed. Beyond, all others of a namespace's policies are one.
const MAX_RULES: usize = 10_000;
/// The same of one namespace, so that pods that invent rules take no room of other namespaces.
const MAX_OF_NAMESPACE: usize = 1_000;

/// A rule of a policy, or what its access section decided by without one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RuleId {
    /// Namespace and name of the MeshPolicy.
    pub policy: Key,
    /// As in logs: `DenyRule(0)`, `NoAllowMatched`, `AmbiguousPath`.
    pub rule: Arc<str>,
}

impl RuleId {
    /// The rule that a series is about. `None`: it is about requests, or about a policy that its reporter is not subject
    /// to.
    fn of(id: &SeriesId) -> Option<Self> {
        let is_subject = id.direction == Direction::Policy && id.namespace == id.reporter.namespace;
        let policy = || (Arc::clone(&id.namespace), Arc::clone(&id.peer));
        is_subject.then(|| Self { policy: policy(), rule: Arc::clone(&id.route) })
    }
}

/// Sums per rule since this replica started.
#[derive(Debug, Default)]
pub(super) struct Rules {
    sums: BTreeMap<RuleId, Verdicts>,
    /// How many of them are of each namespace.
    of_namespace: HashMap<Arc<str>, usize>,
}

impl Rules {
    /// Adds what a report says of a series, if that is about a rule.
    pub(super) fn add(&mut self, series: &SeriesId, verdicts: Verdicts) {
        let Some(mut rule) = RuleId::of(series) else { return };
        if !self.has_room(&rule) && !self.sums.contains_key(&rule) {
            rule = RuleId { policy: (rule.policy.0, OTHER.into()), rule: OTHER.into() };
        }
        if !self.sums.contains_key(&rule) {
            *self.of_namespace.entry(Arc::clone(&rule.policy.0)).or_default() += 1;
        }
        self.sums.entry(rule).or_default().merge(verdicts);
    }

    fn has_room(&self, rule: &RuleId) -> bool {
        let of_namespace = self.of_namespace.get(&rule.policy.0).copied().unwrap_or_default();
        self.sums.len() < MAX_RULES && of_namespace < MAX_OF_NAMESPACE
    }

    /// Removes the sums of policies that do not exist.
    pub(super) fn retain(&mut self, exists: impl Fn(&Key) -> bool) {
        self.sums.retain(|rule, _| *rule.policy.1 == *OTHER || exists(&rule.policy));
        self.of_namespace.clear();
        for rule in self.sums.keys() {
            *self.of_namespace.entry(Arc::clone(&rule.policy.0)).or_default() += 1;
        }
    }

    pub(super) fn all(&self) -> Vec<(RuleId, Verdicts)> {
        self.sums.iter().map(|(rule, verdicts)| (rule.clone(), *verdicts)).collect()
    }
}

/// What rules have decided at one workload, in order.
pub fn of_workload(sum: &Sum, workload: &Party) -> BTreeMap<RuleId, Verdicts> {
    let mut rules: BTreeMap<RuleId, Verdicts> = BTreeMap::new();
    for (id, counts) in sum.series.iter().filter(|(id, _)| id.direction == Direction::Policy) {
        if let Some(rule) = RuleId::of(id).filter(|_| id.reporter.party() == *workload) {
            rules.entry(rule).or_default().merge(counts.verdicts());
        }
    }
    rules
}

#[cfg(test)]
mod tests {
    use super::super::history::Reporter;
    use super::*;
    use crate::model::tests::key;

    fn series(namespace: &str, rule: usize) -> SeriesId {
        let reporter =
            Reporter { namespace: namespace.into(), kind: "Deployment".into(), workload: "web".into() };
        SeriesId {
            namespace: namespace.into(),
            peer: "web".into(),
            route: format!("DenyRule({rule})").into(),
            ..SeriesId::other(reporter, Direction::Policy, false)
        }
    }

    #[test]
    fn rules_that_one_namespace_makes_up_take_no_room_of_another() {
        let mut rules = Rules::default();
        let denied = Verdicts { denied: 1, would_deny: 0 };
        (0..2 * MAX_RULES).for_each(|rule| rules.add(&series("shop", rule), denied));
        rules.add(&series("payments", 7), denied);
        let all = rules.all();
        assert_eq!(all.len(), MAX_OF_NAMESPACE + 2);
        let of = |namespace: &str, policy: &str| {
            let found = all.iter().find(|(rule, _)| rule.policy == key(namespace, policy));
            found.map(|(rule, verdicts)| (rule.rule.to_string(), verdicts.denied))
        };
        assert_eq!(of("payments", "web"), Some(("DenyRule(7)".to_owned(), 1)));
        let others = (2 * MAX_RULES - MAX_OF_NAMESPACE) as u64;
        assert_eq!(of("shop", OTHER), Some((OTHER.to_owned(), others)), "all are counted");

        rules.retain(|policy| *policy.0 != *"shop");
        rules.add(&series("shop", 20), denied);
        assert_eq!(rules.all().len(), 3, "there is room again: {:?}", rules.all());
        assert!(rules.all().iter().any(|(rule, _)| *rule.rule == *"DenyRule(20)"));
    }
}
