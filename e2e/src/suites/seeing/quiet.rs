//! Commands that only look leave everything as it is, and open no stream in a sidecar's name.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{Scratch, WINDOW, enforced, find, says};
use crate::cli::{Printed, exit};
use crate::host;
use crate::images;
use crate::kubectl::Kube;
use crate::suites::namespace::{TestNamespace, deployment};

/// Kinds whose objects are compared, besides the namespace. Not Leases and events, which others write.
const KINDS: &str = "pods,services,endpointslices,serviceaccounts,configmaps,deployments,replicasets,\
    meshpolicies,canaries,roles,rolebindings";
/// Kinds of an installation whose objects are compared: what an upgrade or an uninstallation would change.
const INSTALLED: &str = "deployments,services,serviceaccounts,roles,rolebindings,networkpolicies,\
    clusterroles,clusterrolebindings,customresourcedefinitions,mutatingwebhookconfigurations,\
    validatingwebhookconfigurations";
/// The label of every object of an installation.
const PART_OF: &str = "app.kubernetes.io/part-of=tulle";
/// Tulle's own namespace.
const SYSTEM: &str = "tulle-system";

/// The operator's metrics of discovery streams: sidecars with one, and streams that were opened.
const CONNECTED: &str = "tulle_operator_sidecars";
const OPENED: &str = "tulle_operator_discovery_streams_total";

/// Has the form of a service account's token.
const TOKEN: &str = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl";
/// How every token of a service account begins: `{"alg":`.
const TOKEN_BEGINS: &str = "eyJhbGciOi";
/// Stands in the first line of every private key in PEM.
const PRIVATE_KEY: &str = "PRIVATE KEY";
/// How a certificate begins in PEM. It is public, and in the webhook configurations.
const CERTIFICATE: &str = "-----BEGIN CERTIFICATE";
/// Each value of Secrets in a line: Secret and key, the value in base64, and the value in quotes with `\n` between its
/// lines.
const VALUES: &str = r#"go-template={{range .items}}{{$name := .metadata.name}}{{range $key, $value := .data}}{{$name}}/{{$key}} {{$value}} {{printf "%q" (base64decode $value)}}{{"\n"}}{{end}}{{end}}"#;
/// Shorter values could be found anywhere by chance.
const LONG_ENOUGH: usize = 16;

/// How long kubectl may take to run the plugin.
const PLUGIN_LIMIT: Duration = Duration::from_secs(60);

pub(crate) fn changes_nothing(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-see-quiet")?;
    let scratch = Scratch::new("quiet")?;
    field.service("web", 1, &[])?;
    field.client("client")?;
    ensure!(field.status("client", "http://web/")? == "200", "no answer");
    let deny = json!({"deny": [{"to": [{"methods": ["DELETE"]}]}]});
    // Secrets that the report must not contain.
    let secrets = json!({"example.com/token": TOKEN, "example.com/key": "-----BEGIN PRIVATE KEY-----"});
    field.apply(json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy",
        "metadata": {"name": "web", "annotations": secrets},
        "spec": {"target": {"kind": "Service", "name": "web"}, "access": deny}}))?;
    enforced(&field, "web")?;
    field.apply(json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "Canary", "metadata": {"name": "web"},
        "spec": {"target": {"kind": "Deployment", "name": "web"}, "steps": [{"weight": 50, "hold": "5s"}]}}))?;
    kube.wait_for("the Canary", 60, || Ok(field.get("canary/web", ".status.phase")? == "Stable"))?;
    let denial = denied(&field)?;
    counted(&field)?;
    let before = calm(&field)?;
    let installed = before.keys().any(|name| name.starts_with("CustomResourceDefinition/"));
    ensure!(installed, "no object of the installation is compared: {before:?}");
    let pods = field.pods("web")?;
    let pod = pods.first().context("web has no pod")?;
    let configured = sidecars(&field)?;
    has_configuration(&configured, pod)?;
    let (connected, opened) = (connected(kube)?, opened(kube)?);
    traffic(&field, pod)?;
    access(&field, &denial)?;
    manifests(&field, &scratch)?;
    canary(&field)?;
    installation(&field, &scratch)?;
    report(&field, &scratch)?;
    let after = versions(&field)?;
    let changed: Vec<&String> =
        before.keys().chain(after.keys()).filter(|name| before.get(*name) != after.get(*name)).collect();
    ensure!(changed.is_empty(), "the commands have changed {changed:?}");
    let now = sidecars(&field)?;
    ensure!(now == configured, "the sidecars had {configured:#?}, after the commands {now:#?}");
    let now = self::opened(kube)?;
    ensure!(now == opened, "sidecars had opened {opened} discovery streams, after the commands {now}");
    let now = self::connected(kube)?;
    // Fewer, where pods of an earlier test end meanwhile.
    ensure!(now <= connected, "{connected} sidecars were connected, now {now}");
    Ok(())
}

