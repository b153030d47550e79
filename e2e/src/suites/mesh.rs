//! Injection, policy and identity on real pods.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde_json::json;

use super::namespace::{TestNamespace, deployment, host_pod, pod_template, service};
use super::{Skip, Test};
use crate::host;
use crate::kubectl::Kube;

pub(super) const TESTS: &[Test] = &[
    ("pods get a sidecar at admission, and a malformed annotation is named in a warning", injection),
    ("a pod may opt out where the sidecar is not required, and not where it is", opting_out),
    ("nobody else may run as the sidecar's user, not even a debug container", proxy_uid),
    ("where a namespace's Pod Security level forbids NET_ADMIN, a warning says what to do", pod_security),
    ("a static pod's mirror is left alone", static_pod),
    ("a Job with a sidecar completes", job),
    ("strict mTLS refuses plain text, and probes still pass", strict),
    ("a deny from the dev to the prod namespace blocks one caller and not the other", dev_to_prod),
    ("shadow mode logs what it would deny, denies nothing, and disables no other policy", shadow),
    ("mtls: Disabled lets meshed clients send plain text", disabled),
    (
        "objects that cannot be enforced are rejected at apply, and the message says what to write",
        refused_objects,
    ),
    ("of two policies for the same pods, the younger reports the conflict", conflict),
    ("a Service of another namespace cannot take over a cluster address by externalIPs", foreign_claim),
    ("an invalid cidr is refused by the schema, without the webhook", invalid_cidr),
    ("kubectl explain describes each kind and each of its fields", explain),
];

/// The label of an injected pod.
const INJECTED: &str = "tulle.dev/sidecar";

fn injection(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-inject")?;
    let mut pod = host_pod("app", "default", &["/usr/bin/sleep", "1000"]);
    pod["metadata"]["annotations"] = json!({"tulle.dev/colour": "red"});
    let said = field.apply(pod)?;
    ensure!(said.contains("annotation tulle.dev/colour"), "no warning: {said}");
    let mut workload = deployment("web", 0, &[]);
    workload["spec"]["template"]["metadata"]["annotations"] = json!({"tulle.dev/colour": "red"});
    let said = field.apply(workload)?;
    ensure!(said.contains("annotation tulle.dev/colour"), "no warning about a Deployment's pods: {said}");
    field.ready("app")?;
    let names = field.get("pod/app", ".spec.initContainers[*].name")?;
    ensure!(names == "tulle-init tulle-proxy", "init containers: {names}");
    let app = kube.json(&["-n", "t-inject", "get", "pod", "app"])?;
    let label = &app["metadata"]["labels"][INJECTED];
    ensure!(label.is_string(), "an injected pod lacks its label: {label}");
    Ok(())
}

fn opting_out(kube: &Kube) -> Result<()> {
    let mut pod = host_pod("app", "default", &["/usr/bin/sleep", "1000"]);
    pod["metadata"]["labels"]["tulle.dev/inject"] = json!("disabled");
    let enabled = TestNamespace::meshed(kube, "t-optout")?;
    enabled.apply(pod.clone())?;
    ensure!(
        enabled.get("pod/app", ".spec.initContainers")?.is_empty(),
        "the pod was injected although it opts out"
    );
    let required = TestNamespace::new(kube, "t-required", json!({"tulle.dev/inject": "required"}))?;
    let said = required.apply(pod.clone())?;
    ensure!(said.contains("has no effect"), "no warning: {said}");
    ensure!(
        required.get("pod/app", ".spec.initContainers[1].name")? == "tulle-proxy",
        "the pod was not injected"
    );
    pod["metadata"]["name"] = json!("host");
    pod["spec"]["hostNetwork"] = json!(true);
    let refused = required.apply(pod);
    ensure!(
        refused.is_err_and(|error| error.to_string().contains("hostNetwork")),
        "a hostNetwork pod was not rejected as such"
    );
    Ok(())
}

