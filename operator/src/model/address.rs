//! Whose an address is. Everybody who may write a Service can claim any external address, so that a claim must never
//! take traffic from its owner.

use std::net::{IpAddr, SocketAddr};

use super::{Endpoint, Key, Model, Pod, Service};

/// An address that two Services claim with the same port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Collision {
    /// The address.
    pub ip: IpAddr,
    /// The Service that has it.
    pub holder: Key,
    /// The Service whose claim has no effect.
    pub claimant: Key,
}

/// Whose an address is.
#[derive(Debug)]
pub(crate) enum Owner<'a> {
    /// A Service's. It may lack the port.
    Service(&'a Key, &'a Service),
    /// A pod's own.
    Pod(&'a Pod),
    /// Nobody's in the cluster.
    Nobody,
}

impl Model {
    /// The pod whose own address this is.
    pub fn pod_at(&self, ip: IpAddr) -> Option<&Pod> {
        self.pods_by_ip.get(&ip).and_then(|uid| self.pods.get(uid))
    }

    /// The pod of an endpoint: the one that it names, or else the one whose own address it has. Hand-made slices name
    /// none, nor do those that mirror hand-made Endpoints. `None`: there is no pod, or it is not known yet.
    pub(super) fn pod_of_endpoint(&self, endpoint: &Endpoint) -> Option<&Pod> {
        match &endpoint.pod_uid {
            Some(uid) => self.pods.get(uid),
            None => self.pod_at(endpoint.address?),
        }
    }

    /// The slices that a pod is an endpoint of, by its name or by its own address.
    pub(super) fn slices_of<'a>(&'a self, pod: &'a Pod) -> impl Iterator<Item = &'a Key> + use<'a> {
        let by_uid = self.slices_by_pod.get(&pod.uid).into_iter().flatten();
        let is_owner = |ip: IpAddr| self.pod_at(ip).is_some_and(|owner| owner.uid == pod.uid);
        let ips = pod.ips.iter().filter(move |ip| is_owner(**ip));
        by_uid.chain(ips.filter_map(move |ip| self.slices_by_address.get(ip)).flatten())
    }

    /// Whose an address is. A cluster address belongs to its Service whatever others claim, a pod's address to the
    /// pod; an external address to the oldest Service that claims it with this port, because load balancers share
    /// addresses between Services with different ports.
    pub(crate) fn owner(&self, address: SocketAddr) -> Owner<'_> {
        let claims = self.claims_of(address.ip());
        let is_cluster_ip = |claim: &(&Key, &Service)| claim.1.cluster_ips.contains(&address.ip());
        if let Some((key, service)) = claims.iter().copied().find(is_cluster_ip) {
            return Owner::Service(key, service);
        }
        if let Some(pod) = self.pod_at(address.ip()) {
            return Owner::Pod(pod);
        }
        let has_port =
            |claim: &(&Key, &Service)| claim.1.ports.iter().any(|port| port.port == address.port());
        match claims.iter().copied().find(has_port).or(claims.first().copied()) {
            Some((key, service)) => Owner::Service(key, service),
            None => Owner::Nobody,
        }
    }

    /// The addresses at which clients reach a port of a Service: those of its own that nobody else owns.
    pub(super) fn addresses_at<'a>(
        &'a self,
        key: &'a Key,
        service: &'a Service,
        port: u16,
    ) -> impl Iterator<Item = SocketAddr> + use<'a> {
        let all = service.ips().map(move |ip| SocketAddr::new(ip, port));
        all.filter(move |address| matches!(self.owner(*address), Owner::Service(owner, _) if owner == key))
    }

    /// Services that claim an address, the oldest first.
    fn claims_of(&self, ip: IpAddr) -> Vec<(&Key, &Service)> {
        let keys = self.claims.get(&ip).into_iter().flatten();
        let mut claims: Vec<_> = keys.filter_map(|key| self.services.get_key_value(key)).collect();
        claims.sort_by(|a, b| (a.1.created, a.0).cmp(&(b.1.created, b.0)));
        claims
    }

    /// Claims of Services to addresses that another Service has, in order. An address that two Services share with
    /// different ports is no collision, unless it is the cluster address of one.
    pub fn colliding_claims(&self) -> Vec<Collision> {
        let shared = self.claims.iter().filter(|(_, keys)| keys.len() > 1);
        let mut found: Vec<Collision> = shared.flat_map(|(ip, _)| self.collisions_at(*ip)).collect();
        found.sort();
        found
    }

    fn collisions_at(&self, ip: IpAddr) -> Vec<Collision> {
        let mut claims = self.claims_of(ip);
        // Stable: of equal right the older stays first.
        claims.sort_by_key(|(_, service)| !service.cluster_ips.contains(&ip));
        let owned = claims.first().is_some_and(|(_, service)| service.cluster_ips.contains(&ip));
        let mut found = Vec::new();
        for (index, (claimant, service)) in claims.iter().enumerate() {
            let overlaps = |other: &Service| {
                let has = |number: u16| other.ports.iter().any(|port| port.port == number);
                service.ports.iter().any(|port| has(port.port))
            };
            let mut earlier = claims.iter().take(index);
            let holder = match owned {
                true => earlier.next(),
                false => earlier.find(|(_, other)| overlaps(other)),
            };
            if let Some((holder, _)) = holder {
                let (holder, claimant) = ((*holder).clone(), (*claimant).clone());
                found.push(Collision { ip, holder, claimant });
            }
        }
        found
    }
}
