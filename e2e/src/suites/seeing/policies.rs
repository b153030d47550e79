//! What is known of manifests before they are applied: `tulle diff`, `lint` and `inject`.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{Scratch, WINDOW, enforced, find, fresh, requests, says};
use crate::cli::exit;
use crate::kubectl::Kube;
use crate::suites::namespace::{TestNamespace, deployment};

/// Requests of each client that the policy does not allow.
const DENIED: u64 = 10;

pub(super) fn denied(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, &fresh("t-see-diff"))?;
    let scratch = Scratch::new("diff")?;
    field.service("web", 1, &[])?;
    field.load("load", "web:80", 20)?;
    field.client("stranger")?;
    field.plain_client("plain")?;
    let clients = ["stranger", "plain"];
    clients.iter().try_for_each(|client| ask(&field, client).map(drop))?;
    kube.wait_for("the traffic of all three", 60, || {
        let edges = kube.tulle_json(&["-n", &field.namespace, "edges", "--window", WINDOW])?;
        let from = |name: &str| find(&edges["edges"], |edge| edge["source"]["name"] == name);
        let plain = find(&edges["edges"], |edge| edge["source"]["kind"] == "Plain");
        Ok(requests(&from("load")) > 0 && requests(&from("stranger")) == DENIED && requests(&plain) == DENIED)
    })?;

    let file = scratch.file("policy.yaml", &only("default", "Enforce").to_string())?;
    let diff = |code, more: &[&str]| {
        kube.tulle_expecting(code, &[&["-n", &field.namespace, "diff", "-f", &file], more].concat())
    };
    let found = diff(exit::FINE, &["-o", "json"])?.json()?;
    let found = found.get(0).context("there is no answer about the policy")?;
    ensure!(found["pods"] == 1, "one sidecar would enforce it: {found}");
    let rows = found["rows"].as_array().context("there are no rows")?;
    ensure!(rows.len() == clients.len(), "{} edges would change: {found}", rows.len());
    let of = |kind: &str| find(&found["rows"], |row| row["edge"]["source"]["kind"] == kind);
    for row in [of("ServiceAccount"), of("Plain")] {
        ensure!(row["verdict"] == "denied" && requests(&row["edge"]) == DENIED, "{row}");
    }
    ensure!(of("ServiceAccount")["edge"]["source"]["name"] == "stranger", "{found}");
    let table = diff(exit::FINDINGS, &["--fail-on", "denied"])?.stdout;
    says(&table, &["stranger", "denied", "1 sidecar would enforce it"])?;
    // Nothing was applied, and a policy that allows everybody changes nothing.
    ensure!(field.get("meshpolicies", ".items[*].metadata.name")?.is_empty(), "diff has applied the policy");
    let mut open = only("default", "Enforce");
    open["spec"]["access"] = json!({"deny": [{"from": [{"serviceAccount": "nobody"}]}]});
    let open = scratch.file("open.yaml", &open.to_string())?;
    let nothing = ["-n", &field.namespace, "diff", "-f", &open, "--fail-on", "depends"];
    says(&kube.tulle(&nothing)?, &["nothing of the traffic of the last "])?;

    let counted = |labels: &[&str]| {
        let pods = field.pods("web")?;
        let pod = pods.first().context("web has no pod")?;
        field.metric(pod, labels)
    };
    let would_deny = ["tulle_events_total{", "kind=\"policy_would_deny\""];
    let denied = ["tulle_failures_total{", "reason=\"PolicyDenied\""];
    // Shadow counts what the list says and refuses nothing; Enforce refuses as many.
    for (mode, labels, code) in [("Shadow", would_deny, "200"), ("Enforce", denied, "403")] {
        field.apply(only("default", mode))?;
        enforced(&field, "web")?;
        ensure!(counted(&labels)? == 0, "{mode}: the load is denied, which diff does not say");
        for client in clients {
            let before = counted(&labels)?;
            let codes = ask(&field, client)?;
            ensure!(codes.lines().all(|line| line == code), "{mode}: {client} has got {codes}");
            let after = counted(&labels)?;
            ensure!(after - before == DENIED, "{mode} denies {} of {DENIED} of {client}", after - before);
        }
    }
    Ok(())
}

/// The status of each response.
fn ask(field: &TestNamespace<'_>, client: &str) -> Result<String> {
    let ask = format!(
        "for i in $(seq {DENIED}); do curl -s -m 8 -o /dev/null -w '%{{http_code}}\\n' http://web/; done"
    );
    field.exec(client, &["/bin/sh", "-c", &ask])
}

/// A policy that lets one service account call web.
fn only(account: &str, mode: &str) -> Value {
    let allow = json!([{"from": [{"serviceAccount": account}]}]);
    let spec =
        json!({"target": {"kind": "Service", "name": "web"}, "mode": mode, "access": {"allow": allow}});
    json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy", "metadata": {"name": "web"}, "spec": spec})
}