fn proxy_uid(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-uid")?;
    let mut pod = host_pod("app", "default", &["/usr/bin/sleep", "1000"]);
    pod["spec"]["containers"][0]["securityContext"] = json!({"runAsUser": 4150});
    let refused = field.apply(pod.clone());
    ensure!(
        refused.is_err_and(|error| error.to_string().contains("uid 4150")),
        "a pod with the sidecar's uid was not rejected as such"
    );
    pod["spec"]["containers"][0]["securityContext"] = json!({});
    field.apply(pod)?;
    let debug = json!({"spec": {"ephemeralContainers": [{
        "name": "debug", "image": "tulle.local/empty:1", "securityContext": {"runAsUser": 4150},
    }]}});
    let refused = field.kubectl(&[
        "patch",
        "pod",
        "app",
        "--subresource=ephemeralcontainers",
        "-p",
        &debug.to_string(),
    ]);
    ensure!(
        refused.is_err_and(|error| error.to_string().contains("uid 4150 is reserved for the sidecar")),
        "a debug container with the sidecar's uid was not rejected as such"
    );
    Ok(())
}

fn pod_security(kube: &Kube) -> Result<()> {
    let labels = json!({"tulle.dev/inject": "enabled", "pod-security.kubernetes.io/enforce": "baseline"});
    let field = TestNamespace::new(kube, "t-baseline", labels)?;
    let mut pod = pod_template("app", &["serve".to_owned(), "--name=app".to_owned()]);
    pod["apiVersion"] = json!("v1");
    pod["kind"] = json!("Pod");
    pod["metadata"]["name"] = json!("app");
    pod["spec"]["serviceAccountName"] = json!("default");
    let Err(refused) = field.apply(pod.clone()) else {
        bail!("a pod with NET_ADMIN was admitted under baseline")
    };
    let said = refused.to_string();
    ensure!(said.contains("violates PodSecurity"), "the pod was rejected for another reason: {said}");
    ensure!(
        said.contains("pod-security.kubernetes.io/enforce=privileged"),
        "no warning says what to do: {said}"
    );
    pod["metadata"]["labels"]["tulle.dev/inject"] = json!("disabled");
    field.apply(pod).map(drop)
}

/// kubelet runs a static pod from its file, so an injected mirror would show a sidecar that does not run.
fn static_pod(kube: &Kube) -> Result<()> {
    let Kube::Embedded(cluster) = kube else {
        bail!(Skip("kubelet's folder of static pods is out of reach"))
    };
    let field = TestNamespace::meshed(kube, "t-static")?;
    let mut pod = host_pod("app", "", &["/usr/bin/sleep", "1000"]);
    pod["metadata"]["namespace"] = json!("t-static");
    pod["spec"].as_object_mut().context("the pod has no spec")?.remove("serviceAccountName");
    let manifest = cluster.static_pods().join("app.json");
    host::write(&manifest, pod.to_string())?;
    let outcome = (|| {
        kube.wait_for("the mirror pod", 60, || {
            Ok(field.kubectl(&["get", "pods", "-o", "name"])? == "pod/app-node\n")
        })?;
        field.ready("app-node")?;
        let mirror = kube.json(&["-n", "t-static", "get", "pod", "app-node"])?;
        ensure!(
            mirror["metadata"]["annotations"]["kubernetes.io/config.mirror"].is_string(),
            "the pod is not a mirror pod"
        );
        ensure!(mirror["spec"]["initContainers"].is_null(), "the mirror shows a sidecar");
        let label = &mirror["metadata"]["labels"][INJECTED];
        ensure!(label.is_null(), "the mirror is labelled as injected: {label}");
        Ok(())
    })();
    std::fs::remove_file(manifest)?;
    kube.wait_for("the mirror pod to end", 60, || {
        Ok(field.kubectl(&["get", "pods", "-o", "name"])?.is_empty())
    })?;
    outcome
}

