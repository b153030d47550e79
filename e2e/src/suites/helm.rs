//! The Helm chart and kustomize overlays: what they render, and install, upgrade and uninstall of the chart.
//!
//! Runs alone: it removes the Tulle that the other suites use, and installs it again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::namespace::TestNamespace;
use super::{Skip, Test};
use crate::cluster::{self, Cluster};
use crate::host;
use crate::install;
use crate::kubectl::Kube;

pub(super) const TESTS: &[Test] = &[
    ("helm template renders what kustomize renders", renders_alike),
    ("an overlay's namespace and images reach every object", overlay),
    ("one value of the chart moves all images to a registry, by tag or by digest", registry),
    ("the chart rejects unknown values and values of a wrong type", wrong_values),
    (
        "helm installs Tulle into a namespace of another name, upgrades and uninstalls it: CRDs and user objects stay",
        lifecycle,
    ),
];

/// The release, and the namespace that it is installed into.
const RELEASE: [&str; 3] = ["tulle", "--namespace", "mesh-system"];

/// Time limit of one call of helm.
const LIMIT: Duration = Duration::from_secs(240);

/// The trust domain of the release.
const TRUST_DOMAIN: &str = "mesh.example";

/// CustomResourceDefinitions of the chart.
const DEFINITIONS: [&str; 3] = ["canaries.tulle.dev", "meshconfigs.tulle.dev", "meshpolicies.tulle.dev"];

/// The parts of Tulle that have images.
const PARTS: [&str; 3] = ["operator", "webhook", "sidecar"];

/// The real helm, as the administrator of the embedded cluster.
struct Helm<'a> {
    cluster: &'a Cluster,
    program: PathBuf,
    /// The folder of the chart.
    chart: String,
}

impl<'a> Helm<'a> {
    fn new(kube: &'a Kube) -> Result<Self> {
        let Kube::Embedded(cluster) = kube else {
            bail!(Skip("the test would remove Tulle and its objects from this cluster"));
        };
        Ok(Self { cluster, program: cluster::helm()?, chart: folder("config/helm/tulle")? })
    }

    /// Runs helm; returns what it prints.
    fn run(&self, arguments: &[&str]) -> Result<String> {
        let home = host::cache()?.join("helm-home");
        let mut command = self.cluster.inside(&self.program.display().to_string())?;
        // Plugins and settings of the user who runs the tests must not have an effect.
        for variable in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
            command.env(variable, &home);
        }
        host::output_within(command.args(arguments), LIMIT)
    }

    /// `install` or `upgrade` of the release, until its pods are ready.
    fn roll_out(&self, verb: &str, more: &[&str]) -> Result<()> {
        let wait = [self.chart.as_str(), "--wait", "--timeout", "2m"];
        self.run(&[&[verb], &RELEASE[..], &wait, more].concat()).map(drop)
    }

    fn install(&self) -> Result<()> {
        let trust_domain = format!("trustDomain={TRUST_DOMAIN}");
        self.roll_out("install", &["--create-namespace", "--set", &trust_domain])
    }

    fn uninstall(&self) -> Result<()> {
        let wait = ["--ignore-not-found", "--wait", "--timeout", "2m"];
        self.run(&[&["uninstall"], &RELEASE[..], &wait].concat()).map(drop)
    }
}

fn renders_alike(kube: &Kube) -> Result<()> {
    let helm = Helm::new(kube)?;
    helm.run(&["lint", &helm.chart])?;
    let chart = objects(&helm.run(&["template", "tulle", &helm.chart, "--namespace", "tulle-system"])?)?;
    for definition in DEFINITIONS {
        let found = chart.get(&format!("CustomResourceDefinition {definition}"));
        let policy = found.map(|object| &object["metadata"]["annotations"]["helm.sh/resource-policy"]);
        ensure!(policy == Some(&json!("keep")), "resource policy of {definition}: {policy:?}");
    }
    let kustomize = objects(&kube.run(&["kustomize", &folder("config")?])?)?;
    let names: BTreeSet<&String> = chart.keys().chain(kustomize.keys()).collect();
    let mut differences = Vec::new();
    // Helm creates the namespace.
    for name in names.into_iter().filter(|name| *name != "Namespace tulle-system") {
        match (kustomize.get(name), chart.get(name)) {
            (Some(left), Some(right)) => {
                differences.extend(difference(name, &comparable(left), &comparable(right)));
            }
            (left, _) => {
                differences.push(format!("{name}: only in {}", left.map_or("the chart", |_| "kustomize")))
            }
        }
    }
    ensure!(differences.is_empty(), "{}", differences.join("\n"));
    Ok(())
}

