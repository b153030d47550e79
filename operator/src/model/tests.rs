//! Objects in, views out: no cluster, no mock.

use std::net::IpAddr;

use serde_json::json;
use tulle_mesh::proto::{self, EndpointState, ServicePort, destination};

use super::object::ServicePort as Port;
use super::*;
use crate::model::gateway::{RouteKind, RouteObject, RouteSpec};

mod addresses;
mod gateway;
mod invalid;
mod routes;
mod sections;
mod splits;

pub(super) const VIP: &str = "10.96.0.1:80";

pub(crate) fn key(namespace: &str, name: &str) -> Key {
    (namespace.into(), name.into())
}

pub(crate) fn pod(name: &str, ip: &str, revision: &str) -> Pod {
    Pod {
        uid: format!("uid-{name}").into(),
        name: name.into(),
        namespace: "shop".into(),
        service_account: "web".into(),
        node: "node-a".into(),
        labels: Box::new([("app".into(), "web".into()), ("pod-template-hash".into(), revision.into())]),
        ips: Box::new([ip.parse().unwrap()]),
        workload: Some(WorkloadKey {
            kind: tulle_crds::WorkloadKind::Deployment,
            namespace: "shop".into(),
            name: "web".into(),
        }),
        injected: true,
        containers_ready: true,
        ready: true,
        ..Pod::default()
    }
}

pub(super) fn endpoint(pod: &Pod, ready: bool) -> Endpoint {
    Endpoint {
        address: pod.ips.first().copied(),
        ready,
        serving: ready,
        terminating: false,
        node: Arc::clone(&pod.node),
        pod_uid: Some(Arc::clone(&pod.uid)),
        ..Endpoint::default()
    }
}

/// A Service `shop/web`, with an external address too, with these pods in one slice.
pub(crate) fn shop(pods: &[Pod]) -> Model {
    let mut model = Model::default();
    model.apply_namespace(
        "shop".into(),
        Namespace { labels: [("tulle.dev/inject".into(), "enabled".into())].into(), terminating: false },
    );
    model.apply_service(
        key("shop", "web"),
        Service {
            uid: "svc".into(),
            cluster_ips: vec!["10.96.0.1".parse().unwrap()],
            other_ips: vec!["203.0.113.1".parse().unwrap()],
            ports: vec![Port { name: "http".into(), port: 80, app_protocol: None }],
            selector: [("app".to_owned(), "web".to_owned())].into(),
            ..Service::default()
        },
    );
    for pod in pods {
        model.apply_pod(pod.clone());
    }
    let endpoints = pods.iter().map(|pod| endpoint(pod, pod.ready)).collect();
    model.apply_slice(
        key("shop", "web-1"),
        Slice { service: "web".into(), ports: vec![("http".into(), 8080)], endpoints },
    );
    model
}

pub(super) fn view(model: &Model, node: &str) -> ServicePort {
    match model.destination(VIP.parse().unwrap(), node).kind {
        Some(destination::Kind::Service(service)) => service,
        other => panic!("{other:?}"),
    }
}

fn addresses(model: &Model) -> Vec<String> {
    view(model, "node-a").endpoints.into_iter().map(|endpoint| endpoint.address).collect()
}

pub(crate) fn canary(status: serde_json::Value) -> Canary {
    serde_json::from_value(json!({
        "apiVersion": "tulle.dev/v1alpha1", "kind": "Canary", "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"target": {"kind": "Deployment", "name": "web"}}, "status": status,
    }))
    .unwrap()
}

pub(crate) fn policy(name: &str, age: u32, spec: serde_json::Value) -> MeshPolicy {
    serde_json::from_value(json!({
        "apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy", "spec": spec,
        "metadata": {"name": name, "namespace": "shop", "creationTimestamp": format!("2026-01-01T00:00:{age:02}Z")},
    }))
    .unwrap()
}

