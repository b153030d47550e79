//! What keeps calls alive: sections of MeshPolicies for clients, and limits, on real pods under load.

mod protects;
mod saves;

use std::process::Command;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::mesh::policy;
use super::namespace::{TestNamespace, deployment, service};
use super::{Skip, Test};
use crate::host;
use crate::kubectl::Kube;

pub(super) const TESTS: &[Test] = &[
    ("retries save every request from a pod that fails, and are counted", saves::retries),
    ("under a service that fails every request, retries stay within their budget", saves::budget),
    ("a breaker ejects a pod that fails, and its requests go elsewhere", saves::breaker),
    ("a timeout answers 504, and does not cut a long answer", protects::timeouts),
    ("a gRPC call ends with its deadline, and the application sees what is left of it", protects::deadlines),
    ("requests with the same hash go to the same pod", protects::hash),
    ("beyond its concurrency a pod answers 503 with Retry-After", protects::concurrency),
    ("faults are injected, reach no application, and end by themselves", protects::faults),
    ("in shadow mode sections do nothing, and are counted", protects::shadow),
    ("kubectl get meshpolicies names the sections of a policy", columns),
    ("zone: Prefer keeps requests in the client's zone while it has endpoints", zones),
];

/// Creates a Deployment whose pods are behind the Service `group` beside those of others.
pub(super) fn member(
    field: &TestNamespace<'_>,
    group: &str,
    name: &str,
    replicas: u32,
    arguments: &[&str],
) -> Result<()> {
    let mut member = deployment(name, replicas, arguments);
    member["spec"]["template"]["metadata"]["labels"]["group"] = json!(group);
    member["spec"]["template"]["spec"]["serviceAccountName"] = json!("default");
    field.apply(member)?;
    field.apply(service(group, json!({"selector": {"group": group}})))?;
    field.kube.rolled_out(&field.namespace, &format!("deployment/{name}"), 120)
}

/// Applies a policy for a Service, and waits until it is ready.
pub(super) fn ready_policy(field: &TestNamespace<'_>, service: &str, sections: Value) -> Result<()> {
    let mut spec = json!({"target": {"kind": "Service", "name": service}});
    for (name, section) in sections.as_object().into_iter().flatten() {
        spec[name] = section.clone();
    }
    policy(field, service, spec)?;
    let object = format!("meshpolicy/{service}");
    let ready = "jsonpath={.status.conditions[?(@.type==\"Ready\")].status}/{.status.observedGeneration}";
    field.kube.wait_for(&format!("policy {service} to be ready"), 60, || {
        let found = field.kubectl(&["get", &object, "-o", ready])?;
        Ok(found == format!("True/{}", field.get(&object, ".metadata.generation")?))
    })
}

/// A time so many seconds from now, as Kubernetes writes it.
pub(super) fn in_seconds(seconds: u32) -> Result<String> {
    let offset = format!("+{seconds} seconds");
    let text = host::output(Command::new("date").args(["-u", "-d", &offset, "+%Y-%m-%dT%H:%M:%SZ"]))?;
    Ok(text.trim().to_owned())
}

fn columns(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-s-columns")?;
    field.apply(service("web", json!({})))?;
    let spec = json!({"target": {"kind": "Service", "name": "web"}, "timeout": {"request": "5s"},
        "retry": {"on": ["5xx"]}, "breaker": {}, "limits": {"concurrency": 10}});
    policy(&field, "web", spec)?;
    let mut table = String::new();
    kube.wait_for("the sections to be shown", 60, || {
        table = field.kubectl(&["get", "meshpolicies"])?;
        let sections = ["timeout", "retry", "breaker", "limits"];
        Ok(table.contains("SECTIONS") && sections.iter().all(|section| table.contains(section)))
    })
    .map_err(|error| error.context(format!("kubectl get meshpolicies printed:\n{table}")))
}

/// The endpoints are written by hand, so that they are in zones although the cluster has one node.
fn zones(kube: &Kube) -> Result<()> {
    let Kube::Embedded(_) = kube else { bail!(Skip("it labels the node with a zone")) };
    let field = TestNamespace::meshed(kube, "t-s-zones")?;
    let zone = "topology.kubernetes.io/zone";
    kube.run(&["label", "nodes", "--all", "--overwrite", &format!("{zone}=here")])?;
    let outcome = zone_preferred(&field);
    kube.run(&["label", "nodes", "--all", &format!("{zone}-")])?;
    outcome
}

fn zone_preferred(field: &TestNamespace<'_>) -> Result<()> {
    field.service("near", 1, &[])?;
    field.service("far", 1, &[])?;
    field.apply(json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"ports": [{"name": "http", "port": 80}]}}))?;
    let slice = |name: &str, zone: &str| -> Result<()> {
        let pod = field.kube.json(&["-n", &field.namespace, "get", "pods", "-l", &format!("app={name}")])?;
        let pod = &pod["items"][0];
        let target = json!({"kind": "Pod", "namespace": field.namespace, "name": pod["metadata"]["name"],
            "uid": pod["metadata"]["uid"]});
        field
            .apply(
                json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                "metadata": {"name": format!("web-{name}"), "labels": {"kubernetes.io/service-name": "web"}},
                "ports": [{"name": "http", "port": 8080}],
                "endpoints": [{"addresses": [pod["status"]["podIP"]], "zone": zone, "targetRef": target,
                    "conditions": {"ready": true}}]}),
            )
            .map(drop)
    };
    slice("near", "here")?;
    slice("far", "elsewhere")?;
    ready_policy(field, "web", json!({"balance": {"zone": "Prefer"}}))?;
    // Its sidecar learns its zone at its start.
    field.client("client")?;
    let ask = "for i in $(seq 60); do curl -s -m 8 http://web/; echo; done";
    let by = |name: &str, answers: &str| answers.matches(&format!("\"service\":\"{name}\"")).count();
    let mut answers = String::new();
    let waited = field.kube.wait_for("the requests to stay in the zone", 60, || {
        answers = field.exec("client", &["/bin/sh", "-c", ask])?;
        // A few are sent elsewhere on purpose.
        Ok(by("near", &answers) >= 55 && by("near", &answers) + by("far", &answers) == 60)
    });
    waited.map_err(|error| {
        error.context(format!("60 answers: {} near, {} far", by("near", &answers), by("far", &answers)))
    })?;
    field.kubectl(&["delete", "endpointslice", "web-near"])?;
    let waited = field.kube.wait_for("the requests to go to the other zone", 60, || {
        answers = field.exec("client", &["/bin/sh", "-c", ask])?;
        Ok(by("far", &answers) == 60)
    });
    waited.with_context(|| {
        format!("without an endpoint in the zone {} of 60 were answered", by("far", &answers))
    })
}