fn job(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-job")?;
    let pod = host_pod("work", "default", &["/bin/sh", "-c", "echo done"]);
    let mut template = json!({"metadata": {"labels": {"app": "work"}}, "spec": pod["spec"]});
    template["spec"]["restartPolicy"] = json!("Never");
    field.apply(json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "work"}, "spec": {"template": template}}))?;
    field.kubectl(&["wait", "--for=condition=Complete", "--timeout=90s", "job/work"])?;
    let proxied = field.kubectl(&[
        "get",
        "pods",
        "-l",
        "app=work",
        "-o",
        "jsonpath={.items[0].spec.initContainers[1].name}",
    ])?;
    ensure!(proxied == "tulle-proxy", "the Job's pod had no sidecar");
    Ok(())
}

/// Sends requests on one connection until the status changes, and prints each status once.
const KEEPS_ASKING: &str = "import http.client, time
connection, seen = http.client.HTTPConnection('web.t-strict.svc.cluster.local', timeout=8), []
for _ in range(480):
    connection.request('GET', '/')
    answer = connection.getresponse(); answer.read()
    if answer.status not in seen: seen.append(answer.status)
    if len(seen) > 1: break
    time.sleep(0.25)
print(*seen)";

fn strict(kube: &Kube) -> Result<()> {
    let (meshed, plain) = (TestNamespace::meshed(kube, "t-strict")?, TestNamespace::plain(kube, "t-plain")?);
    meshed.service("web", 1, &[])?;
    meshed.client("insider")?;
    plain.client("outsider")?;
    let url = "http://web.t-strict.svc.cluster.local/";
    ensure!(plain.status("outsider", url)? == "200", "Permissive, the default, refused a plain client");
    let received = meshed.received("web")?;
    let kept = thread::scope(|scope| {
        let kept = scope.spawn(|| plain.exec("outsider", &["/usr/bin/python3", "-c", KEEPS_ASKING]));
        kube.wait_for("the client that keeps asking", 60, || Ok(meshed.received("web")? > received + 1))?;
        policy(&meshed, "strict", json!({"target": {"kind": "Service", "name": "web"}, "mtls": "Strict"}))?;
        enforced(&meshed, "strict", "1/1")?;
        kept.join().map_err(|_| anyhow!("the client's thread panicked"))?
    })?;
    ensure!(kept.trim() == "200 403", "a plain connection from before the policy was answered {kept}");
    ensure!(plain.status("outsider", url)? == "000", "a plain client got through");
    ensure!(meshed.status("insider", url)? == "200", "a meshed client was refused");
    thread::sleep(Duration::from_secs(4));
    let ready = meshed.get("deployment/web", ".status.readyReplicas")?;
    ensure!(ready == "1", "probes fail under Strict: {ready} ready");
    Ok(())
}

fn dev_to_prod(kube: &Kube) -> Result<()> {
    let prod = TestNamespace::new(kube, "t-prod", json!({"tulle.dev/inject": "enabled", "env": "prod"}))?;
    let dev = TestNamespace::new(kube, "t-dev", json!({"tulle.dev/inject": "enabled", "env": "dev"}))?;
    prod.service("web", 1, &[])?;
    prod.client("insider")?;
    dev.client("outsider")?;
    let url = "http://web.t-prod.svc.cluster.local/";
    ensure!(dev.status("outsider", url)? == "200", "dev was blocked before there was a policy");
    let deny = json!([{"from": [{"namespaceLabels": {"env": "dev"}}]}]);
    policy(&prod, "no-dev", json!({"target": {"kind": "Namespace"}, "access": {"deny": deny}}))?;
    enforced(&prod, "no-dev", "2/2")?;
    ensure!(dev.status("outsider", url)? == "403", "dev still gets through");
    ensure!(prod.status("insider", url)? == "200", "prod was blocked");
    prod.kubectl(&["delete", "meshpolicy", "no-dev"])?;
    kube.wait_for("dev to get through again", 60, || Ok(dev.status("outsider", url)? == "200"))
}

