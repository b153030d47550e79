//! Quotas, LimitRanges and QoS classes of namespaces whose pods get a sidecar.

use std::thread;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{INIT, NOTICED, PROXY, injected, reviewed, sleeper};
use crate::kubectl::Kube;
use crate::suites::namespace::{TestNamespace, deployment};

pub(super) fn quota(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-adm-quota")?;
    let hard =
        json!({"requests.cpu": "1", "requests.memory": "1Gi", "limits.cpu": "2", "limits.memory": "1Gi"});
    limit(&field, &hard)?;
    let said = field.apply(workload(burstable(), json!({})))?;
    ensure!(!said.contains("ResourceQuota"), "a warning although the quota suffices: {said}");
    let pod = comes_up(&field)?;
    for name in [INIT, PROXY] {
        let limits = &injected(&pod, name)?["resources"]["limits"];
        ensure!(limits["cpu"].is_string() && limits["memory"].is_string(), "limits of {name}: {limits}");
    }
    Ok(())
}

pub(super) fn guaranteed(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-adm-guaranteed")?;
    let amounts = json!({"cpu": "100m", "memory": "64Mi"});
    let fixed = json!({"requests": amounts, "limits": amounts});
    let mut annotated = sleeper("annotated");
    annotated["spec"]["containers"][0]["resources"] = fixed.clone();
    annotated["metadata"]["annotations"] = json!({"tulle.dev/cpu": "150m"});
    let seen = reviewed(&field, annotated)?;
    ensure!(seen["status"]["qosClass"] == "Guaranteed", "QoS class without a quota: {}", seen["status"]);
    let cpu = &injected(&seen, PROXY)?["resources"]["limits"]["cpu"];
    ensure!(cpu == "150m", "the annotated request gives a limit of {cpu}");

    limit(&field, &json!({"limits.cpu": "2", "limits.memory": "1Gi"}))?;
    field.apply(workload(fixed, json!({})))?;
    let pod = comes_up(&field)?;
    ensure!(pod["status"]["qosClass"] == "Guaranteed", "QoS class: {}", pod["status"]["qosClass"]);
    for name in [INIT, PROXY] {
        let resources = &injected(&pod, name)?["resources"];
        ensure!(
            resources["requests"].is_object() && resources["requests"] == resources["limits"],
            "resources of {name}: {resources}"
        );
    }

    let mut pooled = sleeper("pooled");
    let amounts = json!({"cpu": "40m", "memory": "100Mi"});
    let fixed = json!({"requests": amounts, "limits": amounts});
    // Kubernetes without resources of pods goes by those of the container.
    pooled["spec"]["containers"][0]["resources"] = fixed.clone();
    pooled["spec"]["resources"] = fixed;
    let seen = reviewed(&field, pooled)?;
    let (class, own) = (&seen["status"]["qosClass"], &seen["spec"]["resources"]);
    ensure!(class == "Guaranteed", "QoS class of a pod with resources of its own: {class}, {own}");
    Ok(())
}

pub(super) fn range(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-adm-range")?;
    let minimum = json!({"cpu": "20m", "memory": "32Mi"});
    allow(&field, &json!({"type": "Container", "min": minimum, "max": {"cpu": "1", "memory": "512Mi"}}))?;
    field.apply(workload(burstable(), json!({})))?;
    let pod = comes_up(&field)?;
    let requests = &injected(&pod, PROXY)?["resources"]["requests"];
    ensure!(*requests == minimum, "the sidecar requests {requests}, where the minimum is {minimum}");
    Ok(())
}

pub(super) fn ratio(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-adm-ratio")?;
    allow(
        &field,
        &json!({"type": "Container", "default": {"cpu": "400m", "memory": "256Mi"},
            "defaultRequest": {"cpu": "100m", "memory": "64Mi"}, "maxLimitRequestRatio": {"cpu": "4", "memory": "4"}}),
    )?;
    field.apply(workload(json!({}), json!({})))?;
    let pod = comes_up(&field)?;
    let resources = &injected(&pod, PROXY)?["resources"];
    ensure!(resources["limits"]["cpu"] == "100m", "expected the sidecar's own limit: {resources}");
    ensure!(resources["requests"]["cpu"] == "25m", "expected a quarter of the limit: {resources}");
    Ok(())
}

