//! Faults of MeshPolicies, Canaries and routes.

use serde_json::{Value, json};
use tulle_crds::reason;

use super::super::facts::target_name;
use super::faults;
use crate::objects::Unread;

fn policy(reason: &str) -> Value {
    json!({"metadata": {"name": "deny", "namespace": "shop", "generation": 2}, "status": {"observedGeneration": 2,
        "conditions": [{"type": "Ready", "status": "False", "reason": reason, "message": "why",
            "lastTransitionTime": "2026-11-27T11:50:00Z"}]}})
}

#[test]
fn policies_that_are_not_enforced_are_reported_with_their_reason() {
    let fix = "kubectl -n shop describe meshpolicy deny";
    for (reason, result, rest) in [
        (reason::INVALID, "error", ""),
        (reason::CONFLICTED, "error", ""),
        (reason::REFUSED, "error", ""),
        (reason::TARGET_NOT_FOUND, "error", ""),
        (reason::NO_WORKLOADS, "warning", ""),
        (reason::PROPAGATING, "warning", " (for 10m)"),
    ] {
        let expected = format!("T0801 {result}: MeshPolicy shop/deny: {reason}: why{rest} => {fix}");
        assert_eq!(faults(|facts| facts.policies = Ok(vec![policy(reason)])), [expected]);
    }
    assert_eq!(faults(|facts| facts.policies = Ok(vec![policy(reason::ENFORCED)])), Vec::<String>::new());
    let mut stale = policy(reason::ENFORCED);
    stale["metadata"]["generation"] = json!(3);
    assert_eq!(
        faults(|facts| facts.policies = Ok(vec![stale])),
        [format!("T0801 warning: MeshPolicy shop/deny: its present version has no status => {fix}")]
    );
}

fn canary(steps: Value, condition: Value) -> Value {
    json!({"metadata": {"name": "web", "namespace": "shop"},
        "spec": {"target": {"kind": "Deployment", "name": "web"}, "steps": steps},
        "status": {"phase": "Progressing", "conditions": [condition]}})
}

#[test]
fn canaries_that_cannot_go_on_are_reported() {
    let condition = |type_: &str, status: &str, reason: &str| json!({"type": type_, "status": status, "reason": reason, "message": "why"});
    let fix = "kubectl -n shop describe canary web";
    for (condition, expected) in [
        (
            condition("Stalled", "True", "PromotionStalled"),
            "T0901 error: Canary shop/web: PromotionStalled: why",
        ),
        (
            condition("Acknowledged", "False", "ClientsDialPods"),
            "T0901 error: Canary shop/web: ClientsDialPods: why",
        ),
        (condition("Ready", "False", "Conflicted"), "T0901 error: Canary shop/web: Conflicted: why"),
        (condition("DeadlineExceeded", "True", "DeadlineExceeded"), "T0902 warning: Canary shop/web: why"),
    ] {
        let canaries = vec![canary(json!([]), condition)];
        assert_eq!(faults(|facts| facts.canaries = Ok(canaries)), [format!("{expected} => {fix}")]);
    }
    let fine = canary(json!([]), condition("Stalled", "False", "No"));
    assert_eq!(faults(|facts| facts.canaries = Ok(vec![fine])), Vec::<String>::new());
}

#[test]
fn a_tool_that_would_undo_a_rollout_is_a_warning_only_where_the_steps_take_longer_than_it_waits() {
    let helm = json!({"metadata": {"labels": {"app.kubernetes.io/managed-by": "Helm"}}});
    let with = |steps: Value, target: &Value| {
        let (canaries, target) = (vec![canary(steps, json!({}))], target.clone());
        faults(move |facts| {
            facts.canaries = Ok(canaries);
            facts.targets = [(target_name("Deployment", "shop", "web"), target)].into();
        })
    };
    let fix = "kubectl -n shop describe canary web";
    let expected = |steps: &str| {
        [format!("T0903 warning: Canary shop/web: Deployment web is managed by Helm, and {steps} => {fix}")]
    };
    assert_eq!(with(json!([]), &helm), expected("the steps take at least 600 s"));
    assert_eq!(
        with(json!([{"weight": 5, "hold": "1m"}, {"pause": {}}]), &helm),
        expected("a step is a pause")
    );
    assert_eq!(with(json!([{"weight": 5, "hold": "2m"}, {"weight": 50}]), &helm), Vec::<String>::new());
    assert_eq!(with(json!([]), &json!({})), Vec::<String>::new());
}

#[test]
fn a_parent_of_kind_service_without_its_group_is_a_warning() {
    let route = |group: Value| {
        let parent = json!({"kind": "Service", "name": "api", "group": group});
        json!({
            "kind": "HTTPRoute",
            "metadata": {"namespace": "shop", "name": "web"},
            "spec": {"parentRefs": [parent]},
        })
    };
    let of = |group: Value| faults(|facts| facts.routes = Ok(vec![route(group)]));
    let expected = "T0920 warning: HTTPRoute shop/web: parent api of kind Service has no group \"\" => kubectl -n shop edit httproute web";
    assert_eq!(of(json!("gateway.networking.k8s.io")), [expected]);
    assert_eq!(of(Value::Null), [expected]);
    assert_eq!(of(json!("")), Vec::<String>::new());
}

#[test]
fn a_route_that_our_controller_does_not_accept_is_an_error() {
    let route = |controller: &str| {
        json!({"kind": "HTTPRoute", "metadata": {"name": "web", "namespace": "shop"}, "status": {"parents": [{
            "controllerName": controller, "parentRef": {"name": "api"},
            "conditions": [{"type": "Accepted", "status": "False", "reason": "UnsupportedValue", "message": "why"},
                {"type": "ResolvedRefs", "status": "True"}]}]}})
    };
    assert_eq!(
        faults(|facts| facts.routes = Ok(vec![route("tulle.dev/mesh-controller")])),
        [
            "T0920 error: HTTPRoute shop/web: Accepted is False for parent api: UnsupportedValue: why => kubectl -n shop describe httproute web"
        ]
    );
    assert_eq!(faults(|facts| facts.routes = Ok(vec![route("example.com/other")])), Vec::<String>::new());
    assert_eq!(faults(|facts| facts.routes = Err(Unread::NotServed)), Vec::<String>::new());
}