/// The id of a request that the policy has refused.
fn denied(field: &TestNamespace<'_>) -> Result<String> {
    let ask = "curl -s -m 8 -X DELETE -o /dev/null -D - http://web/orders";
    let head = field.exec("client", &["/bin/sh", "-c", ask])?;
    let id = head.lines().find_map(|line| line.strip_prefix("tulle-denial: ")).map(str::trim);
    Ok(id.with_context(|| format!("the refusal has no id: {head}"))?.to_owned())
}

/// Waits until the operator has counted what the client has sent.
fn counted(field: &TestNamespace<'_>) -> Result<()> {
    field.kube.wait_for("the edge of the client", 60, || {
        let edges = field.kube.tulle_json(&["-n", &field.namespace, "edges", "--window", WINDOW])?;
        let is_ours =
            |edge: &Value| edge["source"]["name"] == "client" && edge["destination"]["name"] == "web";
        Ok(!find(&edges["edges"], is_ours).is_null())
    })
}

/// Runs a command in the namespace, which must end with this code and have these parts in its result.
fn shows(field: &TestNamespace<'_>, code: i32, command: &[&str], parts: &[&str]) -> Result<Printed> {
    ends(field, &[&["-n", &field.namespace], command].concat(), &[code], parts)
}

/// Runs a command, which must end with one of these codes and have these parts in its result.
fn ends(field: &TestNamespace<'_>, command: &[&str], codes: &[i32], parts: &[&str]) -> Result<Printed> {
    let printed = field.kube.tulle_ended(command)?;
    let shown = command.join(" ");
    ensure!(
        codes.contains(&printed.code),
        "{shown}: exit code {}, expected one of {codes:?}\n{}{}",
        printed.code,
        printed.stdout,
        printed.stderr
    );
    says(&printed.stdout, parts).with_context(|| format!("{shown} has printed\n{}", printed.stderr))?;
    Ok(printed)
}

/// What was counted, and what sidecars have.
fn traffic(field: &TestNamespace<'_>, pod: &str) -> Result<()> {
    let fine = |command: &[&str], parts: &[&str]| shows(field, exit::FINE, command, parts);
    fine(&["stat"], &["NAME", "MESHED", "web", "1/1"])?;
    fine(&["stat", "svc", "--window", WINDOW], &["NAME", "SUCCESS", "web"])?;
    fine(&["edges", "--window", WINDOW], &["SRC", "MTLS", "client", "svc/web"])?;
    fine(&["top", "--once", "--window", WINDOW], &["SOURCE", "WORST", "client", "svc/web"])?;
    // The namespace has no HTTPRoute or GRPCRoute: only the header is printed.
    fine(&["routes"], &["ROUTE", "SERVICE", "RULE", "ASKED-OK"])?;
    fine(&["denials", "web"], &["CALLER", "REQUEST", "RULE"])?;
    let tapped = fine(&["tap", "web", "--timeout", "3s"], &["METHOD", "LATENCY"])?;
    says(&tapped.stderr, &["0 shown"])?;
    fine(&["pods", "-o", "wide"], &["CERT-LEFT", "OPERATOR", "MEM", pod, "Deployment/web"])?;
    fine(&["config", pod], &["Services", "Endpoints", "Certificate"])?;
    fine(&["config", pod, "--diff"], &["SIDECAR", "OPERATOR", "certificate", "acknowledged"]).map(drop)
}

