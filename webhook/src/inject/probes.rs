//! Kubelet's probes come from the node, without a certificate. They are moved to a port of the sidecar
//! that carries them out from within the pod, so that no policy can fail them.

use serde_json::{Value, json};
use tulle_mesh::ports;

use super::{Operations, name_of};

const KINDS: [&str; 3] = ["startupProbe", "livenessProbe", "readinessProbe"];

/// Rewrites the probes of every container; returns what the sidecar needs to carry them out.
pub(super) fn rewrite(pod: &Value, operations: &mut Operations, warnings: &mut Vec<String>) -> Value {
    let mut probes = Vec::new();
    for list in ["containers", "initContainers"] {
        let containers = pod.pointer(&format!("/spec/{list}")).and_then(Value::as_array);
        for (index, container) in containers.into_iter().flatten().enumerate() {
            for hook in ["postStart", "preStop"] {
                if container.pointer(&format!("/lifecycle/{hook}/httpGet")).is_some() {
                    warnings.push(format!(
                        "{hook} of container {} comes from kubelet without a certificate: mtls: Strict refuses it, an allow list too; write it as exec",
                        name_of(container)
                    ));
                }
            }
            for kind in KINDS {
                let Some(probe) = container.get(kind) else { continue };
                let path = format!("/{}/{kind}", name_of(container));
                match check(container, probe) {
                    Ok(Some((handler, check))) => {
                        let index = index.to_string();
                        let list_at = "spec";
                        operations.remove(&[list_at, list, &index, kind, handler]);
                        let get = json!({"path": path, "port": ports::PROBES, "scheme": "HTTP"});
                        operations.add(&[list_at, list, &index, kind, "httpGet"], get);
                        let timeout = probe.get("timeoutSeconds").and_then(Value::as_u64).unwrap_or(1);
                        probes.push(json!({"path": path, "check": check, "timeoutSeconds": timeout}));
                    }
                    Ok(None) => {}
                    Err(why) => warnings
                        .push(format!("{kind} of container {} stays as it is: {why}", name_of(container))),
                }
            }
        }
    }
    Value::Array(probes)
}

/// What a probe checks, and which field says so; `None`: nothing that comes over the network.
fn check(container: &Value, probe: &Value) -> Result<Option<(&'static str, Value)>, String> {
    if let Some(get) = probe.get("httpGet") {
        if get.get("host").and_then(Value::as_str).is_some_and(|host| !host.is_empty()) {
            return Err("it names a host of its own".to_owned());
        }
        if get.get("scheme").and_then(Value::as_str) == Some("HTTPS") {
            return Err("HTTPS probes are passed through to the application; under mtls: Strict kubelet is refused, use an exec probe".to_owned());
        }
        let port = port(container, get.get("port"))?;
        // kubelet adds the slash too.
        let path = get.get("path").and_then(Value::as_str).unwrap_or("/");
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        let headers: Vec<Value> = get
            .get("httpHeaders")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .map(|header| json!([header.get("name"), header.get("value")]))
            .collect();
        return Ok(Some((
            "httpGet",
            json!({"http": {"port": port, "path": path, "headers": headers, "tls": false}}),
        )));
    }
    if let Some(tcp) = probe.get("tcpSocket") {
        if tcp.get("host").and_then(Value::as_str).is_some_and(|host| !host.is_empty()) {
            return Err("it names a host of its own".to_owned());
        }
        let port = port(container, tcp.get("port"))?;
        return Ok(Some(("tcpSocket", json!({"tcp": {"port": port}}))));
    }
    if let Some(grpc) = probe.get("grpc") {
        let port = port(container, grpc.get("port"))?;
        let service = grpc.get("service").and_then(Value::as_str).unwrap_or("");
        return Ok(Some(("grpc", json!({"grpc": {"port": port, "service": service}}))));
    }
    Ok(None)
}

fn port(container: &Value, port: Option<&Value>) -> Result<u64, String> {
    match port {
        Some(Value::Number(number)) => number.as_u64().ok_or_else(|| "its port is no number".to_owned()),
        Some(Value::String(name)) => {
            let ports = container.get("ports").and_then(Value::as_array).into_iter().flatten();
            let named = ports.into_iter().find(|p| p.get("name").and_then(Value::as_str) == Some(name));
            let number = named.and_then(|port| port.get("containerPort")).and_then(Value::as_u64);
            number
                .or_else(|| name.parse().ok())
                .ok_or_else(|| format!("the container has no port named {name}"))
        }
        _ => Err("it has no port".to_owned()),
    }
}
