//! Moves a pod's probes to the sidecar.
//!
//! Kubelet sends probes from the node, without a certificate, so a policy could reject them. A moved probe goes to a
//! port of the sidecar instead, which carries it out from within the pod.
//!
//! In: a pod, with or without the sidecar. Out: operations that move its probes, and the list of checks that the
//! sidecar reads from `TULLE_PROBES`. Probes that only kubelet can carry out (exec, HTTPS, another host) are not
//! moved.

use json_patch::Patch;
use serde_json::{Value, json};
use tulle_mesh::ports;

use super::{INIT, Operations, PROXY, containers_at, name_of};

pub(super) const KINDS: [&str; 3] = ["startupProbe", "livenessProbe", "readinessProbe"];

/// Environment variable of the sidecar: the checks, as JSON.
const PROBES_VARIABLE: &str = "TULLE_PROBES";

/// Moves the probes of a pod that is being injected; returns the checks.
pub(super) fn move_all(pod: &Value, operations: &mut Operations, warnings: &mut Vec<String>) -> Value {
    Value::Array(move_probes(pod, &[], operations, warnings))
}

/// Moves the probes that another webhook has added to a pod after its injection; `None` when there are none. Only for
/// pods that are being created, because probes are immutable afterwards (see [`super::update`]).
pub(super) fn move_added(pod: &Value, warnings: &mut Vec<String>) -> Option<Patch> {
    let (index, proxy) = containers_at(pod, "/spec/initContainers")
        .enumerate()
        .find(|(_, container)| name_of(container) == PROXY)?;
    let known_at = items(proxy, "env").position(|variable| name_of(variable) == PROBES_VARIABLE);
    // An unreadable list is replaced, because the sidecar would not start with it.
    let mut checks = checks_of(proxy);

    let mut operations = Operations::default();
    let added = move_probes(pod, &checks, &mut operations, warnings);
    if added.is_empty() {
        return None;
    }
    checks.retain(|check| !added.iter().any(|added| added.get("path") == check.get("path")));
    checks.extend(added);
    let value = json!(Value::Array(checks).to_string());
    let index = index.to_string();
    match known_at.map(|at| at.to_string()) {
        Some(at) => operations.add(&["spec", "initContainers", &index, "env", &at, "value"], value),
        None => {
            if proxy.get("env").is_none() {
                operations.add(&["spec", "initContainers", &index, "env"], json!([]));
            }
            let variable = json!({"name": PROBES_VARIABLE, "value": value});
            operations.add(&["spec", "initContainers", &index, "env", "-"], variable);
        }
    }
    Some(Patch(operations.0))
}

/// The checks that a sidecar carries out; none if its list is unreadable.
pub(super) fn checks_of(proxy: &Value) -> Vec<Value> {
    let variable = items(proxy, "env").find(|variable| name_of(variable) == PROBES_VARIABLE);
    let text = variable.and_then(|variable| variable.get("value")?.as_str());
    text.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
}

/// Moves every probe that is not among the `known` checks.
fn move_probes(
    pod: &Value,
    known: &[Value],
    operations: &mut Operations,
    warnings: &mut Vec<String>,
) -> Vec<Value> {
    let mut checks = Vec::new();
    for list in ["containers", "initContainers"] {
        for (index, container) in containers_at(pod, &format!("/spec/{list}")).enumerate() {
            let name = name_of(container);
            if [INIT, PROXY].contains(&name) {
                continue;
            }
            warn_about_http_hooks(container, warnings);
            for kind in KINDS {
                let Some(probe) = container.get(kind) else { continue };
                let path = format!("/{name}/{kind}");
                match where_to(probe, &path, known) {
                    Leads::Elsewhere => {}
                    Leads::ToTheSidecar => continue,
                    Leads::Nowhere => {
                        operations.remove(&["spec", list, &index.to_string(), kind]);
                        warnings.push(format!(
                            "{kind} of container {name} is removed because it was moved to a sidecar that the pod no longer has, and the original check is unknown; write the probe again"
                        ));
                        continue;
                    }
                }
                match check(container, probe) {
                    Ok(Some(Check { handler, what })) => {
                        let index = index.to_string();
                        operations.remove(&["spec", list, &index, kind, handler]);
                        let get = json!({"path": path, "port": ports::PROBES, "scheme": "HTTP"});
                        operations.add(&["spec", list, &index, kind, "httpGet"], get);
                        let timeout = probe.get("timeoutSeconds").and_then(Value::as_u64).unwrap_or(1);
                        checks.push(json!({"path": path, "check": what, "timeoutSeconds": timeout}));
                    }
                    Ok(None) => {}
                    Err(why) => warnings.push(format!(
                        "{kind} of container {name} is not moved to the sidecar because {why}"
                    )),
                }
            }
        }
    }
    checks
}

