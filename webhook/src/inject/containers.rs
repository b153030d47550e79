//! The two containers and their volumes.

use serde_json::{Value, json};
use tulle_mesh::ports;

use super::{Context, INIT, PROXY, PodSettings};

const TOKEN_VOLUME: &str = "tulle-token";
const TRUST_VOLUME: &str = "tulle-trust";
const TOKEN_PATH: &str = "/var/run/tulle/token";
const TRUST_PATH: &str = "/var/run/tulle/trust";

/// jemalloc gives memory back after 5 s, uses no huge pages and one arena per thread: a sidecar that has
/// had its burst is small again.
const MALLOC: &str = "narenas:2,dirty_decay_ms:5000,muzzy_decay_ms:5000,thp:never";

/// Sets the redirect rules and exits. It is root for NET_ADMIN and has nothing else.
pub(super) fn init(context: &Context, settings: &PodSettings) -> Value {
    let mut arguments = vec!["init".to_owned()];
    let lists = [
        ("--skip-inbound-ports", &settings.skip_inbound_ports),
        ("--skip-outbound-ports", &settings.skip_outbound_ports),
    ];
    for (flag, ports) in lists.into_iter().filter(|(_, ports)| !ports.is_empty()) {
        let ports: Vec<String> = ports.iter().map(ToString::to_string).collect();
        arguments.push(format!("{flag}={}", ports.join(",")));
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
        "resources": resources(settings),
    })
}

/// The same for both: a quota or a limit range asks it of every container, and the first ends before the
/// second begins.
fn resources(settings: &PodSettings) -> Value {
    let mut resources = json!({"requests": {
        "cpu": settings.cpu.as_deref().unwrap_or("10m"),
        "memory": settings.memory.as_deref().unwrap_or("16Mi"),
    }});
    let limits = [("cpu", &settings.cpu_limit), ("memory", &settings.memory_limit)];
    let limits =
        limits.into_iter().filter_map(|(name, limit)| Some((name.to_owned(), json!(limit.as_ref()?))));
    let limits: serde_json::Map<_, _> = limits.collect();
    if let (false, Some(resources)) = (limits.is_empty(), resources.as_object_mut()) {
        resources.insert("limits".to_owned(), Value::Object(limits));
    }
    resources
}

/// The data plane, as a native sidecar: started before the application, stopped after it.
pub(super) fn proxy(context: &Context, settings: &PodSettings, probes: &Value) -> Value {
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
        json!({"name": "_RJEM_MALLOC_CONF", "value": MALLOC}),
    ];
    if probes.as_array().is_some_and(|probes| !probes.is_empty()) {
        env.push(json!({"name": "TULLE_PROBES", "value": probes.to_string()}));
    }
    if let Some(level) = &settings.log_level {
        env.push(json!({"name": "TULLE_LOG", "value": level}));
    }
    if let Some(workers) = settings.workers {
        env.push(json!({"name": "TULLE_WORKERS", "value": workers.to_string()}));
    }
    json!({
        "name": PROXY,
        "image": context.image,
        "args": ["proxy"],
        "restartPolicy": "Always",
        "ports": [{"name": "tulle-metrics", "containerPort": ports::ADMIN, "protocol": "TCP"}],
        "env": env,
        // The application starts once the sidecar has its certificate and its rules.
        "startupProbe": {
            "httpGet": {"path": "/ready", "port": ports::ADMIN},
            "periodSeconds": 1,
            "failureThreshold": 600,
        },
        "securityContext": {
            "runAsUser": ports::PROXY_UID,
            "runAsGroup": ports::PROXY_UID,
            "runAsNonRoot": true,
            "privileged": false,
            "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "resources": resources(settings),
        "volumeMounts": [
            {"name": TOKEN_VOLUME, "mountPath": TOKEN_PATH, "readOnly": true},
            {"name": TRUST_VOLUME, "mountPath": TRUST_PATH, "readOnly": true},
        ],
    })
}

/// Variables that annotations and probes add.
const OPTIONAL: &[&str] = &["TULLE_PROBES", "TULLE_LOG", "TULLE_WORKERS"];

/// Where a container does not do what `wanted` does: another program, arguments, environment or user; `None`:
/// nowhere. Resources, probes, what others mount into it, and variables that our program does not read may
/// differ.
pub(super) fn difference(found: &Value, wanted: &Value) -> Option<String> {
    let equal = ["/image", "/args", "/command", "/envFrom", "/restartPolicy", "/securityContext/runAsUser"];
    let shown = |value: Option<&Value>| value.map_or_else(|| "nothing".to_owned(), Value::to_string);
    if let Some(path) = equal.into_iter().find(|path| found.pointer(path) != wanted.pointer(path)) {
        let (is, should) = (shown(found.pointer(path)), shown(wanted.pointer(path)));
        return Some(format!("its {} is {is} instead of {should}", path.trim_start_matches('/')));
    }
    let list = |container: &Value, name: &str| -> Vec<Value> {
        container.get(name).and_then(Value::as_array).cloned().unwrap_or_default()
    };
    let part = |value: &Value, path: &str| value.pointer(path).cloned();
    let variable =
        |v: &Value| (part(v, "/name"), part(v, "/value"), part(v, "/valueFrom/fieldRef/fieldPath"));
    let mount = |m: &Value| (part(m, "/name"), part(m, "/mountPath"), part(m, "/subPath"));
    let named = |v: &Value| v.get("name").and_then(Value::as_str).unwrap_or("").to_owned();
    let (has, needs) = (list(found, "env"), list(wanted, "env"));
    let read = |v: &&Value| ["TULLE_", "_RJEM_"].iter().any(|prefix| named(v).starts_with(prefix));
    let foreign = has.iter().filter(read).find(|v| {
        !OPTIONAL.contains(&named(v).as_str()) && !needs.iter().any(|need| variable(need) == variable(v))
    });
    let missing = needs.iter().find(|need| !has.iter().any(|v| variable(v) == variable(need)));
    if let Some(v) = foreign.or(missing) {
        return Some(format!("its variable {} is another", named(v)));
    }
    let mounts = list(found, "volumeMounts");
    let unmounted =
        list(wanted, "volumeMounts").into_iter().find(|need| !mounts.iter().any(|m| mount(m) == mount(need)));
    unmounted.map(|volume| format!("it does not mount {}", named(&volume)))
}

pub(super) fn volumes() -> [Value; 2] {
    [
        json!({"name": TOKEN_VOLUME, "projected": {"defaultMode": 0o444, "sources": [
            {"serviceAccountToken": {"audience": "tulle", "expirationSeconds": 3600, "path": "token"}},
        ]}}),
        json!({"name": TRUST_VOLUME, "configMap": {"name": "tulle-trust", "defaultMode": 0o444}}),
    ]
}
