//! The cluster, the CustomResourceDefinitions, and the network plugin: what an installation needs and finds.

use std::collections::BTreeMap;

use serde_json::Value;
use tulle_crds::keys;
use tulle_mesh::check::{Finding, list as checks, or_ok, version};

use super::super::facts::Facts;
use super::super::finding::{REPEATS, ReadRequest, UnreadCheck as _};
use super::{Options, namespaces_request, or_ok_if_read, repair};
use crate::objects::{self, Read, Unread, items, label, name, text};
use crate::tenants;

/// Native sidecars are enabled by default since this minor version of Kubernetes.
const NATIVE_SIDECARS: u32 = 29;
/// ValidatingAdmissionPolicies are stable since this minor version of Kubernetes.
const ADMISSION_POLICIES: u32 = 30;
/// The version of Tulle's kinds that this program uses.
const SERVED: &str = "v1alpha1";

pub(super) fn judge(facts: &Facts, options: Options) -> Vec<Finding> {
    let mut findings = vec![server(facts)];
    findings.extend(kubelets(facts));
    findings.extend(permissions(facts, options));
    findings.extend(pod_security(facts));
    if !options.pre {
        findings.extend(definitions(facts));
    }
    findings.extend(versions(facts));
    findings.extend(managers(facts));
    if !options.pre {
        findings.extend(complete(facts));
        findings.extend(schemas(facts));
    }
    findings
}

fn server(facts: &Facts) -> Finding {
    let text = match &facts.server {
        Ok(text) => text,
        Err(why) => {
            return checks::SERVER.unread("the API server's version", why, &ReadRequest::path("/version"));
        }
    };
    match version(text) {
        None => checks::SERVER
            .warning(format!("the API server has version {text:?}, which is not a version"))
            .hint(format!("compare it yourself: Tulle needs Kubernetes 1.{ADMISSION_POLICIES} or newer"))
            .fix("kubectl version"),
        Some((1, minor, _)) if minor < ADMISSION_POLICIES => {
            let missing = if minor < NATIVE_SIDECARS {
                "native sidecars, and ValidatingAdmissionPolicies"
            } else {
                "stable ValidatingAdmissionPolicies"
            };
            checks::SERVER
                .error(format!("the API server has version {text}, which does not have {missing}"))
                .hint(format!("upgrade the cluster to Kubernetes 1.{ADMISSION_POLICIES} or newer"))
                .fix("kubectl version")
        }
        Some(_) => checks::SERVER.ok(format!("the API server has version {text}")),
    }
}

fn kubelets(facts: &Facts) -> Vec<Finding> {
    let nodes = match &facts.nodes {
        Ok(nodes) => nodes,
        Err(why) => {
            let request = ReadRequest::list(objects::NODE, None);
            return vec![checks::KUBELETS.unread("the nodes' versions", why, &request)];
        }
    };
    let too_old = |node: &&Value| {
        let kubelet = version(text(node, "/status/nodeInfo/kubeletVersion"));
        let windows = label(node, "kubernetes.io/os") == Some("windows");
        !windows && kubelet.is_some_and(|(major, minor, _)| major == 1 && minor < NATIVE_SIDECARS)
    };
    let one = |node: &Value| {
        checks::KUBELETS
            .error(format!(
                "node {} has kubelet {}, which does not start native sidecars before the application",
                name(node),
                text(node, "/status/nodeInfo/kubeletVersion")
            ))
            .hint("upgrade the node, or keep meshed pods away from it")
            .fix(format!("kubectl cordon {}", name(node)))
    };
    or_ok(nodes.iter().filter(too_old).map(one).collect(), || {
        checks::KUBELETS.ok(format!("{} nodes with kubelet 1.{NATIVE_SIDECARS} or newer", nodes.len()))
    })
}

fn permissions(facts: &Facts, options: Options) -> Vec<Finding> {
    if !options.pre {
        return Vec::new();
    }
    let one = |permission: &super::super::facts::Permission| match &permission.allowed {
        Ok(true) => None,
        Ok(false) => Some(
            checks::PERMISSIONS
                .error(format!("you may not {}", permission.right))
                .hint("install with an account that has the ClusterRole cluster-admin")
                .fix(format!("kubectl auth can-i {}", permission.right)),
        ),
        Err(why) => Some(
            checks::PERMISSIONS
                .unknown(&format!("whether you may {}", permission.right), why)
                .hint(REPEATS)
                .fix(format!("kubectl auth can-i {}", permission.right)),
        ),
    };
    or_ok(facts.permissions.iter().filter_map(one).collect(), || {
        checks::PERMISSIONS.ok(format!("you have all {} rights that are needed", facts.permissions.len()))
    })
}