/// A maximum ratio requires a limit; without one, the API server rejects the container.
pub(super) fn bare_ratio(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-adm-bare-ratio")?;
    allow(&field, &json!({"type": "Container", "maxLimitRequestRatio": {"cpu": "10", "memory": "4"}}))?;
    field.apply(workload(burstable(), json!({})))?;
    comes_up(&field).map(drop)
}

pub(super) fn small_quota(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-adm-small")?;
    limit(&field, &json!({"limits.cpu": "600m"}))?;
    let app = json!({"requests": {"cpu": "20m"}, "limits": {"cpu": "300m"}});
    let said = field.apply(workload(app.clone(), json!({})))?;
    for part in
        ["ResourceQuota team allows 600m", "needs limits.cpu 800m", "will be rejected", "tulle.dev/cpu-limit"]
    {
        ensure!(said.contains(part), "applying the Deployment did not print {part:?}: {said}");
    }
    // The warning predicts this rejection.
    kube.wait_for("the ReplicaSet's pods to be rejected", 60, || {
        Ok(obstacle(&field)?.contains("exceeded quota: team"))
    })?;
    // The warning recommends this annotation.
    let said = field.apply(workload(app, json!({"tulle.dev/cpu-limit": "200m"})))?;
    ensure!(!said.contains("ResourceQuota"), "a warning although the quota suffices: {said}");
    comes_up(&field).map(drop)
}

/// Resources of an application whose pod is Burstable.
fn burstable() -> Value {
    json!({"requests": {"cpu": "50m", "memory": "32Mi"}, "limits": {"cpu": "200m", "memory": "128Mi"}})
}

/// A Deployment whose application has these resources, and whose pods have these annotations.
fn workload(resources: Value, annotations: Value) -> Value {
    let mut workload = deployment("web", 1, &[]);
    let template = &mut workload["spec"]["template"];
    template["metadata"]["annotations"] = annotations;
    template["spec"]["serviceAccountName"] = json!("default");
    template["spec"]["containers"][0]["resources"] = resources;
    workload
}

/// Creates ResourceQuota `team` and waits until it has been counted, because before that it rejects every
/// pod.
fn limit(field: &TestNamespace<'_>, hard: &Value) -> Result<()> {
    field.apply(json!({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "team"}, "spec": {"hard": hard}}))?;
    field.kube.wait_for("the quota to be counted", 60, || {
        Ok(!field.get("resourcequota/team", ".status.used")?.is_empty())
    })?;
    thread::sleep(NOTICED);
    Ok(())
}

/// A LimitRange `team`.
fn allow(field: &TestNamespace<'_>, item: &Value) -> Result<()> {
    field.apply(json!({"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "team"}, "spec": {"limits": [item]}}))?;
    thread::sleep(NOTICED);
    Ok(())
}

/// Why the Deployment has no pods; empty when it has.
fn obstacle(field: &TestNamespace<'_>) -> Result<String> {
    field.get("deployment/web", ".status.conditions[?(@.type==\"ReplicaFailure\")].message")
}

/// The Deployment's pod, once it is ready.
fn comes_up(field: &TestNamespace<'_>) -> Result<Value> {
    field.kube.rolled_out(&field.namespace, "deployment/web", 90).with_context(|| {
        obstacle(field).map_or_else(|error| format!("{error:#}"), |why| format!("no pod: {why}"))
    })?;
    let running = [
        "-n",
        field.namespace.as_str(),
        "get",
        "pods",
        "-l",
        "app=web",
        "--field-selector=status.phase=Running",
    ];
    let pods = field.kube.json(&running)?;
    let pod = pods["items"][0].clone();
    injected(&pod, PROXY)?;
    Ok(pod)
}
