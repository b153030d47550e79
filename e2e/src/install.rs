//! Tulle on a cluster: images, manifests, and what the sample shop needs.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

use crate::cluster::Cluster;
use crate::host;
use crate::images;
use crate::kubectl::Kube;
use crate::progress::step;

/// The cluster that the user asked for, up and running: `embedded`, or `context:NAME`.
pub fn cluster(name: &str) -> Result<Kube> {
    match name.strip_prefix("context:") {
        Some(context) => {
            if !host::exists("kubectl") {
                bail!("kubectl is needed for --cluster {name}: install it and try again");
            }
            Ok(Kube::Context(context.to_owned()))
        }
        None if name == "embedded" => {
            let cluster = Cluster::new()?;
            cluster.up(None)?;
            Ok(Kube::Embedded(cluster))
        }
        None => bail!("--cluster is embedded or context:NAME, not {name:?}"),
    }
}

/// Loads the images, whose programs have been compiled.
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
        Kube::Context(context) => load_into(context, &archive.display().to_string()),
    }
}

/// kind, k3d and minikube each have a way of their own.
fn load_into(context: &str, archive: &str) -> Result<()> {
    let (program, arguments) = if let Some(name) = context.strip_prefix("kind-") {
        ("kind", vec!["load", "image-archive", archive, "--name", name])
    } else if let Some(name) = context.strip_prefix("k3d-") {
        ("k3d", vec!["image", "import", archive, "--cluster", name])
    } else {
        ("minikube", vec!["image", "load", archive, "--profile", context])
    };
    host::output(std::process::Command::new(program).args(arguments)).map(drop)
}

/// The label of a tulle-system that may be removed again.
const OURS: &str = "tulle.dev/xtask";

/// Installs Tulle and waits until it works.
pub fn tulle(kube: &Kube) -> Result<()> {
    let mine = kube.run(&[
        "get",
        "namespace",
        "tulle-system",
        "--ignore-not-found",
        "-o",
        "jsonpath={.metadata.labels}",
    ])?;
    if matches!(kube, Kube::Context(_)) && !mine.is_empty() && !mine.contains(OURS) {
        bail!(
            "this cluster has a Tulle that was not installed by xtask, which would change and remove it: use another cluster"
        );
    }
    step("installing Tulle: kubectl apply --server-side -k config/");
    let config = host::workspace().join("config");
    let config = config.to_str().context("the workspace's path is text")?;
    kube.run(&["apply", "--server-side", "--force-conflicts", "-k", config])?;
    kube.run(&["label", "--overwrite", "namespace", "tulle-system", &format!("{OURS}=true")])?;
    for workload in ["deployment/tulle-operator", "deployment/tulle-webhook"] {
        // The images have the same name at every build.
        kube.run(&["-n", "tulle-system", "rollout", "restart", workload])?;
        kube.rolled_out("tulle-system", workload, 120)?;
    }
    injects(kube)
}

/// Waits until a pod would be injected: the API server learns of a webhook's authority a moment after it
/// is written, and until then lets pods of `enabled` namespaces in as they are.
fn injects(kube: &Kube) -> Result<()> {
    const NAMESPACE: &str = "tulle-probe";
    let labels = serde_json::json!({"tulle.dev/inject": "enabled"});
    let namespace = serde_json::json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}});
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

/// A sample manifest.
pub fn sample(name: &str) -> Result<String> {
    let path = host::workspace().join("config/samples").join(name);
    fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
}
