//! What admission does to real pods: resources, annotations, probes, required namespaces, and the objects of the API.
//!
//! ```text
//!   resources    quotas, LimitRanges and QoS classes
//!   annotations  settings of a namespace and of a pod
//!   pods         containers, ports and pods of every kind
//!   required     what a namespace that requires the sidecar rejects, and what it does not
//!   probes       kubelet's probes through the sidecar
//!   objects      what the CRDs accept, reject and show
//! ```
//! Nothing here changes Tulle itself: every test has namespaces of its own.

mod annotations;
mod objects;
mod pods;
mod probes;
mod required;
mod resources;

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::Test;
use super::namespace::{TestNamespace, host_pod};
use crate::cluster::Cluster;
use crate::host;
use crate::kubectl::Kube;

pub(super) const TESTS: &[Test] = &[
    ("under a ResourceQuota on limits the pods of a Deployment come up", resources::quota),
    ("a Guaranteed pod stays Guaranteed with its sidecar, also under a ResourceQuota", resources::guaranteed),
    ("under a LimitRange with a minimum and a maximum the pods of a Deployment come up", resources::range),
    (
        "under a LimitRange with defaults and a maximum ratio the pods of a Deployment come up",
        resources::ratio,
    ),
    (
        "under a LimitRange with nothing but a maximum ratio the pods of a Deployment come up",
        resources::bare_ratio,
    ),
    (
        "a quota too small for a pod with its sidecar is named when the Deployment is applied, with what to lower",
        resources::small_quota,
    ),
    (
        "a namespace's annotations are defaults for its sidecars, a pod's own win, a malformed one is named",
        annotations::of_a_namespace,
    ),
    (
        "annotations for cpu and memory set requests and limits of the injected containers",
        annotations::amounts,
    ),
    (
        "with annotation log-level the sidecar logs what debugging needs, and without it does not",
        annotations::log_level,
    ),
    (
        "meshed clients reach ports that a namespace excludes from redirection, in plain text",
        annotations::skipped_ports_of_a_namespace,
    ),
    (
        "with annotation source-address=preserve the application sees each client's address, and the sidecar has one capability more",
        annotations::source_address,
    ),
    ("annotation workers sets the number of the sidecar's data threads", annotations::workers),
    (
        "connections to the ports in annotation skip-outbound-ports bypass the sidecar",
        annotations::skip_outbound,
    ),
    (
        "an init container and a native sidecar of the user call a meshed service with mTLS before the app starts",
        pods::early_containers,
    ),
    (
        "a pod that declares or probes a port of the sidecar gets a warning that names the port",
        pods::taken_ports,
    ),
    (
        "a pod with a container or volume of its own that has an injected name is rejected, and the message names it",
        pods::injected_names,
    ),
    ("the ports of NSQ are free for an application, and are reached through the mesh", pods::nsq_ports),
    (
        "pods whose name server knows no Services, or does not answer, come up with their sidecar",
        pods::foreign_name_servers,
    ),
    ("a Windows pod is left alone where the sidecar is optional, and a warning says why", pods::windows),
    (
        "where the sidecar is optional, a pod without one is reported unless it cannot have one",
        pods::not_reported,
    ),
    ("the sidecar answers /live and /ready, and kubelet probes both", pods::probed_sidecar),
    ("a stuck sidecar makes its pod unready and is restarted; the application is not", pods::stuck_sidecar),
    (
        "required: images of a running sidecar cannot be changed; the app's image and labels can",
        required::running_sidecar,
    ),
    (
        "required: a pod from before the label can still be labelled and deleted, and an opt-out is reported",
        required::pods_from_before,
    ),
    (
        "required: an injected pod is admitted again, also pinned to a digest; another image or arguments are not",
        required::injected_pods,
    ),
    (
        "required: an injected pod of another namespace is admitted as an exact copy, and not when it differs",
        required::copies,
    ),
    (
        "under Strict every kind of probe succeeds, fails and arrives as without a sidecar",
        probes::as_without_a_sidecar,
    ),
    (
        "the probes of a container that a later webhook adds pass under Strict, and what it puts first comes after the sidecar",
        probes::of_a_later_webhook,
    ),
    ("the CRDs are accepted without a warning", objects::definitions),
    (
        "contradictory and meaningless values are rejected, and the message says what to write",
        objects::rejected,
    ),
    ("durations of several units are accepted", objects::durations),
    ("the two numbers in a MeshPolicy's status are those of its summary", objects::numbers),
];

