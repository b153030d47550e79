//! The endpoints of a Service in words: where they listen, and why there are none.

use std::net::SocketAddr;

use tulle_mesh::proto;

use super::World;
use super::stages::{self, Target};
use crate::model::{Key, Pod, Service};

/// Addresses that an answer names at most.
const NAMED: usize = 3;

/// `: 10.1.0.1:8080, 10.1.0.2:8080 and 3 more`.
pub(super) fn listed(endpoints: &[&proto::Endpoint]) -> String {
    let named: Vec<&str> = endpoints.iter().take(NAMED).map(|endpoint| endpoint.address.as_str()).collect();
    match endpoints.len().saturating_sub(NAMED) {
        _ if named.is_empty() => String::new(),
        0 => format!(": {}", named.join(", ")),
        more => format!(": {} and {more} more", named.join(", ")),
    }
}

/// Says how many of the pods are gone: a sidecar that is behind still sends to them.
pub(super) fn gone(world: &World<'_>, endpoints: &[&proto::Endpoint]) -> Option<String> {
    let is_gone = |endpoint: &&&proto::Endpoint| {
        !endpoint.pod_uid.is_empty() && world.model.pod(&endpoint.pod_uid).is_none()
    };
    match (endpoints.iter().filter(is_gone).count(), endpoints.len()) {
        (0, _) => None,
        (1, 1) => Some("; its pod is gone".to_owned()),
        (count, all) => Some(format!("; {count} of these {all} are of pods that are gone")),
    }
}

/// Says of the first pod that declares ports, but not the one that it is sent to, that nothing may listen there. A pod may
/// listen at a port that it does not declare.
pub(super) fn undeclared(
    world: &World<'_>,
    target: &Target,
    endpoints: &[&proto::Endpoint],
) -> Option<String> {
    let found = endpoints.iter().find_map(|endpoint| {
        let port = endpoint.address.parse::<SocketAddr>().ok()?.port();
        let pod = world.model.pod(&endpoint.pod_uid)?;
        let declares_others = !pod.declared_ports.is_empty() && !pod.declared_ports.contains(&port);
        declares_others.then_some((pod, port))
    });
    let (pod, port) = found?;
    let (namespace, name, all) = (&pod.namespace, &pod.name, words(&pod.declared_ports));
    Some(format!(
        "; the containers of pod {namespace}/{name} declare {all} and not {port}: if nothing listens there, every request \
         fails; correct targetPort of Service {}",
        service_of(target)
    ))
}

fn words(ports: &[u16]) -> String {
    let numbers: Vec<String> = ports.iter().map(u16::to_string).collect();
    let noun = if ports.len() == 1 { "port" } else { "ports" };
    format!("{noun} {}", numbers.join(", "))
}

/// Why a Service has no ready endpoint, and what to do.
pub(super) fn missing(world: &World<'_>, target: &Target) -> String {
    let none = format!("{} has no ready endpoint that it may go to", target.service);
    if world.has_earlier_endpoints(&target.endpoints) {
        return format!("{none}: the version of the endpoints that its client's sidecar has lists none");
    }
    let key = key_of(target);
    let Some(service) = world.model.service(&key) else {
        return format!("{none}: the Service does not exist");
    };
    if !stages::endpoints(world, target).endpoints.is_empty() {
        return format!("{none}: it has endpoints, but a Canary keeps requests from their revisions");
    }
    format!("{none}: {}", cause(world, target, &key, service))
}

fn cause(world: &World<'_>, target: &Target, key: &Key, service: &Service) -> String {
    let (namespace, name) = (&key.0, &key.1);
    if service.selector.is_empty() {
        return format!(
            "it has no selector, and no EndpointSlice lists a ready endpoint (kubectl -n {namespace} get endpointslices -l \
             kubernetes.io/service-name={name})"
        );
    }
    let is_selected = |pod: &&Pod| pod.namespace == *namespace && !pod.finished && service.selects(pod);
    let mut selected: Vec<&Pod> = world.model.pods().filter(is_selected).collect();
    selected.sort_by(|a, b| a.name.cmp(&b.name));
    let labels: Vec<String> = service.selector.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let labels = labels.join(",");
    let Some(first) = selected.first() else {
        return format!(
            "no pod has the labels {labels} that its selector names (kubectl -n {namespace} get pods --show-labels)"
        );
    };
    let takes = |pod: &&&Pod| pod.ready && !pod.terminating;
    let all = selected.len();
    match selected.iter().filter(takes).count() {
        0 => format!(
            "none of the {all} pods that it selects is ready, as {0} (kubectl -n {namespace} describe pod {0})",
            first.name
        ),
        _ if service.local_only && !selected.iter().any(|pod| pod.node == world.client.pod.node) => {
            "none of its pods is on the client's node, and internalTrafficPolicy is Local".to_owned()
        }
        ready => format!(
            "{ready} of the {all} pods that it selects are ready, but none has an address for port {}: where targetPort is a \
             name, a container has to declare a port of that name (kubectl -n {namespace} get service {name} -o yaml)",
            target.service.rsplit(':').next().unwrap_or_default()
        ),
    }
}

/// `namespace/name` of the Service of a target.
fn service_of(target: &Target) -> &str {
    target.service.split(':').next().unwrap_or_default()
}

fn key_of(target: &Target) -> Key {
    let (namespace, name) = service_of(target).split_once('/').unwrap_or_default();
    (namespace.into(), name.into())
}
