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
fn a_target_that_keeps_no_stable_pod_is_an_error_and_one_that_waits_for_a_person_a_warning() {
    let with = |kind: &str, spec: Value| {
        let mut canary = canary(json!([]), json!({}));
        canary["spec"]["target"]["kind"] = json!(kind);
        let target = (target_name(kind, "shop", "web"), json!({"spec": spec}));
        faults(move |facts| {
            facts.canaries = Ok(vec![canary]);
            facts.targets = [target].into();
        })
    };
    assert_eq!(
        with("Deployment", json!({"strategy": {"type": "Recreate"}})),
        [
            "T0904 error: Canary shop/web: Deployment web has strategy Recreate, which deletes all stable pods before the new version starts => kubectl -n shop edit deployment web"
        ]
    );
    let few = json!({"replicas": 1, "strategy": {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 1}}});
    let found = with("Deployment", few);
    let expected = "T0904 warning: Canary shop/web: Deployment web may lose all its pods at once (replicas 1";
    assert!(found.len() == 1 && found[0].starts_with(expected), "{found:?}");
    let found = with("StatefulSet", json!({"replicas": 3, "updateStrategy": {"type": "OnDelete"}}));
    let expected = "T0904 warning: Canary shop/web: StatefulSet web has updateStrategy OnDelete";
    assert!(found.len() == 1 && found[0].starts_with(expected), "{found:?}");
    let costly = json!({"replicas": 3, "strategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}});
    assert_eq!(with("Deployment", costly), Vec::<String>::new());
}

#[test]
fn a_sidecar_that_does_not_run_is_named_with_the_state_of_its_container() {
    let with = |init: Value, proxy: Value| {
        let pod = json!({
            "metadata": {"name": "web-1", "namespace": "shop"},
            "spec": {"initContainers": [{"name": "tulle-init"}, {"name": "tulle-proxy"}]},
            "status": {"startTime": "2026-11-27T11:00:00Z", "phase": "Pending", "initContainerStatuses": [init, proxy]},
        });
        faults(move |facts| {
            facts.sidecars.as_mut().unwrap().sidecars[0].connected = false;
            facts.injected = Ok(vec![pod]);
        })
    };
    let init =
        |state: Value, restarts: u32| json!({"name": "tulle-init", "state": state, "restartCount": restarts});
    let proxy =
        |state: Value, started: bool| json!({"name": "tulle-proxy", "state": state, "started": started});
    let waiting = |reason: &str| json!({"waiting": {"reason": reason}});
    let ended = |code: u32, reason: &str| json!({"terminated": {"exitCode": code, "reason": reason}});
    let later = || proxy(waiting("PodInitializing"), false);
    let fine = || init(ended(0, "Completed"), 0);
    let running = || json!({"running": {}});
    for (init, proxy, state, fix) in [
        (
            init(waiting("CrashLoopBackOff"), 3),
            later(),
            "tulle-init: CrashLoopBackOff",
            "logs web-1 -c tulle-init",
        ),
        (init(ended(1, "Error"), 0), later(), "tulle-init: Error", "logs web-1 -c tulle-init"),
        (init(running(), 0), later(), "tulle-init: running", "logs web-1 -c tulle-init"),
        (init(waiting("ImagePullBackOff"), 0), later(), "tulle-init: ImagePullBackOff", "describe pod web-1"),
        (fine(), later(), "tulle-proxy: PodInitializing", "describe pod web-1"),
        (
            fine(),
            proxy(running(), false),
            "tulle-proxy: running, but its startup probe fails",
            "logs web-1 -c tulle-proxy",
        ),
        (fine(), proxy(ended(0, "Completed"), false), "tulle-proxy: Completed", "describe pod web-1"),
        (fine(), proxy(ended(137, "OOMKilled"), false), "tulle-proxy: OOMKilled", "describe pod web-1"),
        (init(waiting("ImagePullBackOff"), 2), later(), "tulle-init: ImagePullBackOff", "describe pod web-1"),
        (
            fine(),
            proxy(waiting("CrashLoopBackOff"), false),
            "tulle-proxy: CrashLoopBackOff",
            "logs web-1 -c tulle-proxy",
        ),
        (Value::Null, Value::Null, "tulle-init: no node has started it", "describe pod web-1"),
    ] {
        let expected =
            format!("T0703 warning: 1 sidecars do not run: shop/web-1 ({state}) => kubectl -n shop {fix}");
        assert_eq!(with(init, proxy), [expected]);
    }
    let lost = with(fine(), proxy(running(), true));
    assert!(lost.len() == 1 && lost[0].contains("shop/web-1 (not connected)"), "{lost:?}");
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
