//! What a large cluster costs in memory, counted by the allocator: in a process of its own, so that nothing
//! else is counted.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

use std::net::{IpAddr, Ipv4Addr};

use serde_json::json;
use tikv_jemalloc_ctl::{epoch, stats};
use tulle_operator::model::object::ServicePort;
use tulle_operator::model::{Endpoint, Model, Service, Slice};
use tulle_operator::watch::pod_of_json;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const PODS: u32 = 10_000;
const PODS_PER_SERVICE: u32 = 10;

fn allocated() -> usize {
    epoch::advance().unwrap();
    stats::allocated::read().unwrap()
}

fn address(number: u32) -> IpAddr {
    Ipv4Addr::from(0x0a00_0000 + number).into()
}

/// An injected pod of a Deployment, as the API server sends it.
fn pod(number: u32) -> String {
    let app = format!("service-{}", number / PODS_PER_SERVICE);
    let hash = format!("{:010x}", number / PODS_PER_SERVICE);
    let container = |name: &str| {
        let is_proxy = name == "tulle-proxy";
        json!({
            "name": name, "image": format!("registry.example/{name}:1.2.3"),
            "args": if is_proxy { vec!["proxy"] } else { vec!["--port=8080", "--verbose"] },
            "restartPolicy": is_proxy.then_some("Always"),
            "env": [{"name": "DATABASE", "value": "postgres://db/shop"}, {"name": "REGION", "value": "north"}],
            "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}},
            "volumeMounts": [{"name": "kube-api-access", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}],
        })
    };
    let proxy = container("tulle-proxy");
    let condition =
        |kind: &str| json!({"type": kind, "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"});
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": format!("{app}-{hash}-{number:05}"), "namespace": format!("team-{}", number % 50),
            "uid": format!("0f8fad5b-d9cb-469f-a165-{number:012}"), "resourceVersion": format!("{number}"),
            "labels": {
                "app.kubernetes.io/name": app, "app.kubernetes.io/part-of": "shop", "app.kubernetes.io/version": "1.2.3",
                "pod-template-hash": hash, "tulle.dev/sidecar": "0.1.0",
            },
            "annotations": {"prometheus.io/scrape": "true", "checksum/config": "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": format!("{app}-{hash}"), "uid": "x", "controller": true}],
            "managedFields": [{"manager": "kubelet", "operation": "Update", "apiVersion": "v1", "time": "2026-01-01T00:00:00Z", "fieldsV1": {}}],
        },
        "spec": {
            "nodeName": format!("node-{}", number % 200), "serviceAccountName": app,
            "initContainers": [container("tulle-init"), proxy], "containers": [container("app")],
        },
        "status": {
            "phase": "Running", "podIP": address(number).to_string(), "podIPs": [{"ip": address(number).to_string()}],
            "conditions": [condition("Initialized"), condition("Ready"), condition("ContainersReady"), condition("PodScheduled")],
        },
    })
    .to_string()
}

#[test]
fn ten_thousand_pods_and_their_services_take_less_than_40_mb() {
    let before = allocated();
    let mut model = Model::default();
    for number in 0..PODS {
        model.apply_pod(pod_of_json(&pod(number)).unwrap());
    }
    let pods = allocated() - before;
    for number in 0..PODS / PODS_PER_SERVICE {
        let name = format!("service-{number}");
        let key = (format!("team-{}", number % 50).into(), name.as_str().into());
        let port = ServicePort { name: "http".into(), port: 80, app_protocol: None };
        let service = Service {
            uid: name.as_str().into(),
            cluster_ips: vec![address(1 << 20 | number)],
            ports: vec![port],
            selector: [("app.kubernetes.io/name".to_owned(), name.clone())].into(),
            ..Service::default()
        };
        model.apply_service(key, service);
        let endpoints = (0..PODS_PER_SERVICE).map(|n| {
            let pod = number * PODS_PER_SERVICE + n;
            let uid = format!("0f8fad5b-d9cb-469f-a165-{pod:012}");
            Endpoint {
                address: Some(address(pod)),
                ready: true,
                serving: true,
                node: format!("node-{}", pod % 200).into(),
                zone: "zone-a".into(),
                pod_uid: Some(uid.into()),
                ..Endpoint::default()
            }
        });
        let slice = Slice {
            service: name.as_str().into(),
            ports: vec![("http".into(), 8080)],
            endpoints: endpoints.collect(),
        };
        model.apply_slice((format!("team-{}", number % 50).into(), format!("{name}-x").into()), slice);
    }
    let all = allocated() - before;
    println!("{PODS} pods: {} kB; with Services and slices: {} kB", pods / 1000, all / 1000);
    assert!(model.pods().count() == PODS as usize, "not all pods are there");
    assert!(all < 40_000_000, "{PODS} pods take {all} bytes");
}
