//! The operator's replicas and the settings that they share with users.

use std::io::{BufRead as _, BufReader, Lines};
use std::process::{Child, ChildStdout, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde_json::{Value, json};

use super::{SYSTEM, copy_of, has_settings, pods, rolled_out};
use crate::cluster::Cluster;
use crate::host;
use crate::kubectl::Kube;
use crate::suites::Skip;
use crate::suites::namespace::{TestNamespace, borrows, host_pod};

/// A state of the Lease.
struct Lease {
    /// `pod/address`; empty: it is released.
    holder: String,
    transitions: i64,
}

/// The states of the Lease, one after the other. None is left out, as it would be by reading again and again.
struct Watch {
    kubectl: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Watch {
    /// Begins with the state of now.
    fn begin(kube: &Kube) -> Result<Self> {
        let state = "jsonpath={.spec.leaseTransitions} {.spec.holderIdentity}{\"\\n\"}";
        let lease = ["-n", SYSTEM, "get", "lease", "tulle-operator"];
        let watch = ["--watch", "--request-timeout=120s", "-o", state];
        let mut command = kube.command(&[&lease[..], &watch].concat())?;
        let mut kubectl =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("cannot run kubectl")?;
        let output = kubectl.stdout.take().context("kubectl has no standard output")?;
        Ok(Self { kubectl, lines: BufReader::new(output).lines() })
    }

    fn following(&mut self) -> Result<Lease> {
        let line = self.lines.next().context("the watch of the Lease has ended")??;
        let (transitions, holder) =
            line.split_once(' ').with_context(|| format!("kubectl printed {line:?}"))?;
        // The field is absent before the first change of hands.
        Ok(Lease { holder: holder.to_owned(), transitions: transitions.parse().unwrap_or(0) })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.kubectl.kill();
        let _ = self.kubectl.wait();
    }
}

pub(super) fn leader_deleted(kube: &Kube) -> Result<()> {
    rolled_out(kube, "tulle-operator")?;
    let mut states = Watch::begin(kube)?;
    let before = states.following()?;
    let (pod, _) = before.holder.split_once('/').context("no replica holds the Lease")?;
    kube.run(&["-n", SYSTEM, "delete", "pod", pod, "--wait=false"])?;
    let mut released = false;
    let after = loop {
        let now =
            states.following().with_context(|| format!("no replica took the Lease of {}", before.holder))?;
        released |= now.holder.is_empty();
        if !now.holder.is_empty() && now.holder != before.holder {
            break now;
        }
    };
    rolled_out(kube, "tulle-operator")?;
    ensure!(released, "{} took the Lease when it had expired: it was not released", after.holder);
    ensure!(
        after.transitions == before.transitions + 1,
        "leaseTransitions: {} before, {} after",
        before.transitions,
        after.transitions
    );
    Ok(())
}

/// An operator that gets its rights only after it has started.
const LATE: &str = "tulle-operator-late";

/// Asks an operator at this address for `/readyz` until it is ready, and then connects to its discovery port at once.
/// Prints `open` or `closed`, and how often it was not ready before.
const FIRST_READY: &str = r#"
not_ready=0
until [[ $SECONDS -ge 90 ]]; do
  status=
  if { exec 3<>"/dev/tcp/$1/26161"; } 2>/dev/null; then
    printf 'GET /readyz HTTP/1.0\r\n\r\n' >&3
    read -r _ status _ <&3
    exec 3>&-
  fi
  if [[ $status == 200 ]]; then
    if { exec 4<>"/dev/tcp/$1/26160"; } 2>/dev/null; then echo "open $not_ready"; else echo "closed $not_ready"; fi
    exit
  fi
  if [[ $status == 503 ]]; then not_ready=$((not_ready + 1)); fi
  sleep 0.002
done
echo "never $not_ready"
"#;

pub(crate) fn ready_when_listening(kube: &Kube) -> Result<()> {
    let Kube::Embedded(cluster) = kube else { bail!(Skip("it connects to pods from within their node")) };
    let outcome = first_ready(kube, cluster);
    let objects = ["deployment", "serviceaccount", "rolebinding", "clusterrolebinding"];
    let objects = objects.map(|kind| format!("{kind}/{LATE}"));
    let mut delete = vec!["-n", SYSTEM, "delete", "--ignore-not-found"];
    delete.extend(objects.iter().map(String::as_str));
    outcome.and(kube.run(&delete).map(drop))
}

fn first_ready(kube: &Kube, cluster: &Cluster) -> Result<()> {
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": LATE, "namespace": SYSTEM}});
    kube.apply(&account.to_string())?;
    let mut copy = copy_of(kube, "tulle-operator", LATE)?;
    // The API server has filled in both names of the field.
    for field in ["serviceAccountName", "serviceAccount"] {
        copy["spec"]["template"]["spec"][field] = json!(LATE);
    }
    kube.apply(&copy.to_string())?;
    let mut address = String::new();
    kube.wait_for("the operator without rights to run", 60, || {
        let pod = pods(kube, LATE)?.pop().context("the operator has no pod")?;
        pod["status"]["podIP"].as_str().unwrap_or("").clone_into(&mut address);
        Ok(pod["status"]["phase"] == "Running" && !address.is_empty())
    })?;
    let mut watch = cluster.inside("bash")?;
    watch.args(["-c", FIRST_READY, "bash", &address]);
    let (seen, allowed) = thread::scope(|scope| {
        let seen = scope.spawn(|| host::output_within(&mut watch, Duration::from_secs(120)));
        thread::sleep(Duration::from_secs(3));
        let allowed = kube.apply(&rights().to_string());
        (seen.join(), allowed)
    });
    allowed?;
    let seen = seen.map_err(|_| anyhow!("watching the operator panicked"))??;
    let (port, not_ready) =
        seen.trim().split_once(' ').with_context(|| format!("the watching script printed {seen:?}"))?;
    ensure!(
        not_ready != "0",
        "the operator was never seen running and not ready, so the test proves nothing"
    );
    ensure!(
        port == "open",
        "at the first ready answer, after {not_ready} others, the discovery port was {port}"
    );
    Ok(())
}

/// The rights of the operator's own service account.
fn rights() -> Value {
    let binding = |kind: &str, metadata: Value, role: &str| {
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": metadata,
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": role, "name": "tulle-operator"},
            "subjects": [{"kind": "ServiceAccount", "name": LATE, "namespace": SYSTEM}],
        })
    };
    let items = [
        binding("RoleBinding", json!({"name": LATE, "namespace": SYSTEM}), "Role"),
        binding("ClusterRoleBinding", json!({"name": LATE}), "ClusterRole"),
    ];
    json!({"apiVersion": "v1", "kind": "List", "items": items})
}