pub(super) fn manifests(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-see-lint")?;
    let plain = TestNamespace::plain(kube, "t-see-bare")?;
    let scratch = Scratch::new("lint")?;
    field.apply(json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "web"}}))?;
    field.injects()?;
    inject(&field, &plain, &scratch)?;
    lint(&field, &scratch)?;
    let objects = "pods,deployments,services,meshpolicies,canaries";
    for namespace in [&field, &plain] {
        let left = namespace.kubectl(&["get", objects, "-o", "name"])?;
        ensure!(left.is_empty(), "reading manifests has created {left}");
    }
    Ok(())
}

fn inject(field: &TestNamespace<'_>, plain: &TestNamespace<'_>, scratch: &Scratch) -> Result<()> {
    let kube = field.kube;
    let mut workload = deployment("web", 2, &[]);
    let file = scratch.file("web.yaml", &workload.to_string())?;
    let pod = kube.tulle(&["-n", &field.namespace, "inject", "-f", &file])?;
    says(&pod, &["kind: Pod", "tulle-init", "tulle-proxy", "tulle.dev/sidecar"])?;
    let refused = kube.tulle_expecting(exit::FINDINGS, &["-n", &plain.namespace, "inject", "-f", &file])?;
    says(&refused.stderr, &["hint: kubectl label", &plain.namespace, "tulle.dev/inject=enabled"])?;
    // What the webhook warns of and what it rejects.
    workload["spec"]["template"]["metadata"]["annotations"] = json!({"tulle.dev/colour": "red"});
    let file = scratch.file("colour.yaml", &workload.to_string())?;
    let warned = kube.tulle_expecting(exit::FINE, &["-n", &field.namespace, "inject", "-f", &file])?;
    says(&warned.stderr, &["warning:", "annotation tulle.dev/colour"])?;
    workload["spec"]["template"]["spec"]["containers"][0]["securityContext"] = json!({"runAsUser": 4150});
    let file = scratch.file("user.yaml", &workload.to_string())?;
    let refused = kube.tulle_expecting(exit::FINDINGS, &["-n", &field.namespace, "inject", "-f", &file])?;
    says(&refused.stderr, &["error:", "uid 4150"])?;
    let file = scratch.file("policy.yaml", &only("web", "Enforce").to_string())?;
    let nothing = kube.tulle_expecting(exit::FAILED, &["-n", &field.namespace, "inject", "-f", &file])?;
    says(&nothing.stderr, &["neither a Pod nor a workload"])
}

fn lint(field: &TestNamespace<'_>, scratch: &Scratch) -> Result<()> {
    let lint = |code, file: &str, more: &[&str]| {
        let arguments = [&["-n", &field.namespace, "lint", "-f", file], more].concat();
        field.kube.tulle_expecting(code, &arguments).map(|printed| printed.stdout)
    };
    let good = scratch.file("good.yaml", &only("web", "Enforce").to_string())?;
    ensure!(lint(exit::FINE, &good, &[])?.is_empty(), "a valid policy has findings");
    // The API server takes it, and knows no Service web.
    let found = lint(exit::FINE, &good, &["--with-cluster"])?;
    says(&found, &["warning T1903", "MeshPolicy t-see-lint/web"])?;
    lint(exit::FINDINGS, &good, &["--with-cluster", "--fail-on", "warning"])?;
    let mut policy = only("web", "Enforce");
    policy["spec"]["timeout"] = json!({"reqest": "2s"});
    let misspelt = scratch.file("misspelt.yaml", &policy.to_string())?;
    let found = lint(exit::FINDINGS, &misspelt, &[])?;
    says(&found, &["error T1101", "spec.timeout.reqest", "hint: write request?", &misspelt])?;
    lint(exit::FINE, &misspelt, &["--fail-on", "never"])?;
    policy["spec"]["timeout"] = json!({"request": "soon"});
    let invalid = scratch.file("invalid.yaml", &policy.to_string())?;
    let found = lint(exit::FINDINGS, &invalid, &["-o", "json"])?;
    let found: Value = serde_json::from_str(&found)?;
    let ids: Vec<&str> =
        found.as_array().into_iter().flatten().filter_map(|one| one["id"].as_str()).collect();
    ensure!(!ids.is_empty() && ids.iter().all(|id| *id == "T1103"), "{found}");
    let broken = scratch.file("broken.yaml", "kind: [")?;
    says(&lint(exit::FINDINGS, &broken, &[])?, &["error T1001", "broken.yaml"])?;
    let missing = scratch.path("missing.yaml")?;
    lint(exit::FAILED, &missing, &[]).map(drop)
}
