//! Rollouts on a real cluster under load. The demo shows promotion and a bad version; these tests add every
//! kind of workload, undo, and missing objects.

mod bad;
mod decisions;
mod kstatus;
mod services;
mod strategies;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::Test;
use super::namespace::{TestNamespace, pod_template, service};
use crate::kubectl::Kube;

pub(super) const TESTS: &[Test] = &[
    ("a canary is promoted under load without a lost request", promoted),
    ("a bad canary is stopped, and its pods are parked", stopped),
    ("kubectl rollout undo during a rollout restores the stable version", undo_in_the_middle),
    ("a StatefulSet canary parks its highest ordinal", stateful_set),
    ("a DaemonSet canary parks its surge pod beside the stable one", daemon_set),
    ("onFailure: Undo restores the template of a version that failed", undone),
    ("a Canary reports a missing target, and picks it up when it appears", missing_target),
    ("deleting a Canary opens the gates", deleted),
    (
        "a version that closes half of its connections without an answer is stopped, although retries hide it from users",
        bad::closes,
    ),
    ("a version that adds 1.5 s to 40 % of its requests is stopped by its objective", bad::slow),
    ("a version that answers 403 to 40 % is held, and the status says why", bad::forbids),
    ("of two bad versions, a canary that fails every request is never promoted", bad::both_bad),
    ("an objective holds whatever the stable version does", bad::objective),
    ("a client that never acknowledges does not keep a bad version alive", bad::silent_client),
    (
        "a good version of a TCP service is promoted, and one that resets its connections is stopped",
        services::tcp,
    ),
    (
        "with a newer version in the middle no request is lost, and the older one leaves the Service",
        decisions::newer,
    ),
    (
        "a failed version stays Failed when its Deployment is scaled to zero and back",
        decisions::scaled_to_zero,
    ),
    (
        "a version whose last stable pod is scaled away is not promoted unjudged, and takes all requests",
        decisions::scaled_down,
    ),
    ("kubectl events shows the start of each of two rollouts", decisions::events),
    ("kubectl rollout undo to an approved revision takes no second trial", decisions::undo_approved),
    ("promote for another revision is ignored and says so", decisions::promote_other),
    ("abort works during a promotion", decisions::abort_promotion),
    (
        "with sessionAffinity: ClientIP a client stays with its pod at rest, and with its version during a rollout",
        services::affinity,
    ),
    ("behind a headless Service the rollout holds and names the Service", services::headless),
    ("a Service with two workloads shares the weight of the one that has a Canary", services::two_workloads),
    ("only insiders, by header or cookie, get a version in a match step", strategies::insiders),
    ("a mirror step copies a fifth of the GETs, and no client sees the new version", strategies::copies),
    ("blue/green switches at once, back at an abort, and loses no request", strategies::blue_green),
    ("a user with a cookie never gets v1 after v2 within a rollout", strategies::sticky),
    (
        "to kstatus, with which Flux waits, a Canary is Current while it holds and while it is paused",
        kstatus::while_it_holds,
    ),
    (
        "a Deployment that is held back past its deadline is in progress, and has failed once its version has",
        kstatus::past_the_deadline,
    ),
];

fn promoted(kube: &Kube) -> Result<()> {
    let field =
        shop(kube, "t-promote", json!([{"weight": 20, "hold": "4s"}, {"weight": 50, "hold": "4s"}]), 30)?;
    // The one test with the default warm-up.
    patch(&field, &json!({"judge": {"warmUp": null}}))?;
    let (failed, why) = field.failed_during("load", || {
        deploy(&field, "v2", 0)?;
        kube.wait_for("the promotion", 120, || {
            Ok(status(&field, ".history[0].outcome")? == "Promoted" && status(&field, ".phase")? == "Stable")
        })
    })?;
    ensure!(failed == 0, "{failed} requests were lost: {why}");
    let versions = field.account("load")?.versions;
    ensure!(versions["v2"].as_u64() > Some(0), "no answer came from v2: {versions}");
    Ok(())
}