pub(super) fn users_settings(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    has_settings(kube)?;
    let default = kube.json(&["get", "meshconfig", "mesh", "--show-managed-fields"])?;
    let mut managers = default["metadata"]["managedFields"].as_array().into_iter().flatten();
    let created = json!({"manager": "tulle-operator", "operation": "Apply", "subresource": null});
    ensure!(
        managers.any(|entry| ["manager", "operation", "subresource"]
            .iter()
            .all(|key| entry[*key] == created[*key])),
        "MeshConfig mesh is not the operator's default: {default}"
    );
    let outcome = applied_by_user(kube);
    kube.run(&["delete", "meshconfig", "mesh", "--ignore-not-found"])?;
    let back = has_settings(kube).context("waiting for the default MeshConfig after the user's was deleted");
    outcome.and(back)?;
    let exemptions = kube.run(&["get", "meshconfig", "mesh", "-o", "jsonpath={.spec.exemptions}"])?;
    ensure!(exemptions.is_empty(), "the new default has the user's exemptions: {exemptions}");
    Ok(())
}

fn applied_by_user(kube: &Kube) -> Result<()> {
    let field = TestNamespace::new(kube, "t-ops-settings", json!({"tulle.dev/inject": "required"}))?;
    field.injects()?;
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "exempt"}});
    field.apply(account)?;
    let spec = json!({
        "mtls": "Permissive",
        "sidecar": {"resources": {"requests": {"cpu": "11m", "memory": "24Mi"}}},
        "exemptions": [{"namespace": "t-ops-settings", "serviceAccount": "exempt"}],
    });
    let settings = json!({
        "apiVersion": "tulle.dev/v1alpha1", "kind": "MeshConfig", "metadata": {"name": "mesh"}, "spec": spec,
    });
    kube.apply_server_side(&settings.to_string()).context("applying a user's MeshConfig over the default")?;

    let sleep = ["/usr/bin/sleep", "1000"];
    kube.wait_for("the MeshConfig's resources in new sidecars", 60, || {
        Ok(admitted(&field, host_pod("probe", "default", &sleep))?.is_some_and(|sidecar| {
            sidecar["resources"]["requests"] == json!({"cpu": "11m", "memory": "24Mi"})
        }))
    })?;
    kube.wait_for("the exemption to take effect", 60, || {
        Ok(admitted(&field, host_pod("probe", "exempt", &sleep))?.is_none())
    })?;
    field.apply(host_pod("exempt", "exempt", &sleep))?;
    field.apply(host_pod("other", "default", &sleep))?;
    field.kubectl(&["wait", "--for=condition=Ready", "--timeout=90s", "pod/exempt"])?;
    field.ready("other")?;
    let containers = field.get("pod/exempt", ".spec.initContainers[*].name")?;
    ensure!(containers.is_empty(), "the exempt pod has init containers: {containers}");
    Ok(())
}

/// The sidecar that a pod would get, if any.
fn admitted(field: &TestNamespace<'_>, mut pod: Value) -> Result<Option<Value>> {
    pod["metadata"]["namespace"] = json!(field.namespace);
    let pod: Value = serde_json::from_str(&field.kube.dry_run(&pod.to_string())?)?;
    let mut containers = pod["spec"]["initContainers"].as_array().into_iter().flatten();
    Ok(containers.find(|container| container["name"] == "tulle-proxy").cloned())
}
