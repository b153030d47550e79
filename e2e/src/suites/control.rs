//! The control plane's rights, metrics and readiness, and what it leaves alone. These tests change nothing of
//! the Tulle that other tests use.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::namespace::{TestNamespace, borrows};
use super::{Test, operations};
use crate::kubectl::Kube;

pub(super) const TESTS: &[Test] = &[
    ("a Terminating namespace is left alone", terminating),
    ("the operator's metrics are OpenMetrics, and one replica leads", metrics),
    ("the service accounts of operator and webhook may do what they need and no more", rights),
    (
        "while the webhook cannot reach the API server it is alive, not ready, and not restarted",
        operations::webhook::api_server_out_of_reach,
    ),
    ("an operator is ready only when its discovery port listens", operations::operator::ready_when_listening),
    (
        "while nodes are drained in turn, every new pod gets a sidecar and one replica stays available",
        operations::admission::drained,
    ),
];

/// Longer than the time after which the operator writes every bundle again: 30 s.
const BEYOND_REFRESH: Duration = Duration::from_secs(34);
/// The namespace that stays Terminating.
const ENDING: &str = "t-control-ending";

fn terminating(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, ENDING)?;
    let outcome = left_alone(&field);
    // Without the finalizer the namespace can end.
    let free = json!({"metadata": {"finalizers": null}}).to_string();
    let freed = field.kubectl(&["patch", "configmap", "held", "--type=merge", "-p", &free]);
    outcome?;
    freed?;
    kube.wait_for("the namespace to end", 60, || {
        Ok(kube.run(&["get", "namespace", ENDING, "--ignore-not-found", "-o", "name"])?.is_empty())
    })
}

fn left_alone(field: &TestNamespace<'_>) -> Result<()> {
    let kube = field.kube;
    let finalizers = json!(["tulle.dev/test"]);
    field.apply(json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "held", "finalizers": finalizers}}))?;
    kube.wait_for("the trust bundle", 60, || has_bundle(field))?;
    let written = Instant::now();
    kube.run(&["delete", "namespace", ENDING, "--wait=false"])?;
    kube.wait_for("the bundle to go with the namespace", 60, || Ok(!has_bundle(field)?))?;
    let phase = kube.run(&["get", "namespace", ENDING, "-o", "jsonpath={.status.phase}"])?;
    ensure!(phase == "Terminating", "the namespace is {phase}");
    // New namespaces make the operator write bundles, which must leave this namespace out.
    let mut others = Vec::new();
    for number in 0..4 {
        let other = TestNamespace::meshed(kube, &format!("t-control-other-{number}"))?;
        kube.wait_for("the bundle of another namespace", 60, || has_bundle(&other))?;
        others.push(other);
    }
    thread::sleep(BEYOND_REFRESH.saturating_sub(written.elapsed()));
    ensure!(!has_bundle(field)?, "the bundle was written again");
    let system = ["-n", "tulle-system", "logs", "-l", "app=tulle-operator", "--since=60s", "--tail=-1"];
    let logs = kube.run(&system)?;
    let tried = logs.lines().find(|line| line.contains(ENDING) && line.contains("cannot write"));
    ensure!(tried.is_none(), "the operator tried to write to the namespace: {}", tried.unwrap_or(""));
    Ok(())
}

fn has_bundle(field: &TestNamespace<'_>) -> Result<bool> {
    let get = ["get", "configmap", "tulle-trust", "--ignore-not-found", "-o", "name"];
    Ok(!field.kubectl(&get)?.is_empty())
}

/// Reads metrics with the parser of Prometheus' own client library, which fails at whatever is not OpenMetrics. Prints the
/// content type, and of every family its type and the sum of its samples.
const SCRAPE: &str = r#"
import json, sys, urllib.request
from prometheus_client.openmetrics.parser import text_string_to_metric_families
answer = urllib.request.urlopen(sys.argv[1], timeout=8)
families = text_string_to_metric_families(answer.read().decode())
sums = {f.name: {"type": f.type, "sum": sum(s.value for s in f.samples)} for f in families}
print(json.dumps({"type": answer.headers["Content-Type"], "families": sums}))
"#;