/// Who may do what, and why somebody may not.
fn access(field: &TestNamespace<'_>, denial: &str) -> Result<()> {
    let fine = |command: &[&str], parts: &[&str]| shows(field, exit::FINE, command, parts);
    let web = format!("{}/web", field.namespace);
    let client = format!("{}/client", field.namespace);
    fine(&["explain", "client", "web"], &["√ pass", &format!("reaches {web}:80")])?;
    let refused = ["refused DELETE /orders of host web", "× stop"];
    shows(field, exit::FINDINGS, &["explain", "--denial", denial], &refused)?;
    let denied = format!("denied by MeshPolicy/{web}");
    fine(&["access", "who-can", "web"], &["ALLOWED BY", &web, &denied])?;
    let what = ["-A", "access", "what-can", &client];
    ends(field, &what, &[exit::FINE], &["CLIENT", "ALLOWED BY", &client, &web])?;
    // The only workload that is called has access rules.
    let suggested = fine(&["access", "suggest"], &[])?;
    says(&suggested.stderr, &["No suggestions"])
}

/// What would become of manifests.
fn manifests(field: &TestNamespace<'_>, scratch: &Scratch) -> Result<()> {
    let manifests = scratch.file(
        "all.yaml",
        &format!(
            "{}\n---\n{}\n",
            deployment("web", 1, &[]),
            json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy", "metadata": {"name": "new"},
                "spec": {"target": {"kind": "Service", "name": "web"}, "mtls": "Strict"}})
        ),
    )?;
    let new = format!("MeshPolicy {}/new: ", field.namespace);
    shows(field, exit::FINE, &["diff", "-f", &manifests], &[&new, "would enforce it"])?;
    let linted = shows(field, exit::FINE, &["lint", "--with-cluster", "-f", &manifests], &[])?;
    says(&linted.stderr, &["2 objects: 0 errors"])?;
    shows(field, exit::FINE, &["inject", "-f", &manifests], &["kind: Pod", "tulle-proxy"]).map(drop)
}

fn canary(field: &TestNamespace<'_>) -> Result<()> {
    let fine = |command: &[&str], parts: &[&str]| shows(field, exit::FINE, command, parts);
    let row = ["NAME", "EVIDENCE", "Deployment/web", "Stable"];
    fine(&["canary", "list"], &row)?;
    fine(&["canary", "get", "web"], &row)?;
    let watch = ["canary", "status", "web", "--watch", "--timeout", "60s"];
    fine(&watch, &["no rollout is in progress"])?;
    let refused = shows(field, exit::FAILED, &["canary", "undo", "web", "--dry-run"], &[])?;
    says(&refused.stderr, &["no rollout is in progress"])
}

/// What is installed, and what would be done to it.
fn installation(field: &TestNamespace<'_>, scratch: &Scratch) -> Result<()> {
    let fine = |command: &[&str], parts: &[&str]| ends(field, command, &[exit::FINE], parts);
    // Findings about the cluster are not this test's business.
    let either = [exit::FINE, exit::FINDINGS];
    ends(field, &["-n", &field.namespace, "check"], &either, &["T0303", "T0801"])?;
    ends(field, &["check", "--pre"], &either, &["T0101", "T0103"])?;
    fine(&["version"], &["COMPONENT", "operator"])?;
    fine(&["completion", "bash"], &["_tulle()", "dashboard"])?;
    fine(&["install"], &["kind: CustomResourceDefinition", "name: tulle-operator"])?;
    // An earlier test may own a field.
    let listed = fine(&["upgrade", "--force-conflicts"], &["KIND", "CHANGE", "tulle-operator"])?;
    says(&listed.stderr, &["nothing was changed"])?;
    let refused = ends(field, &["uninstall"], &[exit::FAILED], &[])?;
    says(&refused.stderr, &["pods have a sidecar", "hint:"])?;
    let uninstall = ["# `tulle uninstall --apply` does the same.", "kubectl delete"];
    fine(&["uninstall", "--force"], &uninstall)?;
    plugin(field.kube, scratch)
}