/// The object without what differs by design.
fn comparable(object: &Value) -> Value {
    let mut object = object.clone();
    let cluster_wide = is_admission_policy(&object);
    let metadata = &mut object["metadata"];
    if cluster_wide {
        metadata["namespace"] = Value::Null;
    }
    metadata["labels"] =
        json!({"app.kubernetes.io/part-of": metadata["labels"]["app.kubernetes.io/part-of"]});
    if let Some(annotations) = metadata["annotations"].as_object_mut() {
        annotations.remove("helm.sh/resource-policy");
    }
    if metadata["annotations"] == json!({}) {
        metadata["annotations"] = Value::Null;
    }
    without_own_namespace(&mut object);
    object
}

/// kustomize leaves Tulle's own namespace out of injection by a label, the chart by its name as well.
fn without_own_namespace(value: &mut Value) {
    match value {
        Value::Object(fields) => fields.values_mut().for_each(without_own_namespace),
        Value::Array(items) => {
            if items.contains(&json!("kube-node-lease")) {
                items.retain(|item| *item != "tulle-system");
            }
            items.iter_mut().for_each(without_own_namespace);
        }
        _ => {}
    }
}

/// Where two values differ first.
fn difference(path: &str, kustomize: &Value, chart: &Value) -> Option<String> {
    match (kustomize, chart) {
        (Value::Object(left), Value::Object(right)) => {
            let keys: BTreeSet<&String> = left.keys().chain(right.keys()).collect();
            keys.into_iter()
                .find_map(|key| difference(&format!("{path}.{key}"), &kustomize[key], &chart[key]))
        }
        (Value::Array(left), Value::Array(right)) if left.len() == right.len() => {
            let mut pairs = left.iter().zip(right).enumerate();
            pairs.find_map(|(index, (left, right))| difference(&format!("{path}[{index}]"), left, right))
        }
        // 1 and 1.0 are the same to the API server.
        (Value::Number(left), Value::Number(right)) if left.as_f64() == right.as_f64() => None,
        _ if kustomize == chart => None,
        _ => Some(format!("{path}: {kustomize} by kustomize, {chart} by the chart")),
    }
}

fn overlay(kube: &Kube) -> Result<()> {
    let objects = objects(&kube.run(&["kustomize", &folder("config/samples/overlay")?])?)?;
    for (name, object) in &objects {
        let text = object.to_string();
        for left in ["tulle-system", "tulle.local/"] {
            ensure!(!text.contains(left), "{name} still has {left:?}: {text}");
        }
    }
    let images = images(&objects, "mesh-system")?;
    let expected = PARTS.map(|part| format!("registry.example/tulle-{part}:0.1.0"));
    ensure!(images == expected, "the overlay has the images {images:?}");
    Ok(())
}

/// The images of [`PARTS`] in these objects.
fn images(objects: &BTreeMap<String, Value>, namespace: &str) -> Result<[String; 3]> {
    let template = |part: &str| {
        let name = format!("Deployment {namespace}/tulle-{part}");
        let found = objects.get(&name).map(|object| &object["spec"]["template"]);
        found.with_context(|| format!("there is no {name}"))
    };
    let (operator, webhook) = (template("operator")?, template("webhook")?);
    let text = |image: &Value| image.as_str().map(str::to_owned).context("an image is not a text");
    Ok([
        text(&operator["spec"]["containers"][0]["image"])?,
        text(&webhook["spec"]["containers"][0]["image"])?,
        text(&webhook["metadata"]["annotations"]["tulle.dev/sidecar-image"])?,
    ])
}