/// Time after which both replicas of the webhook have seen a change of a namespace or of its limits.
const NOTICED: Duration = Duration::from_secs(5);

/// The init container that is injected.
const INIT: &str = "tulle-init";
/// The sidecar that is injected.
const PROXY: &str = "tulle-proxy";

/// A namespace that requires the sidecar.
fn requires<'a>(kube: &'a Kube, namespace: &str) -> Result<TestNamespace<'a>> {
    TestNamespace::new(kube, namespace, json!({"tulle.dev/inject": "required"}))
}

/// A pod that does nothing.
fn sleeper(name: &str) -> Value {
    host_pod(name, "default", &["/usr/bin/sleep", "100000"])
}

/// A pod that does nothing, with annotations.
fn annotated(name: &str, annotations: Value) -> Value {
    let mut pod = sleeper(name);
    pod["metadata"]["annotations"] = annotations;
    pod
}

/// A pod of the namespace, as the API server has it.
fn pod(field: &TestNamespace<'_>, name: &str) -> Result<Value> {
    field.kube.json(&["-n", &field.namespace, "get", "pod", name])
}

/// A pod as admission would return it, by a dry run.
fn reviewed(field: &TestNamespace<'_>, mut pod: Value) -> Result<Value> {
    pod["metadata"]["namespace"] = json!(field.namespace);
    Ok(serde_json::from_str(&field.kube.dry_run(&pod.to_string())?)?)
}

/// A pod as admission returns it, in a form that can be created.
fn as_admitted(field: &TestNamespace<'_>, pod: Value) -> Result<Value> {
    let mut pod = reviewed(field, pod)?;
    pod.as_object_mut().context("the pod is not an object")?.remove("status");
    let metadata = pod["metadata"].as_object_mut().context("the pod has no metadata")?;
    metadata.retain(|name, _| ["name", "labels", "annotations"].contains(&name.as_str()));
    Ok(pod)
}

/// An injected container of a pod.
fn injected<'a>(pod: &'a Value, name: &str) -> Result<&'a Value> {
    let mut containers = pod["spec"]["initContainers"].as_array().into_iter().flatten();
    containers.find(|container| container["name"] == name).with_context(|| format!("{name} was not injected"))
}

/// The value of a variable of the sidecar; empty when it is not set.
fn variable<'a>(pod: &'a Value, name: &str) -> Result<&'a str> {
    let mut variables = injected(pod, PROXY)?["env"].as_array().into_iter().flatten();
    let found = variables.find(|variable| variable["name"] == name);
    Ok(found.and_then(|variable| variable["value"].as_str()).unwrap_or(""))
}

/// Why an object was rejected.
fn rejection<T>(outcome: Result<T>) -> Result<String> {
    match outcome {
        Ok(_) => bail!("the object was admitted"),
        Err(error) => Ok(format!("{error:#}")),
    }
}

/// Makes all pods of the namespace refuse plain text.
fn strict(field: &TestNamespace<'_>) -> Result<()> {
    let spec = json!({"target": {"kind": "Namespace"}, "mtls": "Strict"});
    field
        .apply(json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy", "metadata": {"name": "strict"}, "spec": spec}))
        .map(drop)
}

/// The process of a pod's sidecar, by its number on the node.
pub(super) fn sidecar_process(cluster: &Cluster, field: &TestNamespace<'_>, name: &str) -> Result<u32> {
    let uid = field.get(&format!("pod/{name}"), ".metadata.uid")?;
    process_with(cluster, &format!("TULLE_POD_UID={uid}"))
        .with_context(|| format!("the sidecar of pod {name}"))
}

/// The one process on the node with this variable.
pub(super) fn process_with(cluster: &Cluster, variable: &str) -> Result<u32> {
    let script = format!("grep -lszx {variable} /proc/[0-9]*/environ || true");
    let found = host::output(cluster.inside("/bin/sh")?.args(["-c", &script]))?;
    let number = found.trim().strip_prefix("/proc/").and_then(|rest| rest.strip_suffix("/environ"));
    let number = number.and_then(|number| number.parse().ok());
    number.with_context(|| format!("expected one process with {variable}, found {found:?}"))
}
