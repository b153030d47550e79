//! Named ports, and probes that are added after the injection.

use super::super::{Context, Mode, Outcome, inject};
use super::*;

fn context(mode: Mode) -> Context {
    Context {
        mode,
        namespace: crate::inject::Namespace { name: "shop".into(), ..Default::default() },
        defaults: Default::default(),
        exempt: false,
        needs_approval: false,
        image: "tulle/sidecar:test".into(),
        operator: "tulle-operator.tulle-system.svc:4160".into(),
        operator_addresses: Vec::new(),
        operator_identity: "tulle-system/tulle-operator".into(),
        trust_domain: "cluster.local".into(),
        key: crate::inject::SealKey::derive(b"of the tests"),
    }
}

/// Admits a pod as the API server does; `None` when it was admitted unchanged.
fn admit(pod: &mut Value, mode: Mode) -> Option<Vec<String>> {
    let (outcome, warnings) = inject(pod, &context(mode));
    match outcome {
        Outcome::Inject(patch) => json_patch::patch(pod, &patch).unwrap(),
        Outcome::Skip => return None,
        Outcome::Refuse(why) => panic!("refused: {why}"),
    }
    Some(warnings)
}

fn add_container(pod: &mut Value, container: Value) {
    pod.pointer_mut("/spec/containers").unwrap().as_array_mut().unwrap().push(container);
}

fn checks(pod: &Value) -> Vec<Value> {
    let proxy = containers_at(pod, "/spec/initContainers").find(|one| name_of(one) == PROXY).unwrap();
    let mut variables = items(proxy, "env").filter(|variable| name_of(variable) == PROBES_VARIABLE);
    let text = variables.next().map(|variable| variable["value"].as_str().unwrap());
    assert!(variables.next().is_none(), "the variable is there twice");
    text.map(|text| serde_json::from_str(text).unwrap()).unwrap_or_default()
}

fn paths(pod: &Value) -> Vec<String> {
    checks(pod).iter().map(|check| check["path"].as_str().unwrap().to_owned()).collect()
}

fn moved(path: &str) -> Value {
    json!({"httpGet": {"path": path, "port": ports::PROBES, "scheme": "HTTP"}})
}

fn probed(name: &str) -> Value {
    json!({"name": name, "readinessProbe": {"httpGet": {"path": "/ready", "port": 8080}}})
}

#[test]
fn a_port_may_be_named_in_every_kind_of_probe_of_every_kind_of_container() {
    let ports = json!([{"name": "web", "containerPort": 8080}, {"name": "rpc", "containerPort": 9090}]);
    let container = |name: &str| {
        json!({"name": name, "ports": ports,
            "startupProbe": {"tcpSocket": {"port": "rpc"}},
            "livenessProbe": {"httpGet": {"path": "/", "port": "web"}},
            "readinessProbe": {"grpc": {"port": 9090}}})
    };
    let mut native = container("native");
    native["restartPolicy"] = json!("Always");
    let mut pod =
        json!({"metadata": {}, "spec": {"containers": [container("app")], "initContainers": [native]}});
    assert_eq!(admit(&mut pod, Mode::Enabled), Some(vec![]));
    for (app, native) in checks(&pod).iter().zip(checks(&pod).iter().skip(3)) {
        assert_eq!(app["check"], native["check"]);
    }
    let checked: Vec<Value> = checks(&pod).into_iter().take(3).map(|check| check["check"].clone()).collect();
    assert_eq!(checked[0], json!({"tcp": {"port": 9090}}));
    assert_eq!(checked[1]["http"]["port"], 8080);
    assert_eq!(checked[2], json!({"grpc": {"port": 9090, "service": ""}}));
}

#[test]
fn a_port_is_resolved_as_kubelet_resolves_it() {
    let container = json!({"ports": [{"name": "web", "containerPort": 8080}, {"containerPort": 1}]});
    for (given, resolved) in [
        (json!(80), Ok(80)),
        (json!("web"), Ok(8080)),
        (json!("81"), Ok(81)),
        (json!("other"), Err("the container has no port named other")),
        (json!(0), Err("port 0 is invalid")),
        (json!(65536), Err("port 65536 is invalid")),
        (json!("65536"), Err("port 65536 is invalid")),
        (json!(null), Err("it has no port")),
    ] {
        assert_eq!(port(&container, Some(&given)), resolved.map_err(str::to_owned), "{given}");
    }
}

#[test]
fn repeated_headers_reach_the_sidecar() {
    let headers = json!([{"name": "X", "value": "1"}, {"name": "X", "value": "2"}, {"name": "Y"}]);
    let get = json!({"path": "/", "port": 80, "httpHeaders": headers});
    let mut pod =
        json!({"metadata": {}, "spec": {"containers": [{"name": "app", "livenessProbe": {"httpGet": get}}]}});
    admit(&mut pod, Mode::Enabled);
    assert_eq!(checks(&pod)[0]["check"]["http"]["headers"], json!([["X", "1"], ["X", "2"], ["Y", ""]]));
}

