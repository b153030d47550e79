//! Namespaces that require the sidecar: what they reject, and what they must not.

use std::thread;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{
    INIT, NOTICED, PROXY, annotated, as_admitted, injected, pod, rejection, requires, reviewed, sleeper,
};
use crate::kubectl::Kube;
use crate::suites::namespace::{TestNamespace, borrows};

/// From the message of the policy tulle-required-update.
const FIXED: &str = "its image cannot be changed in an existing pod";

pub(super) fn running_sidecar(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = requires(kube, "t-adm-update")?;
    field.apply(sleeper("app"))?;
    field.ready("app")?;
    let before = pod(&field, "app")?;
    for name in [PROXY, INIT] {
        replacing_is_rejected(&field, name)?;
        let (was, is) = (injected(&before, name)?["image"].clone(), pod(&field, "app")?);
        ensure!(injected(&is, name)?["image"] == was, "the image of {name} has changed");
    }
    field.kubectl(&["label", "pod", "app", "tier=front"])?;
    field.kubectl(&["set", "image", "pod/app", "app=tulle.local/shop:dev"])?;
    kube.wait_for("the app's new image to run", 60, || {
        let status = &pod(&field, "app")?["status"]["containerStatuses"][0];
        let image = status["image"].as_str().unwrap_or("");
        Ok(image.contains("tulle.local/shop:dev") && status["ready"] == true)
    })?;
    let restarts = field.get("pod/app", ".status.initContainerStatuses[1].restartCount")?;
    ensure!(restarts == "0", "the sidecar was restarted {restarts} times");
    Ok(())
}

/// Fails unless replacing the image of an injected container of pod `app` is rejected.
fn replacing_is_rejected(field: &TestNamespace<'_>, name: &str) -> Result<()> {
    let image = format!("{name}=tulle.local/empty:1");
    let why = rejection(field.kubectl(&["set", "image", "pod/app", &image])).context(image)?;
    ensure!(why.contains(FIXED), "the image of {name} was rejected for another reason: {why}");
    Ok(())
}

pub(super) fn pods_from_before(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = TestNamespace::plain(kube, "t-adm-before")?;
    field.apply(sleeper("bare"))?;
    let mut opted_out = sleeper("opted-out");
    opted_out["metadata"]["labels"]["tulle.dev/inject"] = json!("disabled");
    field.apply(opted_out)?;
    field.ready("bare")?;
    field.ready("opted-out")?;
    kube.run(&["label", "namespace", &field.namespace, "tulle.dev/inject=required"])?;
    kube.wait_for("the namespace to require sidecars", 60, || {
        Ok(reviewed(&field, sleeper("app")).is_ok_and(|pod| injected(&pod, PROXY).is_ok()))
    })?;
    field.apply(sleeper("app"))?;
    replacing_is_rejected(&field, INIT).context("the policy on updates is not in force yet")?;

    field.kubectl(&["label", "pod", "bare", "tier=front"])?;
    let held = json!({"metadata": {"finalizers": ["tulle.dev/test"]}}).to_string();
    field.kubectl(&["patch", "pod", "bare", "--type=merge", "-p", &held])?;
    field.kubectl(&["delete", "pod", "bare", "--now", "--wait=false"])?;
    field.kubectl(&[
        "patch",
        "pod",
        "bare",
        "--type=merge",
        "-p",
        r#"{"metadata": {"finalizers": null}}"#,
    ])?;
    kube.wait_for("the bare pod to be gone", 60, || {
        Ok(!field.kubectl(&["get", "pods", "-o", "name"])?.contains("pod/bare"))
    })?;
    kube.wait_for("the event on the pod that opted out", 60, || {
        Ok(events(&field, "opted-out")?.contains("OptOutIgnored"))
    })?;
    let events = events(&field, "opted-out")?;
    ensure!(!events.contains("NoSidecar"), "the pod that opted out also has event NoSidecar: {events}");
    Ok(())
}

fn events(field: &TestNamespace<'_>, name: &str) -> Result<String> {
    field.kubectl(&["events", "--for", &format!("pod/{name}")])
}

