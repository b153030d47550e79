//! What rules of policies have refused, or would have refused in Shadow.
//!
//! In: the counts of each report, by the rule that decided. Out: sums per rule, over all pods for `/metrics`, and over
//! those of one workload for its page. A pod is subject to the policies of its own namespace only, so what it reports of
//! others is not counted.

use std::collections::BTreeMap;
use std::sync::Arc;

use tulle_mesh::query::Party;

use super::counts::{OTHER, Verdicts};
use super::history::{Direction, SeriesId, Sum};
use crate::model::Key;

/// Rules that are summed. Beyond, all others of a namespace's policies are one.
const MAX_RULES: usize = 10_000;

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
pub(super) struct Rules(BTreeMap<RuleId, Verdicts>);

impl Rules {
    /// Adds what a report says of a series, if that is about a rule.
    pub(super) fn add(&mut self, series: &SeriesId, verdicts: Verdicts) {
        let Some(mut rule) = RuleId::of(series) else { return };
        if self.0.len() >= MAX_RULES && !self.0.contains_key(&rule) {
            rule = RuleId { policy: (rule.policy.0, OTHER.into()), rule: OTHER.into() };
        }
        self.0.entry(rule).or_default().merge(verdicts);
    }

    /// Removes the sums of policies that do not exist.
    pub(super) fn retain(&mut self, exists: impl Fn(&Key) -> bool) {
        self.0.retain(|rule, _| *rule.policy.1 == *OTHER || exists(&rule.policy));
    }

    pub(super) fn all(&self) -> Vec<(RuleId, Verdicts)> {
        self.0.iter().map(|(rule, verdicts)| (rule.clone(), *verdicts)).collect()
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
