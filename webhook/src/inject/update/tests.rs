//! Pods that are applied again, changed, or updated by others.

use super::super::{Context, Mode, Outcome, inject};
use super::*;

fn context() -> Context {
    super::super::tests::context(Mode::Enabled)
}

fn injected(spec: Value) -> Value {
    let mut pod = json!({"metadata": {"name": "web"}, "spec": spec});
    let (Outcome::Inject(patch), _) = inject(&pod, &context()) else { panic!("not injected") };
    json_patch::patch(&mut pod, &patch).unwrap();
    pod
}

/// An application whose probe has this handler, as the API server completes it.
fn app(probe: Value) -> Value {
    let ports = json!([{"name": "web", "containerPort": 8080}]);
    json!({"containers": [{"name": "app", "image": "app:1", "ports": ports, "readinessProbe": probe}]})
}

/// As a client-side or server-side apply merges a probe into the pod: fields that the manifest lacks stay.
fn applied(pod: &Value, probe: Value) -> Value {
    let mut pod = pod.clone();
    json_patch::merge(&mut pod["spec"]["containers"][0]["readinessProbe"], &probe);
    pod
}

fn restored(old: &Value, mut new: Value) -> Value {
    let patch = restore(old, &new).expect("nothing is put back");
    json_patch::patch(&mut new, &patch).unwrap();
    new
}

#[test]
fn the_same_manifest_applied_again_changes_nothing() {
    for (created, manifest) in [
        (
            json!({"httpGet": {"path": "/ready", "port": 8080, "scheme": "HTTP"}}),
            json!({"httpGet": {"path": "/ready", "port": 8080}}),
        ),
        (
            json!({"httpGet": {"path": "/", "port": "web", "scheme": "HTTP"}}),
            json!({"httpGet": {"port": "web"}}),
        ),
        (
            json!({"httpGet": {"path": "/", "port": 8080, "scheme": "HTTP", "httpHeaders": [{"name": "X", "value": "1"}]}}),
            json!({"httpGet": {"port": 8080, "httpHeaders": [{"name": "X", "value": "1"}]}}),
        ),
        (json!({"tcpSocket": {"port": "web"}}), json!({"tcpSocket": {"port": "web"}})),
        (json!({"grpc": {"port": 9000, "service": ""}}), json!({"grpc": {"port": 9000}})),
        // The application's own path may look like that of a moved probe.
        (
            json!({"httpGet": {"path": "/app/readinessProbe", "port": 8080, "scheme": "HTTP"}}),
            json!({"httpGet": {"path": "/app/readinessProbe", "port": 8080}}),
        ),
    ] {
        let old = injected(app(created));
        let new = applied(&old, manifest.clone());
        assert_ne!(new, old, "{manifest}");
        assert_eq!(restored(&old, new), old, "{manifest}");
    }
}

#[test]
fn a_probe_of_a_native_sidecar_and_of_every_kind_is_put_back() {
    let mut spec = app(json!({"tcpSocket": {"port": 8080}}));
    let native = json!({"name": "native", "restartPolicy": "Always", "startupProbe": {"tcpSocket": {"port": 9090}},
        "livenessProbe": {"grpc": {"port": 9090}}});
    spec["initContainers"] = json!([native]);
    let old = injected(spec);
    let mut new = applied(&old, json!({"tcpSocket": {"port": 8080}}));
    new["spec"]["initContainers"][2]["startupProbe"]["tcpSocket"] = json!({"port": 9090});
    new["spec"]["initContainers"][2]["livenessProbe"]["grpc"] = json!({"port": 9090});
    assert_eq!(restored(&old, new), old);
}

#[test]
fn a_changed_image_stays_changed() {
    let old = injected(app(json!({"tcpSocket": {"port": 8080}})));
    let mut new = applied(&old, json!({"tcpSocket": {"port": 8080}}));
    new["spec"]["containers"][0]["image"] = json!("app:2");
    let mut wanted = old.clone();
    wanted["spec"]["containers"][0]["image"] = json!("app:2");
    assert_eq!(restored(&old, new), wanted);
}

