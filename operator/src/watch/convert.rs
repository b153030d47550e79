//! Converts Kubernetes objects to objects of the model.
//!
//! In: objects as `wire` decodes them. Out: model objects. Malformed values are left out or replaced by Kubernetes'
//! defaults, never an error.

use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{Resource, ResourceExt as _};
use serde::Deserialize as _;
use tulle_crds::{WorkloadKind, keys};

use super::crashes::crashes;
use super::wire;
use crate::model::gateway::{RouteKey, RouteKind, RouteObject, RouteSpec};
use crate::model::object::ServicePort;
use crate::model::{
    Distribution, Endpoint, Key, Namespace, Obstacle, Pod, Revision, Service, Slice, Workload, WorkloadKey,
};

/// Name of the injected container.
const SIDECAR: &str = "tulle-proxy";
/// Name of the init container that installs the redirect rules.
const INIT: &str = "tulle-init";
/// Annotation of a mirror pod, which represents a static pod of a node.
const MIRROR: &str = "kubernetes.io/config.mirror";
/// Label of a node: its zone.
const ZONE: &str = "topology.kubernetes.io/zone";
/// Names of the containers that other meshes inject.
const OTHER_SIDECARS: [&str; 2] = ["istio-proxy", "linkerd-proxy"];

pub(super) fn key<K: Resource>(object: &K) -> Key {
    let meta = object.meta();
    (meta.namespace.as_deref().unwrap_or("").into(), meta.name.as_deref().unwrap_or("").into())
}

pub(super) fn namespace(object: &wire::Namespace) -> Namespace {
    let terminating =
        object.metadata.deletion_timestamp.is_some() || object.status.phase.as_deref() == Some("Terminating");
    Namespace { labels: object.labels().clone(), terminating }
}

/// The zone of a node. Empty: unknown.
pub(super) fn zone<K: Resource>(node: &K) -> Arc<str> {
    node.meta().labels.as_ref().and_then(|labels| labels.get(ZONE)).map_or("", String::as_str).into()
}

pub(super) fn route_key(kind: RouteKind, object: &wire::Route) -> RouteKey {
    let (namespace, name) = key(object);
    RouteKey { kind, namespace, name }
}

/// Converts a route.
///
/// # Errors
/// Its `spec` cannot be decoded.
pub(super) fn route(kind: RouteKind, object: &wire::Route) -> serde_json::Result<RouteObject> {
    let meta = &object.metadata;
    let spec =
        if object.spec.is_null() { RouteSpec::default() } else { RouteSpec::deserialize(&object.spec)? };
    let (namespace, name) = key(object);
    Ok(RouteObject {
        kind,
        namespace,
        name,
        uid: meta.uid.as_deref().unwrap_or_default().into(),
        generation: meta.generation.unwrap_or_default(),
        created: meta.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second()),
        parents: spec.parents,
        hostnames: spec.hostnames,
        rules: spec.rules,
    })
}

pub(super) fn pod(object: &wire::Pod) -> Pod {
    let (spec, status) = (&object.spec, &object.status);
    let holds = |name: &str| {
        status
            .conditions
            .iter()
            .flatten()
            .any(|condition| condition.type_ == name && condition.status == "True")
    };
    let ips = status.pod_ips.iter().flatten().filter_map(|ip| ip.ip.parse().ok());
    let gates = || spec.readiness_gates.iter().flatten().map(|gate| gate.condition_type.as_str());
    let finished = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
    let labels = object.labels().iter().map(|(key, value)| (key.as_str().into(), value.as_str().into()));
    Pod {
        uid: object.uid().unwrap_or_default().into(),
        name: object.name_any().into(),
        namespace: object.namespace().unwrap_or_default().into(),
        service_account: spec.service_account_name.as_deref().unwrap_or("default").into(),
        node: spec.node_name.as_deref().unwrap_or("").into(),
        labels: labels.collect(),
        ips: ips.collect(),
        workload: workload_of(object.meta()),
        host_network: spec.host_network.unwrap_or(false),
        injected: spec.init_containers.iter().flatten().any(is_sidecar),
        obstacle: obstacle(object),
        skipped_ports: skipped_ports(spec),
        declared_ports: declared_ports(spec),
        containers_ready: holds("ContainersReady"),
        containers_since_unix: containers_since(status),
        crashes: crashes(status),
        ready: holds("Ready"),
        ready_unix: ready_since(status),
        started_unix: started(object),
        terminating: object.metadata.deletion_timestamp.is_some(),
        finished,
        gated: gates().any(|gate| gate == keys::GATE),
        gate_open: holds(keys::GATE),
        other_gates_open: gates().filter(|gate| *gate != keys::GATE).all(holds),
    }
}