/// A route of a namespace, of Service `shop/{parent}`, with one backend at port 80.
pub(crate) fn route(name: &str, namespace: &str, parent: &str, backend: &str) -> RouteObject {
    let spec: RouteSpec = serde_json::from_value(json!({
        "parentRefs": [{"group": "", "kind": "Service", "namespace": "shop", "name": parent}],
        "rules": [{"backendRefs": [{"namespace": "shop", "name": backend, "port": 80}]}],
    }))
    .unwrap();
    RouteObject {
        kind: RouteKind::Http,
        namespace: namespace.into(),
        name: name.into(),
        uid: "r".into(),
        generation: 1,
        created: 0,
        parents: spec.parents,
        hostnames: spec.hostnames,
        rules: spec.rules,
    }
}

#[test]
fn an_endpoint_is_the_address_and_port_of_its_slice_with_its_pods_identity() {
    let model = shop(&[pod("a", "10.1.0.1", "r1")]);
    let endpoint = view(&model, "").endpoints.remove(0);
    assert_eq!(endpoint.address, "10.1.0.1:8080");
    assert_eq!(endpoint.identity, "spiffe://cluster.local/ns/shop/sa/web");
    assert_eq!(endpoint.revision, "r1");
}

#[test]
fn a_pod_without_a_sidecar_or_on_the_nodes_network_has_no_identity() {
    let bare = Pod { injected: false, ..pod("a", "10.1.0.1", "r1") };
    let host = Pod { host_network: true, ..pod("b", "192.168.0.1", "r1") };
    let model = shop(&[bare, host]);
    assert!(view(&model, "").endpoints.iter().all(|endpoint| endpoint.identity.is_empty()));
    let by_node_address = model.destination("192.168.0.1:8080".parse().unwrap(), "");
    assert!(
        matches!(by_node_address.kind, Some(destination::Kind::Unknown(_))),
        "never known by the node's address"
    );
}

#[test]
fn a_pod_in_two_slices_counts_once() {
    let a = pod("a", "10.1.0.1", "r1");
    let mut model = shop(std::slice::from_ref(&a));
    let again = Slice {
        service: "web".into(),
        ports: vec![("http".into(), 8080)],
        endpoints: vec![endpoint(&a, true)],
    };
    model.apply_slice(key("shop", "web-2"), again);
    assert_eq!(addresses(&model), ["10.1.0.1:8080"]);
    model.delete_slice(&key("shop", "web-1"));
    assert_eq!(addresses(&model), ["10.1.0.1:8080"]);
    model.delete_slice(&key("shop", "web-2"));
    assert!(addresses(&model).is_empty());
}

#[test]
fn an_address_that_a_new_pod_has_taken_over_is_the_new_pods() {
    let mut model = shop(&[pod("old", "10.1.0.1", "r1")]);
    model.apply_pod(Pod { service_account: "other".into(), ..pod("new", "10.1.0.1", "r2") });
    model.delete_pod("uid-old");
    let destination = model.destination("10.1.0.1:9000".parse().unwrap(), "");
    let Some(destination::Kind::Pod(found)) = destination.kind else { panic!("{destination:?}") };
    assert_eq!(found.endpoint.unwrap().identity, "spiffe://cluster.local/ns/shop/sa/other");
}

#[test]
fn pods_that_are_going_are_left_as_soon_as_their_deletion_is_seen() {
    let going = Pod { terminating: true, ..pod("a", "10.1.0.1", "r1") };
    let model = shop(&[going, pod("b", "10.1.0.2", "r1")]);
    let states: Vec<i32> = view(&model, "").endpoints.iter().map(|endpoint| endpoint.state).collect();
    assert_eq!(states, [EndpointState::Terminating as i32, EndpointState::Ready as i32]);
}

#[test]
fn internal_traffic_policy_local_is_the_clients_node() {
    let far = Pod { node: "node-b".into(), ..pod("b", "10.1.0.2", "r1") };
    let mut model = shop(&[pod("a", "10.1.0.1", "r1"), far]);
    let local = Service { local_only: true, ..model.services[&key("shop", "web")].clone() };
    model.apply_service(key("shop", "web"), local);
    assert_eq!(view(&model, "node-b").endpoints[0].address, "10.1.0.2:8080");
    assert_eq!(view(&model, "node-c").endpoints.len(), 0);
}