fn registry(kube: &Kube) -> Result<()> {
    let helm = Helm::new(kube)?;
    let rendered = |values: &[&str]| {
        let mut arguments = vec!["template", "tulle", &helm.chart, "--namespace", "mesh-system"];
        values.iter().for_each(|value| arguments.extend(["--set", value]));
        images(&objects(&helm.run(&arguments)?)?, "mesh-system")
    };
    let version = env!("CARGO_PKG_VERSION");
    let digest = format!("sha256:{}", "a1".repeat(32));
    let digests = PARTS.map(|part| format!("image.digests.{part}={digest}")).join(",");
    let former = PARTS.map(|part| format!("{part}.image=tulle.local/{part}:dev")).join(",");
    let team = "image.registry=registry.example/team";
    let own = "sidecar.image=mirror.example/proxy:7";
    for (values, expected) in [
        (vec![team], PARTS.map(|part| format!("registry.example/team/tulle-{part}:{version}"))),
        (
            vec![team, "image.tag=1.2.3"],
            PARTS.map(|part| format!("registry.example/team/tulle-{part}:1.2.3")),
        ),
        (
            vec![team, digests.as_str()],
            PARTS.map(|part| format!("registry.example/team/tulle-{part}@{digest}")),
        ),
        (vec!["image.tag=next"], PARTS.map(|part| format!("tulle.local/{part}:next"))),
        // --reuse-values brings the defaults of the chart from before it had the value `image`.
        (
            vec![team, former.as_str()],
            PARTS.map(|part| format!("registry.example/team/tulle-{part}:{version}")),
        ),
        (
            vec!["image.registry=registry.example:5000/team/"],
            PARTS.map(|part| format!("registry.example:5000/team/tulle-{part}:{version}")),
        ),
    ] {
        let images = rendered(&values)?;
        ensure!(images == expected, "--set {values:?}: {images:?}");
    }
    let [operator, webhook, sidecar] = rendered(&[team, &digests, own])?;
    ensure!(sidecar == "mirror.example/proxy:7", "the image of the sidecar is {sidecar}");
    ensure!(operator.ends_with(&digest) && webhook.ends_with(&digest), "{operator} {webhook}");
    let Err(error) = rendered(&[&digests]) else { bail!("the chart accepts digests without a registry") };
    ensure!(error.to_string().contains("image.digests needs image.registry"), "{error}");
    Ok(())
}

fn wrong_values(kube: &Kube) -> Result<()> {
    let helm = Helm::new(kube)?;
    let one_digest = format!("image.digests.operator=sha256:{}", "a1".repeat(32));
    for (value, named) in [
        ("replicas=2", "'replicas' not allowed"),
        ("operator.replica=2", "'replica' not allowed"),
        ("operator.replicas=two", "/operator/replicas"),
        ("webhook.replicas=0", "/webhook/replicas"),
        ("sidecar.image=a b", "/sidecar/image"),
        ("image.repository=registry.example", "'repository' not allowed"),
        ("image.registry=https://registry.example", "/image/registry"),
        ("image.registry=registry.example//team", "/image/registry"),
        ("image.registry=registry.example/Team", "/image/registry"),
        ("image.tag=a/b", "/image/tag"),
        ("image.digests.operator=sha256:ab", "/image/digests/operator"),
        // A tag would choose the other two.
        (one_digest.as_str(), "'webhook', 'sidecar' required"),
        ("webhook.resources.request.cpu=1", "'request' not allowed"),
        ("trustDomain=Mesh!", "/trustDomain"),
        ("imagePullPolicy=Sometimes", "/imagePullPolicy"),
    ] {
        let Err(error) = helm.run(&["template", "tulle", &helm.chart, "--set", value]) else {
            bail!("the chart accepts --set {value}");
        };
        let error = error.to_string();
        ensure!(error.contains("schema") && error.contains(named), "--set {value}: {error}");
    }
    Ok(())
}