fn stopped(kube: &Kube) -> Result<()> {
    let field = shop(kube, "t-stop", json!([{"weight": 20, "hold": "60s"}]), 50)?;
    deploy(&field, "v2", 30)?;
    kube.wait_for("the bad version to be stopped", 90, || Ok(status(&field, ".phase")? == "Failed"))?;
    kube.wait_for("the weight to be acknowledged", 60, || Ok(status(&field, ".weightSummary")? == "0%"))?;
    let (failed, why) = field.failed_during("load", || Ok(()))?;
    ensure!(failed == 0, "{failed} requests failed after the bad version was stopped: {why}");
    let ready = field.get("deployment/web", ".status.updatedReplicas")?;
    ensure!(ready == "1", "{ready} pods of the bad version, expected only the parked one");
    let because = status(&field, ".evidenceSummary")?;
    ensure!(because.contains("worse than 1.5x"), "the evidence summary does not give the reason: {because}");
    Ok(())
}

fn undo_in_the_middle(kube: &Kube) -> Result<()> {
    let field = shop(kube, "t-undo", json!([{"weight": 20, "hold": "600s"}]), 30)?;
    let (failed, why) = field.failed_during("load", || {
        deploy(&field, "v2", 0)?;
        kube.wait_for("20% of the traffic on v2", 60, || Ok(status(&field, ".weightSummary")? == "20%"))?;
        field.kubectl(&["rollout", "undo", "deployment/web"])?;
        kube.wait_for("the stable version to be restored", 60, || {
            Ok(status(&field, ".phase")? == "Stable" && status(&field, ".canaryRevision")?.is_empty())
        })
    })?;
    ensure!(failed == 0, "{failed} requests were lost: {why}");
    field.kube.rolled_out("t-undo", "deployment/web", 60)
}

fn stateful_set(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-stateful")?;
    field.apply(json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "db"}}))?;
    field.apply(service("db", json!({"clusterIP": "None"})))?;
    let set = |version: &str| {
        let arguments: Vec<String> =
            ["serve", "--name=db", version].iter().map(|a| (*a).to_owned()).collect();
        json!({"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "db"}, "spec": {
            "serviceName": "db", "replicas": 2, "selector": {"matchLabels": {"app": "db"}}, "template": pod_template("db", &arguments),
        }})
    };
    field.apply(set("--version=v1"))?;
    field.kube.rolled_out("t-stateful", "statefulset/db", 120)?;
    let said = field.apply(canary("db", "StatefulSet", json!([{"pause": {}}]), 1))?;
    ensure!(said.contains("has no surge"), "no warning: {said}");
    kube.wait_for("the stable revision", 60, || Ok(field.get("canary/db", ".status.phase")? == "Stable"))?;
    field.apply(set("--version=v2"))?;
    kube.wait_for("db-1 to be parked", 90, || {
        let gate = field.get("pod/db-1", ".spec.readinessGates[0].conditionType")?;
        let conditions = kube.json(&["-n", "t-stateful", "get", "pod", "db-1"])?;
        let of = |kind: &str| condition(&conditions, kind);
        Ok(gate == "tulle.dev/approved" && of("ContainersReady") == "True" && of("Ready") == "False")
    })?;
    ensure!(field.get("pod/db-0", ".spec.containers[0].args[2]")? == "--version=v1", "db-0 was replaced too");
    // On the way back to v1, the StatefulSet's controller waits for the parked pod before it replaces that
    // pod.
    field.apply(set("--version=v1"))?;
    field.kube.rolled_out("t-stateful", "statefulset/db", 120)?;
    ensure!(field.get("pod/db-1", ".spec.containers[0].args[2]")? == "--version=v1", "db-1 still runs v2");
    field.apply(set("--version=v2"))?;
    kube.wait_for("the rollout of v2 to pause", 90, || {
        Ok(field.get("canary/db", ".status.phase")? == "Paused")
    })?;
    field.kubectl(&["annotate", "canary", "db", "tulle.dev/action=promote@1"])?;
    field.kube.rolled_out("t-stateful", "statefulset/db", 120)
}