#[test]
fn a_parked_pod_takes_its_share_and_no_more_even_where_slices_call_it_ready() {
    let parked = Pod { gated: true, ready: false, ..pod("new", "10.1.0.2", "r2") };
    let mut model = shop(&[pod("old", "10.1.0.1", "r1"), parked.clone()]);
    // publishNotReadyAddresses: the slice says ready whatever the pod says.
    let endpoints = vec![endpoint(&pod("old", "10.1.0.1", "r1"), true), endpoint(&parked, true)];
    model.apply_slice(
        key("shop", "web-1"),
        Slice { service: "web".into(), ports: vec![("http".into(), 8080)], endpoints },
    );
    model.apply_canary(
        key("shop", "web"),
        canary(
            json!({"approvedRevision": "r1", "canaryRevision": "r2", "weight": 5, "phase": "Progressing"}),
        ),
    );
    let seen = view(&model, "");
    assert_eq!(seen.endpoints.len(), 2);
    let split: Vec<(String, u32)> =
        seen.split.into_iter().map(|share| (share.revision, share.permille)).collect();
    assert_eq!(split, [("r1".to_owned(), 950), ("r2".to_owned(), 50)]);
    model.apply_pod(Pod { containers_ready: false, ..parked });
    assert_eq!(addresses(&model), ["10.1.0.1:8080"], "its containers are not ready");
}

#[test]
fn a_pod_whose_gate_opens_serves_on_before_its_slice_says_that_it_is_ready() {
    let parked = Pod { gated: true, ready: false, other_gates_open: true, ..pod("new", "10.1.0.2", "r2") };
    let mut model = shop(&[pod("old", "10.1.0.1", "r1"), parked.clone()]);
    let trial =
        json!({"approvedRevision": "r1", "canaryRevision": "r2", "weight": 20, "phase": "Progressing"});
    model.apply_canary(key("shop", "web"), canary(trial));
    let both = ["10.1.0.1:8080", "10.1.0.2:8080"];
    assert_eq!(addresses(&model), both);
    let opened = Pod { gate_open: true, ..parked };
    model.apply_pod(opened.clone());
    assert_eq!(addresses(&model), both, "the slice still says that it is not ready");
    model.apply_pod(Pod { other_gates_open: false, ..opened.clone() });
    assert_eq!(addresses(&model), ["10.1.0.1:8080"], "it waits for another gate");
    model.apply_pod(Pod { containers_ready: false, ..opened });
    assert_eq!(addresses(&model), ["10.1.0.1:8080"], "its containers are not ready");
}

#[test]
fn an_unapproved_revision_gets_nothing_before_anybody_has_decided() {
    let mut model = shop(&[pod("old", "10.1.0.1", "r1"), pod("stray", "10.1.0.2", "r2")]);
    model.apply_canary(key("shop", "web"), canary(json!({"approvedRevision": "r1", "phase": "Stable"})));
    let split = view(&model, "").split;
    assert_eq!((split.len(), split[0].revision.as_str(), split[0].permille), (1, "r1", 1000));
    model.delete_canary(&key("shop", "web"));
    assert!(view(&model, "").split.is_empty());
}

#[test]
fn of_two_canaries_of_a_workload_the_older_holds_it() {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
    for (name, age) in [("younger", "2026-01-02T00:00:00Z"), ("zolder", "2026-01-01T00:00:00Z")] {
        let mut one = canary(json!({"approvedRevision": "r1"}));
        one.metadata.name = Some(name.to_owned());
        one.metadata.creation_timestamp = serde_json::from_value(json!(age)).unwrap();
        model.apply_canary(key("shop", name), one);
    }
    let workload = pod("a", "10.1.0.1", "r1").workload.unwrap();
    assert_eq!(model.canary_of(&workload).unwrap().0, &key("shop", "zolder"));
    model.delete_canary(&key("shop", "zolder"));
    assert_eq!(model.canary_of(&workload).unwrap().0, &key("shop", "younger"));
}

#[test]
fn gates_that_no_canary_holds_are_found() {
    let parked = Pod { gated: true, ready: false, ..pod("new", "10.1.0.2", "r2") };
    let mut model = shop(&[parked]);
    assert_eq!(model.orphaned_gates(), [("shop".to_owned(), "new".to_owned())]);
    model.apply_canary(key("shop", "web"), canary(json!({"approvedRevision": "r1"})));
    assert!(model.orphaned_gates().is_empty());
    // One that was made anew in the middle of a trial waits for its end: nobody else opens that gate.
    model.apply_canary(key("shop", "web"), canary(json!({})));
    assert_eq!(model.orphaned_gates().len(), 1);
}

