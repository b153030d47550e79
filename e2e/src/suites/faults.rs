//! What must keep working while a part of the control plane is missing.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;

use super::namespace::{TestNamespace, host_pod};
use super::{Skip, Test};
use crate::host;
use crate::install;
use crate::kubectl::Kube;

pub(super) const TESTS: &[Test] = &[
    ("while both operator replicas are gone for a minute, no request is lost", operator_gone),
    (
        "when the operator is killed during a canary, the weight stays and the rollout continues",
        operator_killed,
    ),
    (
        "while the webhook is down, pods of enabled namespaces start without a sidecar and are reported",
        webhook_gone,
    ),
    (
        "without the webhook's configuration, required namespaces still admit no pod without a sidecar",
        configuration_gone,
    ),
    ("certificate renewal under load loses no request", renewal),
    ("a certificate for another pod's identity is refused, logged and counted", foreign_identity),
    (
        "uninstalled as config/README.md says, Tulle leaves no object of any kind in any namespace, and pods start",
        uninstall,
    ),
];

fn operator_gone(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-headless")?;
    field.service("web", 2, &[])?;
    field.load("load", "web:80", 100)?;
    let outcome = field.failed_during("load", || {
        scale(kube, "tulle-operator", 0)?;
        thread::sleep(Duration::from_secs(60));
        Ok(())
    });
    scale(kube, "tulle-operator", 2)?;
    let (failed, why) = outcome?;
    ensure!(failed == 0, "{failed} requests were lost: {why}");
    // Sidecars get what has changed meanwhile.
    field.client("client")?;
    ensure!(
        field.status("client", "http://web.t-headless.svc.cluster.local/")? == "200",
        "no answer after the operator's return"
    );
    Ok(())
}

fn operator_killed(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-killed")?;
    field.service("web", 2, &["--version=v1"])?;
    field.load("load", "web:80", 100)?;
    field.apply(
        json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "Canary", "metadata": {"name": "web"}, "spec": {
            "target": {"kind": "Deployment", "name": "web"}, "steps": [{"weight": 25, "hold": "40s"}],
            "judge": {"minRequests": 50, "warmUp": "2s"},
        }}),
    )?;
    kube.wait_for("the stable revision", 60, || Ok(field.get("canary/web", ".status.phase")? == "Stable"))?;
    let arguments = json!([{"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": "--version=v2"},
        {"op": "remove", "path": "/spec/template/spec/containers/0/args/2"}]);
    field.kubectl(&["patch", "deployment", "web", "--type=json", "-p", &arguments.to_string()])?;
    kube.wait_for("25% of the traffic on v2", 60, || {
        Ok(field.get("canary/web", ".status.weightSummary")? == "25%")
    })?;
    let evidence = || -> Result<u64> {
        let seen = field.get("canary/web", ".status.evidence.canary.attempts")?;
        seen.parse().with_context(|| format!("the attempts are not a number: {seen:?}"))
    };
    kube.wait_for("evidence", 60, || Ok(evidence()? > 0))?;
    let before = evidence()?;
    let (failed, why) = field.failed_during("load", || {
        kube.run(&[
            "-n",
            "tulle-system",
            "delete",
            "pod",
            "-l",
            "app=tulle-operator",
            "--grace-period=0",
            "--force",
        ])?;
        kube.rolled_out("tulle-system", "deployment/tulle-operator", 90)?;
        kube.wait_for("the evidence to grow", 60, || {
            Ok(evidence()? > before || field.get("canary/web", ".status.phase")? != "Progressing")
        })
    })?;
    ensure!(failed == 0, "{failed} requests were lost: {why}");
    kube.wait_for("the promotion", 120, || {
        Ok(field.get("canary/web", ".status.history[0].outcome")? == "Promoted")
    })
}

fn webhook_gone(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-bare")?;
    scale(kube, "tulle-webhook", 0)?;
    let outcome = (|| {
        field.apply(host_pod("bare", "default", &["/usr/bin/sleep", "1000"]))?;
        field.kubectl(&["wait", "--for=condition=Ready", "--timeout=90s", "pod/bare"])?;
        ensure!(
            field.get("pod/bare", ".spec.initContainers")?.is_empty(),
            "the pod was injected while the webhook is down"
        );
        let required = TestNamespace::new(kube, "t-waits", json!({"tulle.dev/inject": "required"}))?;
        let refused = required.apply(host_pod("waits", "default", &["/usr/bin/sleep", "1000"]));
        let why = refused.err().map(|error| error.to_string()).unwrap_or_default();
        ensure!(
            why.contains("required.inject.tulle.dev"),
            "a pod of a required namespace was not rejected for the webhook's absence: {why:?}"
        );
        kube.wait_for("the event on the bare pod", 60, || {
            Ok(field.kubectl(&["events", "--for", "pod/bare"])?.contains("NoSidecar"))
        })
    })();
    scale(kube, "tulle-webhook", 2)?;
    outcome
}

