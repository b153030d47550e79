//! The injected containers and their volumes, and how a pod's differ from them.

use serde_json::{Value, json};
use tulle_mesh::ports;

use super::seal::is_same_image;
use super::{Context, INIT, PROXY, PodSettings, containers_at, name_of};

const TOKEN_VOLUME: &str = "tulle-token";
const TRUST_VOLUME: &str = "tulle-trust";
const TOKEN_PATH: &str = "/var/run/tulle/token";
const TRUST_PATH: &str = "/var/run/tulle/trust";

/// The variable by which the sidecar knows whose address the application sees. Without it, the sidecar's.
const SOURCE_ADDRESS: &str = "TULLE_SOURCE_ADDRESS";

/// The variable with the addresses of the operator's Service.
const OPERATOR_ADDRESSES: &str = "TULLE_OPERATOR_ADDRESSES";

/// The init container, which sets the redirect rules and exits. It is root to use NET_ADMIN, its only capability.
pub(super) fn init(context: &Context, settings: &PodSettings, resources: &Value) -> Value {
    let mut arguments = vec!["init".to_owned()];
    let lists = [
        ("--skip-inbound-ports", &settings.skip_inbound_ports),
        ("--skip-outbound-ports", &settings.skip_outbound_ports),
    ];
    for (flag, ports) in lists.into_iter().filter(|(_, ports)| !ports.is_empty()) {
        let ports: Vec<String> = ports.iter().map(ToString::to_string).collect();
        arguments.push(format!("{flag}={}", ports.join(",")));
    }
    if settings.preserves_source_address() {
        arguments.push("--preserve-source-address".to_owned());
    }
    json!({
        "name": INIT,
        "image": context.image,
        "args": arguments,
        "securityContext": {
            "runAsUser": 0,
            "runAsGroup": 0,
            "runAsNonRoot": false,
            "privileged": false,
            "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true,
            "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "resources": resources,
    })
}

/// The proxy, as a native sidecar: started before the application, stopped after it.
pub(super) fn proxy(context: &Context, settings: &PodSettings, resources: &Value, probes: &Value) -> Value {
    let field = |path: &str| json!({"fieldRef": {"fieldPath": path}});
    let mut env = vec![
        json!({"name": "TULLE_POD_NAME", "valueFrom": field("metadata.name")}),
        json!({"name": "TULLE_POD_NAMESPACE", "valueFrom": field("metadata.namespace")}),
        json!({"name": "TULLE_POD_UID", "valueFrom": field("metadata.uid")}),
        json!({"name": "TULLE_POD_IPS", "valueFrom": field("status.podIPs")}),
        json!({"name": "TULLE_TRUST_DOMAIN", "value": context.trust_domain}),
        json!({"name": "TULLE_OPERATOR", "value": context.operator}),
        json!({"name": "TULLE_OPERATOR_IDENTITY", "value": context.operator_identity}),
        json!({"name": "TULLE_TOKEN_FILE", "value": format!("{TOKEN_PATH}/token")}),
        json!({"name": "TULLE_TRUST_FILE", "value": format!("{TRUST_PATH}/roots.pem")}),
    ];
    if !context.operator_addresses.is_empty() {
        let addresses: Vec<String> = context.operator_addresses.iter().map(ToString::to_string).collect();
        env.push(json!({"name": OPERATOR_ADDRESSES, "value": addresses.join(",")}));
    }
    if probes.as_array().is_some_and(|probes| !probes.is_empty()) {
        env.push(json!({"name": "TULLE_PROBES", "value": probes.to_string()}));
    }
    if let Some(level) = &settings.log_level {
        env.push(json!({"name": "TULLE_LOG", "value": level}));
    }
    if let Some(workers) = settings.workers {
        env.push(json!({"name": "TULLE_WORKERS", "value": workers.to_string()}));
    }
    // The kernel lets a process send from a client's address if it has this capability. A process that is not root gets
    // it from its file, which no_new_privs would forbid.
    let preserve = settings.preserves_source_address();
    let capabilities = if preserve {
        env.push(json!({"name": SOURCE_ADDRESS, "value": "preserve"}));
        json!({"drop": ["ALL"], "add": ["NET_RAW"]})
    } else {
        json!({"drop": ["ALL"]})
    };
    json!({
        "name": PROXY,
        "image": context.image,
        "args": ["proxy"],
        "restartPolicy": "Always",
        "ports": [{"name": "tulle-metrics", "containerPort": ports::ADMIN, "protocol": "TCP"}],
        "env": env,
        // Holds the application back until the sidecar has its certificate and its policy.
        "startupProbe": {
            "httpGet": {"path": "/ready", "port": ports::ADMIN},
            "periodSeconds": 1,
            "failureThreshold": 600,
        },
        // Fails when the certificate has expired. It does not depend on a connection to the operator, because the
        // pod would become unready with every outage of the operator.
        "readinessProbe": {
            "httpGet": {"path": "/ready", "port": ports::ADMIN},
            "periodSeconds": 5,
            "timeoutSeconds": 5,
            "failureThreshold": 3,
        },
        // Fails when a worker thread is stuck. It takes 30 s, because a restart ends connections and a busy node must
        // not cause one.
        "livenessProbe": {
            "httpGet": {"path": "/live", "port": ports::ADMIN},
            "periodSeconds": 10,
            "timeoutSeconds": 5,
            "failureThreshold": 3,
        },
        "securityContext": {
            "runAsUser": ports::PROXY_UID,
            "runAsGroup": ports::PROXY_UID,
            "runAsNonRoot": true,
            "privileged": false,
            "allowPrivilegeEscalation": preserve,
            "readOnlyRootFilesystem": true,
            "capabilities": capabilities,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "resources": resources,
        "volumeMounts": [
            {"name": TOKEN_VOLUME, "mountPath": TOKEN_PATH, "readOnly": true},
            {"name": TRUST_VOLUME, "mountPath": TRUST_PATH, "readOnly": true},
        ],
    })
}

/// Variables that depend on annotations and probes.
const OPTIONAL: &[&str] = &["TULLE_PROBES", "TULLE_LOG", "TULLE_WORKERS"];

/// The environment variables that the sidecar reads, without the optional ones, as `[name, value, field]`.
pub(super) fn variables(container: &Value) -> Vec<Value> {
    let read = |v: &&Value| ["TULLE_", "_RJEM_"].iter().any(|prefix| name_of(v).starts_with(prefix));
    containers_at(container, "/env")
        .filter(read)
        .filter(|v| !OPTIONAL.contains(&name_of(v)))
        .map(|v| json!([v.get("name"), v.get("value"), v.pointer("/valueFrom/fieldRef/fieldPath")]))
        .collect()
}

/// Mounts of the token and of the trust bundle, as `[volume, path, subpath]`.
pub(super) fn mounts(container: &Value) -> Vec<Value> {
    containers_at(container, "/volumeMounts")
        .filter(|m| [TOKEN_VOLUME, TRUST_VOLUME].contains(&name_of(m)))
        .map(|m| json!([m.get("name"), m.get("mountPath"), m.get("subPath")]))
        .collect()
}

/// Where a container runs something else than its image, or with other rights than it was injected with; worded to
/// follow the container's name.
pub(super) fn tampered(container: &Value) -> Option<String> {
    // The program, and what it reads. Mounts elsewhere are harmless: the image has nothing else.
    const OURS: [&str; 2] = ["/program", "/var/run/tulle"];
    let ours = [TOKEN_VOLUME, TRUST_VOLUME];
    let over =
        containers_at(container, "/volumeMounts").filter(|m| !ours.contains(&name_of(m))).find_map(|m| {
            let path = m.get("mountPath").and_then(Value::as_str)?.trim_end_matches('/');
            let hides = OURS.iter().any(|our| our.starts_with(&format!("{path}/")) || path.starts_with(our));
            hides.then(|| format!("mounts volume {} over {path:?}", name_of(m)))
        });
    let exec = ["startupProbe", "livenessProbe", "readinessProbe"].into_iter().find_map(|probe| {
        container.pointer(&format!("/{probe}/exec")).map(|_| format!("has an exec handler in its {probe}"))
    });
    let has = |path: &str| {
        container.pointer(path).is_some_and(|value| ![json!([]), json!({}), json!(null)].contains(value))
    };
    let added = containers_at(container, "/securityContext/capabilities/add");
    let preserves = name_of(container) == PROXY && preserves_source_address(container);
    let is_ours = |name: &str| match name {
        "NET_ADMIN" => name_of(container) == INIT,
        "NET_RAW" => preserves,
        _ => false,
    };
    let capability = added
        .filter_map(Value::as_str)
        .find(|name| !is_ours(name))
        .map(|name| format!("has capability {name}"));
    let escalates =
        container.pointer("/securityContext/allowPrivilegeEscalation") == Some(&Value::Bool(true));
    let privileged = container.pointer("/securityContext/privileged") == Some(&Value::Bool(true));
    over.or(exec)
        .or(capability)
        .or_else(|| has("/lifecycle").then(|| "has lifecycle hooks".to_owned()))
        .or_else(|| has("/volumeDevices").then(|| "has volumeDevices".to_owned()))
        .or_else(|| privileged.then(|| "is privileged".to_owned()))
        .or_else(|| (escalates && !preserves).then(|| "has allowPrivilegeEscalation: true".to_owned()))
}

/// The rights of an injected container that its program cannot do without and that it no longer has; each worded to
/// follow the container's name.
pub(super) fn lost_rights(container: &Value, pod: &Value) -> Vec<String> {
    // Kubelet takes the pod's value where the container has none.
    let effective = |field: &str| {
        let of_pod = pod.pointer(&format!("/spec/securityContext/{field}"));
        container.pointer(&format!("/securityContext/{field}")).or(of_pod)
    };
    let is_init = name_of(container) == INIT;
    let preserves = !is_init && preserves_source_address(container);
    let mut lost = Vec::new();
    let (user, uid) = (effective("runAsUser"), if is_init { 0 } else { ports::PROXY_UID });
    if user.and_then(Value::as_u64) != Some(u64::from(uid)) {
        let found = user.map_or_else(|| "nothing".to_owned(), Value::to_string);
        lost.push(format!("has runAsUser {found} instead of {uid}"));
    }
    // Kubelet does not start a container that is root by its other field.
    if is_init && effective("runAsNonRoot") == Some(&Value::Bool(true)) {
        lost.push("has runAsNonRoot: true".to_owned());
    }
    let capability = if is_init { Some("NET_ADMIN") } else { preserves.then_some("NET_RAW") };
    if let Some(name) = capability.filter(|name| !has_capability(container, name)) {
        lost.push(format!("has no capability {name}"));
    }
    let escalation = container.pointer("/securityContext/allowPrivilegeEscalation");
    if preserves && escalation == Some(&Value::Bool(false)) {
        lost.push("has allowPrivilegeEscalation: false".to_owned());
    }
    lost
}

/// Whether the container runtime gives a container a capability that is not among its defaults. `ALL` is removed before
/// the others are added; one that is removed by its own name stays removed.
fn has_capability(container: &Value, wanted: &str) -> bool {
    let lists = |list: &str, name: &str| {
        let path = format!("/securityContext/capabilities/{list}");
        containers_at(container, &path).any(|found| found.as_str() == Some(name))
    };
    let privileged = container.pointer("/securityContext/privileged") == Some(&Value::Bool(true));
    privileged || ((lists("add", wanted) || lists("add", "ALL")) && !lists("drop", wanted))
}

/// Whether the sidecar was injected for a pod whose application sees its clients' addresses. The seal covers it.
fn preserves_source_address(container: &Value) -> bool {
    containers_at(container, "/env")
        .any(|v| name_of(v) == SOURCE_ADDRESS && v.get("value").and_then(Value::as_str) == Some("preserve"))
}

/// The ConfigMap, and the token's audience, of a volume.
pub(super) fn volume_source(volume: &Value) -> [Option<&Value>; 2] {
    ["/configMap/name", "/projected/sources/0/serviceAccountToken/audience"].map(|path| volume.pointer(path))
}

/// The first difference of a container from the injected one, worded to follow the container's name; `None` when
/// image, arguments, user, environment and mounts are the same. Resources, probes, additional mounts and variables
/// that the sidecar does not read may differ, because they do not change where traffic goes.
pub(super) fn difference(found: &Value, wanted: &Value) -> Option<String> {
    let image = |container: &Value| container.get("image").and_then(Value::as_str).unwrap_or("").to_owned();
    if !is_same_image(&image(found), &image(wanted)) {
        return Some(format!("has image {:?}, expected {:?}", image(found), image(wanted)));
    }
    let equal = ["/args", "/command", "/envFrom", "/restartPolicy", "/securityContext/runAsUser"];
    let shown = |value: Option<&Value>| value.map_or_else(|| "nothing".to_owned(), Value::to_string);
    if let Some(path) = equal.into_iter().find(|path| found.pointer(path) != wanted.pointer(path)) {
        let (actual, expected) = (shown(found.pointer(path)), shown(wanted.pointer(path)));
        let field = path.trim_start_matches('/').replace('/', ".");
        return Some(format!("has {field} {actual}, expected {expected}"));
    }
    let (has, needs) = (variables(found), variables(wanted));
    let foreign = has.iter().find(|variable| !needs.contains(variable));
    // A pod that was injected before they were known does without them.
    let is_needed = |variable: &&Value| variable.get(0).and_then(Value::as_str) != Some(OPERATOR_ADDRESSES);
    let missing = needs.iter().filter(is_needed).find(|variable| !has.contains(variable));
    if let Some(variable) = foreign.or(missing) {
        let name = variable.get(0).and_then(Value::as_str).unwrap_or("");
        return Some(format!("differs from the injected container in environment variable {name}"));
    }
    let mounted = mounts(found);
    let missing = mounts(wanted).into_iter().find(|mount| !mounted.contains(mount));
    missing
        .map(|mount| format!("does not mount volume {}", mount.get(0).and_then(Value::as_str).unwrap_or("")))
}

/// The injected volumes: the service account token for the operator, and the trust bundle.
pub(super) fn volumes() -> [Value; 2] {
    [
        json!({"name": TOKEN_VOLUME, "projected": {"defaultMode": 0o444, "sources": [
            {"serviceAccountToken": {"audience": "tulle", "expirationSeconds": 3600, "path": "token"}},
        ]}}),
        json!({"name": TRUST_VOLUME, "configMap": {"name": "tulle-trust", "defaultMode": 0o444}}),
    ]
}
