//! Which routes hold at a port of a Service.
//!
//! Only Services with a cluster address can be parents: nobody dials a headless one, and ExternalName is an alias in DNS.
//! Of two kinds at one port the first in the order of [`RouteKind`](super::RouteKind) holds, and the others are ignored.
//! What sidecars are sent for one address is bounded: the oldest routes come first, and one for which there is no room
//! left is ignored too, because a message that a sidecar cannot take would end its stream.

use std::collections::HashMap;
use std::sync::Arc;

use super::super::object::{Service, ServicePort};
use super::super::{Key, Model};
use super::object::{ParentRef, RouteKey, RouteObject};
use super::{Gateway, Held};

/// Rules of one port for one client: 32 full routes.
pub(super) const MAX_RULES: usize = 512;
/// Bytes of these rules; a sixteenth of what a sidecar takes in one message.
const MAX_BYTES: usize = 1 << 20;

/// How a route that is attached to a port fares there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// Its rules hold.
    Holds,
    /// This route of another kind holds instead.
    Overruled(RouteKey),
    /// There is no room for it beside older ones.
    NoRoom,
}

/// A route that is attached to a port.
#[derive(Debug)]
pub(super) struct Attached<'a> {
    pub(super) key: &'a RouteKey,
    pub(super) held: &'a Held,
    pub(super) standing: Standing,
}

/// How routes stand at the ports that were asked for, for as long as the model stays as it is: of a thousand routes of
/// one Service, each would otherwise put all of them in order.
#[derive(Debug, Default)]
pub struct Standings<'a> {
    /// By the Service, its port, and the namespace of the routes.
    at: HashMap<(Key, u16, Arc<str>), HashMap<&'a RouteKey, Standing>>,
}

/// Whether a parent is a Service. Without a group it is a kind of the Gateway API.
pub(super) fn is_service(parent: &ParentRef) -> bool {
    parent.group.as_deref() == Some("") && parent.kind.as_deref() == Some("Service")
}

/// The Service that a parent is. `None`: it is not a Service.
pub(super) fn service_of(route: &RouteObject, parent: &ParentRef) -> Option<Key> {
    let namespace = || match parent.namespace.as_deref() {
        Some(namespace) if !namespace.is_empty() => namespace.into(),
        _ => Arc::clone(&route.namespace),
    };
    is_service(parent).then(|| (namespace(), parent.name.as_str().into()))
}

/// Whether a parent is this Service. Allocates nothing.
fn is(route: &RouteObject, parent: &ParentRef, service: &Key) -> bool {
    let given = parent.namespace.as_deref().filter(|namespace| !namespace.is_empty());
    is_service(parent)
        && parent.name.as_str() == &*service.1
        && given.unwrap_or(&route.namespace) == &*service.0
}

/// Whether routes can be attached to a Service.
pub(super) fn is_parent(service: &Service) -> bool {
    !service.cluster_ips.is_empty()
}

/// Whether a parent means this port of its Service.
pub(super) fn means(parent: &ParentRef, port: &ServicePort) -> bool {
    parent.port.is_none_or(|number| number == i32::from(port.port))
        && parent.section_name.as_deref().is_none_or(|name| name.is_empty() || name == port.name)
}

impl Gateway {
    /// Routes of the namespace `from` that decide something at a port of a Service, the oldest first.
    fn attached(&self, service: &Key, port: &ServicePort, from: &str) -> Vec<Attached<'_>> {
        let its = self.by_parent.get(service).into_iter().flatten().filter(|key| &*key.namespace == from);
        let its = its.filter_map(|key| self.routes.get_key_value(key));
        let means_it = |held: &Held| {
            let mut parents = held.object.parents.iter();
            parents.any(|parent| is(&held.object, parent, service) && means(parent, port))
        };
        let mut its: Vec<(&RouteKey, &Held)> =
            its.filter(|(_, held)| held.is_in_force() && means_it(held)).collect();
        // All are of one namespace.
        its.sort_by(|a, b| (a.1.object.created, &a.0.name).cmp(&(b.1.object.created, &b.0.name)));
        let Some(winner) = its.iter().map(|(key, _)| *key).min_by_key(|key| key.kind) else {
            return Vec::new();
        };
        let (mut rules, mut bytes) = (0, 0);
        let standing = |(key, held): (&RouteKey, &Held)| {
            if key.kind != winner.kind {
                return Standing::Overruled(winner.clone());
            }
            if rules + held.rules.len() > MAX_RULES || bytes + held.bytes > MAX_BYTES {
                return Standing::NoRoom;
            }
            rules += held.rules.len();
            bytes += held.bytes;
            Standing::Holds
        };
        let standings: Vec<Standing> = its.iter().copied().map(standing).collect();
        its.into_iter()
            .zip(standings)
            .map(|((key, held), standing)| Attached { key, held, standing })
            .collect()
    }
}

impl Model {
    /// Routes of the namespace `from` that decide something at a port of a Service, the oldest first.
    pub(super) fn attached(&self, service: &Key, port: &ServicePort, from: &str) -> Vec<Attached<'_>> {
        // Nearly always there is none, and nothing else is looked at.
        let is_named = self.gateway.by_parent.contains_key(service);
        if is_named && self.services.get(service).is_some_and(is_parent) {
            self.gateway.attached(service, port, from)
        } else {
            Vec::new()
        }
    }

    /// How a route stands at a port of a Service. `None`: it decides nothing there.
    pub(super) fn standing<'a>(
        &'a self,
        (service, port): (&Key, &ServicePort),
        key: &RouteKey,
        known: &mut Standings<'a>,
    ) -> Option<Standing> {
        let at = (service.clone(), port.port, Arc::clone(&key.namespace));
        let all = known.at.entry(at).or_insert_with(|| {
            let attached = self.attached(service, port, &key.namespace).into_iter();
            attached.map(|one| (one.key, one.standing)).collect()
        });
        all.get(key).cloned()
    }

    /// Whether routes of the clients' own namespace hold for them at a port of a Service of another namespace.
    pub(in crate::model) fn has_consumer_routes(
        &self,
        service: &Key,
        port: &ServicePort,
        client_namespace: &str,
    ) -> bool {
        *service.0 != *client_namespace
            && self
                .attached(service, port, client_namespace)
                .iter()
                .any(|one| one.standing == Standing::Holds)
    }

    /// The routes that hold at a port of a Service for clients of a namespace, the oldest first.
    pub(super) fn holding(
        &self,
        service: &Key,
        port: &ServicePort,
        client_namespace: &str,
    ) -> Vec<(&RouteKey, &Held)> {
        let of = |namespace: &str| {
            let attached = self.attached(service, port, namespace).into_iter();
            let holding = attached.filter(|one| one.standing == Standing::Holds);
            holding.map(|one| (one.key, one.held)).collect::<Vec<_>>()
        };
        let consumer = if *service.0 == *client_namespace { Vec::new() } else { of(client_namespace) };
        if consumer.is_empty() { of(&service.0) } else { consumer }
    }
}