fn metrics(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = TestNamespace::plain(kube, "t-control-metrics")?;
    field.client("prometheus")?;
    kube.wait_for("one replica to lead", 60, || {
        let addresses = "jsonpath={.items[*].status.podIP}";
        let addresses =
            kube.run(&["-n", "tulle-system", "get", "pods", "-l", "app=tulle-operator", "-o", addresses])?;
        let mut leaders = 0.0;
        for address in addresses.split_whitespace() {
            leaders += scrape(&field, address)?["tulle_operator_leader"]["sum"].as_f64().unwrap_or(0.0);
        }
        Ok(leaders == 1.0)
    })
}

/// The metric families of an operator.
fn scrape(field: &TestNamespace<'_>, address: &str) -> Result<Value> {
    let host = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
    let url = format!("http://{host}:26161/metrics");
    let printed = field.exec("prometheus", &["/usr/bin/python3", "-c", SCRAPE, &url])?;
    let scraped: Value =
        serde_json::from_str(&printed).with_context(|| format!("the scrape printed {printed:?}"))?;
    let content_type = scraped["type"].as_str().unwrap_or("");
    ensure!(
        content_type.starts_with("application/openmetrics-text; version=1.0.0"),
        "the content type is {content_type:?}"
    );
    let families = &scraped["families"];
    for (name, wanted) in [
        ("tulle_operator_leader", "gauge"),
        ("tulle_operator_sidecars", "gauge"),
        ("tulle_operator_pods_without_sidecar", "gauge"),
        ("tulle_operator_discovery_streams", "counter"),
        ("tulle_operator_refusals", "counter"),
        ("tulle_operator_requests", "counter"),
        ("tulle_canary_phase", "gauge"),
        ("tulle_canary_weight", "gauge"),
        ("tulle_canary_last_change_timestamp_seconds", "gauge"),
    ] {
        let found = &families[name]["type"];
        ensure!(*found == wanted, "{name} is of type {found}, expected {wanted}");
    }
    Ok(families.clone())
}

/// What an account may do, or not: `VERB RESOURCE[.GROUP][/SUBRESOURCE] [NAMESPACE][/NAME]`; without a namespace, in all
/// of them.
struct Account {
    name: &'static str,
    may: &'static [&'static str],
    may_not: &'static [&'static str],
}