fn daemon_set(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-daemon")?;
    field.apply(json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "agent"}}))?;
    let set = |version: &str| {
        let arguments: Vec<String> =
            ["serve", "--name=agent", version].iter().map(|a| (*a).to_owned()).collect();
        json!({"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "agent"}, "spec": {
            "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "selector": {"matchLabels": {"app": "agent"}}, "template": pod_template("agent", &arguments),
        }})
    };
    field.apply(set("--version=v1"))?;
    field.kube.rolled_out("t-daemon", "daemonset/agent", 120)?;
    field.apply(canary("agent", "DaemonSet", json!([{"pause": {}}]), 1))?;
    kube.wait_for("the stable revision", 60, || Ok(field.get("canary/agent", ".status.phase")? == "Stable"))?;
    field.apply(set("--version=v2"))?;
    kube.wait_for("a parked pod of v2 beside a ready one of v1", 90, || {
        let pods = kube.json(&["-n", "t-daemon", "get", "pods"])?;
        let seen = |version: &str, ready: &str| {
            pods["items"].as_array().into_iter().flatten().any(|pod| {
                pod["spec"]["containers"][0]["args"][2] == version
                    && condition(pod, "ContainersReady") == "True"
                    && condition(pod, "Ready") == ready
            })
        };
        Ok(seen("--version=v1", "True") && seen("--version=v2", "False"))
    })?;
    field.kubectl(&["annotate", "canary", "agent", "tulle.dev/action=promote@1"])?;
    field.kube.rolled_out("t-daemon", "daemonset/agent", 120)
}

fn undone(kube: &Kube) -> Result<()> {
    let field = shop(kube, "t-undone", json!([{"weight": 20, "hold": "60s"}]), 50)?;
    patch(&field, &json!({"onFailure": "Undo"}))?;
    kube.wait_for("the missing right in the condition Undo", 60, || {
        Ok(status(&field, ".conditions[?(@.type==\"Undo\")].reason")? == "NotPermitted")
    })?;
    permit_undo(&field)?;
    let before = field.get("deployment/web", ".spec.template")?;
    deploy(&field, "v2", 30)?;
    kube.wait_for("the bad version to be undone", 90, || {
        Ok(status(&field, ".history[0].outcome")? == "Failed" && status(&field, ".phase")? == "Stable")
    })?;
    let after = field.get("deployment/web", ".spec.template")?;
    ensure!(after == before, "the template is {after} instead of {before}");
    field.kube.rolled_out("t-undone", "deployment/web", 60)
}

/// Lets the operator patch Deployments of one namespace, as config/overlays/undo does for the whole cluster.
fn permit_undo(field: &TestNamespace<'_>) -> Result<()> {
    let role = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role",
        "metadata": {"name": "tulle-operator-undo"},
        "rules": [{"apiGroups": ["apps"], "resources": ["deployments"], "verbs": ["get", "patch"]}]});
    field.apply(role)?;
    let subject = json!({"kind": "ServiceAccount", "name": "tulle-operator", "namespace": "tulle-system"});
    let binding = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
        "metadata": {"name": "tulle-operator-undo"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "tulle-operator-undo"},
        "subjects": [subject]});
    field.apply(binding).map(drop)
}

fn missing_target(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-missing")?;
    let said = field.apply(canary("web", "Deployment", json!([{"weight": 50, "hold": "5s"}]), 10))?;
    ensure!(said.contains("there is no Deployment web yet"), "no warning: {said}");
    kube.wait_for("reason TargetNotFound in the condition", 60, || {
        Ok(status(&field, ".conditions[?(@.type==\"Ready\")].reason")? == "TargetNotFound")
    })?;
    field.service("web", 1, &[])?;
    kube.wait_for("the target to be picked up", 60, || {
        Ok(field.get("canary/web", ".status.phase")? == "Stable")
    })
}

fn deleted(kube: &Kube) -> Result<()> {
    let field = shop(kube, "t-deleted", json!([{"pause": {}}]), 10)?;
    deploy(&field, "v2", 0)?;
    kube.wait_for("the rollout to pause", 60, || Ok(status(&field, ".phase")? == "Paused"))?;
    field.kubectl(&["delete", "canary", "web"])?;
    field.kube.rolled_out("t-deleted", "deployment/web", 90)
}

