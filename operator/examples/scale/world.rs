//! The cluster that is simulated.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use serde_json::json;
use tulle_crds::{Canary, MeshPolicy, WorkloadKind};
use tulle_mesh::identity::WorkloadId;
use tulle_operator::model::object::ServicePort;
use tulle_operator::model::{Endpoint, Key, Model, Pod, Service, Slice, WorkloadKey};

pub const PODS: u32 = 10_000;
pub const SERVICES: u32 = 1_000;
pub const POLICIES: u32 = 500;
pub const CANARIES: u32 = 200;
pub const STREAMS: u32 = 2_000;
/// Destinations of one stream: so each Service has STREAMS × this ÷ SERVICES = 20 clients.
pub const DESTINATIONS: u32 = 10;
const PODS_PER_SERVICE: u32 = PODS / SERVICES;
/// Pods of the policy that selects many, and of that which selects few.
pub const MANY: u32 = 1_000;
pub const FEW: u32 = 10;
/// The revision of pods that nobody restarted. Others are named after the time of their restart.
pub const FIRST: &str = "1";

pub fn id(account: &str) -> WorkloadId {
    WorkloadId::new("cluster.local", "shop", account)
}

pub fn key(name: &str) -> Key {
    ("shop".into(), name.into())
}

pub fn uid(pod: u32) -> Arc<str> {
    format!("pod-{pod}").into()
}

pub fn service_name(service: u32) -> String {
    format!("service-{service}")
}

pub fn service_address(service: u32) -> SocketAddr {
    (Ipv4Addr::from(0x0a60_0000 + service), 80).into()
}

fn pod_address(pod: u32) -> IpAddr {
    Ipv4Addr::from(0x0af4_0000 + pod).into()
}

/// What a stream subscribes to.
pub fn destinations(stream: u32) -> impl Iterator<Item = SocketAddr> {
    (0..DESTINATIONS).map(move |n| service_address((stream * DESTINATIONS + n) % SERVICES))
}

pub fn pod(number: u32, revision: &str) -> Pod {
    let service = service_name(number / PODS_PER_SERVICE);
    // The first thousand belong to the broad policy, and everybody to a narrow one.
    let tier = if number < MANY { "many" } else { "rest" };
    Pod {
        uid: uid(number),
        name: uid(number),
        namespace: "shop".into(),
        service_account: "app".into(),
        node: format!("node-{}", number % 200).into(),
        labels: Box::new([
            ("app".into(), service.as_str().into()),
            ("tier".into(), tier.into()),
            ("pod-template-hash".into(), revision.into()),
        ]),
        ips: Box::new([pod_address(number)]),
        workload: Some(WorkloadKey {
            kind: WorkloadKind::Deployment,
            namespace: "shop".into(),
            name: service.into(),
        }),
        injected: true,
        containers_ready: true,
        ready: true,
        ..Pod::default()
    }
}

/// The slice of a Service, with this pod ready or not.
pub fn slice(service: u32, not_ready: Option<u32>) -> Slice {
    let endpoint = |number: u32| Endpoint {
        address: Some(pod_address(number)),
        ready: Some(number) != not_ready,
        serving: Some(number) != not_ready,
        node: format!("node-{}", number % 200).into(),
        pod_uid: Some(uid(number)),
        ..Endpoint::default()
    };
    let first = service * PODS_PER_SERVICE;
    Slice {
        service: service_name(service).into(),
        ports: vec![("http".into(), 8080)],
        endpoints: (first..first + PODS_PER_SERVICE).map(endpoint).collect(),
    }
}

/// A policy for the pods with a label.
pub fn policy(name: &str, label: (&str, &str), generation: u32) -> MeshPolicy {
    let (label, value) = label;
    let rules = [json!({"from": [{"namespace": format!("team-{generation}")}]})];
    serde_json::from_value(json!({
        "apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy",
        "metadata": {"name": name, "namespace": "shop", "uid": name, "generation": generation,
            "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {
            "target": {"kind": "Workload", "selector": {"matchLabels": {label: value}}},
            "access": {"allow": rules},
        },
    }))
    .unwrap()
}

pub fn canary(service: u32, epoch: u64) -> Canary {
    let name = service_name(service);
    serde_json::from_value(json!({
        "apiVersion": "tulle.dev/v1alpha1", "kind": "Canary", "metadata": {"name": name, "namespace": "shop"},
        "spec": {"target": {"kind": "Deployment", "name": name}},
        "status": {"approvedRevision": FIRST, "phase": "Stable", "epoch": epoch},
    }))
    .unwrap()
}

pub fn model() -> Model {
    let mut model = Model::new("mesh", "cluster.local");
    for number in 0..PODS {
        model.apply_pod(pod(number, FIRST));
    }
    for service in 0..SERVICES {
        let name = service_name(service);
        let object = Service {
            uid: name.as_str().into(),
            cluster_ips: vec![service_address(service).ip()],
            ports: vec![ServicePort { name: "http".into(), port: 80, app_protocol: None }],
            selector: [("app".to_owned(), name.clone())].into(),
            ..Service::default()
        };
        model.apply_service(key(&name), object);
        model.apply_slice(key(&name), slice(service, None));
    }
    model.apply_policy(key("many"), policy("many", ("tier", "many"), 1));
    // The pods of the broad policy have no narrow one: it would overrule the other.
    for number in 1..POLICIES {
        let name = format!("few-{number}");
        let service = service_name(MANY / PODS_PER_SERVICE + number);
        model.apply_policy(key(&name), policy(&name, ("app", &service), 1));
    }
    for service in 0..CANARIES {
        model.apply_canary(key(&service_name(service)), canary(service, 1));
    }
    model
}