fn configuration_gone(kube: &Kube) -> Result<()> {
    let field = TestNamespace::new(kube, "t-policy", json!({"tulle.dev/inject": "required"}))?;
    kube.run(&["delete", "mutatingwebhookconfiguration", "tulle"])?;
    let mut bare = false;
    let outcome = kube.wait_for("the rejection by the admission policy", 60, || {
        let refused = match field.apply(host_pod("bare", "default", &["/usr/bin/sleep", "1000"])) {
            Ok(_) => {
                // Until the API server has noticed, the webhook still injects.
                bare |= field.get("pod/bare", ".spec.initContainers[1].name")? != "tulle-proxy";
                field.kubectl(&["delete", "pod", "bare", "--now"])?;
                return Ok(false);
            }
            Err(refused) => refused.to_string(),
        };
        Ok(refused.contains("the namespace requires Tulle's sidecar"))
    });
    install::tulle(kube)?;
    ensure!(!bare, "a pod without a sidecar was admitted");
    outcome
}

fn renewal(kube: &Kube) -> Result<()> {
    if matches!(kube, Kube::Context(_)) {
        bail!(Skip("the test would remove Tulle and its objects from this cluster"));
    }
    let config = |life: &str| json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "MeshConfig", "metadata": {"name": "mesh"}, "spec": {"certificates": {"leafLifetime": life}}});
    kube.apply(&config("20s").to_string())?;
    let outcome = (|| {
        let field = TestNamespace::meshed(kube, "t-renew")?;
        field.service("web", 2, &[])?;
        field.load("load", "web:80", 100)?;
        let renewals = || -> Result<usize> {
            let logs = field.kubectl(&["logs", "deployment/load", "-c", "tulle-proxy"])?;
            Ok(logs.lines().filter(|line| line.contains("a new certificate")).count())
        };
        let before = renewals()?;
        let (failed, why) = field.failed_during("load", || {
            kube.wait_for("three renewals", 120, || Ok(renewals()? >= before + 3))
        })?;
        ensure!(failed == 0, "{failed} requests were lost over three renewals: {why}");
        Ok(())
    })();
    kube.run(&["delete", "meshconfig", "mesh"])?;
    // A MeshConfig that is created again must not change the trust domain, which would cut every connection.
    let other = json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "MeshConfig", "metadata": {"name": "mesh"}, "spec": {"trustDomain": "other.example"}});
    kube.apply(&other.to_string())?;
    let said = kube.wait_for("MeshConfig mesh to report that its trust domain has no effect", 60, || {
        let path = "{.status.conditions[0].reason} {.status.trustDomain}";
        let status = kube.run(&["get", "meshconfig", "mesh", "-o", &format!("jsonpath={path}")])?;
        Ok(status == "TrustDomainFixed cluster.local")
    });
    kube.run(&["delete", "meshconfig", "mesh"])?;
    said?;
    kube.wait_for("the default MeshConfig", 60, || {
        Ok(kube.run(&["wait", "--for=condition=Ready", "--timeout=1s", "meshconfig/mesh"]).is_ok())
    })?;
    outcome
}

fn foreign_identity(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-foreign")?;
    field.client("victim")?;
    let victim = kube.json(&["-n", "t-foreign", "get", "pod", "victim"])?;
    // A real sidecar with a real token of its own, which claims to be another pod.
    let mut sidecar = victim["spec"]["initContainers"][1].clone();
    let known = ["image", "args", "env", "volumeMounts"];
    sidecar
        .as_object_mut()
        .context("the sidecar is not an object")?
        .retain(|name, _| known.contains(&name.as_str()));
    sidecar["name"] = json!("impostor");
    for variable in sidecar["env"].as_array_mut().context("the sidecar has no environment")? {
        if variable["name"] == "TULLE_POD_UID" {
            *variable = json!({"name": "TULLE_POD_UID", "value": victim["metadata"]["uid"]});
        }
    }
    let volumes = victim["spec"]["volumes"].as_array().context("the pod has no volumes")?;
    let volumes: Vec<_> = volumes
        .iter()
        .filter(|v| ["tulle-token", "tulle-trust"].contains(&v["name"].as_str().unwrap_or("")))
        .collect();
    let mounts = sidecar["volumeMounts"].as_array_mut().context("the sidecar has no mounts")?;
    mounts.retain(|mount| ["tulle-token", "tulle-trust"].contains(&mount["name"].as_str().unwrap_or("")));
    field.apply(json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "impostor", "labels": {"tulle.dev/inject": "disabled"}},
        "spec": {"serviceAccountName": "default", "containers": [sidecar], "volumes": volumes}}))?;
    let counted = || -> Result<bool> {
        let pods =
            kube.run(&["-n", "tulle-system", "get", "pods", "-l", "app=tulle-operator", "-o", "name"])?;
        for pod in pods.lines().filter_map(|name| name.strip_prefix("pod/")) {
            let path = format!("/api/v1/namespaces/tulle-system/pods/{pod}:26161/proxy/metrics");
            let wanted = "tulle_operator_refusals_total{what=\"certificate\",reason=\"OtherPod\"}";
            if kube.run(&["get", "--raw", &path])?.contains(wanted) {
                return Ok(true);
            }
        }
        Ok(false)
    };
    kube.wait_for("the refusal to be counted", 60, counted)?;
    let logs = kube.run(&["-n", "tulle-system", "logs", "-l", "app=tulle-operator", "--tail=200"])?;
    ensure!(
        logs.contains("refused a certificate: the token is bound to another pod"),
        "the refusal is not in the operator's log"
    );
    // The operator may refuse before the kubelet has written that the container runs.
    kube.wait_for("the impostor's sidecar to log the reason", 60, || {
        let said = field.kubectl(&["logs", "impostor"]).unwrap_or_default();
        Ok(said.contains("the token is bound to another pod"))
    })
}