pub(super) fn injected_pods(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = requires(kube, "t-adm-sealed")?;
    let sealed = as_admitted(&field, sleeper("app"))?;
    let seal = &sealed["metadata"]["annotations"]["tulle.dev/injection"];
    ensure!(seal.is_string(), "the pod has no seal: {}", sealed["metadata"]);
    field.apply(sealed.clone())?;
    field.ready("app")?;
    for name in [INIT, PROXY] {
        let (is, was) = (pod(&field, "app")?, injected(&sealed, name)?);
        ensure!(injected(&is, name)?["args"] == was["args"], "{name} was injected again");
    }

    let image = injected(&sealed, PROXY)?["image"].as_str().context("the sidecar has no image")?;
    let (repository, _) = image.rsplit_once(':').context("the sidecar's image has no tag")?;
    let digest = format!("sha256:{}", "a".repeat(64));
    for pinned in [format!("{image}@{digest}"), format!("{repository}@{digest}")] {
        let seen = reviewed(&field, with_images(&sealed, &pinned)?).context(pinned.clone())?;
        ensure!(injected(&seen, PROXY)?["image"] == pinned, "{pinned} was changed");
    }
    let foreign = [
        "mirror.example/sidecar:dev".to_owned(),
        format!("mirror.example/sidecar@{digest}"),
        format!("{image}-mine"),
    ];
    for foreign in foreign {
        let why = rejection(reviewed(&field, with_images(&sealed, &foreign)?)).context(foreign.clone())?;
        ensure!(why.contains("has image"), "{foreign}: {why}");
    }
    let why = rejection(reviewed(&field, with_arguments(&sealed)?)).context("other arguments")?;
    ensure!(why.contains("has args"), "other arguments: {why}");
    Ok(())
}

pub(super) fn copies(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let (field, other) = (requires(kube, "t-adm-copied")?, requires(kube, "t-adm-copy")?);
    let optional = TestNamespace::meshed(kube, "t-adm-optional")?;
    // The service account of a new namespace, and its label, take a moment.
    thread::sleep(NOTICED);
    let sealed = as_admitted(&field, sleeper("app"))?;
    let seen = reviewed(&other, renamed(&sealed)).context("an exact copy")?;
    let count = seen["spec"]["initContainers"].as_array().map_or(0, Vec::len);
    ensure!(count == 2, "the copy has {count} init containers");
    let why = rejection(reviewed(&other, with_arguments(&sealed)?)).context("a copy with other arguments")?;
    ensure!(why.contains("has args"), "a copy with other arguments: {why}");

    // The pod is genuine in its own namespace, where ports may be skipped, as they may not in the other.
    let skips = annotated("app", json!({"tulle.dev/skip-outbound-ports": "5432"}));
    let sealed = as_admitted(&optional, skips)?;
    reviewed(&optional, renamed(&sealed)).context("in its own namespace")?;
    let why = rejection(reviewed(&other, renamed(&sealed))).context("a pod that skips ports")?;
    ensure!(why.contains("--skip-outbound-ports=5432"), "a pod that skips ports: {why}");
    Ok(())
}

/// The same pod under a name that is free.
fn renamed(pod: &Value) -> Value {
    let mut pod = pod.clone();
    pod["metadata"]["name"] = json!("copy");
    pod
}

/// The same pod with another image for both injected containers.
fn with_images(pod: &Value, image: &str) -> Result<Value> {
    let mut pod = renamed(pod);
    let containers =
        pod["spec"]["initContainers"].as_array_mut().context("the pod has no init containers")?;
    for container in containers.iter_mut().filter(|c| [INIT, PROXY].iter().any(|name| c["name"] == *name)) {
        container["image"] = json!(image);
    }
    Ok(pod)
}

/// The same pod with redirect rules that leave a port out.
fn with_arguments(pod: &Value) -> Result<Value> {
    let mut pod = renamed(pod);
    let containers =
        pod["spec"]["initContainers"].as_array_mut().context("the pod has no init containers")?;
    let init = containers
        .iter_mut()
        .find(|container| container["name"] == INIT)
        .context("the pod has no tulle-init")?;
    init["args"] = json!(["init", "--skip-outbound-ports=5432"]);
    Ok(pod)
}