/// kubectl finds the program by its name, and passes on what follows that.
fn plugin(kube: &Kube, scratch: &Scratch) -> Result<()> {
    let link = scratch.path("kubectl-tulle")?;
    symlink(images::tulle()?, &link).with_context(|| format!("cannot create {link}"))?;
    let words = match kube {
        Kube::Embedded(_) => kube.words(&["tulle", "version"])?,
        // kubectl takes no option of its own before the name of a plugin.
        Kube::Context(name) => ["kubectl", "tulle", "version", "--context", name].map(str::to_owned).to_vec(),
    };
    let path = format!("PATH={}:{}", scratch.0.display(), host::path().display());
    let printed = host::output_within(kube.program("env")?.arg(path).args(words), PLUGIN_LIMIT)?;
    says(&printed, &["COMPONENT", "tulle", "operator"])
}

/// The bundle of a report has what a bug report needs, and none of the secrets of the cluster.
fn report(field: &TestNamespace<'_>, scratch: &Scratch) -> Result<()> {
    let directory = scratch.path("report")?;
    shows(field, exit::FINE, &["report", &directory], &["wrote ", &directory])?;
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(&directory).with_context(|| format!("cannot read {directory}"))? {
        let path = entry?.path();
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        files.insert(path.file_name().unwrap_or_default().to_string_lossy().into_owned(), text);
    }
    let names: Vec<&String> = files.keys().collect();
    let has = |name: &str, part: &str| files.get(name).is_some_and(|text| text.contains(part));
    ensure!(has("meshpolicies.yaml", "[removed]"), "the policy is not in the report: {names:?}");
    ensure!(has("webhooks.yaml", "caBundle") && has("pods.yaml", "tulle-operator"), "{names:?}");
    ensure!(names.iter().any(|name| name.ends_with(".log")), "no log: {names:?}");
    let secrets = secrets(field.kube)?;
    for (name, text) in &files {
        for begin in [PRIVATE_KEY, TOKEN_BEGINS] {
            ensure!(!text.contains(begin), "{name} contains {begin}");
        }
        for secret in &secrets {
            // The value itself must not be in a log of this test either.
            let found = secret.parts.iter().any(|part| text.contains(part));
            ensure!(!found, "{name} contains a part of {} of the Secrets in {SYSTEM}", secret.key);
        }
    }
    Ok(())
}

/// A value of a Secret.
struct Secret {
    /// Name of the Secret, and key of the value.
    key: String,
    /// The value in base64, and its lines: in YAML and JSON they are indented or joined.
    parts: Vec<String>,
}

/// The values of the Secrets of Tulle, except certificates.
fn secrets(kube: &Kube) -> Result<Vec<Secret>> {
    let listed = kube.run(&["-n", SYSTEM, "get", "secrets", "-o", VALUES])?;
    let mut secrets = Vec::new();
    for line in listed.lines() {
        let mut words = line.splitn(3, ' ');
        let (Some(key), Some(encoded), Some(quoted)) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        let decoded = quoted.trim_matches('"');
        if decoded.starts_with(CERTIFICATE) {
            continue;
        }
        let lines = decoded.split("\\n").chain([encoded]).filter(|part| part.len() > LONG_ENOUGH);
        secrets.push(Secret { key: key.to_owned(), parts: lines.map(str::to_owned).collect() });
    }
    for key in ["tulle-root/ca.key", "tulle-webhook-authority/ca.key"] {
        let known = secrets.iter().any(|secret| secret.key == key && secret.parts.len() > 2);
        ensure!(known, "{key} is not among the Secrets of {SYSTEM}");
    }
    Ok(secrets)
}

/// The versions of the namespace's objects, once nobody changes them any more.
fn calm(field: &TestNamespace<'_>) -> Result<BTreeMap<String, String>> {
    let mut last = versions(field)?;
    let mut same = 0;
    field.kube.wait_for("the namespace to become calm", 90, || {
        let now = versions(field)?;
        same = if now == last { same + 1 } else { 0 };
        last = now;
        // Five seconds: statuses are written within two.
        Ok(same >= 10)
    })?;
    Ok(last)
}