fn lifecycle(kube: &Kube) -> Result<()> {
    let helm = Helm::new(kube)?;
    let removed = kube.run(&["delete", "--timeout=90s", "-k", &folder("config")?]);
    let outcome = removed.and_then(|_| life(&helm, kube)).with_context(|| {
        let pods = kube.run(&["get", "pods", "--all-namespaces", "-o", "wide"]);
        format!("the pods at that time:\n{}", pods.unwrap_or_else(|error| error.to_string()))
    });
    let restored = restore(&helm, kube).context("installing Tulle again with kustomize");
    outcome.and(restored)
}

fn life(helm: &Helm<'_>, kube: &Kube) -> Result<()> {
    helm.install()?;
    let trust_domain = || kube.run(&["get", "meshconfig", "mesh", "-o", "jsonpath={.status.trustDomain}"]);
    kube.wait_for("the operator's MeshConfig", 60, || Ok(trust_domain()? == TRUST_DOMAIN))?;
    let field = TestNamespace::meshed(kube, "t-helm")?;
    field.injects()?;
    field.service("web", 1, &[])?;
    field.client("client")?;
    policy(&field, &json!([{"from": [{"serviceAccount": "client"}]}]))?;
    kube.wait_for("the policy to be enforced", 60, || Ok(reason(&field)? == "Enforced"))?;
    called(&field)?;

    notes(helm)?;
    helm.roll_out("upgrade", &["--reuse-values", "--set", "operator.replicas=1"])?;
    let replicas = kube.field("mesh-system", "deployment/tulle-operator", ".spec.replicas")?;
    ensure!(replicas == "1", "{replicas} replicas of the operator after helm upgrade");
    ensure!(trust_domain()? == TRUST_DOMAIN, "the upgrade has changed the trust domain");
    field.injects()?;
    called(&field)?;

    helm.uninstall()?;
    nothing_but_definitions(kube)?;
    ensure!(reason(&field)? == "Enforced", "helm uninstall has changed the MeshPolicy");
    ensure!(trust_domain()? == TRUST_DOMAIN, "helm uninstall has changed the MeshConfig");
    called(&field)?;

    // A release of the same name adopts what was kept, and sidecars find its operator.
    helm.install()?;
    policy(&field, &json!([]))?;
    kube.wait_for("the changed policy to be enforced", 90, || {
        Ok(field.status("client", "http://web.t-helm.svc.cluster.local/")? == "403")
    })
}

/// Helm's notes list the images that a value keeps at its version, and those that cannot be pulled.
fn notes(helm: &Helm<'_>) -> Result<()> {
    let listed = |values: &str| -> Result<Vec<String>> {
        let dry = [helm.chart.as_str(), "--dry-run", "--reset-then-reuse-values", "--set", values];
        let printed = helm.run(&[&["upgrade"], &RELEASE[..], &dry].concat())?;
        let (_, notes) = printed.split_once("\nNOTES:\n").context("helm upgrade prints no notes")?;
        let indented = notes.lines().filter_map(|line| line.strip_prefix("  "));
        Ok(indented.filter(|line| !line.starts_with(' ')).map(str::to_owned).collect())
    };
    let digest = format!("sha256:{}", "a1".repeat(32));
    let team = "image.registry=registry.example/team";
    let digests = PARTS.map(|part| format!("{team},image.digests.{part}={digest}")).join(",");
    for (values, expected) in [
        (team, Vec::new()),
        (digests.as_str(), PARTS.map(|part| format!("registry.example/team/tulle-{part}@{digest}")).to_vec()),
        ("operator.replicas=1", PARTS.map(|part| format!("tulle.local/{part}:dev")).to_vec()),
    ] {
        let found = listed(values)?;
        ensure!(found == expected, "the notes of helm upgrade --set {values} list {found:?}");
    }
    Ok(())
}

