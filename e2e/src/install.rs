//! Installs Tulle on a cluster: images and manifests.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

use crate::cluster::{self, Cluster};
use crate::host;
use crate::images;
use crate::kubectl::Kube;
use crate::progress::step;

/// Fails at once where `--cluster` cannot work, before anything is compiled for it.
pub fn check(name: &str) -> Result<()> {
    if let Some(context) = name.strip_prefix("context:") {
        if !host::is_installed("kubectl") {
            bail!("--cluster {name} needs kubectl; install it and try again");
        }
        return host::output(std::process::Command::new("kubectl").args(["config", "get-contexts", context]))
            .map(drop);
    }
    if name != "embedded" {
        bail!("invalid --cluster {name:?}; write embedded or context:NAME");
    }
    host::require_root()?;
    cluster::check()
}

/// Keeps other runs from the embedded cluster until the file is dropped. Others cannot be reserved.
pub fn reserve(name: &str) -> Result<Option<fs::File>> {
    match name {
        "embedded" => Cluster::new()?.reserve().map(Some),
        _ => Ok(None),
    }
}

/// The cluster of argument `--cluster`: `embedded`, which is started if necessary, or `context:NAME`.
pub fn cluster(name: &str) -> Result<Kube> {
    match name.strip_prefix("context:") {
        Some(context) => Ok(Kube::Context(context.to_owned())),
        None if name == "embedded" => {
            let cluster = Cluster::new()?;
            if cluster.was_interrupted() {
                step("tests were interrupted on this cluster: making it anew");
                cluster.down()?;
            }
            cluster.up(None)?;
            Ok(Kube::Embedded(cluster))
        }
        None => bail!("invalid --cluster {name:?}; write embedded or context:NAME"),
    }
}

/// Builds the images from the compiled programs, and loads them into the cluster.
pub fn load_images(kube: &Kube) -> Result<()> {
    for image in images::TULLE.iter().chain([&images::EMPTY]) {
        load(kube, &images::archive(image)?)?;
    }
    Ok(())
}

/// Loads the archive of an image.
pub fn load(kube: &Kube, archive: &Path) -> Result<()> {
    match kube {
        Kube::Embedded(cluster) => cluster.load(archive),
        Kube::Context(context) => load_into_context(context, &archive.display().to_string()),
    }
}

/// Loads an archive into a cluster of kind, k3d or, for other context names, minikube.
fn load_into_context(context: &str, archive: &str) -> Result<()> {
    let (program, arguments) = if let Some(name) = context.strip_prefix("kind-") {
        ("kind", vec!["load", "image-archive", archive, "--name", name])
    } else if let Some(name) = context.strip_prefix("k3d-") {
        ("k3d", vec!["image", "import", archive, "--cluster", name])
    } else {
        ("minikube", vec!["image", "load", archive, "--profile", context])
    };
    host::output(std::process::Command::new(program).args(arguments)).map(drop)
}

/// Label of a namespace tulle-system that xtask has installed, and so may change and remove.
const INSTALLED_BY_XTASK: &str = "tulle.dev/xtask";

/// Installs Tulle and waits until pods are injected.
pub fn tulle(kube: &Kube) -> Result<()> {
    let labels = kube.run(&[
        "get",
        "namespace",
        "tulle-system",
        "--ignore-not-found",
        "-o",
        "jsonpath={.metadata.labels}",
    ])?;
    if matches!(kube, Kube::Context(_)) && !labels.is_empty() && !labels.contains(INSTALLED_BY_XTASK) {
        bail!(
            "Tulle on this cluster was not installed by xtask, which would change and remove it; use another cluster"
        );
    }
    // First, so that an installation that is interrupted can be repeated.
    let namespace = serde_json::json!({"apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": "tulle-system", "labels": {INSTALLED_BY_XTASK: "true"}}});
    kube.apply_server_side(&namespace.to_string())?;
    step("installing Tulle: kubectl apply --server-side -k config/");
    let config = host::workspace().join("config");
    let config = config.to_str().context("the path of the workspace is not UTF-8")?;
    kube.run(&["apply", "--server-side", "--force-conflicts", "-k", config])?;
    for workload in ["deployment/tulle-operator", "deployment/tulle-webhook"] {
        // A restart, because images of a new build have the same names.
        kube.run(&["-n", "tulle-system", "rollout", "restart", workload])?;
        kube.rolled_out("tulle-system", workload, 120)?;
    }
    wait_until_injecting(kube)
}

/// Waits until a pod would be injected: the API server applies a changed `caBundle` only after a moment, and admits pods
/// of `enabled` namespaces without a sidecar until then.
fn wait_until_injecting(kube: &Kube) -> Result<()> {
    const NAMESPACE: &str = "tulle-probe";
    let labels = serde_json::json!({"tulle.dev/inject": "enabled"});
    let namespace = serde_json::json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}});
    kube.run(&["delete", "namespace", NAMESPACE, "--ignore-not-found"])?;
    kube.apply(&namespace.to_string())?;
    let outcome = kube.wait_for("the webhook to inject", 60, || {
        let run = [
            "-n",
            NAMESPACE,
            "run",
            "probe",
            "--image=probe",
            "--dry-run=server",
            "-o",
            "jsonpath={.spec.initContainers[*].name}",
        ];
        Ok(kube.run(&run)?.contains("tulle-proxy"))
    });
    kube.run(&["delete", "namespace", NAMESPACE, "--wait=false"])?;
    outcome
}

/// Text of a manifest in `config/samples`.
pub fn sample(name: &str) -> Result<String> {
    let path = host::workspace().join("config/samples").join(name);
    fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
}