/// Whether a container is the sidecar, so that its pod is meshed. The name alone is no evidence: the author of a pod may
/// have chosen it, and clients would wait for a certificate that nobody has. Every version of the webhook has injected
/// these fields; another webhook may have put its own program, or a shell, before the sidecar's.
fn is_sidecar(container: &wire::Container) -> bool {
    let mut texts = [&container.command, &container.args].into_iter().flatten().flatten();
    container.name == SIDECAR
        && container.restart_policy.as_deref() == Some("Always")
        && texts.any(|text| text.split_whitespace().any(|word| word == "proxy"))
}

/// When a pod became ready, in seconds since 1970. 0: it is not, or the condition does not say.
fn ready_since(status: &wire::PodStatus) -> i64 {
    let mut conditions = status.conditions.iter().flatten();
    let ready = conditions.find(|condition| condition.type_ == "Ready" && condition.status == "True");
    ready.and_then(|ready| ready.since.as_ref()).map_or(0, |since| since.0.as_second())
}

/// When the containers of a pod became ready, or ceased to be, in seconds since 1970. 0: the condition does not say.
fn containers_since(status: &wire::PodStatus) -> i64 {
    let mut conditions = status.conditions.iter().flatten();
    let ready = conditions.find(|condition| condition.type_ == "ContainersReady");
    ready.and_then(|ready| ready.since.as_ref()).map_or(0, |since| since.0.as_second())
}

/// When a pod's node took it, or else when it was created, in seconds since 1970. 0: neither is known.
fn started(object: &wire::Pod) -> i64 {
    let created = object.meta().creation_timestamp.as_ref();
    object.status.start_time.as_ref().or(created).map_or(0, |time| time.0.as_second())
}

/// Inbound ports that are not redirected to the sidecar. Read from the injected container, because the annotation may
/// be on the namespace or may have changed since.
fn skipped_ports(spec: &wire::PodSpec) -> Box<[u16]> {
    let mut containers = spec.init_containers.iter().flatten();
    let init = containers.find(|container| container.name == INIT);
    let arguments = init.into_iter().flat_map(|init| init.args.iter().flatten());
    let skipped = arguments.into_iter().find_map(|argument| argument.strip_prefix("--skip-inbound-ports="));
    skipped.map_or_else(Box::default, ports)
}

