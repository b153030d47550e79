//! The objects of Tulle's API: what the CRDs accept and reject, and what a status shows.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::{PROXY, as_admitted, rejection, sleeper};
use crate::host;
use crate::kubectl::Kube;
use crate::suites::Skip;
use crate::suites::namespace::{TestNamespace, borrows};

/// An unused API group, in which the definitions are new, as on a cluster without Tulle.
const GROUP: &str = "adm.tulle.test";

pub(super) fn definitions(kube: &Kube) -> Result<()> {
    let mut control = definition("canaries")?;
    let schema = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties";
    let fields = control.pointer_mut(schema).context("the Canary's schema has no fields")?;
    fields["added"] = json!({"type": "string", "format": "nobodys"});
    if !kube.warnings(&control.to_string())?.contains("unrecognized format \"nobodys\"") {
        bail!(Skip("this API server does not warn of formats that it does not know"));
    }
    for plural in ["canaries", "meshconfigs", "meshpolicies"] {
        let said = kube.warnings(&definition(plural)?.to_string())?;
        ensure!(said.is_empty(), "creating {plural} prints: {said}");
    }
    Ok(())
}

/// A definition of this workspace, moved to [`GROUP`].
fn definition(plural: &str) -> Result<Value> {
    let path = host::workspace().join(format!("crds/manifests/{plural}.yaml"));
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut definition: Value = serde_yaml::from_str(&text)?;
    definition["metadata"]["name"] = json!(format!("{plural}.{GROUP}"));
    definition["spec"]["group"] = json!(GROUP);
    Ok(definition)
}

pub(super) fn rejected(kube: &Kube) -> Result<()> {
    let field = TestNamespace::plain(kube, "t-adm-rejected")?;
    let selector = json!({"matchLabels": {"app": "web"}});
    for (target, expected) in [
        (json!({"kind": "Service", "name": "web", "selector": selector}), "a Service target uses only name"),
        (
            json!({"kind": "Workload", "name": "web", "selector": selector}),
            "a Workload target uses only selector",
        ),
        (json!({"kind": "Workload"}), "a Workload target needs a selector"),
        (json!({"kind": "Namespace", "name": "web"}), "leave name and selector out"),
    ] {
        let policy = json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy", "metadata": {"name": "bad"},
            "spec": {"target": target, "mtls": "Strict"}});
        let why = rejection(field.apply(policy)).with_context(|| target.to_string())?;
        ensure!(why.contains(expected), "{target}: {why}");
    }
    for (spec, expected) in [
        (json!({"steps": [{"weight": 0}]}), "weight must be from 1 to 100"),
        (json!({"judge": {"confidence": "0%"}}), "confidence must be above 0% and below 100%"),
        (json!({"judge": {"confidence": "100%"}}), "confidence must be above 0% and below 100%"),
        (json!({"deadline": "0s"}), "deadline must be longer than 0s"),
    ] {
        let why = rejection(field.apply(canary(&spec))).with_context(|| spec.to_string())?;
        ensure!(why.contains(expected), "{spec}: {why}");
    }
    Ok(())
}

pub(super) fn durations(kube: &Kube) -> Result<()> {
    let field = TestNamespace::plain(kube, "t-adm-durations")?;
    field.apply(canary(&json!({"deadline": "1h30m", "steps": [{"weight": 5, "hold": "1m30s"}]})))?;
    ensure!(field.get("canary/web", ".spec.deadline")? == "1h30m", "the deadline was changed");
    ensure!(field.get("canary/web", ".spec.steps[0].hold")? == "1m30s", "the hold was changed");
    // The operator must read the object, too; one that it cannot read gets no status.
    kube.wait_for("the Canary's status", 60, || Ok(!field.get("canary/web", ".status.target")?.is_empty()))
}

/// A Canary of a Deployment that does not exist.
fn canary(more: &Value) -> Value {
    let mut canary = json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "Canary", "metadata": {"name": "web"},
        "spec": {"target": {"kind": "Deployment", "name": "web"}}});
    for (key, value) in more.as_object().into_iter().flatten() {
        canary["spec"][key] = value.clone();
    }
    canary
}

pub(super) fn numbers(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = TestNamespace::meshed(kube, "t-adm-numbers")?;
    field.service("web", 1, &[])?;
    // A sidecar that does not support access rules, so that the two numbers differ while the policy has some.
    let mut older = as_admitted(&field, sleeper("older"))?;
    let mut containers = older["spec"]["initContainers"].as_array_mut().into_iter().flatten();
    let proxy = containers.find(|container| container["name"] == PROXY).context("no sidecar was injected")?;
    let environment = proxy["env"].as_array_mut().context("the sidecar has no environment")?;
    environment.push(json!({"name": "TULLE_FEATURES", "value": "split/v1"}));
    field.apply(older)?;
    field.ready("older")?;
    for (section, enforcing) in [(json!({"access": {"allow": []}}), 1), (json!({"mtls": "Strict"}), 2)] {
        let mut spec = section.clone();
        spec["target"] = json!({"kind": "Namespace"});
        field.apply(json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy", "metadata": {"name": "all"}, "spec": spec}))?;
        let summary = format!("{enforcing}/2");
        kube.wait_for(&format!("{section} to be enforced by {summary}"), 60, || {
            Ok(field.get("meshpolicy/all", ".status.enforced")? == summary)
        })?;
        let status = kube.json(&["-n", &field.namespace, "get", "meshpolicy", "all"])?["status"].clone();
        ensure!(
            status["enforcingSidecars"] == enforcing && status["selectedSidecars"] == 2,
            "under {section} with {summary} the status is {status}"
        );
    }
    Ok(())
}