fn warn_about_http_hooks(container: &Value, warnings: &mut Vec<String>) {
    // Kubelet takes every response for success. The sidecar accepts the connection in place of the application.
    const LOST: &str = ", and one that is sent before the application listens is lost: the sidecar answers it with 502, and kubelet neither reports that nor restarts the container";
    for (hook, lost) in [("postStart", LOST), ("preStop", "")] {
        if container.pointer(&format!("/lifecycle/{hook}/httpGet")).is_some() {
            warnings.push(format!(
                "{hook} of container {} is sent by kubelet without a certificate, so mtls: Strict and allow lists reject it{lost}; use an exec hook",
                name_of(container)
            ));
        }
    }
}

/// Where a probe leads.
enum Leads {
    /// To the application.
    Elsewhere,
    /// To the sidecar, which has the check.
    ToTheSidecar,
    /// To a sidecar's port, where no check is known: moving it again would make the sidecar probe itself.
    Nowhere,
}

fn where_to(probe: &Value, path: &str, known: &[Value]) -> Leads {
    let is_ours = probe.pointer("/httpGet/path").and_then(Value::as_str) == Some(path);
    let port = probe.pointer("/httpGet/port").and_then(Value::as_u64);
    let listed = || known.iter().any(|check| check.get("path").and_then(Value::as_str) == Some(path));
    match is_ours {
        true if listed() => Leads::ToTheSidecar,
        true if port == Some(u64::from(ports::PROBES)) => Leads::Nowhere,
        _ => Leads::Elsewhere,
    }
}

/// A probe that can be moved.
pub(super) struct Check {
    /// The probe's handler field: `httpGet`, `tcpSocket` or `grpc`.
    handler: &'static str,
    /// The check that the sidecar carries out.
    pub(super) what: Value,
}

/// The check of a probe; `None` when it does not use the network.
pub(super) fn check(container: &Value, probe: &Value) -> Result<Option<Check>, String> {
    if let Some(get) = probe.get("httpGet") {
        reject_host(get)?;
        if get.get("scheme").and_then(Value::as_str) == Some("HTTPS") {
            return Err(
                "its scheme is HTTPS, so it fails where mtls is Strict; use an exec probe there".to_owned()
            );
        }
        let port = port(container, get.get("port"))?;
        // Not normalized here: the sidecar parses it as kubelet does.
        let path = get.get("path").and_then(Value::as_str).unwrap_or("/");
        let text =
            |header: &Value, field: &str| header.get(field).and_then(Value::as_str).unwrap_or("").to_owned();
        let headers: Vec<[String; 2]> =
            items(get, "httpHeaders").map(|header| [text(header, "name"), text(header, "value")]).collect();
        let what = json!({"http": {"port": port, "path": path, "headers": headers, "tls": false}});
        return Ok(Some(Check { handler: "httpGet", what }));
    }
    if let Some(tcp) = probe.get("tcpSocket") {
        reject_host(tcp)?;
        let port = port(container, tcp.get("port"))?;
        return Ok(Some(Check { handler: "tcpSocket", what: json!({"tcp": {"port": port}}) }));
    }
    if let Some(grpc) = probe.get("grpc") {
        let port = port(container, grpc.get("port"))?;
        let service = grpc.get("service").and_then(Value::as_str).unwrap_or("");
        let what = json!({"grpc": {"port": port, "service": service}});
        return Ok(Some(Check { handler: "grpc", what }));
    }
    Ok(None)
}

fn items<'a>(value: &'a Value, field: &str) -> impl Iterator<Item = &'a Value> {
    value.get(field).and_then(Value::as_array).into_iter().flatten()
}

fn reject_host(handler: &Value) -> Result<(), String> {
    match handler.get("host").and_then(Value::as_str) {
        None | Some("") => Ok(()),
        Some(_) => Err("it sets host".to_owned()),
    }
}

/// The number of a probe's port, resolved by kubelet's rules (`ResolveContainerPort`): a name refers to a port of the
/// same container, and a number may be written as text.
fn port(container: &Value, port: Option<&Value>) -> Result<u16, String> {
    let number = match port {
        Some(Value::Number(number)) => number.as_u64().ok_or_else(|| format!("port {number} is invalid"))?,
        Some(Value::String(name)) => {
            let named = items(container, "ports").find(|port| name_of(port) == name);
            let number = match named {
                Some(port) => port.get("containerPort").and_then(Value::as_u64),
                None => name.parse().ok(),
            };
            number.ok_or_else(|| format!("the container has no port named {name}"))?
        }
        _ => return Err("it has no port".to_owned()),
    };
    u16::try_from(number).ok().filter(|port| *port > 0).ok_or_else(|| format!("port {number} is invalid"))
}

#[cfg(test)]
mod tests;