#[test]
fn probes_of_a_container_that_another_webhook_adds_are_moved_too() {
    for mode in [Mode::Enabled, Mode::Required] {
        let mut pod = json!({"metadata": {}, "spec": {"containers": [probed("app")]}});
        admit(&mut pod, mode).unwrap();
        assert_eq!(admit(&mut pod, mode), None, "nothing new");
        add_container(&mut pod, probed("late"));
        let sidecar = pod.pointer("/spec/initContainers/1").cloned().unwrap();
        assert_eq!(admit(&mut pod, mode), Some(vec![]));
        assert_eq!(paths(&pod), ["/app/readinessProbe", "/late/readinessProbe"]);
        assert_eq!(pod.pointer("/spec/containers/0/readinessProbe"), Some(&moved("/app/readinessProbe")));
        assert_eq!(pod.pointer("/spec/containers/1/readinessProbe"), Some(&moved("/late/readinessProbe")));
        let after = pod.pointer("/spec/initContainers/1").unwrap();
        assert_eq!(after["startupProbe"], sidecar["startupProbe"], "the sidecar's own probe stays");
        assert_eq!(admit(&mut pod, mode), None, "once more changes nothing");
    }
}

#[test]
fn a_sidecar_without_checks_gets_the_variable() {
    let mut pod = json!({"metadata": {}, "spec": {"containers": [{"name": "app"}]}});
    admit(&mut pod, Mode::Required).unwrap();
    assert_eq!(paths(&pod), [""; 0]);
    add_container(&mut pod, probed("late"));
    admit(&mut pod, Mode::Required).unwrap();
    assert_eq!(paths(&pod), ["/late/readinessProbe"]);
    assert_eq!(admit(&mut pod, Mode::Required), None);
}

#[test]
fn a_probe_that_another_webhook_replaces_replaces_the_check() {
    let mut pod = json!({"metadata": {}, "spec": {"containers": [probed("app"), probed("other")]}});
    admit(&mut pod, Mode::Enabled).unwrap();
    pod["spec"]["containers"][0]["readinessProbe"] = json!({"tcpSocket": {"port": 9090}});
    admit(&mut pod, Mode::Enabled).unwrap();
    assert_eq!(pod.pointer("/spec/containers/0/readinessProbe"), Some(&moved("/app/readinessProbe")));
    assert_eq!(paths(&pod), ["/other/readinessProbe", "/app/readinessProbe"]);
    assert_eq!(checks(&pod)[1]["check"], json!({"tcp": {"port": 9090}}));
}

#[test]
fn an_application_whose_own_path_looks_like_ours_is_moved() {
    let get = json!({"path": "/app/readinessProbe", "port": 8080});
    let mut pod = json!({"metadata": {}, "spec": {"containers": [{"name": "app", "readinessProbe": {"httpGet": get}}]}});
    admit(&mut pod, Mode::Enabled).unwrap();
    assert_eq!(checks(&pod)[0]["check"]["http"]["port"], 8080);
    assert_eq!(admit(&mut pod, Mode::Enabled), None);
}

#[test]
fn a_probe_that_has_to_stay_with_kubelet_is_named_and_changes_nothing() {
    let mut pod = json!({"metadata": {}, "spec": {"containers": [{"name": "app"}]}});
    admit(&mut pod, Mode::Enabled).unwrap();
    add_container(
        &mut pod,
        json!({"name": "late", "livenessProbe": {"httpGet": {"port": 8443, "scheme": "HTTPS"}}}),
    );
    let (outcome, warnings) = inject(&pod, &context(Mode::Enabled));
    assert_eq!(outcome, Outcome::Skip);
    assert!(
        warnings[0].starts_with(
            "livenessProbe of container late is not moved to the sidecar because its scheme is HTTPS"
        ),
        "{warnings:?}"
    );
}

#[test]
fn a_hook_by_http_that_would_be_lost_before_the_application_listens_is_named() {
    let get = json!({"httpGet": {"port": 8080}});
    let container = json!({"name": "app", "lifecycle": {"postStart": get, "preStop": get}});
    let mut pod = json!({"metadata": {}, "spec": {"containers": [container]}});
    let warnings = admit(&mut pod, Mode::Enabled).unwrap();
    let [start, stop] = warnings.as_slice() else { panic!("{warnings:?}") };
    assert!(
        start.starts_with("postStart of container app") && start.contains("answers it with 502"),
        "{start}"
    );
    assert!(stop.starts_with("preStop of container app") && !stop.contains("502"), "{stop}");
}

#[test]
fn a_forged_sidecar_is_refused_whatever_its_containers_probe() {
    let mut pod = json!({"metadata": {}, "spec": {"containers": [probed("app")]}});
    admit(&mut pod, Mode::Required).unwrap();
    pod["spec"]["initContainers"][1]["image"] = json!("pause:1");
    add_container(&mut pod, probed("late"));
    assert!(matches!(inject(&pod, &context(Mode::Required)).0, Outcome::Refuse(_)));
}
