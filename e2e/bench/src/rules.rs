//! An HTTPRoute of five rules for each port that speaks HTTP, and a MeshPolicy with every section about traffic.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tulle_crds::MeshPolicy;
use tulle_operator::model::gateway::{ParentStatus, RouteKey, RouteKind, RouteObject, RouteSpec};
use tulle_operator::model::{Key, Model, Verdict};

/// The namespace of everything.
const NAMESPACE: &str = "bench";
/// The routes, and the ports of the Service that they are for.
const ROUTES: [(&str, u16); 2] = [("http1", 80), ("http2", 82)];

/// Puts routes and policy in force.
///
/// # Errors
/// When an object is not in force as it is written.
pub fn apply(model: &mut Model) -> Result<()> {
    for (name, port) in ROUTES {
        let route = route(name, port)?;
        let key = route.key();
        model.apply_route(route);
        let status = model.route_status(&key);
        let is_in_force = |parent: &ParentStatus| {
            parent.accepted.status && parent.resolved.status && parent.partially_invalid.is_none()
        };
        ensure!(!status.is_empty() && status.iter().all(is_in_force), "{key} is not in force: {status:?}");
    }
    let policy: MeshPolicy = serde_json::from_value(policy()).context("cannot read the MeshPolicy")?;
    let key = policy_key();
    model.apply_policy(key.clone(), policy.clone());
    let verdict = model.report(&key, &policy).verdict;
    ensure!(verdict == Verdict::Accepted, "the MeshPolicy is not in force: {verdict:?}");
    Ok(())
}

/// Deletes them.
pub fn delete(model: &mut Model) {
    for (name, _) in ROUTES {
        let key = RouteKey { kind: RouteKind::Http, namespace: NAMESPACE.into(), name: name.into() };
        model.delete_route(&key);
    }
    model.delete_policy(&policy_key());
}

fn policy_key() -> Key {
    (NAMESPACE.into(), "all".into())
}

fn route(name: &str, port: u16) -> Result<RouteObject> {
    let parent = json!({"group": "", "kind": "Service", "name": "server", "port": port});
    let spec: RouteSpec = serde_json::from_value(json!({"parentRefs": [parent], "rules": rules(port)}))
        .context("cannot read the HTTPRoute")?;
    Ok(RouteObject {
        kind: RouteKind::Http,
        namespace: NAMESPACE.into(),
        name: name.into(),
        uid: name.into(),
        generation: 1,
        created: 0,
        parents: spec.parents,
        hostnames: spec.hostnames,
        rules: spec.rules,
    })
}

/// By the precedence of the Gateway API (exact path, longest prefix, most headers, most query parameters) the rule
/// `rest` is looked at last. The benchmark recognises the rule `tester` by its answers.
fn rules(port: u16) -> Value {
    let to = json!([{"name": "server", "port": port}]);
    let mark = json!({"set": [{"name": "x-rule", "value": "tester"}]});
    json!([
        {"name": "tester", "matches": [{"headers": [{"name": "x-tester", "value": "yes"}]}], "backendRefs": to,
            "filters": [{"type": "RequestHeaderModifier", "requestHeaderModifier": mark},
                {"type": "ResponseHeaderModifier", "responseHeaderModifier": mark}]},
        {"name": "beta", "matches": [{"queryParams": [{"name": "beta", "value": "1"}]}], "backendRefs": to},
        {"name": "api", "matches": [{"path": {"type": "PathPrefix", "value": "/api/v1"}}], "backendRefs": to},
        {"name": "health", "matches": [{"path": {"type": "Exact", "value": "/healthz"}}], "backendRefs": to},
        {"name": "rest", "matches": [{"path": {"type": "PathPrefix", "value": "/"}}], "backendRefs": to},
    ])
}

/// Everything is on, and nothing of it interferes with a request that is answered in time.
fn policy() -> Value {
    json!({
        "apiVersion": "tulle.dev/v1alpha1",
        "kind": "MeshPolicy",
        "metadata": {"name": "all", "namespace": NAMESPACE, "uid": "all", "generation": 1},
        "spec": {
            "target": {"kind": "Namespace"},
            "timeout": {"request": "10s", "attempt": "5s", "idle": "60s"},
            "retry": {"on": ["5xx", "reset", "connect", "unavailable"]},
            "breaker": {"consecutiveFailures": 5},
            "balance": {"by": "Latency", "warmUp": "30s"},
            "faults": {
                "delay": {"by": "100ms", "of": "0%"},
                "abort": {"status": 503, "of": "0%"},
                "until": "2099-01-01T00:00:00Z",
            },
            "limits": {"concurrency": 10_000, "connections": 10_000},
        },
    })
}