fn shadow(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-shadow")?;
    field.service("web", 1, &[])?;
    field.client("client")?;
    let spec =
        json!({"target": {"kind": "Service", "name": "web"}, "mode": "Shadow", "access": {"allow": []}});
    policy(&field, "nobody", spec)?;
    enforced(&field, "nobody", "1/1")?;
    ensure!(field.status("client", "http://web.t-shadow.svc.cluster.local/")? == "200", "Shadow denied");
    let logs = field.kubectl(&["logs", "deployment/web", "-c", "tulle-proxy"])?;
    let said =
        logs.lines().any(|line| line.contains("refused by policy") && line.contains("\"shadow\":true"));
    ensure!(said, "the sidecar did not log what Shadow would deny");
    // An enforced policy stays in force beside the one in Shadow, although its target is broader.
    let allow = json!([{"from": [{"serviceAccount": "somebody"}]}]);
    policy(&field, "somebody", json!({"target": {"kind": "Namespace"}, "access": {"allow": allow}}))?;
    enforced(&field, "somebody", "2/2")?;
    let status = field.status("client", "http://web.t-shadow.svc.cluster.local/")?;
    ensure!(status == "403", "a policy in Shadow disabled an enforced one: status {status}");
    Ok(())
}

fn disabled(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-disabled")?;
    field.service("web", 1, &[])?;
    field.client("client")?;
    policy(&field, "plain", json!({"target": {"kind": "Service", "name": "web"}, "mtls": "Disabled"}))?;
    enforced(&field, "plain", "1/1")?;
    let ask = ["/usr/bin/curl", "-s", "-m", "8", "http://web.t-disabled.svc.cluster.local/"];
    kube.wait_for("an answer over plain text", 60, || {
        let answer = field.exec("client", &ask)?;
        Ok(answer.contains("\"client\":null"))
    })
}

fn refused_objects(kube: &Kube) -> Result<()> {
    let field = TestNamespace::plain(kube, "t-refused")?;
    for (spec, expected) in [
        (json!({"target": {"kind": "Service"}}), "a Service target needs a name"),
        (
            json!({"target": {"kind": "Namespace"}, "access": {"allow": [{"from": [{}]}]}}),
            "a caller needs serviceAccount",
        ),
        (
            json!({"target": {"kind": "Namespace"}, "access": {"deny": [{"from": [{"cidr": "10.1"}]}]}}),
            "write for example 10.1.0.0/16",
        ),
        (json!({"target": {"kind": "Namespace"}, "mtls": "Always"}), "Unsupported value"),
    ] {
        let said = policy(&field, "bad", spec.clone());
        ensure!(
            said.as_ref().is_err_and(|error| format!("{error:#}").contains(expected)),
            "{spec}: {said:?}"
        );
    }
    let canary = json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "Canary", "metadata": {"name": "c"},
        "spec": {"target": {"kind": "Deployment", "name": "nobody"}, "steps": [{"weight": 5, "pause": {}}]}});
    let said = field.apply(canary);
    ensure!(
        said.as_ref().is_err_and(
            |error| format!("{error:#}").contains("exactly one of match, mirror, weight and pause")
        ),
        "{said:?}"
    );
    Ok(())
}

fn conflict(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-conflict")?;
    field.service("web", 1, &[])?;
    let spec = json!({"target": {"kind": "Service", "name": "web"}, "mtls": "Strict"});
    policy(&field, "older", spec.clone())?;
    thread::sleep(Duration::from_millis(1100));
    policy(&field, "younger", spec)?;
    kube.wait_for("the younger policy to report the conflict", 60, || {
        Ok(field.get("meshpolicy/younger", ".status.conditions[0].reason")? == "Conflicted")
    })?;
    let reason = field.get("meshpolicy/older", ".status.conditions[0].reason")?;
    ensure!(reason == "Enforced", "the older policy is {reason}");
    Ok(())
}