fn pod_security(facts: &Facts) -> Vec<Finding> {
    const ENFORCE: &str = "pod-security.kubernetes.io/enforce";
    let namespaces = match &facts.namespaces {
        Ok(namespaces) => namespaces,
        Err(why) => {
            let request = namespaces_request(facts);
            return vec![checks::POD_SECURITY.unread("the Pod Security level of namespaces", why, &request)];
        }
    };
    let one = |namespace: &Value| {
        let asks = matches!(label(namespace, keys::INJECT), Some("enabled" | "required"));
        let level = label(namespace, ENFORCE).filter(|level| asks && *level != "privileged")?;
        let name = name(namespace);
        Some(
            checks::POD_SECURITY
                .error(format!(
                    "namespace {name} enforces Pod Security level {level}, which rejects the init container tulle-init"
                ))
                .hint("tulle-init needs NET_ADMIN to redirect the pod's traffic")
                .fix(format!("kubectl label --overwrite namespace {name} {ENFORCE}=privileged")),
        )
    };
    or_ok(namespaces.iter().filter_map(one).collect(), || {
        checks::POD_SECURITY.ok(format!("{} namespaces with label {}", namespaces.len(), keys::INJECT))
    })
}

fn definitions(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (name, definition) in &facts.definitions {
        match definition {
            Ok(Some(definition)) => {
                let established = objects::condition(definition, "Established");
                if established.is_none_or(|condition| text(condition, "/status") != "True") {
                    findings.push(
                        checks::DEFINITIONS
                            .error(format!("{name} is not established"))
                            .hint("the API server does not serve its objects yet; its conditions say why")
                            .fix(format!("kubectl describe crd {name}")),
                    );
                }
            }
            Ok(None) => findings.push(
                checks::DEFINITIONS
                    .error(format!("{name} is not installed"))
                    .hint("objects of this kind cannot be created, and those that existed are lost")
                    .fix(repair(facts)),
            ),
            Err(why) => {
                let request = ReadRequest::object(objects::DEFINITION, None, name);
                findings.push(checks::DEFINITIONS.unread(name, why, &request));
            }
        }
    }
    or_ok(findings, || checks::DEFINITIONS.ok(format!("{} definitions", facts.definitions.len())))
}

/// Whether the API server has shown every definition, also if one does not exist. T0201 is about the others.
fn are_read(facts: &Facts) -> bool {
    facts.definitions.values().all(Result::is_ok)
}

/// The definitions that exist.
fn existing(facts: &Facts) -> impl Iterator<Item = (&'static str, &Value)> {
    facts.definitions.iter().filter_map(|(name, found)| Some((*name, found.as_ref().ok()?.as_ref()?)))
}

fn versions(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (name, definition) in existing(facts) {
        let served: Vec<&str> = items(definition, "/spec/versions")
            .iter()
            .filter(|version| version.pointer("/served").and_then(Value::as_bool) == Some(true))
            .map(|version| text(version, "/name"))
            .collect();
        if !served.contains(&SERVED) {
            findings.push(
                checks::VERSIONS
                    .error(format!("{name} serves {}, and this program needs {SERVED}", served.join(", ")))
                    .hint("use a `tulle` of the installed version, or upgrade the installation")
                    .fix(repair(facts)),
            );
        }
        let served_or_not = |stored: &&Value| !served.contains(&stored.as_str().unwrap_or_default());
        for stored in items(definition, "/status/storedVersions").iter().filter(served_or_not) {
            findings.push(
                checks::VERSIONS
                    .error(format!("{name} has stored objects as {stored}, which it does not serve any more"))
                    .hint("these objects cannot be read: serve the version again, and write each object once")
                    .fix(format!("kubectl get crd {name} -o yaml")),
            );
        }
    }
    or_ok_if_read(findings, are_read(facts), || match existing(facts).count() {
        0 => checks::VERSIONS.ok("none is installed"),
        _ => checks::VERSIONS.ok(format!("{SERVED} is served")),
    })
}

fn managers(facts: &Facts) -> Vec<Finding> {
    let mut tools: Vec<(&str, &str)> = existing(facts)
        .map(|(name, definition)| {
            (name, objects::managed_by(definition).map_or("kubectl or tulle", |tool| tool.name()))
        })
        .collect();
    tools.sort_by_key(|(_, tool)| *tool);
    let (Some((first, one)), Some((last, other))) = (tools.first(), tools.last()) else {
        return or_ok_if_read(Vec::new(), are_read(facts), || checks::MANAGER.ok("none is installed"));
    };
    if one != other {
        return vec![
            checks::MANAGER
                .warning(format!("{first} is managed by {one}, and {last} by {other}"))
                .hint("let one tool manage all three, or an upgrade changes only some of them")
                .fix(format!("kubectl get crd {first} {last} --show-managed-fields -o yaml")),
        ];
    }
    or_ok_if_read(Vec::new(), are_read(facts), || checks::MANAGER.ok(format!("managed by {one}")))
}