#[test]
fn a_probe_that_really_differs_is_left_to_the_api_server() {
    let old = injected(app(json!({"httpGet": {"path": "/ready", "port": 8080, "scheme": "HTTP"}})));
    for probe in [
        json!({"httpGet": {"path": "/ready", "port": 8081}}),
        json!({"httpGet": {"path": "/other", "port": 8080}}),
        json!({"httpGet": {"path": "/ready", "port": 8080, "scheme": "HTTPS"}}),
        json!({"httpGet": {"path": "/ready", "port": 8080, "host": "other"}}),
        json!({"httpGet": {"path": "/ready", "port": 8080, "httpHeaders": [{"name": "X", "value": "1"}]}}),
        // The path that remains of the moved probe would mean the root.
        json!({"httpGet": {"port": 8080}}),
        json!({"tcpSocket": {"port": 8080}}),
        json!({"exec": {"command": ["true"]}}),
        json!({"httpGet": {"path": "/ready", "port": 8080}, "tcpSocket": {"port": 8080}}),
    ] {
        assert_eq!(restore(&old, &applied(&old, probe.clone())), None, "{probe}");
    }
}

#[test]
fn other_updates_are_left_alone() {
    let old = injected(app(json!({"tcpSocket": {"port": 8080}})));
    assert_eq!(restore(&old, &old), None);
    for (path, value) in [
        ("/metadata/labels", json!({"app": "web"})),
        ("/metadata/annotations", json!({})),
        ("/metadata/finalizers", json!([])),
        ("/spec/tolerations", json!([{"operator": "Exists"}])),
        ("/spec/containers/0/image", json!("app:2")),
        ("/spec/containers/0/resources", json!({"requests": {"cpu": "1"}})),
        ("/spec/activeDeadlineSeconds", json!(60)),
    ] {
        let mut new = old.clone();
        let add: Patch =
            serde_json::from_value(json!([{"op": "add", "path": path, "value": value}])).unwrap();
        json_patch::patch(&mut new, &add).unwrap();
        assert_eq!(restore(&old, &new), None, "{path}");
    }
}

#[test]
fn a_pod_without_a_sidecar_is_never_injected_or_changed() {
    let old = json!({"metadata": {}, "spec": app(json!({"tcpSocket": {"port": 8080}}))});
    assert_eq!(restore(&old, &applied(&old, json!({"tcpSocket": {"port": 8081}}))), None);
    let new = injected(app(json!({"tcpSocket": {"port": 8080}})));
    assert_eq!(restore(&old, &new), None, "only the old pod counts");
}

#[test]
fn the_pods_own_resources_keep_the_room_for_the_sidecar() {
    let mut spec = app(json!({"exec": {"command": ["true"]}}));
    let own = json!({"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"cpu": "1"}});
    spec["resources"] = own.clone();
    let old = injected(spec);
    assert_ne!(old["spec"]["resources"], own);
    let mut new = old.clone();
    new["spec"]["resources"] = own;
    assert_eq!(restored(&old, new.clone()), old);
    new["spec"]["resources"] = json!({"requests": {"cpu": "600m"}});
    assert_eq!(restore(&old, &new), None, "other values");
}

#[test]
fn a_limit_of_the_pods_own_is_put_back_whichever_share_it_was_raised_by() {
    let pod = |ours: &str, own: Value| {
        let ours = json!({"requests": {"cpu": "10m"}, "limits": {"cpu": ours}});
        let proxy = json!({"name": "tulle-proxy", "resources": ours});
        json!({"metadata": {}, "spec": {"initContainers": [proxy], "containers": [], "resources": own}})
    };
    let amounts =
        |requests: &str, limits: &str| json!({"requests": {"cpu": requests}, "limits": {"cpu": limits}});
    for (case, ours, raised, applied) in [
        ("both", "50m", amounts("50m", "50m"), amounts("40m", "40m")),
        (
            "a limit alone, into the request that was made of it",
            "50m",
            amounts("50m", "50m"),
            amounts("50m", "40m"),
        ),
        (
            "by a version that raised equal ones differently",
            "500m",
            amounts("50m", "540m"),
            amounts("40m", "40m"),
        ),
    ] {
        let old = pod(ours, raised);
        assert_eq!(restored(&old, pod(ours, applied)), old, "{case}");
    }
    let old = pod("50m", amounts("50m", "50m"));
    assert_eq!(restore(&old, &old), None);
    assert_eq!(restore(&old, &pod("50m", amounts("50m", "30m"))), None, "another value");
}
