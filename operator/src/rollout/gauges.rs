//! What `/metrics` says about Canaries.

use std::sync::Arc;

use tulle_crds::{CanaryStatus, Phase};

use crate::model::Model;

/// A Canary at a scrape.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CanaryGauges {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// The name of its phase.
    pub phase: String,
    /// Percentage of the requests that goes to the new version.
    pub weight: u32,
    /// When something happened to it last, in Unix seconds; `None`: never.
    pub last_change: Option<i64>,
}

/// All Canaries, in order of their names.
pub fn gauges(model: &Model) -> Vec<CanaryGauges> {
    let initial = CanaryStatus::default();
    let mut all: Vec<CanaryGauges> = model
        .canaries()
        .map(|((namespace, name), canary)| {
            let status = canary.status.as_ref().unwrap_or(&initial);
            CanaryGauges {
                namespace: Arc::clone(namespace),
                name: Arc::clone(name),
                phase: phase(status.phase),
                weight: status.weight,
                last_change: last_change(status),
            }
        })
        .collect();
    all.sort_unstable();
    all
}

/// As in the status.
fn phase(phase: Phase) -> String {
    format!("{phase:?}")
}

/// When the rollout last began, got a weight that every sidecar has acknowledged, paused or ended, or the target came or
/// went, in Unix seconds. `None`: nothing has happened yet.
fn last_change(status: &CanaryStatus) -> Option<i64> {
    let times = [&status.started, &status.step_started, &status.paused_since].into_iter().flatten();
    let ended = status.history.first().map(|last| &last.ended);
    let conditions =
        status.conditions.iter().filter(|condition| matches!(&*condition.type_, "Ready" | "Progressing"));
    let changed = conditions.map(|condition| &condition.last_transition_time);
    times.chain(ended).chain(changed).map(|time| time.0.as_second()).max()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::Key;
    use crate::model::tests::canary;

    #[test]
    fn a_canary_has_gauges_as_long_as_it_exists() {
        let (mut model, key): (Model, Key) = (Model::default(), ("shop".into(), "web".into()));
        model.apply_canary(key.clone(), canary(json!(null)));
        let gauges_of = |model: &Model| {
            let all = gauges(model).into_iter();
            all.map(|canary| (canary.phase, canary.weight, canary.last_change)).collect::<Vec<_>>()
        };
        assert_eq!(gauges_of(&model), [("Waiting".to_owned(), 0, None)], "the operator has not seen it yet");
        let status = json!({"phase": "Paused", "weight": 25, "started": "1970-01-01T00:01:00Z",
            "stepStarted": "1970-01-01T00:02:00Z", "pausedSince": "1970-01-01T00:03:00Z"});
        model.apply_canary(key.clone(), canary(status));
        assert_eq!(gauges_of(&model), [("Paused".to_owned(), 25, Some(180))]);
        model.delete_canary(&key);
        assert!(gauges_of(&model).is_empty());
    }

    #[test]
    fn a_rollout_that_has_ended_changed_last_when_it_ended() {
        let ended =
            json!({"revision": "r2", "outcome": "Promoted", "because": "", "ended": "1970-01-01T01:00:00Z"});
        let condition = json!({"type": "Progressing", "status": "False", "reason": "Stable", "message": "",
            "lastTransitionTime": "1970-01-01T00:59:00Z"});
        let status = json!({"phase": "Stable", "started": "1970-01-01T00:01:00Z", "history": [ended],
            "conditions": [condition]});
        let status: CanaryStatus = serde_json::from_value(status).unwrap();
        assert_eq!(last_change(&status), Some(3_600));
    }
}
