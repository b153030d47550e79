//! What has been reported of access rules: as with series, the key of a rule once, and then its counts by number.

use std::collections::HashMap;

use tulle_mesh::proto;

use crate::telemetry::rules::{RuleKey, RuleTable, RuleTotals};

/// What has been reported of all rules.
#[derive(Debug, Default)]
pub(super) struct ReportedRules(HashMap<RuleKey, Sent>);

/// What has been reported of a rule.
#[derive(Debug)]
struct Sent {
    /// The number of its key.
    id: u32,
    /// The operator has the key, or it is in the report that is under way.
    is_introduced: bool,
    /// The last report that the rule is in.
    sequence: u64,
    totals: RuleTotals,
}

fn introduction(key: &RuleKey, id: u32) -> proto::RuleKey {
    let RuleKey { namespace, policy, rule } = key.clone();
    proto::RuleKey { id, namespace, policy, rule }
}

impl ReportedRules {
    /// What has changed since the last report, as counts of the report with this number, and the keys that the operator
    /// does not have. `next_id`: the number of the next key.
    pub(super) fn changed(
        &mut self,
        table: &RuleTable,
        sequence: u64,
        next_id: &mut u32,
    ) -> (Vec<proto::RuleKey>, Vec<proto::RuleCounts>) {
        let (mut keys, mut changed) = (Vec::new(), Vec::new());
        for (key, totals) in table.all() {
            let known = self.0.get(&key).map(|sent| sent.totals).unwrap_or_default();
            if known == totals {
                continue;
            }
            let sent = self.0.entry(key.clone()).or_insert_with(|| {
                let id = *next_id;
                *next_id = next_id.wrapping_add(1);
                Sent { id, is_introduced: false, sequence: 0, totals: RuleTotals::default() }
            });
            if !std::mem::replace(&mut sent.is_introduced, true) {
                keys.push(introduction(&key, sent.id));
            }
            changed.push(proto::RuleCounts {
                key: sent.id,
                denied: totals.denied.saturating_sub(known.denied),
                would_deny: totals.would_deny.saturating_sub(known.would_deny),
            });
            (sent.sequence, sent.totals) = (sequence, totals);
        }
        (keys, changed)
    }

    /// The operator has forgotten all keys: those of the report with this number go again with it, and all others with
    /// their next counts.
    pub(super) fn introduce_again(&mut self, sequence: u64) -> Vec<proto::RuleKey> {
        let mut keys = Vec::new();
        for (key, sent) in &mut self.0 {
            sent.is_introduced = sent.sequence == sequence;
            if sent.is_introduced {
                keys.push(introduction(key, sent.id));
            }
        }
        keys.sort_unstable_by_key(|key| key.id);
        keys
    }

    /// Whether the operator has had everything of a rule, before the report with this number.
    pub(super) fn is_reported(&self, key: &RuleKey, totals: RuleTotals, sequence: u64) -> bool {
        match self.0.get(key) {
            Some(sent) => sent.sequence != sequence && sent.totals == totals,
            None => totals == RuleTotals::default(),
        }
    }

    /// Forgets a rule that is no longer counted. One that comes back begins at zero, with another number.
    pub(super) fn forget(&mut self, key: &RuleKey) {
        self.0.remove(key);
    }
}
