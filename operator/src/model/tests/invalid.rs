//! Policies with values that cannot be enforced, and policies that cannot be read.

use super::*;

fn with_range(cidr: &str, mode: &str) -> MeshPolicy {
    let spec = json!({"target": {"kind": "Namespace"}, "mode": mode, "access": {"deny": [{"from": [{"cidr": cidr}]}]}});
    policy("p", 1, spec)
}

fn verdict(model: &Model) -> String {
    match model.report(&key("shop", "p"), &model.policies[&key("shop", "p")]).verdict {
        Verdict::Invalid(why) => why,
        other => format!("{other:?}"),
    }
}

#[test]
fn the_last_valid_version_of_a_policy_stays_in_force() {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
    model.apply_policy(key("shop", "p"), with_range("10.0.0.0/8", "Enforce"));
    model.apply_policy(key("shop", "p"), with_range("10.0.0.0/99", "Enforce"));
    let access = model.inbound("uid-a").unwrap().access.unwrap();
    assert_eq!(access.deny[0].from[0].cidr, "10.0.0.0/8");
    let why = verdict(&model);
    assert!(why.contains("10.0.0.0/99") && why.contains("last valid version stays in force"), "{why}");
    model.apply_policy(key("shop", "p"), with_range("10.0.0.0/9", "Enforce"));
    assert_eq!(verdict(&model), "Accepted");
}

#[test]
fn a_policy_that_was_never_valid_admits_nobody_and_in_shadow_does_nothing() {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
    model.apply_policy(key("shop", "p"), with_range("10.0.0.0/99", "Enforce"));
    let access = model.inbound("uid-a").unwrap().access.unwrap();
    assert!(access.has_allow && access.allow.is_empty() && access.deny.is_empty());
    assert!(verdict(&model).contains("nobody is admitted"));
    model.apply_policy(key("shop", "p"), with_range("10.0.0.0/99", "Shadow"));
    let inbound = model.inbound("uid-a").unwrap();
    assert!(inbound.access.is_none() && inbound.shadow.is_none());
}

#[test]
fn a_policy_that_cannot_be_read_stays_as_it_was_last_read_and_is_listed() {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
    model.apply_policy(key("shop", "p"), with_range("10.0.0.0/8", "Enforce"));
    model.mark_policy_unreadable(key("shop", "p"), Unreadable { error: "?".into(), ..Unreadable::default() });
    assert!(model.inbound("uid-a").unwrap().access.is_some());
    assert_eq!(model.unreadable_policies().count(), 1);
    model.apply_policy(key("shop", "p"), with_range("10.0.0.0/8", "Enforce"));
    assert_eq!(model.unreadable_policies().count(), 0);
}

#[test]
fn a_policy_that_a_narrower_one_overrules_has_nothing_to_acknowledge_there() {
    let other = Pod { labels: Box::new([]), ..pod("b", "10.1.0.2", "r1") };
    let mut model = shop(&[pod("a", "10.1.0.1", "r1"), other]);
    model.apply_policy(
        key("shop", "all"),
        policy("all", 1, json!({"target": {"kind": "Namespace"}, "mtls": "Strict"})),
    );
    model.apply_policy(
        key("shop", "web"),
        policy("web", 2, json!({"target": {"kind": "Service", "name": "web"}, "mtls": "Permissive"})),
    );
    let sections = model.sections(&key("shop", "all"), "uid-a");
    assert_eq!(sections, Sections::default(), "the narrower one decides");
    let mtls = Sections { mtls: true, access: false, ..Sections::default() };
    assert_eq!(model.sections(&key("shop", "web"), "uid-a"), mtls);
    assert_eq!(model.sections(&key("shop", "all"), "uid-b"), mtls);
}