/// Kind, namespace and name of each object, and its version.
fn versions(field: &TestNamespace<'_>) -> Result<BTreeMap<String, String>> {
    let name = "{.kind}/{.metadata.namespace}/{.metadata.name}";
    let line = format!("jsonpath={{range .items[*]}}{name} {{.metadata.resourceVersion}}{{\"\\n\"}}{{end}}");
    let mut text = field.kubectl(&["get", KINDS, "-o", &line])?;
    text.push_str(&field.kube.run(&["-n", SYSTEM, "get", INSTALLED, "-l", PART_OF, "-o", &line])?);
    let namespace = "jsonpath=Namespace/{.metadata.name} {.metadata.resourceVersion}";
    let version = field.kube.run(&["get", "namespace", &field.namespace, "-o", namespace])?;
    text.push_str(&version);
    let lines = text.lines().filter_map(|line| line.split_once(' '));
    Ok(lines.map(|(name, version)| (name.to_owned(), version.to_owned())).collect())
}

/// The snapshot of each sidecar of the namespace, by pod: what it enforces, as its admin port shows it, and what the
/// operator has sent to it and heard from it.
fn sidecars(field: &TestNamespace<'_>) -> Result<BTreeMap<String, Value>> {
    let listed = field.kube.tulle_json(&["-n", &field.namespace, "pods"])?;
    let mut sidecars = BTreeMap::new();
    for known in listed["sidecars"].as_array().context("tulle pods lists no sidecars")? {
        let pod = known["pod"].as_str().context("tulle pods lists a sidecar without a pod")?;
        let path = format!("/api/v1/namespaces/{}/pods/{pod}:26152/proxy/config", field.namespace);
        let text = field.kube.run(&["get", "--raw", &path])?;
        let mut config: Value =
            serde_json::from_str(&text).with_context(|| format!("/config of {pod} is not JSON: {text}"))?;
        // A sidecar shows them in no order.
        if let Some(destinations) = config.get_mut("destinations").and_then(Value::as_array_mut) {
            destinations.sort_by_key(|destination| destination["address"].to_string());
        }
        sidecars.insert(pod.to_owned(), json!({"sidecar": config, "operator": known}));
    }
    Ok(sidecars)
}

/// Snapshots without a policy or a destination would be the same whatever the commands did.
fn has_configuration(sidecars: &BTreeMap<String, Value>, web: &str) -> Result<()> {
    let (web, client) = (sidecars.get(web), sidecars.get("client"));
    let (web, client) = web.zip(client).with_context(|| format!("not all sidecars: {sidecars:?}"))?;
    ensure!(!web["sidecar"]["inbound"]["accessPolicy"].is_null(), "web enforces no policy: {web:#}");
    let destinations = client["sidecar"]["destinations"].as_array();
    ensure!(destinations.is_some_and(|all| !all.is_empty()), "client has no destination: {client:#}");
    for sidecar in [web, client] {
        let [resources, acknowledged] =
            ["resources", "acknowledged"].map(|name| sidecar["operator"][name].as_u64());
        ensure!(resources > Some(0) && resources == acknowledged, "not all is acknowledged: {sidecar:#}");
    }
    Ok(())
}

/// How many sidecars the leader counts as connected.
fn connected(kube: &Kube) -> Result<u64> {
    let lease = kube.json(&["-n", SYSTEM, "get", "lease", "tulle-operator"])?;
    let holder = lease["spec"]["holderIdentity"].as_str().unwrap_or("");
    operator_metric(kube, holder.split('/').next().unwrap_or(""), CONNECTED)
}

/// How many discovery streams sidecars have opened at any replica, also those that have ended.
fn opened(kube: &Kube) -> Result<u64> {
    let pods = kube.pods(SYSTEM, "app=tulle-operator")?;
    ensure!(!pods.is_empty(), "the operator has no pod");
    pods.iter().map(|pod| operator_metric(kube, pod, OPENED)).sum()
}

/// A metric without labels of one replica of the operator.
fn operator_metric(kube: &Kube, pod: &str, metric: &str) -> Result<u64> {
    let path = format!("/api/v1/namespaces/{SYSTEM}/pods/{pod}:26161/proxy/metrics");
    let metrics = kube.run(&["get", "--raw", &path])?;
    let mut samples = metrics.lines().filter_map(|line| line.split_once(' '));
    let count = samples.find(|(name, _)| *name == metric).and_then(|(_, value)| value.parse().ok());
    count.with_context(|| format!("pod {pod} has no metric {metric}: {metrics}"))
}