const ACCOUNTS: [Account; 3] = [
    Account {
        name: "tulle-operator",
        may: &[
            "list namespaces",
            "list pods",
            "watch services",
            "list endpointslices.discovery.k8s.io",
            "watch replicasets.apps",
            "patch pods/status default/web",
            "list canaries.tulle.dev",
            "patch canaries.tulle.dev/status default/web",
            "patch meshpolicies.tulle.dev/status default/web",
            "patch meshconfigs.tulle.dev/status /mesh",
            "create meshconfigs.tulle.dev /mesh",
            "create configmaps default/tulle-trust",
            "patch configmaps default/tulle-trust",
            "create tokenreviews.authentication.k8s.io",
            "create subjectaccessreviews.authorization.k8s.io",
            "create events.events.k8s.io default",
            "get secrets tulle-system/tulle-root",
            "create secrets tulle-system",
            "update leases.coordination.k8s.io tulle-system/tulle-operator",
        ],
        may_not: &[
            // Only with config/overlays/undo.
            "patch deployments.apps default/web",
            "get pods default/web",
            "create pods default",
            "patch pods default/web",
            "delete pods default/web",
            "create pods/exec default/web",
            "patch pods/ephemeralcontainers default/web",
            "get configmaps default/tulle-trust",
            "create configmaps default/other",
            "patch configmaps kube-system/other",
            "list secrets",
            "list secrets tulle-system",
            "get secrets default/tulle-root",
            "get secrets tulle-system/tulle-webhook-authority",
            "update secrets tulle-system/tulle-root",
            "create secrets default",
            "create deployments.apps default",
            "delete deployments.apps default/web",
            "patch statefulsets.apps default/web",
            "patch canaries.tulle.dev default/web",
            "patch meshconfigs.tulle.dev /other",
            "delete meshconfigs.tulle.dev /mesh",
            "update leases.coordination.k8s.io tulle-system/other",
            "update leases.coordination.k8s.io kube-system/kube-scheduler",
            "create serviceaccounts/token default/web",
            "create clusterrolebindings.rbac.authorization.k8s.io",
            "impersonate users",
        ],
    },
    Account {
        name: "tulle-webhook",
        may: &[
            "watch namespaces",
            "list limitranges",
            "list resourcequotas",
            "list canaries.tulle.dev",
            "watch meshconfigs.tulle.dev",
            "get deployments.apps default/web",
            "get mutatingwebhookconfigurations.admissionregistration.k8s.io /tulle",
            "patch mutatingwebhookconfigurations.admissionregistration.k8s.io /tulle",
            "patch validatingwebhookconfigurations.admissionregistration.k8s.io /tulle",
            "get secrets tulle-system/tulle-webhook-authority",
            "create secrets tulle-system",
            "list endpointslices.discovery.k8s.io tulle-system",
        ],
        may_not: &[
            "list secrets",
            "list secrets tulle-system",
            "get secrets tulle-system/tulle-root",
            "get secrets default/tulle-webhook-authority",
            "update secrets tulle-system/tulle-webhook-authority",
            "delete secrets tulle-system/tulle-webhook-authority",
            "list pods",
            "create pods default",
            "list configmaps",
            "patch namespaces /default",
            "patch deployments.apps default/web",
            "list endpointslices.discovery.k8s.io",
            "patch canaries.tulle.dev default/web",
            "patch canaries.tulle.dev/status default/web",
            "create mutatingwebhookconfigurations.admissionregistration.k8s.io",
            "patch mutatingwebhookconfigurations.admissionregistration.k8s.io /other",
            "delete mutatingwebhookconfigurations.admissionregistration.k8s.io /tulle",
            "update leases.coordination.k8s.io tulle-system/tulle-operator",
            "impersonate users",
        ],
    },
    // Whoever may look has a token of it, and so its rights at the API server.
    Account {
        name: "tulle-viewer",
        may: &[],
        may_not: &[
            "list pods",
            "list pods tulle-system",
            "get leases.coordination.k8s.io tulle-system/tulle-operator",
            "create pods/portforward tulle-system",
            "create serviceaccounts/token tulle-system/tulle-viewer",
            "get telemetry.tulle.dev",
            "list canaries.tulle.dev",
            "patch canaries.tulle.dev default/web",
            "get secrets tulle-system/tulle-root",
        ],
    },
];

fn rights(kube: &Kube) -> Result<()> {
    let mut wrong = Vec::new();
    for Account { name, may, may_not } in &ACCOUNTS {
        let actions: Vec<&str> = may.iter().chain(*may_not).copied().collect();
        let reviews: Vec<Value> = actions.iter().map(|action| review(name, action)).collect();
        let list = json!({"apiVersion": "v1", "kind": "List", "items": reviews});
        let allowed = kube.create(&list.to_string(), "jsonpath={.status.allowed}{\"\\n\"}")?;
        let allowed: Vec<&str> = allowed.lines().collect();
        ensure!(allowed.len() == actions.len(), "{} answers to {} questions", allowed.len(), actions.len());
        for (number, (action, allowed)) in actions.iter().zip(allowed).enumerate() {
            let wanted = if number < may.len() { "true" } else { "false" };
            if allowed != wanted {
                wrong.push(format!("{name}: {action}: allowed: {allowed}, expected {wanted}"));
            }
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// The question whether an account may do something.
fn review(account: &str, action: &str) -> Value {
    let mut words = action.split(' ');
    let (verb, what) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    let place = words.next().unwrap_or("");
    let (what, subresource) = what.split_once('/').unwrap_or((what, ""));
    let (resource, group) = what.split_once('.').unwrap_or((what, ""));
    let (namespace, name) = place.split_once('/').unwrap_or((place, ""));
    json!({
        "apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview",
        "spec": {
            "user": format!("system:serviceaccount:tulle-system:{account}"),
            "groups": ["system:serviceaccounts", "system:serviceaccounts:tulle-system", "system:authenticated"],
            "resourceAttributes": {
                "verb": verb, "group": group, "resource": resource, "subresource": subresource,
                "namespace": namespace, "name": name,
            },
        },
    })
}