#[test]
fn versions_are_the_content_and_nothing_else() {
    let name = tulle_mesh::proto::ResourceName { r#type: 2, cluster: String::new(), name: VIP.into() };
    let pods = [pod("a", "10.1.0.1", "r1"), pod("b", "10.1.0.2", "r1")];
    let (forward, mut backward) = (shop(&pods), shop(&[pods[1].clone(), pods[0].clone()]));
    let version = |model: &Model| model.resource(&name, "uid-a").unwrap().version;
    assert_eq!(version(&forward), version(&backward), "two replicas agree");
    backward.delete_pod("uid-b");
    assert_ne!(version(&forward), version(&backward));
}

#[test]
fn the_narrowest_policy_wins_section_by_section() {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
    let wide = policy(
        "wide",
        1,
        json!({"target": {"kind": "Namespace"}, "mtls": "Strict", "access": {"allow": []}}),
    );
    let narrow =
        policy("narrow", 2, json!({"target": {"kind": "Service", "name": "web"}, "mtls": "Permissive"}));
    model.apply_policy(key("shop", "wide"), wide);
    model.apply_policy(key("shop", "narrow"), narrow);
    let inbound = model.inbound("uid-a").unwrap();
    assert_eq!(inbound.mtls(), tulle_mesh::proto::MtlsMode::Permissive);
    assert_eq!(inbound.access.unwrap().policy.unwrap().name, "wide");
}

#[test]
fn a_policy_in_shadow_is_tried_beside_what_is_enforced_and_instead_of_nothing() {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
    let broad = json!({"target": {"kind": "Namespace"}, "mtls": "Strict", "access": {"allow": []}});
    let tried = json!({"target": {"kind": "Service", "name": "web"}, "mode": "Shadow", "mtls": "Disabled", "access": {"deny": []}});
    model.apply_policy(key("shop", "tried"), policy("tried", 0, tried));
    model.apply_policy(key("shop", "broad"), policy("broad", 1, broad));
    let inbound = model.inbound("uid-a").unwrap();
    let name = |access: Option<proto::Access>| access.unwrap().policy.unwrap().name;
    assert_eq!((inbound.mtls(), inbound.shadow_strict), (proto::MtlsMode::Strict, false));
    assert_eq!((name(inbound.access), name(inbound.shadow)), ("broad".to_owned(), "tried".to_owned()));
    assert!(!view(&model, "").endpoints[0].identity.is_empty(), "what is only tried disables nothing");
    for (name, policy) in model.policies() {
        assert_eq!(model.report(name, policy).verdict, Verdict::Accepted, "{name:?}");
    }
}

#[test]
fn clients_send_plain_text_where_no_sidecar_listens_or_mtls_is_disabled() {
    let skips = Pod { skipped_ports: [8080].into(), ..pod("b", "10.1.0.2", "r1") };
    let mut model = shop(&[pod("a", "10.1.0.1", "r1"), skips]);
    let identities = |model: &Model| {
        view(model, "")
            .endpoints
            .into_iter()
            .map(|endpoint| !endpoint.identity.is_empty())
            .collect::<Vec<_>>()
    };
    assert_eq!(identities(&model), [true, false]);
    let disabled = json!({"target": {"kind": "Namespace"}, "mtls": "Disabled"});
    model.apply_policy(key("shop", "plain"), policy("plain", 0, disabled));
    assert_eq!(identities(&model), [false, false]);
    model.delete_policy(&key("shop", "plain"));
    assert_eq!(identities(&model), [true, false]);
}

#[test]
fn of_two_policies_of_equal_specificity_the_older_wins_and_the_younger_is_told() {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
    let spec = |mtls: &str| json!({"target": {"kind": "Service", "name": "web"}, "mtls": mtls});
    model.apply_policy(key("shop", "younger"), policy("younger", 9, spec("Permissive")));
    model.apply_policy(key("shop", "older"), policy("older", 1, spec("Strict")));
    assert_eq!(model.inbound("uid-a").unwrap().mtls(), tulle_mesh::proto::MtlsMode::Strict);
    let verdict = |name: &str| model.report(&key("shop", name), &model.policies[&key("shop", name)]).verdict;
    assert_eq!(verdict("older"), Verdict::Accepted);
    assert_eq!(verdict("younger"), Verdict::Conflicted { with: "older".into(), section: "mtls" });
}

#[test]
fn labels_of_namespaces_follow_the_namespaces() {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
    let deny = json!({"target": {"kind": "Namespace"}, "access": {"deny": [{"from": [{"namespaceLabels": {"env": "dev"}}]}]}});
    model.apply_policy(key("shop", "p"), policy("p", 1, deny));
    let denied =
        |model: &Model| model.inbound("uid-a").unwrap().access.unwrap().deny[0].from[0].namespaces.clone();
    assert!(denied(&model).is_empty());
    model.apply_namespace(
        "dev-1".into(),
        Namespace { labels: [("env".into(), "dev".into())].into(), terminating: false },
    );
    assert_eq!(denied(&model), ["dev-1"]);
}

#[test]
fn a_policy_for_a_service_that_does_not_exist_says_so() {
    let mut model = shop(&[]);
    model.apply_policy(
        key("shop", "p"),
        policy("p", 1, json!({"target": {"kind": "Service", "name": "nobody"}})),
    );
    let report = model.report(&key("shop", "p"), &model.policies[&key("shop", "p")]);
    assert!(matches!(report.verdict, Verdict::TargetNotFound(why) if why.contains("nobody")));
}

#[test]
fn addresses_of_both_families_lead_to_the_service() {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
    let six: IpAddr = "fd00::1".parse().unwrap();
    let mut service = model.services[&key("shop", "web")].clone();
    service.cluster_ips.push(six);
    model.apply_service(key("shop", "web"), service);
    assert!(matches!(model.destination((six, 80).into(), "").kind, Some(destination::Kind::Service(_))));
    model.delete_service(&key("shop", "web"));
    assert!(matches!(model.destination((six, 80).into(), "").kind, Some(destination::Kind::Unknown(_))));
}

#[test]
fn a_deleted_meshconfig_leaves_the_trust_domain() {
    let mut model = Model::default();
    let config = json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "MeshConfig", "metadata": {"name": "mesh"},
        "spec": {"trustDomain": "corp.example", "mtls": "Strict"}});
    model.apply_config(Some(&serde_json::from_value(config).unwrap()));
    model.apply_config(None);
    let settings = model.settings();
    assert_eq!((settings.trust_domain.as_str(), settings.mtls), ("corp.example", MtlsMode::Permissive));
    // Nor does one that was made anew, once there are certificates.
    model.fix_trust_domain("corp.example");
    let other = json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "MeshConfig", "metadata": {"name": "mesh"},
        "spec": {"trustDomain": "other.example", "mtls": "Strict"}});
    model.apply_config(Some(&serde_json::from_value(other).unwrap()));
    let settings = model.settings();
    assert_eq!((settings.trust_domain.as_str(), settings.mtls), ("corp.example", MtlsMode::Strict));
}

#[test]
fn a_pod_that_begins_to_end_is_told_once() {
    let mut model = Model::default();
    let going = || Pod { terminating: true, ..pod("web", "10.0.0.1", "v1") };
    let mut ends = |pod: Pod| {
        model.apply_pod(pod);
        model.take_touched().ending
    };
    assert!(!ends(going()), "it was never here");
    assert!(!ends(pod("web", "10.0.0.1", "v1")));
    assert!(ends(going()));
    assert!(!ends(going()));
}

#[test]
fn of_argument_meshconfig_and_root_the_last_sets_the_trust_domain() {
    let mut model = Model::new("tulle-system", "argument.example");
    assert_eq!(model.settings().trust_domain, "argument.example");
    let config = json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "MeshConfig", "metadata": {"name": "mesh"},
        "spec": {"trustDomain": "config.example"}});
    model.apply_config(Some(&serde_json::from_value(config).unwrap()));
    assert_eq!(model.settings().trust_domain, "config.example");
    model.fix_trust_domain("root.example");
    assert_eq!(model.settings().trust_domain, "root.example");
    model.apply_config(None);
    assert_eq!(model.settings().trust_domain, "root.example");
}
