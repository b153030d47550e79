//! From which addresses a route leads somewhere, and for which clients.
//!
//! In: a route, or a Service that routes lead to. Out: addresses that clients dial, each with the variant of its route
//! that the clients concerned get.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use super::super::object::ServicePort;
use super::super::{EndpointsName, Key, Model, Service, Variant};
use super::attach::{Standing, Standings};
use super::backend::service_of;
use super::check::Terms;
use super::object::RouteKey;
use super::{Gateway, Held};

/// An address from which routes lead to a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::model) struct LeadingAddress {
    pub(in crate::model) address: SocketAddr,
    /// The clients concerned: those that get this variant of the address's route.
    pub(in crate::model) variant: Variant,
    /// The endpoints of the Service that the routes lead to.
    pub(in crate::model) endpoints: EndpointsName,
}

/// What clients get that routes of the namespace `from` concern.
fn variant(parent: &Key, from: &Arc<str>) -> Variant {
    if parent.0 == *from { Variant::Any } else { Variant::Namespace(Arc::clone(from)) }
}

impl Gateway {
    /// The parents of the routes that lead to a Service, each with the namespace of those routes.
    pub(super) fn parents_leading_to(&self, service: &Key) -> BTreeSet<(Key, Arc<str>)> {
        let naming = self.by_backend.get(service).into_iter().flatten();
        let naming = naming.filter_map(|key| self.routes.get_key_value(key));
        let parents = naming.flat_map(|(key, held)| {
            held.parents().into_iter().map(move |parent| (parent, Arc::clone(&key.namespace)))
        });
        parents.collect()
    }
}

impl Model {
    /// The addresses at which a route holds, and what the clients concerned get there.
    pub fn route_addresses<'a>(
        &'a self,
        key: &RouteKey,
        known: &mut Standings<'a>,
    ) -> Vec<(SocketAddr, Variant)> {
        let Some(held) = self.gateway.routes.get(key) else { return Vec::new() };
        let mut found = Vec::new();
        for parent in held.parents() {
            let Some((parent, service)) = self.services.get_key_value(&parent) else { continue };
            for port in &service.ports {
                if self.standing((parent, port), key, known) == Some(Standing::Holds) {
                    let variant = variant(parent, &key.namespace);
                    let addresses = self.addresses_at(parent, service, port.port);
                    found.extend(addresses.map(|address| (address, variant.clone())));
                }
            }
        }
        found
    }

    /// The addresses from which routes lead to a Service.
    pub(in crate::model) fn leading_to(&self, service: &Key) -> Vec<LeadingAddress> {
        let mut found = Vec::new();
        for (parent, from) in self.gateway.parents_leading_to(service) {
            let Some((parent, frontend)) = self.services.get_key_value(&parent) else { continue };
            for port in &frontend.ports {
                found.extend(self.leading_from((parent, frontend, port), &from, service));
            }
        }
        found
    }

    /// Those of one port of a parent, by routes of the namespace `from`.
    fn leading_from(
        &self,
        (parent, frontend, port): (&Key, &Service, &ServicePort),
        from: &Arc<str>,
        service: &Key,
    ) -> Vec<LeadingAddress> {
        let holding = self.holding(parent, port, from).into_iter();
        let holding: Vec<(&RouteKey, &Held)> = holding.filter(|(key, _)| key.namespace == *from).collect();
        let mut found = Vec::new();
        for address in self.addresses_at(parent, frontend, port.port) {
            for (key, held) in &holding {
                let terms = held.rules.iter().filter(|rule| !rule.matches.is_empty());
                let to = terms.filter_map(|rule| rule.terms.as_ref()).flat_map(Terms::references);
                let to = to.filter(|to| service_of(&key.namespace, to).as_ref() == Some(service));
                for endpoints in
                    to.filter_map(|to| self.backend_endpoints(&held.object, to, address.is_ipv4()).ok())
                {
                    let leading = LeadingAddress { address, variant: variant(parent, from), endpoints };
                    // Most rules of a route lead to the same Services.
                    if !found.contains(&leading) {
                        found.push(leading);
                    }
                }
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::tests::{key, pod, route, shop};
    use super::super::RouteObject;
    use super::*;

    /// A route of `shop/web` to `shop/api`.
    fn to_api(namespace: &str, name: &str) -> RouteObject {
        route(name, namespace, "web", "api")
    }

    fn world() -> Model {
        let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
        let port = ServicePort { name: "http".into(), port: 80, app_protocol: None };
        let api = Service {
            cluster_ips: vec!["10.96.0.2".parse().unwrap()],
            ports: vec![port],
            ..Service::default()
        };
        model.apply_service(key("shop", "api"), api);
        model
    }

    fn addresses() -> [SocketAddr; 2] {
        ["10.96.0.1:80", "203.0.113.1:80"].map(|address| address.parse().unwrap())
    }

    #[test]
    fn a_service_is_led_to_from_the_addresses_of_its_routes_parents() {
        let mut model = world();
        assert!(model.leading_to(&key("shop", "api")).is_empty());
        let endpoints = EndpointsName { service: key("shop", "api"), port: 80, ipv4: true };
        let leading = |variant: Variant| {
            addresses().map(|address| LeadingAddress {
                address,
                variant: variant.clone(),
                endpoints: endpoints.clone(),
            })
        };
        model.apply_route(to_api("shop", "producer"));
        assert_eq!(model.leading_to(&key("shop", "api")), leading(Variant::Any));
        model.delete_route(&to_api("shop", "producer").key());
        model.apply_route(to_api("team", "consumer"));
        assert_eq!(model.leading_to(&key("shop", "api")), leading(Variant::Namespace("team".into())));
        assert!(model.leading_to(&key("shop", "web")).is_empty());
    }

    #[test]
    fn a_route_holds_at_the_addresses_of_its_parents() {
        let mut model = world();
        let (producer, consumer) = (to_api("shop", "producer"), to_api("team", "consumer"));
        model.apply_route(producer.clone());
        model.apply_route(consumer.clone());
        let at = |route: &RouteObject| model.route_addresses(&route.key(), &mut Standings::default());
        assert_eq!(at(&producer), addresses().map(|address| (address, Variant::Any)));
        let team = Variant::Namespace("team".into());
        assert_eq!(at(&consumer), addresses().map(|address| (address, team.clone())));
    }
}
