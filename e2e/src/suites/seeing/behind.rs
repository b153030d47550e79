//! `tulle explain` about a sidecar that does not take what it is sent.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::{enforced, find};
use crate::host;
use crate::kubectl::Kube;
use crate::suites::Skip;
use crate::suites::admission::sidecar_process;
use crate::suites::mesh::policy;
use crate::suites::namespace::TestNamespace;

/// A signal stops the sidecar of the server: it keeps its stream and its rules, and takes no new ones.
pub(super) fn is_explained(kube: &Kube) -> Result<()> {
    let Kube::Embedded(cluster) = kube else {
        bail!(Skip("the process of a sidecar is in reach on its node only"))
    };
    let field = TestNamespace::meshed(kube, "t-see-behind")?;
    field.service("web", 1, &[])?;
    field.load("load", "web:80", 1)?;
    let explained = || -> Result<(bool, String)> {
        let found =
            kube.tulle_ended(&["-n", &field.namespace, "explain", "load", "web", "-o", "json"])?.json()?;
        let access = find(&found["stages"], |stage| stage["name"] == "access");
        Ok((found["reaches"] == true, access["because"].as_str().unwrap_or_default().to_owned()))
    };
    let (reaches, because) = explained()?;
    ensure!(reaches && !because.contains("earlier"), "before: {because}");
    let pod = field.pods("web")?.pop().context("web has no pod")?;
    let process = sidecar_process(cluster, &field, &pod)?;
    let signal = |name: &str| {
        let kill = format!("kill -{name} {process}");
        host::output(cluster.inside("/bin/sh")?.args(["-c", &kill]))
    };
    signal("STOP")?;
    let nobody: Value = json!({"target": {"kind": "Service", "name": "web"}, "access": {"allow": []}});
    let outcome = policy(&field, "closed", nobody).and_then(|_| {
        let said = format!(
            "pod {}/{pod} works with an earlier version, because it has not acknowledged",
            field.namespace
        );
        let mut last = String::new();
        let waited = kube.wait_for("the explanation to be that of the sidecar", 20, || {
            let (reaches, because) = explained()?;
            last = because;
            Ok(reaches && last.contains(&said))
        });
        waited.with_context(|| format!("last explained: {last}"))
    });
    // The process is gone if kubelet has restarted the sidecar meanwhile.
    let resumed = signal("CONT");
    outcome?;
    resumed?;
    enforced(&field, "closed")?;
    let (reaches, because) = explained()?;
    ensure!(!reaches && !because.contains("earlier"), "after: {because}");
    Ok(())
}