/// TCP ports that containers declare, but not those that were injected. None if a container of the application declares
/// none, as beside an exporter of metrics that does: that container may be the one that listens.
fn declared_ports(spec: &wire::PodSpec) -> Box<[u16]> {
    let is_silent = |container: &wire::Container| container.ports.as_deref().is_none_or(<[_]>::is_empty);
    if spec.containers.iter().flatten().any(is_silent) {
        return Box::default();
    }
    let containers = [&spec.init_containers, &spec.containers].into_iter().flatten().flatten();
    let own = containers.filter(|container| container.name != SIDECAR && container.name != INIT);
    let ports = own.flat_map(|container| container.ports.iter().flatten());
    let tcp = ports.filter(|port| port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP"));
    tcp.filter_map(|port| u16::try_from(port.container_port).ok()).collect()
}

/// What prevents the injection of a sidecar, other than `hostNetwork`. The first, if there are several.
fn obstacle(object: &wire::Pod) -> Option<Obstacle> {
    let spec = &object.spec;
    let os = spec.os.iter().map(|os| &os.name);
    let selected = spec.node_selector.iter().flat_map(|selector| [&selector.os, &selector.beta_os]);
    let mut os = os.chain(selected.flatten());
    let mut containers = [&spec.init_containers, &spec.containers].into_iter().flatten().flatten();
    if object.annotations().contains_key(MIRROR) {
        Some(Obstacle::Mirror)
    } else if os.any(|name| name == "windows") {
        Some(Obstacle::Windows)
    } else if containers.any(|container| OTHER_SIDECARS.contains(&container.name.as_str())) {
        Some(Obstacle::OtherMesh)
    } else {
        None
    }
}

/// Parses a list of ports. A malformed list has no effect; admission has warned about it.
fn ports(text: &str) -> Box<[u16]> {
    let ports: Result<Vec<u16>, _> = text.split(',').map(|port| port.trim().parse()).collect();
    ports.map_or_else(|_| Box::default(), Vec::into_boxed_slice)
}

/// The workload that a pod belongs to. The name of a ReplicaSet is that of its Deployment and the template's hash.
pub(super) fn workload_of(meta: &ObjectMeta) -> Option<WorkloadKey> {
    let owner = meta.owner_references.iter().flatten().find(|owner| owner.controller == Some(true))?;
    let namespace: Arc<str> = meta.namespace.as_deref().unwrap_or("").into();
    let (kind, name) = match owner.kind.as_str() {
        "ReplicaSet" => {
            let hash = meta.labels.as_ref().and_then(|labels| labels.get("pod-template-hash"))?;
            let name = owner.name.strip_suffix(hash.as_str())?.strip_suffix('-')?;
            (WorkloadKind::Deployment, name)
        }
        "StatefulSet" => (WorkloadKind::StatefulSet, owner.name.as_str()),
        "DaemonSet" => (WorkloadKind::DaemonSet, owner.name.as_str()),
        _ => return None,
    };
    Some(WorkloadKey { kind, namespace, name: name.into() })
}

pub(super) fn service(object: &wire::Service) -> Service {
    let spec = &object.spec;
    // An ExternalName Service is only an alias in DNS.
    let external_name = spec.type_.as_deref() == Some("ExternalName");
    let balanced = object.status.load_balancer.ingress.iter().flatten();
    let balanced = balanced.filter(|ingress| ingress.ip_mode.as_deref() != Some("Proxy"));
    let balanced = balanced.filter_map(|ingress| ingress.ip.as_deref());
    let other = spec.external_ips.iter().flatten().map(String::as_str).chain(balanced);
    let other = other.filter_map(|ip| ip.parse().ok());
    let cluster = spec.cluster_ips.iter().flatten();
    let headless = cluster.clone().any(|ip| ip == "None");
    let cluster = cluster.filter_map(|ip| ip.parse().ok());
    let tcp = |port: &&wire::ServicePort| port.protocol.as_deref().unwrap_or("TCP") == "TCP";
    let ports = spec.ports.iter().flatten().filter(tcp).map(|port| ServicePort {
        name: port.name.clone().unwrap_or_default(),
        port: port.port,
        app_protocol: port.app_protocol.clone(),
    });
    let by_client = spec.session_affinity.as_deref() == Some("ClientIP");
    let affinity = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    Service {
        uid: object.uid().unwrap_or_default().into(),
        created: object.meta().creation_timestamp.as_ref().map_or(0, |time| time.0.as_second()),
        cluster_ips: if external_name { Vec::new() } else { cluster.collect() },
        other_ips: if external_name { Vec::new() } else { other.collect() },
        headless: headless && !external_name,
        ports: ports.collect(),
        selector: spec.selector.clone().unwrap_or_default(),
        local_only: spec.internal_traffic_policy.as_deref() == Some("Local"),
        // The default of Kubernetes is three hours.
        affinity_seconds: if by_client {
            affinity.and_then(|a| a.timeout_seconds).unwrap_or(10_800)
        } else {
            0
        },
        distribution: Distribution::of(spec.traffic_distribution.as_deref()),
    }
}

pub(super) fn slice(object: &wire::EndpointSlice) -> Slice {
    let service = object.labels().get("kubernetes.io/service-name").map_or("", String::as_str);
    let tcp = |port: &&wire::SlicePort| port.protocol.as_deref().unwrap_or("TCP") == "TCP";
    let ports = object.ports.iter().flatten().filter(tcp);
    let ports = ports
        .filter_map(|port| Some((port.name.clone().unwrap_or_default(), u16::try_from(port.port?).ok()?)));
    Slice {
        service: service.into(),
        ports: ports.collect(),
        endpoints: object.endpoints.iter().flatten().map(endpoint).collect(),
    }
}

fn endpoint(endpoint: &wire::Endpoint) -> Endpoint {
    let conditions = &endpoint.conditions;
    // A missing `ready` means true, and a missing `serving` has the value of `ready` (KEP-1672).
    let ready = conditions.ready.unwrap_or(true);
    let pod = endpoint.target_ref.as_ref().filter(|target| target.kind.as_deref() == Some("Pod"));
    Endpoint {
        address: endpoint.addresses.first().and_then(|address| address.parse::<IpAddr>().ok()),
        ready,
        serving: conditions.serving.unwrap_or(ready),
        terminating: conditions.terminating.unwrap_or(false),
        node: endpoint.node_name.as_deref().unwrap_or("").into(),
        zone: endpoint.zone.as_deref().unwrap_or("").into(),
        for_zones: hints(endpoint, |hints| hints.for_zones.as_deref()),
        for_nodes: hints(endpoint, |hints| hints.for_nodes.as_deref()),
        pod_uid: pod.and_then(|target| target.uid.as_deref()).map(Into::into),
    }
}

/// Names in one of the lists of an endpoint's hints.
fn hints(
    endpoint: &wire::Endpoint,
    list: impl Fn(&wire::Hints) -> Option<&[wire::Named]>,
) -> Box<[Arc<str>]> {
    let named = endpoint.hints.as_ref().and_then(list).unwrap_or_default();
    named.iter().map(|named| named.name.as_str().into()).collect()
}

pub(super) fn workload_key<K: Resource>(kind: WorkloadKind, object: &K) -> WorkloadKey {
    let (namespace, name) = key(object);
    WorkloadKey { kind, namespace, name }
}

pub(super) fn workload(
    meta: &ObjectMeta,
    spec: &wire::WorkloadSpec,
    status: &wire::WorkloadStatus,
) -> Workload {
    Workload {
        replicas: spec.replicas.or(status.desired_number_scheduled).unwrap_or(1),
        progress_deadline: spec.progress_deadline_seconds.unwrap_or(600),
        observed: status.observed_generation == meta.generation,
        update_revision: status.update_revision.as_deref().map(Into::into),
    }
}

/// One revision of a Deployment.
pub(super) fn replica_set(object: &wire::ReplicaSet) -> Option<Revision> {
    let meta = object.meta();
    let owner = meta.owner_references.iter().flatten().find(|owner| owner.controller == Some(true))?;
    let number = object.annotations().get("deployment.kubernetes.io/revision")?.parse().ok()?;
    let namespace = meta.namespace.as_deref().unwrap_or("").into();
    Some(Revision {
        owner: WorkloadKey { kind: WorkloadKind::Deployment, namespace, name: owner.name.as_str().into() },
        hash: object.labels().get("pod-template-hash")?.as_str().into(),
        number,
    })
}

/// One revision of a StatefulSet or DaemonSet.
pub(super) fn controller_revision(object: &wire::ControllerRevision) -> Option<Revision> {
    let meta = object.meta();
    let owner = meta.owner_references.iter().flatten().find(|owner| owner.controller == Some(true))?;
    let namespace: Arc<str> = meta.namespace.as_deref().unwrap_or("").into();
    let (kind, hash) = match owner.kind.as_str() {
        // The label of a StatefulSet's pods has the revision's name, that of a DaemonSet's pods only its hash.
        "StatefulSet" => (WorkloadKind::StatefulSet, object.name_any()),
        "DaemonSet" => (WorkloadKind::DaemonSet, object.labels().get("controller-revision-hash")?.clone()),
        _ => return None,
    };
    Some(Revision {
        owner: WorkloadKey { kind, namespace, name: owner.name.as_str().into() },
        hash: hash.into(),
        number: object.revision,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn obstacle_of(metadata: Value, spec: Value) -> Option<Obstacle> {
        let object = json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec});
        pod(&serde_json::from_value(object).unwrap()).obstacle
    }

    fn spec_with(field: &str, value: Value) -> Value {
        let mut spec = json!({"containers": [{"name": "app"}], "nodeSelector": {"disk": "ssd"}});
        spec[field] = value;
        spec
    }

    #[test]
    fn since_when_containers_are_ready_or_not_is_read_from_their_condition() {
        let since = |status: &str| {
            let at = "1970-01-01T00:01:40Z";
            let condition = json!({"type": "ContainersReady", "status": status, "lastTransitionTime": at});
            let status = json!({"conditions": [condition]});
            let object =
                json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "status": status});
            let pod = pod(&serde_json::from_value(object).unwrap());
            (pod.containers_ready, pod.containers_since_unix)
        };
        assert_eq!((since("True"), since("False")), ((true, 100), (false, 100)));
    }

    #[test]
    fn a_mirror_of_a_static_pod_is_known_by_its_annotation() {
        let annotated = json!({"name": "a", "annotations": {"kubernetes.io/config.mirror": "5f0c"}});
        assert_eq!(obstacle_of(annotated, spec_with("hostNetwork", json!(true))), Some(Obstacle::Mirror));
        let other = json!({"name": "a", "annotations": {"kubernetes.io/config.source": "api"}});
        assert_eq!(obstacle_of(other, spec_with("hostNetwork", json!(true))), None);
    }

    #[test]
    fn a_windows_pod_is_known_by_its_os_or_either_label_of_its_node_selector() {
        for (field, value) in [
            ("os", json!({"name": "windows"})),
            ("nodeSelector", json!({"kubernetes.io/os": "windows"})),
            ("nodeSelector", json!({"beta.kubernetes.io/os": "windows"})),
        ] {
            let found = obstacle_of(json!({"name": "a"}), spec_with(field, value.clone()));
            assert_eq!(found, Some(Obstacle::Windows), "{field}: {value}");
        }
        for (field, value) in [
            ("os", json!({"name": "linux"})),
            ("nodeSelector", json!({"kubernetes.io/os": "linux"})),
            ("nodeSelector", json!(null)),
        ] {
            assert_eq!(obstacle_of(json!({"name": "a"}), spec_with(field, value)), None, "{field}");
        }
    }

    #[test]
    fn the_sidecar_of_another_mesh_is_known_by_its_name_wherever_it_stands() {
        for field in ["containers", "initContainers"] {
            for name in OTHER_SIDECARS {
                let found = obstacle_of(json!({"name": "a"}), spec_with(field, json!([{"name": name}])));
                assert_eq!(found, Some(Obstacle::OtherMesh), "{name} in {field}");
            }
        }
    }

    #[test]
    fn a_pod_is_meshed_by_the_sidecar_and_not_by_a_container_that_only_has_its_name() {
        let injected = |container: Value| {
            let spec = spec_with("initContainers", json!([{"name": "migrate"}, container]));
            let object = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec});
            pod(&serde_json::from_value(object).unwrap()).injected
        };
        let sidecar = |args: Value| json!({"name": "tulle-proxy", "restartPolicy": "Always", "args": args});
        assert!(injected(sidecar(json!(["proxy"]))));
        assert!(injected(sidecar(json!(["/program", "proxy"]))), "wrapped by another webhook");
        assert!(injected(sidecar(json!(["-c", "exec /program proxy"]))), "by a shell");
        let mut command = sidecar(json!([]));
        command["command"] = json!(["/wrapper", "/program", "proxy"]);
        assert!(injected(command), "its arguments are a part of the command");
        assert!(!injected(sidecar(json!(["serve"]))));
        assert!(!injected(json!({"name": "tulle-proxy", "restartPolicy": "Always"})));
        assert!(
            !injected(json!({"name": "tulle-proxy", "args": ["proxy"]})),
            "it ends before the application"
        );
        assert!(!injected(json!({"name": "other", "restartPolicy": "Always", "args": ["proxy"]})));
    }

    #[test]
    fn declared_ports_are_those_over_tcp_of_the_containers_that_were_not_injected() {
        let declared = |app: Value| {
            let object = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": {
                "initContainers": [
                    {"name": "tulle-proxy", "ports": [{"containerPort": 26161}]},
                    {"name": "agent", "ports": [{"containerPort": 9000, "protocol": "TCP"}]},
                    {"name": "migrate"},
                ],
                "containers": [app, {"name": "exporter", "ports": [{"containerPort": 9187}]}],
            }});
            pod(&serde_json::from_value(object).unwrap()).declared_ports
        };
        let app = json!({"name": "app", "ports": [{"containerPort": 8080}, {"containerPort": 53, "protocol": "UDP"}]});
        assert_eq!(*declared(app), [9000, 8080, 9187]);
        for silent in [json!({"name": "app"}), json!({"name": "app", "ports": []})] {
            assert_eq!(*declared(silent), [0_u16; 0], "it may listen at any port");
        }
    }

    #[test]
    fn addresses_of_a_service_are_kept_apart_by_who_assigned_them() {
        let object = |spec: Value| {
            json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "creationTimestamp": "1970-01-01T00:01:00Z"},
                "spec": spec, "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.9"}, {"ip": "203.0.113.8", "ipMode": "Proxy"}]}}})
        };
        let of = |spec: Value| service(&serde_json::from_value(object(spec)).unwrap());
        let both = of(json!({"clusterIPs": ["10.96.0.1"], "externalIPs": ["192.0.2.1"]}));
        let ips = |ips: &[IpAddr]| ips.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(ips(&both.cluster_ips), ["10.96.0.1"]);
        assert_eq!(ips(&both.other_ips), ["192.0.2.1", "203.0.113.9"]);
        assert_eq!((both.headless, both.created), (false, 60));
        assert!(of(json!({"clusterIPs": ["None"]})).headless);
        let alias = of(json!({"type": "ExternalName", "externalIPs": ["192.0.2.1"]}));
        assert!(alias.other_ips.is_empty() && !alias.headless);
    }

    #[test]
    fn a_port_out_of_range_in_a_slice_is_left_out_and_the_others_stay() {
        let object = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": {"name": "web-1"},
            "addressType": "IPv4", "endpoints": [],
            "ports": [{"name": "bad", "port": 70000}, {"name": "worse", "port": -1}, {"name": "http", "port": 80}]});
        let slice = slice(&serde_json::from_value(object).unwrap());
        assert_eq!(slice.ports, [("http".to_owned(), 80)]);
    }

    #[test]
    fn an_endpoint_has_the_zones_and_nodes_that_its_hints_name() {
        let object = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": {"name": "web-1"},
            "addressType": "IPv4", "ports": [], "endpoints": [
                {"addresses": ["10.1.0.1"], "zone": "a", "nodeName": "n1",
                    "hints": {"forZones": [{"name": "a"}, {"name": "b"}], "forNodes": [{"name": "n1"}]}},
                {"addresses": ["10.1.0.2"]}]});
        let slice = slice(&serde_json::from_value(object).unwrap());
        let [hinted, plain] = &slice.endpoints[..] else { panic!("two endpoints") };
        assert_eq!((&*hinted.zone, &*hinted.node), ("a", "n1"));
        let names = |list: &[Arc<str>]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(names(&hinted.for_zones), ["a", "b"]);
        assert_eq!(names(&hinted.for_nodes), ["n1"]);
        assert!(plain.for_zones.is_empty() && plain.for_nodes.is_empty() && plain.zone.is_empty());
    }

    #[test]
    fn a_pod_is_ready_since_its_condition_turned_true() {
        let since = |status: &str| {
            let condition =
                json!({"type": "Ready", "status": status, "lastTransitionTime": "1970-01-01T00:01:00Z"});
            let object = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"},
                "status": {"conditions": [condition]}});
            pod(&serde_json::from_value(object).unwrap()).ready_unix
        };
        assert_eq!((since("True"), since("False")), (60, 0));
    }

    #[test]
    fn a_pod_has_started_when_its_node_took_it_and_before_that_is_as_old_as_its_object() {
        let started = |status: Value| {
            let metadata = json!({"name": "a", "creationTimestamp": "1970-01-01T00:01:00Z"});
            let object = json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "status": status});
            pod(&serde_json::from_value(object).unwrap()).started_unix
        };
        assert_eq!(started(json!({"startTime": "1970-01-01T00:02:00Z"})), 120);
        assert_eq!(started(json!({})), 60);
    }

    #[test]
    fn a_service_says_which_endpoints_are_near() {
        let of = |value: Value| {
            let object = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
                "spec": {"trafficDistribution": value}});
            service(&serde_json::from_value(object).unwrap()).distribution
        };
        assert_eq!(of(json!(null)), Distribution::Any);
        assert_eq!(of(json!("PreferClose")), Distribution::SameZone);
        assert_eq!(of(json!("PreferSameNode")), Distribution::SameNode);
    }

    #[test]
    fn the_zone_of_a_node_is_in_its_label() {
        let node = |labels: Value| -> wire::Node {
            serde_json::from_value(json!({"metadata": {"name": "n1", "labels": labels}})).unwrap()
        };
        assert_eq!(&*zone(&node(json!({"topology.kubernetes.io/zone": "a"}))), "a");
        assert_eq!(&*zone(&node(json!({}))), "");
    }

    #[test]
    fn a_route_is_decoded_with_its_age_and_an_unknown_shape_is_an_error() {
        let object = |spec: Value| -> wire::Route {
            let metadata = json!({"namespace": "shop", "name": "web", "uid": "u", "generation": 3,
                "creationTimestamp": "1970-01-01T00:01:00Z"});
            serde_json::from_value(json!({"metadata": metadata, "spec": spec})).unwrap()
        };
        let found =
            route(RouteKind::Tls, &object(json!({"hostnames": ["a.example"], "rules": [{}]}))).unwrap();
        assert_eq!((found.created, found.generation, found.rules.len()), (60, 3, 1));
        assert_eq!(&*found.hostnames[0], "a.example");
        assert!(route(RouteKind::Tls, &object(json!({"hostnames": 1}))).is_err());
        assert!(route(RouteKind::Tls, &object(json!(null))).unwrap().parents.is_empty());
    }

    #[test]
    fn a_namespace_terminates_from_its_deletion_on() {
        let terminating = |metadata: Value, status: Value| {
            let object =
                json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata, "status": status});
            namespace(&serde_json::from_value(object).unwrap()).terminating
        };
        let deleted = json!({"name": "shop", "deletionTimestamp": "2026-01-01T00:00:00Z"});
        assert!(terminating(deleted, json!({"phase": "Active"})));
        assert!(terminating(json!({"name": "shop"}), json!({"phase": "Terminating"})));
        assert!(!terminating(json!({"name": "shop"}), json!({"phase": "Active"})));
        assert!(!terminating(json!({"name": "shop"}), json!({})));
    }
}