/// Whether every object of an installation exists. One finding for all that are missing, and one for all unreadable ones.
fn complete(facts: &Facts) -> Vec<Finding> {
    let named = |wanted: fn(&Read<bool>) -> bool| -> Vec<String> {
        facts.parts.iter().filter(|part| wanted(&part.exists)).map(|part| part.object.clone()).collect()
    };
    let missing = named(|exists| matches!(exists, Ok(false)));
    let unread = named(Result::is_err);
    let mut findings = Vec::new();
    if !missing.is_empty() {
        let verb = if missing.len() == 1 { "does" } else { "do" };
        let found = format!("{} {verb} not exist", tenants::some_of(&missing));
        findings.push(
            checks::OBJECTS
                .error(found)
                .hint("Tulle may lack rights, addresses or limits that it needs; a repair creates what is missing")
                .fix(repair(facts)),
        );
    }
    let first = facts.parts.iter().find_map(|part| Some((&part.object, part.exists.as_ref().err()?)));
    if let Some((object, why)) = first {
        let request = ReadRequest::titled(object);
        findings.push(checks::OBJECTS.unread(&tenants::some_of(&unread), why, &request));
    }
    or_ok(findings, || checks::OBJECTS.ok(format!("{} objects", facts.parts.len())))
}

/// Whether the definitions are those of this program, where the operator has its version.
fn schemas(facts: &Facts) -> Vec<Finding> {
    // T0304 is about an operator that does not answer.
    let Ok(health) = &facts.health else { return Vec::new() };
    if health.version != facts.cli {
        return vec![checks::SCHEMAS.ok("not compared, because the operator has another version")];
    }
    let own: BTreeMap<String, Value> = tulle_crds::manifests()
        .into_iter()
        .filter_map(|(_, definition)| Some((name(&definition).to_owned(), schema(&definition)?.clone())))
        .collect();
    let one = |(name, definition): (&str, &Value)| {
        let wanted = own.get(name)?;
        // A version that is not served is a finding of its own.
        let installed = schema(definition)?;
        (!same(installed, wanted)).then(|| {
            checks::SCHEMAS
                .warning(format!("{name} has another schema than version {} of Tulle", facts.cli))
                .hint("fields may be dropped, or values admitted that the operator does not know")
                .fix(repair(facts))
        })
    };
    or_ok_if_read(existing(facts).filter_map(one).collect(), are_read(facts), || {
        checks::SCHEMAS.ok("as in this program")
    })
}

/// The schema of the version that this program uses.
fn schema(definition: &Value) -> Option<&Value> {
    let versions = items(definition, "/spec/versions");
    versions.iter().find(|version| text(version, "/name") == SERVED)?.pointer("/schema/openAPIV3Schema")
}

/// Whether two schemas are equal. The API server may write a number in another form, and leaves out what is false or empty.
fn same(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => one.as_f64() == other.as_f64(),
        (Value::Array(one), Value::Array(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| same(one, other))
        }
        (Value::Object(one), Value::Object(other)) => {
            let is_unset = |value: Option<&Value>| match value {
                None | Some(Value::Null | Value::Bool(false)) => true,
                Some(Value::String(text)) => text.is_empty(),
                Some(Value::Array(items)) => items.is_empty(),
                Some(_) => false,
            };
            one.keys().chain(other.keys()).all(|key| match (one.get(key), other.get(key)) {
                (Some(one), Some(other)) => same(one, other),
                (one, other) => is_unset(one) && is_unset(other),
            })
        }
        _ => one == other,
    }
}

/// Whether Cilium's socket load balancer replaces a Service's address inside pods, before the sidecar sees it.
pub(super) fn network(facts: &Facts) -> Vec<Finding> {
    let config = match &facts.cilium {
        Ok(Some(config)) => config,
        Ok(None) | Err(Unread::NotServed) => return vec![checks::CILIUM.ok("Cilium was not found")],
        Err(why) => {
            let request = ReadRequest::object(objects::CONFIG_MAP, Some("kube-system"), "cilium-config");
            return vec![checks::CILIUM.unread("ConfigMap kube-system/cilium-config", why, &request)];
        }
    };
    let is = |key: &str, values: &[&str]| {
        let value = config.pointer("/data").and_then(|data| data.get(key)).and_then(Value::as_str);
        value.is_some_and(|value| values.contains(&value))
    };
    let in_sockets = is("bpf-lb-sock", &["true"]) || is("kube-proxy-replacement", &["true", "strict"]);
    if !in_sockets || is("bpf-lb-sock-hostns-only", &["true"]) {
        return vec![checks::CILIUM.ok("Cilium does not replace Services' addresses inside pods")];
    }
    vec![
        checks::CILIUM
            .warning("Cilium replaces Services' addresses inside pods, so sidecars see only the address of a pod")
            .hint("routes and shares of Canaries have no effect: a Canary holds at its first step")
            .fix("helm upgrade cilium cilium/cilium -n kube-system --reuse-values --set socketLB.hostNamespaceOnly=true"),
    ]
}
