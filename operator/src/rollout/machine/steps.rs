//! What the steps of a Canary ask for: a share, matches, copies, for how long.
//!
//! A step with a match or copies and no weight of its own keeps the weight of the steps before it. A match stays in
//! force in the steps after its own, until another match replaces it: whoever was given the new version keeps it.
//! Copies end with their step, because nobody sees them.

use k8s_openapi::jiff::SignedDuration;
use tulle_crds::{CanarySpec, CanarySteering, Step, parse_duration};

use crate::rollout::exposure;

/// What sidecars are to send to the version on trial.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Wanted {
    /// Its share, in percent.
    pub(super) weight: u32,
    /// What it gets besides; `None`: nothing.
    pub(super) steering: Option<CanarySteering>,
}

impl Wanted {
    /// What the step with this index asks for.
    pub(super) fn of(spec: &CanarySpec, steps: &[Step], index: usize) -> Self {
        let until = steps.get(..=index).unwrap_or(steps);
        let weight = until.iter().rev().find_map(|step| step.weight).map_or(0, u32::from);
        let matching = until.iter().rev().find(|step| !step.match_.is_empty());
        let mirror = until.last().and_then(|step| step.mirror).map_or(0, u32::from);
        let steering = CanarySteering {
            match_: matching.map(|step| step.match_.clone()).unwrap_or_default(),
            mirror,
            // As long as the version has no share, nobody needs to be kept with it.
            sticky: if weight > 0 { sticky(spec) } else { String::new() },
        };
        Self { weight, steering: (steering != CanarySteering::default()).then_some(steering) }
    }

    /// Percentage of the requests of which copies are sent.
    pub(super) fn mirror(&self) -> u32 {
        self.steering.as_ref().map_or(0, |steering| steering.mirror)
    }

    /// Whether it sends anything to the version on trial.
    pub(super) fn exposes(&self) -> bool {
        self.weight > 0 || self.steering.as_ref().is_some_and(exposure::sends)
    }

    /// In a few words.
    pub(super) fn summary(&self) -> String {
        exposure::summary(self.weight, self.steering.as_ref())
    }
}

/// The name of the cookie that keeps a user with a version; empty: none.
pub(super) fn sticky(spec: &CanarySpec) -> String {
    spec.sticky.as_ref().map_or_else(String::new, |sticky| sticky.cookie.clone())
}

/// The steps of a Canary, or the default ones.
pub fn steps(spec: &CanarySpec) -> Vec<Step> {
    if spec.steps.is_empty() { default_steps() } else { spec.steps.clone() }
}

fn default_steps() -> Vec<Step> {
    [1, 5, 10, 25, 50].into_iter().map(|weight| Step { weight: Some(weight), ..Step::default() }).collect()
}

/// Whether a step waits for a user. What the step before it has set flows on.
pub(super) fn is_pause(step: &Step) -> bool {
    step.weight.is_none() && step.match_.is_empty() && step.mirror.is_none()
}

/// How long a step is held at least; `None`: a pause, until it is resumed.
pub(super) fn hold(step: &Step) -> Option<SignedDuration> {
    let held = || step.hold.as_deref().map_or(SignedDuration::from_secs(120), duration);
    (!is_pause(step)).then(held)
}

/// Durations are validated at admission; an invalid one counts as a day.
pub(super) fn duration(text: &str) -> SignedDuration {
    let duration = parse_duration(text).ok().and_then(|duration| SignedDuration::try_from(duration).ok());
    duration.unwrap_or(SignedDuration::from_hours(24))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// What each step asks for, in a few words, and the cookie.
    fn summaries(spec: serde_json::Value) -> Vec<(String, String)> {
        let mut all = json!({"target": {"kind": "Deployment", "name": "web"}});
        all.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
        let spec: CanarySpec = serde_json::from_value(all).unwrap();
        let steps = steps(&spec);
        let of = |index| {
            let wanted = Wanted::of(&spec, &steps, index);
            (wanted.summary(), wanted.steering.map_or_else(String::new, |steering| steering.sticky))
        };
        (0..steps.len()).map(of).collect()
    }

    #[test]
    fn a_match_stays_in_force_and_copies_end_with_their_step() {
        let insiders = json!([{"header": {"name": "x-group", "exact": "insider"}}]);
        let seen = summaries(json!({"sticky": {"cookie": "version"}, "steps": [
            {"match": insiders, "hold": "1m"}, {"mirror": 10}, {"weight": 5}, {"mirror": 20}, {"pause": {}}, {"weight": 50},
        ]}));
        let seen: Vec<(&str, &str)> = seen.iter().map(|(what, sticky)| (&**what, &**sticky)).collect();
        assert_eq!(
            seen,
            [
                ("match", ""),
                ("match, mirror 10%", ""),
                ("5%, match", "version"),
                ("5%, match, mirror 20%", "version"),
                ("5%, match", "version"),
                ("50%, match", "version"),
            ]
        );
    }

    #[test]
    fn steps_of_weights_alone_steer_nothing() {
        let spec: CanarySpec =
            serde_json::from_value(json!({"target": {"kind": "Deployment", "name": "web"}})).unwrap();
        let steps = steps(&spec);
        let wanted: Vec<Wanted> = (0..steps.len()).map(|index| Wanted::of(&spec, &steps, index)).collect();
        let weights: Vec<u32> = wanted.iter().map(|wanted| wanted.weight).collect();
        assert_eq!(weights, [1, 5, 10, 25, 50]);
        assert!(wanted.iter().all(|wanted| wanted.steering.is_none()));
    }

    #[test]
    fn a_step_that_matches_or_copies_is_held_for_two_minutes_like_one_with_a_weight() {
        for (step, seconds) in [
            (json!({"weight": 5}), Some(120)),
            (json!({"mirror": 10, "hold": "30s"}), Some(30)),
            (json!({"match": [{"cookie": {"name": "a", "exact": "b"}}]}), Some(120)),
            (json!({"pause": {}}), None),
        ] {
            let parsed: Step = serde_json::from_value(step.clone()).unwrap();
            assert_eq!(hold(&parsed).map(|hold| hold.as_secs()), seconds, "{step}");
        }
    }
}
