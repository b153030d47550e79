//! Policies and Canaries of the shop, as the API server has them.

use anyhow::{Context as _, Result};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tulle_crds::{Canary, MeshPolicy};

const SINCE: &str = "2026-01-01T00:00:00Z";

fn object<T: DeserializeOwned>(kind: &str, name: &str, spec: &Value, status: &Value) -> Result<T> {
    let object = json!({
        "apiVersion": "tulle.dev/v1alpha1", "kind": kind,
        "metadata": {"name": name, "namespace": "shop", "uid": name, "generation": 1, "creationTimestamp": SINCE},
        "spec": spec, "status": status,
    });
    serde_json::from_value(object).with_context(|| format!("{kind} {name}"))
}

fn condition(kind: &str, status: &str, reason: &str, message: &str) -> Value {
    json!({"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": SINCE})
}

/// Policies by name: one that is enforced, one in Shadow, and one with a problem.
pub fn policies() -> Result<Vec<(&'static str, MeshPolicy)>> {
    let app = |name: &str| json!({"kind": "Workload", "selector": {"matchLabels": {"app": name}}});
    let policy = |name: &'static str, spec: Value, enforced: &str, ready: Value| {
        let status = json!({"enforced": enforced, "conditions": [ready]});
        object("MeshPolicy", name, &spec, &status).map(|policy| (name, policy))
    };
    Ok(vec![
        policy(
            "checkout",
            json!({"target": app("checkout"), "mtls": "Strict",
                "access": {"allow": [{"from": [{"namespace": "shop"}]}]}}),
            "2/2",
            condition("Ready", "True", "Enforced", "2 of 2 sidecars enforce it"),
        )?,
        policy(
            "checkout-next",
            json!({"target": app("checkout"), "mode": "Shadow",
                "access": {"allow": [{"from": [{"serviceAccount": "gateway"}]}]}}),
            "1/2",
            condition("Ready", "False", "Waiting", "waits for pod checkout-q9m4d"),
        )?,
        policy(
            "orders",
            json!({"target": app("orders"), "limits": {"concurrency": 20}}),
            "1/2",
            condition("Ready", "False", "Refused", "pod orders-q9m4d was never connected"),
        )?,
    ])
}

/// Canaries by name: one in progress, one that has failed, one at rest.
pub fn canaries() -> Result<Vec<(&'static str, Canary)>> {
    let spec = |name: &str| {
        json!({"target": {"kind": "Deployment", "name": name}, "steps": [
            {"weight": 5, "hold": "2m"}, {"weight": 25, "hold": "5m"}, {"pause": {}}, {"weight": 50, "hold": "5m"},
        ]})
    };
    let canary = |name: &'static str, status: Value| {
        object("Canary", name, &spec(name), &status).map(|canary| (name, canary))
    };
    let ended = |revision: &str, outcome: &str, because: &str| {
        let ended = "2026-01-02T03:04:05Z";
        json!({"revision": revision, "outcome": outcome, "because": because, "ended": ended})
    };
    Ok(vec![
        canary(
            "checkout",
            json!({
                "target": "Deployment/checkout", "phase": "Progressing", "approvedRevision": "6b8f9c5d4",
                "canaryRevision": "7c9d8e6f5", "decidedRevision": "7c9d8e6f5", "step": 1, "stepSummary": "2/4",
                "weight": 25, "acknowledgedWeight": 25, "weightSummary": "25%", "epoch": 4,
                "verdict": "Inconclusive", "started": "2026-01-02T03:00:00Z",
                "evidenceSummary": "errors: 31 of 2,410 attempts failed, of the stable version 69 of 7,190; not enough to decide",
                "evidence": {
                    "canary": {"attempts": 2410, "failures": 31, "unreached": 2, "clientErrors": 60},
                    "stable": {"attempts": 7190, "failures": 69, "unreached": 3, "clientErrors": 181},
                },
                "conditions": [
                    condition("Ready", "True", "TargetFound", "Deployment checkout is watched"),
                    condition("Progressing", "True", "Holding", "step 2 of 4 for 3m of at least 5m"),
                    condition("Acknowledged", "True", "Complete", "every sidecar uses weight 25 %"),
                ],
                "history": [ended("6b8f9c5d4", "Promoted", "every step passed"),
                    ended("5a7e8b4c3", "Failed", "errors: 40 of 200 attempts failed, of the stable version 3 of 190")],
            }),
        )?,
        canary(
            "cart",
            json!({
                "target": "Deployment/cart", "phase": "Failed", "approvedRevision": "6b8f9c5d4",
                "canaryRevision": "8d0e9f7a6", "decidedRevision": "8d0e9f7a6", "failedRevision": "8d0e9f7a6",
                "step": 0, "stepSummary": "1/4", "weightSummary": "0%", "epoch": 9, "verdict": "Fail",
                "evidenceSummary": "errors: 48 of 510 attempts failed, of the stable version 9 of 9,690",
                "evidence": {
                    "canary": {"attempts": 510, "failures": 48, "unreached": 0, "clientErrors": 3},
                    "stable": {"attempts": 9690, "failures": 9, "unreached": 1, "clientErrors": 61},
                },
                "history": [ended("8d0e9f7a6", "Failed", "errors: 48 of 510 attempts failed")],
            }),
        )?,
        canary(
            "stock",
            json!({"target": "Deployment/stock", "phase": "Stable", "approvedRevision": "6b8f9c5d4", "epoch": 1}),
        )?,
    ])
}