fn uninstall(kube: &Kube) -> Result<()> {
    if matches!(kube, Kube::Context(_)) {
        bail!(Skip("the test would remove Tulle and its objects from this cluster"));
    }
    let outcome = uninstalled(kube);
    // No pod without a sidecar may be there once Tulle is installed again.
    let removed = kube.run(&["delete", "namespace", "t-after", "--ignore-not-found"]);
    let restored = removed.and_then(|_| install::tulle(kube)).context("installing Tulle again");
    outcome.and(restored)
}

fn uninstalled(kube: &Kube) -> Result<()> {
    let config = host::workspace().join("config");
    let config = config.to_str().context("the workspace's path is not UTF-8")?;
    // A namespace in which something could be left behind.
    let field = TestNamespace::meshed(kube, "t-after")?;
    kube.wait_for("the trust bundle", 60, || {
        Ok(field.kubectl(&["get", "configmap", "tulle-trust"]).is_ok())
    })?;
    kube.run(&["delete", "--timeout=90s", "-k", config])?;
    // The API server removes the APIService of a group some time after the group's last kind.
    let mut left = Vec::new();
    let bundles = kube.wait_for("only the ConfigMaps that the last step deletes to be left", 60, || {
        left = left_of_tulle(kube)?;
        let bundle = |left: &String| left.starts_with("ConfigMap ") && left.ends_with("/tulle-trust");
        Ok(left.iter().any(|left| left == "ConfigMap t-after/tulle-trust") && left.iter().all(bundle))
    });
    bundles.with_context(|| format!("objects left: {left:?}"))?;
    kube.run(&["delete", "configmaps", "--all-namespaces", "-l", "tulle.dev/trust=bundle"])?;
    let left = left_of_tulle(kube)?;
    ensure!(left.is_empty(), "left behind: {left:?}");
    // The cluster works without it, in namespaces that were meshed too.
    field.apply(host_pod("app", "default", &["/usr/bin/sleep", "1000"]))?;
    field.kubectl(&["wait", "--for=condition=Ready", "--timeout=90s", "pod/app"])?;
    ensure!(
        field.get("pod/app", ".spec.initContainers")?.is_empty(),
        "the pod was injected after the uninstall"
    );
    Ok(())
}

/// Objects of every kind that can be listed, namespaced or not, whose names contain `tulle`. Events are left
/// out, because they are a record and expire.
pub(super) fn left_of_tulle(kube: &Kube) -> Result<Vec<String>> {
    let lines = "jsonpath={range .items[*]}{.kind} {.metadata.namespace}/{.metadata.name}{\"\\n\"}{end}";
    let mut left = Vec::new();
    for namespaced in ["--namespaced=true", "--namespaced=false"] {
        let kinds = kube.run(&["api-resources", "--verbs=list", namespaced, "-o", "name"])?;
        let kinds: Vec<&str> = kinds.lines().filter(|kind| !kind.starts_with("events")).collect();
        let objects = kube.run(&["get", &kinds.join(","), "--all-namespaces", "-o", lines])?;
        // The probe's namespace is xtask's own.
        let ours = |line: &&str| line.contains("tulle") && !line.contains("tulle-probe");
        left.extend(objects.lines().filter(ours).map(str::to_owned));
    }
    Ok(left)
}

/// Scales a workload of Tulle, and waits until its pods are ready, or gone.
pub(super) fn scale(kube: &Kube, workload: &str, replicas: u32) -> Result<()> {
    kube.run(&["-n", "tulle-system", "scale", "deployment", workload, &format!("--replicas={replicas}")])?;
    if replicas > 0 {
        return kube.rolled_out("tulle-system", &format!("deployment/{workload}"), 120);
    }
    kube.wait_for(&format!("{workload} to be gone"), 60, || {
        Ok(kube
            .run(&["-n", "tulle-system", "get", "pods", "-l", &format!("app={workload}"), "-o", "name"])?
            .trim()
            .is_empty())
    })
}
