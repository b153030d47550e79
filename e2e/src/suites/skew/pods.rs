//! Pods with sidecars of earlier builds.

use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::earlier::{self, Build};
use crate::install;
use crate::kubectl::Kube;
use crate::suites::Skip;
use crate::suites::namespace::{TestNamespace, host_pod, pod_template, service};

/// The port on which sidecars with the former ports answer `/ready` and `/metrics`.
const FORMER_ADMIN: u16 = 4152;
/// The port on which they carry out probes.
const FORMER_PROBES: u16 = 4153;
/// The port on which today's sidecar carries out probes.
const PROBES: u16 = 26153;

/// Loads the images of the earlier builds, made once per machine.
pub(super) fn load_earlier(kube: &Kube) -> Result<()> {
    // Tests side by side wait for one build and one import.
    static ARE_LOADED: Mutex<bool> = Mutex::new(false);
    let mut are_loaded = ARE_LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if *are_loaded {
        return Ok(());
    }
    let Some(archives) = earlier::archives()? else {
        bail!(Skip("this clone lacks the commits of the earlier builds; run git fetch --unshallow"));
    };
    for archive in archives {
        install::load(kube, &archive)?;
    }
    *are_loaded = true;
    Ok(())
}

/// The shop's service in a pod with an older sidecar, and its Service.
pub(super) fn older_server(
    field: &TestNamespace<'_>,
    build: &Build,
    name: &str,
    features: Option<&str>,
) -> Result<()> {
    field.apply(service(name, json!({})))?;
    let mut pod = pod_template(name, &["serve".to_owned(), format!("--name={name}")]);
    pod["apiVersion"] = json!("v1");
    pod["kind"] = json!("Pod");
    pod["metadata"]["name"] = json!(name);
    with_account(field, name)?;
    older(field, build, pod, features)
}

/// A pod with an older sidecar to call others from, under a service account of its name.
pub(super) fn older_client(field: &TestNamespace<'_>, build: &Build, name: &str) -> Result<()> {
    with_account(field, name)?;
    older(field, build, host_pod(name, name, &["/usr/bin/sleep", "100000"]), None)
}

fn with_account(field: &TestNamespace<'_>, name: &str) -> Result<()> {
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}});
    field.apply(account).map(drop)
}

/// Creates a pod with a sidecar of an earlier build, and waits until it is ready. `features`: those that the sidecar
/// has; `None`: all of that build.
///
/// The pod is as today's webhook makes it, with the earlier webhook's values where the two differ. It becomes
/// ready only if its sidecar answers on that build's port.
pub(super) fn older(
    field: &TestNamespace<'_>,
    build: &Build,
    mut pod: Value,
    features: Option<&str>,
) -> Result<()> {
    pod["metadata"]["namespace"] = json!(field.namespace);
    let injected = field.kube.dry_run(&pod.to_string())?;
    let mut injected: Value = serde_json::from_str(&injected)?;
    let mut sidecars = 0;
    for list in ["initContainers", "containers"] {
        for container in injected["spec"][list].as_array_mut().into_iter().flatten() {
            match container["name"].as_str() {
                Some("tulle-init") => container["image"] = json!(build.sidecar),
                Some("tulle-proxy") => {
                    as_earlier(container, build, features)?;
                    sidecars += 1;
                }
                _ if build.has_former_ports => move_probes(container),
                _ => {}
            }
        }
    }
    ensure!(sidecars == 1, "no sidecar was injected");
    let metadata = injected["metadata"].as_object_mut().context("the pod has no metadata")?;
    metadata.retain(|name, _| ["name", "namespace", "labels", "annotations"].contains(&name.as_str()));
    // The seal of today's injection, which the changed containers do not match.
    metadata["annotations"]
        .as_object_mut()
        .context("the pod has no annotations")?
        .remove("tulle.dev/injection");
    let name = metadata["name"].as_str().context("the pod has no name")?.to_owned();
    field.apply(injected)?;
    field.ready(&name)
}

/// Turns today's sidecar container into the earlier webhook's: another program and, with the former ports, one that is
/// not probed once it has started. The operator and its address are today's.
fn as_earlier(proxy: &mut Value, build: &Build, features: Option<&str>) -> Result<()> {
    proxy["image"] = json!(build.sidecar);
    if build.has_former_ports {
        proxy["ports"][0]["containerPort"] = json!(FORMER_ADMIN);
        proxy["startupProbe"]["httpGet"]["port"] = json!(FORMER_ADMIN);
        let container = proxy.as_object_mut().context("the sidecar is not an object")?;
        container.remove("readinessProbe");
        container.remove("livenessProbe");
    }
    if let Some(features) = features {
        let variables = proxy["env"].as_array_mut().context("the sidecar has no environment")?;
        variables.push(json!({"name": "TULLE_FEATURES", "value": features}));
    }
    Ok(())
}

/// Points kubelet's probes of a container at the former port.
fn move_probes(container: &mut Value) {
    for kind in ["startupProbe", "livenessProbe", "readinessProbe"] {
        let port = container.get_mut(kind).and_then(|probe| probe.pointer_mut("/httpGet/port"));
        if let Some(port) = port.filter(|port| **port == PROBES) {
            *port = json!(FORMER_PROBES);
        }
    }
}
