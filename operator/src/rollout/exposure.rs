//! Which requests reach the version on trial, and how that reads in a column. No clock, no I/O.
//!
//! A version gets requests by its share (the weight), because a step's match chooses them, or as copies of other
//! requests. [`CanarySteering`] in the status holds the last two, beside the weight and under the same epoch, so that
//! sidecars are sent what the status says and never what a spec says that was edited meanwhile.

use tulle_crds::{CanaryStatus, CanarySteering};

/// Whether requests or copies of requests are sent to the version on trial. A cookie alone sends it nothing.
pub(crate) fn is_exposed(status: &CanaryStatus) -> bool {
    status.weight > 0 || status.steering.as_ref().is_some_and(sends)
}

/// Whether sidecars may still send it any, as far as they have acknowledged.
pub(crate) fn may_be_exposed(status: &CanaryStatus) -> bool {
    status.acknowledged_weight > 0 || status.acknowledged_steering.as_ref().is_some_and(sends)
}

/// Whether a steering sends anything to the version on trial.
pub(super) fn sends(steering: &CanarySteering) -> bool {
    !steering.match_.is_empty() || steering.mirror > 0
}

/// In a few words, such as `5%`, `match`, `mirror 10%` or `5%, match`.
pub(super) fn summary(weight: u32, steering: Option<&CanarySteering>) -> String {
    let matches = steering.is_some_and(|steering| !steering.match_.is_empty());
    let mirror = steering.map_or(0, |steering| steering.mirror);
    let mut parts = Vec::new();
    if weight > 0 || !(matches || mirror > 0) {
        parts.push(format!("{weight}%"));
    }
    if matches {
        parts.push("match".to_owned());
    }
    if mirror > 0 {
        parts.push(format!("mirror {mirror}%"));
    }
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn steering(value: serde_json::Value) -> Option<CanarySteering> {
        Some(serde_json::from_value(value).unwrap())
    }

    #[test]
    fn a_column_says_what_flows() {
        let matches = json!([{"cookie": {"name": "group", "exact": "insider"}}]);
        for (weight, seen, expected) in [
            (0, None, "0%"),
            (5, None, "5%"),
            (5, steering(json!({"sticky": "version"})), "5%"),
            (0, steering(json!({"match": matches})), "match"),
            (5, steering(json!({"match": matches})), "5%, match"),
            (0, steering(json!({"mirror": 10})), "mirror 10%"),
            (5, steering(json!({"match": matches, "mirror": 10})), "5%, match, mirror 10%"),
        ] {
            assert_eq!(summary(weight, seen.as_ref()), expected);
        }
    }

    #[test]
    fn a_version_is_exposed_by_its_weight_a_match_or_copies_and_not_by_a_cookie() {
        let exposed = |value: serde_json::Value| {
            let status: CanaryStatus = serde_json::from_value(value).unwrap();
            is_exposed(&status)
        };
        assert!(exposed(json!({"weight": 1})));
        assert!(exposed(json!({"steering": {"mirror": 1}})));
        assert!(exposed(json!({"steering": {"match": [{"header": {"name": "a", "exact": "b"}}]}})));
        assert!(!exposed(json!({"steering": {"sticky": "version"}})));
        assert!(!exposed(json!({})));
    }
}
