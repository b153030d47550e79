//! What a step in force looks like to the sidecars, and the shares of a promotion.

use serde_json::json;

use super::super::tests::{canary, key, pod, shop, view};
use super::super::{Model, Pod, WorkloadKey};
use super::*;

/// A pod of r1 and one of r2 behind Service `shop/web`, and a Canary with this status.
fn trial(status: serde_json::Value) -> Model {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1"), pod("b", "10.1.0.2", "r2")]);
    model.apply_canary(key("shop", "web"), canary(status));
    model
}

fn progressing(weight: u32, steering: serde_json::Value) -> serde_json::Value {
    json!({"approvedRevision": "r1", "canaryRevision": "r2", "weight": weight, "phase": "Progressing", "epoch": 3,
        "steering": steering})
}

fn promoting(weight: u32, steering: serde_json::Value) -> serde_json::Value {
    json!({"approvedRevision": "r2", "canaryRevision": "r2", "formerRevision": "r1", "weight": weight,
        "phase": "Promoting", "steering": steering})
}

fn split(model: &Model) -> (Vec<(String, u32)>, Option<proto::Steering>) {
    let (split, _, steering) = model.split(&mut view(model, "").endpoints);
    (split.into_iter().map(|share| (share.revision, share.permille)).collect(), steering)
}

fn shares(parts: &[(&str, u32)]) -> Vec<(String, u32)> {
    parts.iter().map(|(revision, permille)| ((*revision).to_owned(), *permille)).collect()
}

#[test]
fn a_match_is_sent_with_a_share_of_nothing() {
    let matches = json!([{"header": {"name": "x-group", "exact": "insider"}}, {"cookie": {"name": "group", "exact": "a"}}]);
    let (split, steering) = split(&trial(progressing(0, json!({"match": matches}))));
    assert_eq!(split, shares(&[("r1", 1000), ("r2", 0)]));
    let steering = steering.unwrap();
    assert_eq!((steering.revision.as_str(), steering.mirror_permille), ("r2", 0));
    use proto::value_match::Type;
    let seen: Vec<(Type, &str, &str)> = steering
        .r#match
        .iter()
        .map(|found| (found.r#type(), found.name.as_str(), found.value.as_str()))
        .collect();
    assert_eq!(seen, [(Type::Exact, "x-group", "insider"), (Type::Cookie, "group", "a")]);
}

#[test]
fn copies_and_the_cookie_are_sent_as_the_status_has_them() {
    let (_, steering) = split(&trial(progressing(5, json!({"mirror": 20, "sticky": "version"}))));
    let steering = steering.unwrap();
    assert_eq!((steering.mirror_permille, steering.sticky_cookie.as_str()), (200, "version"));
}

#[test]
fn without_a_steering_or_without_a_pod_to_send_to_nothing_is_steered() {
    assert_eq!(split(&trial(progressing(5, json!(null)))).1, None);
    assert_eq!(split(&trial(progressing(5, json!({})))).1, None);
    let mut model = trial(progressing(0, json!({"mirror": 20})));
    assert!(split(&model).1.is_some());
    model.delete_pod("uid-b");
    assert_eq!(split(&model).1, None);
}

#[test]
fn a_sidecar_of_an_earlier_version_gets_shares_and_cannot_acknowledge_a_steering() {
    let seen = |steering| view(&trial(progressing(5, steering)), "");
    let plain = seen(json!(null));
    assert_eq!(plain.canary.as_ref().map(|canary| canary.epoch), Some(3));
    for steering in [json!({"mirror": 20}), json!({"sticky": "version"})] {
        let steered = seen(steering);
        assert_eq!((steered.canary, steered.split), (None, plain.split.clone()));
    }
}

#[test]
fn a_spec_that_is_edited_changes_nothing_before_the_status_does() {
    let mut edited = canary(progressing(0, json!({"mirror": 20})));
    edited.spec.steps = vec![tulle_crds::Step { mirror: Some(90), ..tulle_crds::Step::default() }];
    let mut model = trial(progressing(0, json!({"mirror": 20})));
    let before = split(&model);
    model.apply_canary(key("shop", "web"), edited);
    assert_eq!(split(&model), before);
}

#[test]
fn requests_of_another_workload_behind_the_service_are_not_copied() {
    let own = pod("a", "10.1.0.1", "r1");
    let other = WorkloadKey { name: "other".into(), ..own.workload.clone().unwrap() };
    let other = Pod { workload: Some(other), ..pod("c", "10.1.0.3", "x") };
    let mut model = shop(&[own, pod("b", "10.1.0.2", "r2"), other]);
    model.apply_canary(key("shop", "web"), canary(progressing(0, json!({"mirror": 20}))));
    let (split, steering) = split(&model);
    assert_eq!(split, shares(&[("r1", 500), ("", 500), ("r2", 0)]));
    assert_eq!(steering.unwrap().mirror_permille, 100, "a fifth of the half that is the workload's");
}

#[test]
fn a_promotion_goes_on_from_the_share_that_the_version_had() {
    let model = trial(promoting(50, json!({"sticky": "version"})));
    let (split, steering) = split(&model);
    assert_eq!(
        split,
        shares(&[("r1", 500), ("r2", 500)]),
        "the approved version is at the end at which it was"
    );
    let steering = steering.unwrap();
    assert_eq!((steering.revision.as_str(), steering.sticky_cookie.as_str()), ("r2", "version"));
}

#[test]
fn an_approved_version_may_serve_before_its_weight_has_followed_its_pods() {
    // Back to a version that was approved before: it has no pod at first, and of one pod the other goes at once.
    let model = trial(promoting(0, json!({})));
    assert_eq!(split(&model).0, shares(&[("r1", 999), ("r2", 1)]));
    for (left, expected) in [
        // The only one that has an endpoint gets all, as it has a share.
        (pod("b", "10.1.0.2", "r2"), [("r1", 999), ("r2", 1)]),
        (pod("a", "10.1.0.1", "r1"), [("r1", 1000), ("r2", 0)]),
    ] {
        let mut model = shop(&[left]);
        model.apply_canary(key("shop", "web"), canary(promoting(0, json!({}))));
        assert_eq!(split(&model).0, shares(&expected));
    }
}

#[test]
fn pods_that_wait_behind_their_gate_serve_on_when_their_version_is_approved() {
    let mut model = trial(promoting(100, json!({})));
    let parked = Pod { ready: false, gated: true, gate_open: false, ..pod("b", "10.1.0.2", "r2") };
    model.apply_pod(parked);
    let (split, steering) = split(&model);
    assert_eq!((split, steering), (shares(&[("r1", 0), ("r2", 1000)]), None));
    let addresses: Vec<String> = view(&model, "").endpoints.into_iter().map(|seen| seen.address).collect();
    assert_eq!(addresses, ["10.1.0.1:8080", "10.1.0.2:8080"]);
}

#[test]
fn a_promotion_that_an_earlier_operator_began_has_no_shares() {
    assert_eq!(split(&trial(promoting(100, json!(null)))), (Vec::new(), None));
}
