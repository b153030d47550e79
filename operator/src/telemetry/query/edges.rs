//! Who talks to whom. Pure.
//!
//! Counted are source, destination, protocol and mTLS. The rest of an edge is what the model says of its ends now: the
//! port of a Service that has one, the identities of pods, and the zones of their nodes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use tulle_mesh::identity::WorkloadId;
use tulle_mesh::query::{Edge, Edges, Party};

use super::{PLAIN, Peers, client};
use crate::model::{Key, Model, Pod};
use crate::telemetry::history::{Counts, Direction, SeriesId, Sum};

/// What makes an edge.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct EdgeId {
    source: Party,
    destination: Party,
    port: Option<u16>,
    protocol: Arc<str>,
    mtls: bool,
}

impl EdgeId {
    /// The edge of a series. `None`: it is in none.
    fn of(id: &SeriesId, peers: &Peers<'_>, model: &Model) -> Option<Self> {
        let (source, destination, port) = match id.direction {
            Direction::Outbound => (id.reporter.party(), peers.destination(id), port(id, model)),
            Direction::Inbound if &*id.peer == PLAIN => {
                (client(&id.namespace, &id.peer), id.reporter.party(), None)
            }
            // The client's sidecar has counted it.
            Direction::Inbound | Direction::Policy => return None,
        };
        Some(Self { source, destination, port, protocol: Arc::clone(&id.protocol), mtls: id.mtls })
    }
}

/// The port of the Service that a series was sent to: that of the route that led there, or the only one that the Service
/// has. Ports are not counted, so `None` where there are several.
fn port(id: &SeriesId, model: &Model) -> Option<u16> {
    let service: Key = (Arc::clone(&id.namespace), Arc::clone(&id.peer));
    let of_route = match &*id.route {
        "" => BTreeSet::new(),
        route => model.route_ports(route, &service),
    };
    let ports = match of_route.is_empty() {
        true => model.service(&service)?.ports.iter().map(|port| port.port).collect(),
        false => of_route,
    };
    ports.first().copied().filter(|_| ports.len() == 1)
}

/// Who the pods of a party are, and where they run.
#[derive(Clone, Debug, Default)]
struct Place {
    ids: BTreeSet<String>,
    zones: BTreeSet<String>,
}

impl Place {
    fn add(&mut self, pod: &Pod, model: &Model) {
        if pod.injected {
            let trust_domain = &model.settings().trust_domain;
            self.ids.insert(WorkloadId::new(trust_domain, &pod.namespace, &pod.service_account).to_string());
        }
        let zone = model.zone_of(&pod.node);
        if !zone.is_empty() {
            self.zones.insert(zone.to_owned());
        }
    }
}

/// The places of the parties at the ends of edges.
fn places<'a>(model: &Model, edges: impl Iterator<Item = &'a EdgeId>) -> HashMap<Party, Place> {
    let ends = edges.flat_map(|edge| [&edge.source, &edge.destination]);
    let mut places: HashMap<Party, Place> = ends.map(|party| (party.clone(), Place::default())).collect();
    for (party, place) in &mut places {
        if party.kind == "Service" {
            let service: Key = (party.namespace.as_str().into(), party.name.as_str().into());
            model.pods_behind(&service).for_each(|pod| place.add(pod, model));
        }
    }
    for pod in model.pods().filter(|pod| !pod.finished) {
        let account = Party {
            namespace: pod.namespace.to_string(),
            kind: "ServiceAccount".to_owned(),
            name: pod.service_account.to_string(),
        };
        for party in [pod.party(), account] {
            if let Some(place) = places.get_mut(&party) {
                place.add(pod, model);
            }
        }
    }
    places
}

/// Requests and opaque connections.
fn carried(counts: &Counts) -> u64 {
    counts.requests().saturating_add(counts.connections)
}

/// Of the edges between the ends of this one, that which carried most.
fn busiest_between(edge: &EdgeId, counts: &BTreeMap<EdgeId, Counts>) -> Option<EdgeId> {
    let first = EdgeId { port: None, protocol: Arc::default(), mtls: false, ..edge.clone() };
    let is_between = |id: &EdgeId| id.source == edge.source && id.destination == edge.destination;
    let between = counts.range(first..).take_while(|(id, _)| is_between(id));
    between.max_by_key(|(_, counts)| carried(counts)).map(|(id, _)| id.clone())
}

/// Who talks to whom: what clients with a sidecar have sent, and what servers have got from clients without one. With a
/// namespace: edges that begin or end there.
pub fn edges(sum: &Sum, model: &Model, namespace: Option<&str>) -> Edges {
    let peers = Peers::of(model);
    let is_wanted = |edge: &EdgeId| {
        let ends = [&edge.source, &edge.destination];
        namespace.is_none_or(|wanted| ends.iter().any(|party| party.namespace == wanted))
    };
    let mut counts: BTreeMap<EdgeId, Counts> = BTreeMap::new();
    let (mut ejected, mut nowhere) = (Vec::new(), Vec::new());
    for (id, of_series) in &sum.series {
        let Some(edge) = EdgeId::of(id, &peers, model).filter(is_wanted) else { continue };
        if carried(of_series) == 0 {
            ejected.push((edge, of_series));
        } else if !id.mtls && of_series.went_nowhere() {
            nowhere.push((edge, of_series));
        } else {
            counts.entry(edge).or_default().merge(of_series);
        }
    }
    // What went nowhere was not sent in plain text: it belongs to what is sent with mTLS, where there is such an edge.
    for (edge, of_series) in nowhere {
        let secured = EdgeId { mtls: true, ..edge.clone() };
        let edge = if counts.contains_key(&secured) { secured } else { edge };
        counts.entry(edge).or_default().merge(of_series);
    }
    // An endpoint that cannot be connected is ejected before the protocol or the route of a request is known.
    for (edge, of_series) in ejected {
        let edge = busiest_between(&edge, &counts).unwrap_or(edge);
        counts.entry(edge).or_default().merge(of_series);
    }
    let places = places(model, counts.keys());
    let edge = |(id, counts): (EdgeId, Counts)| {
        let [client, server] = [&id.source, &id.destination].map(|party| places.get(party));
        // Without mTLS nobody has shown an identity.
        let ids = |place: Option<&Place>| -> Vec<String> {
            place.filter(|_| id.mtls).into_iter().flat_map(|place| place.ids.iter().cloned()).collect()
        };
        let zones = |place: Option<&Place>| -> Vec<String> {
            place.into_iter().flat_map(|place| place.zones.iter().cloned()).collect()
        };
        Edge {
            client_ids: ids(client),
            server_ids: ids(server),
            client_zones: zones(client),
            server_zones: zones(server),
            port: id.port,
            protocol: id.protocol.to_string(),
            mtls: id.mtls,
            golden: counts.golden(sum.window),
            source: id.source,
            destination: id.destination,
        }
    };
    let mut edges: Vec<Edge> = counts.into_iter().map(edge).collect();
    edges.sort_by_key(|edge| std::cmp::Reverse((edge.golden.requests, edge.golden.connections)));
    Edges { window: sum.window, lost: sum.lost, edges }
}