/// After `helm uninstall`: the definitions are there, and nothing else of Tulle beyond users' objects.
fn nothing_but_definitions(kube: &Kube) -> Result<()> {
    kube.run(&[&["get", "crd"], &DEFINITIONS[..]].concat())?;
    let kinds = "clusterrole,clusterrolebinding,mutatingwebhookconfiguration,validatingwebhookconfiguration,validatingadmissionpolicy,validatingadmissionpolicybinding";
    let mut left = kube.run(&["get", kinds, "-o", "name"])?;
    let namespaced =
        "deployment,service,serviceaccount,role,rolebinding,networkpolicy,resourcequota,poddisruptionbudget";
    left.push_str(&kube.run(&["-n", "mesh-system", "get", namespaced, "-o", "name"])?);
    let left: Vec<&str> = left.lines().filter(|name| name.contains("tulle")).collect();
    ensure!(left.is_empty(), "helm uninstall has left {left:?}");
    Ok(())
}

/// Restores what the other suites expect: the install of `config/`, and nothing of the release.
fn restore(helm: &Helm<'_>, kube: &Kube) -> Result<()> {
    helm.uninstall()?;
    // The sidecars in t-helm have certificates of the release's root.
    kube.run(&["delete", "--ignore-not-found", "namespace", "t-helm", "mesh-system"])?;
    kube.run(&[&["delete", "crd", "--ignore-not-found"], &DEFINITIONS[..]].concat())?;
    install::tulle(kube)
}

/// Fails unless the client reaches the server over mTLS: the identity in the answer is from the client's
/// certificate.
fn called(field: &TestNamespace<'_>) -> Result<()> {
    let curl = ["/usr/bin/curl", "-s", "-m", "8", "http://web.t-helm.svc.cluster.local/"];
    let answer = field.exec("client", &curl)?;
    let client = format!("spiffe://{TRUST_DOMAIN}/ns/t-helm/sa/client");
    ensure!(answer.contains(&client), "expected an answer to {client}, found {answer:?}");
    Ok(())
}

/// A strict MeshPolicy of the server with these rules.
fn policy(field: &TestNamespace<'_>, allow: &Value) -> Result<()> {
    let spec =
        json!({"target": {"kind": "Service", "name": "web"}, "mtls": "Strict", "access": {"allow": allow}});
    field
        .apply(json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy", "metadata": {"name": "web"}, "spec": spec}))
        .map(drop)
}

/// The reason in the policy's condition `Ready`.
fn reason(field: &TestNamespace<'_>) -> Result<String> {
    field.get("meshpolicy/web", ".status.conditions[?(@.type==\"Ready\")].reason")
}

/// Objects by kind, namespace and name.
fn objects(manifests: &str) -> Result<BTreeMap<String, Value>> {
    let mut objects = BTreeMap::new();
    let empty = |line: &str| line.is_empty() || line == "---" || line.starts_with('#');
    for manifest in manifests.split("\n---\n").filter(|manifest| !manifest.lines().all(empty)) {
        let object: Value =
            serde_yaml::from_str(manifest).with_context(|| format!("not YAML: {manifest}"))?;
        let kind = object["kind"].as_str().context("an object has no kind")?;
        let name = object["metadata"]["name"].as_str().context("an object has no name")?;
        let namespace = object["metadata"]["namespace"].as_str();
        let key = match namespace.filter(|_| !is_admission_policy(&object)) {
            Some(namespace) => format!("{kind} {namespace}/{name}"),
            None => format!("{kind} {name}"),
        };
        ensure!(objects.insert(key.clone(), object).is_none(), "{key} is rendered twice");
    }
    Ok(objects)
}

/// Whether this is an admission policy or its binding: kustomize does not know that these belong to the whole
/// cluster and gives them a namespace, which kubectl ignores.
fn is_admission_policy(object: &Value) -> bool {
    object["kind"].as_str().is_some_and(|kind| kind.starts_with("ValidatingAdmissionPolicy"))
}

/// A folder of the workspace, as an argument.
fn folder(path: &str) -> Result<String> {
    let folder = host::workspace().join(path);
    folder.to_str().map(str::to_owned).context("the workspace's path is not UTF-8")
}