/// A service of two pods under load, watched by a Canary.
fn shop<'a>(kube: &'a Kube, namespace: &str, steps: Value, requests: u32) -> Result<TestNamespace<'a>> {
    let field = TestNamespace::meshed(kube, namespace)?;
    field.service("web", 2, &["--version=v1"])?;
    field.load("load", "web:80", 100)?;
    watch(&field, canary("web", "Deployment", steps, requests))?;
    Ok(field)
}

/// Creates Canary web, and waits until it has recorded the stable revision.
fn watch(field: &TestNamespace<'_>, canary: Value) -> Result<()> {
    field.apply(canary)?;
    reaches(field, "Stable", 60)
}

fn canary(name: &str, kind: &str, steps: Value, requests: u32) -> Value {
    json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "Canary", "metadata": {"name": name}, "spec": {
        "target": {"kind": kind, "name": name}, "steps": steps,
        "judge": {"minRequests": requests, "warmUp": "2s"},
    }})
}

fn deploy(field: &TestNamespace<'_>, version: &str, errors: u32) -> Result<()> {
    deploy_with(field, version, &[&format!("--errors={errors}")])
}

/// Changes the version of Deployment web, which is started with these arguments.
fn deploy_with(field: &TestNamespace<'_>, version: &str, more: &[&str]) -> Result<()> {
    let version = format!("--version={version}");
    let arguments: Vec<&str> =
        ["serve", "--name=web", version.as_str()].into_iter().chain(more.iter().copied()).collect();
    let patch =
        json!([{"op": "replace", "path": "/spec/template/spec/containers/0/args", "value": arguments}]);
    field.kubectl(&["patch", "deployment", "web", "--type=json", "-p", &patch.to_string()]).map(drop)
}

/// Changes the spec of Canary web.
fn patch(field: &TestNamespace<'_>, spec: &Value) -> Result<()> {
    let patch = json!({"spec": spec}).to_string();
    field.kubectl(&["patch", "canary", "web", "--type=merge", "-p", &patch]).map(drop)
}

/// Requests an action on Canary web.
fn act(field: &TestNamespace<'_>, action: &str) -> Result<()> {
    let action = format!("tulle.dev/action={action}");
    field.kubectl(&["annotate", "--overwrite", "canary", "web", &action]).map(drop)
}

/// Waits for the phase of Canary web.
fn reaches(field: &TestNamespace<'_>, phase: &str, seconds: u64) -> Result<()> {
    field.kube.wait_for(&format!("phase {phase}"), seconds, || Ok(status(field, ".phase")? == phase))
}

/// Waits until every client uses this weight.
fn flows(field: &TestNamespace<'_>, weight: &str, seconds: u64) -> Result<()> {
    let what = format!("{weight} of the traffic on the new version");
    field.kube.wait_for(&what, seconds, || Ok(status(field, ".weightSummary")? == weight))
}

/// Whether a condition of Canary web is True, and its message.
fn reported(field: &TestNamespace<'_>, kind: &str) -> Result<(String, String)> {
    let of = |part: &str| status(field, &format!(".conditions[?(@.type==\"{kind}\")].{part}"));
    Ok((of("status")?, of("message")?))
}

fn status(field: &TestNamespace<'_>, path: &str) -> Result<String> {
    field.get("canary/web", &format!(".status{path}"))
}

/// The pods of a version of Deployment web that are not being deleted.
fn pods_of(field: &TestNamespace<'_>, version: &str) -> Result<Vec<Value>> {
    let pods = field.kube.json(&["-n", &field.namespace, "get", "pods", "-l", "app=web"])?;
    let argument = json!(format!("--version={version}"));
    let of_version = |pod: &&Value| {
        let arguments = pod["spec"]["containers"][0]["args"].as_array();
        arguments.is_some_and(|arguments| arguments.contains(&argument))
            && pod["metadata"]["deletionTimestamp"].is_null()
    };
    Ok(pods["items"].as_array().into_iter().flatten().filter(of_version).cloned().collect())
}

fn condition(pod: &Value, kind: &str) -> String {
    let conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let found = conditions.iter().find(|condition| condition["type"] == kind);
    found.and_then(|condition| condition["status"].as_str()).unwrap_or("").to_owned()
}