fn foreign_claim(kube: &Kube) -> Result<()> {
    let (owner, thief) = (TestNamespace::meshed(kube, "t-owner")?, TestNamespace::meshed(kube, "t-thief")?);
    owner.service("payments", 1, &[])?;
    owner.client("client")?;
    thief.service("thief", 1, &[])?;
    let address = owner.get("service/payments", ".spec.clusterIP")?;
    thief.apply(service("claim", json!({"selector": {"app": "thief"}, "externalIPs": [address]})))?;
    let ask = "for i in $(seq 20); do curl -s -m 8 http://payments.t-owner.svc.cluster.local/; echo; sleep 0.25; done";
    let answers = owner.exec("client", &["/bin/sh", "-c", ask])?;
    let (mut all, mut own) = (0, 0);
    for answer in answers.lines().filter(|line| !line.is_empty()) {
        all += 1;
        own += usize::from(answer.contains("\"service\":\"payments\"") && answer.contains("/sa/client"));
    }
    ensure!(all == 20 && own == 20, "{own} of {all} answers came from payments over mTLS: {answers}");
    Ok(())
}

/// The API server checks the schema before it calls a validating webhook, so that the schema's message comes alone.
fn invalid_cidr(kube: &Kube) -> Result<()> {
    let field = TestNamespace::plain(kube, "t-cidr")?;
    let access = json!({"deny": [{"from": [{"cidr": "10.0.0.0/99"}]}]});
    let said = policy(&field, "bad", json!({"target": {"kind": "Namespace"}, "access": access}));
    let said = said.err().map(|error| format!("{error:#}")).unwrap_or_default();
    ensure!(said.contains("spec.access.deny[0].from[0]"), "the message does not name the field: {said:?}");
    ensure!(!said.contains("admission webhook"), "only the webhook rejects the cidr: {said}");
    Ok(())
}

fn explain(kube: &Kube) -> Result<()> {
    for (path, sentence) in [
        ("canary", "Canary rolls out each new version of a workload in steps."),
        ("canary.spec", "Which workload to watch, the steps of a rollout, and how to judge the new version."),
        ("canary.spec.steps", "exactly one of `match`, `mirror`, `weight` and `pause`"),
        ("canary.spec.judge", "How the new version is judged."),
        ("canary.status", "Observed state of the Canary and its current or last rollout."),
        ("meshpolicy", "MeshPolicy sets encryption, access rules, limits"),
        ("meshpolicy.spec", "The target, and how traffic to it is handled."),
        ("meshpolicy.spec.access", "Who may call."),
        ("meshpolicy.status", "Observed state of the policy."),
        ("meshconfig", "MeshConfig holds the settings of the whole mesh."),
        ("meshconfig.spec", "The mTLS mode of pods for which no MeshPolicy sets one"),
        ("meshconfig.status", "Observed state of the settings."),
    ] {
        let text = kube.run(&["explain", path])?;
        // kubectl wraps lines.
        let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
        ensure!(words.contains(sentence), "no {sentence:?} in:\n{text}");
        for gap in ["<no description>", "<empty>", "Auto-generated"] {
            ensure!(!text.contains(gap), "{gap} in:\n{text}");
        }
    }
    Ok(())
}

/// Applies a MeshPolicy; returns what kubectl prints.
pub(super) fn policy(field: &TestNamespace<'_>, name: &str, spec: serde_json::Value) -> Result<String> {
    field.apply(json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy", "metadata": {"name": name}, "spec": spec}))
}

fn enforced(field: &TestNamespace<'_>, name: &str, expected: &str) -> Result<()> {
    let object = format!("meshpolicy/{name}");
    field.kube.wait_for(&format!("{name} to be enforced by {expected}"), 60, || {
        Ok(field.get(&object, ".status.enforced")? == expected
            && field.get(&object, ".status.conditions[0].status")? == "True")
    })
}
