//! Shares of revisions where a Canary watches a workload behind a Service, and what stands in their way.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;

use tulle_crds::{Canary, CanaryStatus, CanarySteering, Phase, StepMatch, by_age};
use tulle_mesh::event_reason::EventReason;
use tulle_mesh::proto;

use super::address::Owner;
use super::routes::EndpointsName;
use super::{Key, Model, Pod, Service, Variant, WorkloadKey, target_of};

/// Why sidecars cannot choose the version of a workload behind one of its Services.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SplitObstacle {
    /// The name of the Service.
    pub service: String,
    /// The reason of the condition and of the event.
    pub code: EventReason,
    /// Why, as a part of a sentence.
    pub reason: String,
}

/// An address from which clients reach endpoints that carry the shares of a Canary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedAddress {
    /// The address.
    pub address: SocketAddr,
    /// The name of the endpoints.
    pub endpoints: Arc<str>,
    /// Routes lead there, for the clients that get this variant of the address's route. `None`: the address is the
    /// Service's own, and all its clients are concerned.
    pub via: Option<Variant>,
}

/// Addresses at which a workload can be reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dialled {
    /// The name of a Service that has addresses: of several the first by name. `None`: there is none.
    pub service: Option<String>,
    /// Addresses and ports of such Services.
    pub services: Vec<SocketAddr>,
    /// Addresses of its pods, with the ports that such Services lead to.
    pub pods: Vec<SocketAddr>,
    /// Of these: those of pods that wait behind our gate, where no load balancer leads.
    pub parked: Vec<SocketAddr>,
}

/// Numbers of ready endpoints.
#[derive(Clone, Copy, Debug)]
struct Counts {
    /// Of the approved revision.
    approved: u32,
    /// Of the revision that was approved before.
    former: u32,
    /// Of the revision on trial.
    canary: u32,
    /// Of nothing that the Canary watches.
    others: u32,
}

/// How requests are shared among the versions of the workload that a Canary watches.
pub(super) type Shares = (Vec<proto::RevisionShare>, Option<proto::CanaryRef>, Option<proto::Steering>);

/// The versions behind one Service that Canaries know.
pub struct Sides<'a>(Vec<Versions<'a>>);

impl Sides<'_> {
    /// The side that a revision is on: `stable` or `canary`. `None`: no Canary shares out requests to it.
    pub fn of(&self, revision: &str) -> Option<&'static str> {
        self.0.iter().find_map(|versions| {
            let side = if versions.on_trial == revision { "canary" } else { "stable" };
            versions.list(revision).then_some(side)
        })
    }
}

/// The versions that a Canary knows, by revision. An empty name: there is none.
struct Versions<'a> {
    /// The first in the list of shares, which serves rather than nobody.
    stable: &'a str,
    /// What was stable until its replacement was approved stays stable as long as it has pods.
    former: &'a str,
    /// The last in the list of shares: its share of users begins at the same end, so it grows by those who come to it.
    on_trial: &'a str,
    /// The share of the version on trial, in permille.
    weight: u32,
}

impl<'a> Versions<'a> {
    fn of(status: &'a CanaryStatus) -> Self {
        let (approved, former) = (status.approved_revision.as_str(), status.former_revision.as_str());
        let weight = status.weight.min(100) * 10;
        if status.phase == Phase::Promoting {
            // The approved version goes on from the share that it had, and nobody is sent back meanwhile.
            return match former.is_empty() || former == approved {
                true => Self { stable: approved, former: "", on_trial: "", weight: 0 },
                // Never nothing: it serves by itself as soon as the last pod of the other has gone, which its
                // workload's controller may replace before the weight has followed.
                false => Self { stable: former, former: "", on_trial: approved, weight: weight.max(1) },
            };
        }
        let canary = status.canary_revision.as_str();
        Self {
            stable: approved,
            former: if former == canary { "" } else { former },
            on_trial: if canary == approved { "" } else { canary },
            weight,
        }
    }

    /// Whether shares are set for this revision.
    fn list(&self, revision: &str) -> bool {
        !revision.is_empty() && [self.stable, self.former, self.on_trial].contains(&revision)
    }
}

impl Model {
    /// Sets the shares of a Service's endpoints, and removes the endpoints that must get none. An unapproved revision
    /// gets only its share whether or not its pods carry a gate.
    ///
    /// Everything is taken from the Canary's status: a spec that was edited changes nothing before the status says so.
    pub(super) fn split(&self, endpoints: &mut Vec<proto::Endpoint>) -> Shares {
        let pod = |endpoint: &proto::Endpoint| self.pods.get(endpoint.pod_uid.as_str());
        let Some((key, status, workload)) = self.sharing_canary(endpoints) else {
            // Nobody sets a share here: a pod on trial waits for its gate as with any client.
            endpoints.retain(|endpoint| !pod(endpoint).is_some_and(Pod::is_parked));
            return (Vec::new(), None, None);
        };
        let is_watched = |endpoint: &proto::Endpoint| {
            pod(endpoint).is_some_and(|pod| pod.workload.as_ref() == Some(&workload))
        };
        endpoints.retain(|endpoint| is_watched(endpoint) || !pod(endpoint).is_some_and(Pod::is_parked));
        let versions = Versions::of(status);
        let has_others = endpoints.iter().any(|endpoint| !is_watched(endpoint));
        if has_others {
            // Other endpoints have one share together, whatever their revisions are called; a revision that nobody
            // has approved must not count as one of them.
            endpoints.retain(|endpoint| !is_watched(endpoint) || versions.list(&endpoint.revision));
            for endpoint in endpoints.iter_mut().filter(|endpoint| !is_watched(endpoint)) {
                endpoint.revision.clear();
            }
        }
        let of = |revision: &str| {
            let its = |e: &&proto::Endpoint| is_watched(e) && e.revision == revision && !revision.is_empty();
            count(endpoints.iter().filter(its))
        };
        let counts = Counts {
            approved: of(versions.stable),
            former: of(versions.former),
            canary: of(versions.on_trial),
            others: count(endpoints.iter().filter(|endpoint| !is_watched(endpoint))),
        };
        let weight = if versions.on_trial.is_empty() { 0 } else { versions.weight };
        // Without a pod of the revision on trial all goes to the stable one, also where its share is 0.
        let weight = if counts.canary == 0 && counts.approved + counts.former > 0 { 0 } else { weight };
        let [stable, formers, others, canary] = permilles(weight, counts);
        let share =
            |revision: &str, permille| proto::RevisionShare { revision: revision.to_owned(), permille };
        let mut split = vec![share(versions.stable, stable)];
        if formers > 0 {
            split.push(share(versions.former, formers));
        }
        if has_others {
            split.push(share("", others));
        }
        if !versions.on_trial.is_empty() {
            split.push(share(versions.on_trial, canary));
        }
        let reference =
            proto::CanaryRef { namespace: key.0.to_string(), name: key.1.to_string(), epoch: status.epoch };
        // Without a pod nothing is sent there, and nothing copied.
        let steering = status.steering.as_ref().filter(|_| counts.canary > 0);
        let steering = steering.map(|steering| steer(steering, versions.on_trial, 1000 - others));
        (split, Some(reference), steering.filter(|steering| !is_idle(steering)))
    }

    /// The Canary that sets the shares of these endpoints: of several workloads' Canaries the oldest.
    fn sharing_canary(&self, endpoints: &[proto::Endpoint]) -> Option<(&Key, &CanaryStatus, WorkloadKey)> {
        let pods = endpoints.iter().filter_map(|endpoint| self.pods.get(endpoint.pod_uid.as_str()));
        let workloads: HashSet<&WorkloadKey> = pods.filter_map(|pod| pod.workload.as_ref()).collect();
        let watching = workloads.into_iter().filter_map(|workload| {
            let (key, canary) = self.watching_canary(workload)?;
            Some((key, canary, workload))
        });
        let (key, canary, workload) = watching.min_by(|a, b| by_age(a.1, b.1).then(a.0.cmp(b.0)))?;
        let status = canary.status.as_ref()?;
        // A promotion without a steering was begun by an operator that set no shares during one.
        let shares = status.phase != Phase::Promoting || status.steering.is_some();
        shares.then(|| (key, status, workload.clone()))
    }

    /// The Canary of a workload, once it has approved a revision.
    fn watching_canary(&self, workload: &WorkloadKey) -> Option<(&Key, &Canary)> {
        let (key, canary) = self.canary_of(workload)?;
        (!canary.status.as_ref()?.approved_revision.is_empty()).then_some((key, canary))
    }

    /// Whether a Service selects a pod of a workload by its labels.
    pub(super) fn selects_workload(&self, service: &Service, workload: &WorkloadKey) -> bool {
        self.pods_of(workload).any(|pod| service.selects(pod))
    }

    /// The Services whose selector or slices contain a pod of a workload.
    pub(super) fn services_of(&self, workload: &WorkloadKey) -> BTreeSet<&Key> {
        let selecting = self
            .services_in(&workload.namespace)
            .filter(|(_, service)| self.selects_workload(service, workload))
            .map(|(key, _)| key);
        let slices = self.pods_of(workload).flat_map(|pod| self.slices_of(pod));
        let listing = slices.filter_map(|key| {
            let slice = self.slices.get(key)?;
            let service = (Arc::clone(&key.0), Arc::clone(&slice.service));
            self.services.get_key_value(&service).map(|(key, _)| key)
        });
        selecting.chain(listing).collect()
    }

    /// The pods that are endpoints of a Service.
    pub fn pods_behind(&self, service: &Key) -> impl Iterator<Item = &Pod> {
        let slices = self.slices_by_service.get(service).into_iter().flatten();
        let endpoints = slices.filter_map(move |key| self.slices.get(key)).flat_map(|slice| &slice.endpoints);
        endpoints.filter_map(move |endpoint| self.pod_of_endpoint(endpoint))
    }

    /// The workloads whose pods are endpoints of a Service.
    pub(super) fn workloads_behind(&self, service: &Key) -> HashSet<WorkloadKey> {
        self.pods_behind(service).filter_map(|pod| pod.workload.clone()).collect()
    }

    /// The sides of rollouts that share out requests to a Service. Looks at every pod behind it.
    pub fn sides_of(&self, service: &Key) -> Sides<'_> {
        let workloads = self.workloads_behind(service);
        let versions = workloads.iter().filter_map(|workload| {
            let (_, canary) = self.watching_canary(workload)?;
            Some(Versions::of(canary.status.as_ref()?))
        });
        Sides(versions.collect())
    }

    /// What keeps sidecars from choosing the version of a workload, in order of the Services.
    ///
    /// A headless Service is an obstacle only where no Service with an address selects the workload too: StatefulSets
    /// have both, and clients of the one with an address are split. Requests by way of the headless one go to whichever
    /// pod the client dials.
    pub fn split_obstacles(&self, workload: &WorkloadKey) -> Vec<SplitObstacle> {
        let services = self.services_of(workload);
        let found = services.into_iter().filter_map(|key| Some((key, self.services.get(key)?)));
        let found: Vec<(&Key, &Service)> = found.collect();
        let has_address = found.iter().any(|(_, service)| service.ips().next().is_some());
        let obstacle = |(key, service): &(&Key, &Service)| {
            let reason = if service.headless {
                let headless =
                    "it is headless: clients dial pods by address, so the sidecars cannot choose the version";
                (!has_address).then(|| headless.to_owned())
            } else if service.ips().next().is_some() {
                self.older_canary_behind(key, workload).map(|older| {
                    format!(
                        "Canary {older}, which is older, watches another workload behind it, and a Service has the shares of one Canary"
                    )
                })
            } else {
                None
            };
            reason.map(|reason| SplitObstacle {
                service: key.1.to_string(),
                code: EventReason::NoSplit,
                reason,
            })
        };
        found.iter().filter_map(obstacle).collect()
    }

    /// At which addresses clients may dial a workload: those of its Services, or of its pods themselves.
    pub fn dialled(&self, workload: &WorkloadKey) -> Dialled {
        let mut dialled = Dialled::default();
        let services = self.services_of(workload).into_iter();
        let services = services.filter_map(|key| Some((key, self.services.get(key)?)));
        let mut ports: HashMap<&str, HashSet<u16>> = HashMap::new();
        for (key, service) in services.filter(|(_, service)| service.ips().next().is_some()) {
            dialled.service.get_or_insert_with(|| key.1.to_string());
            for ip in service.ips() {
                dialled.services.extend(service.ports.iter().map(|port| SocketAddr::new(ip, port.port)));
            }
            for slice in self.slices_by_service.get(key).into_iter().flatten() {
                let Some(slice) = self.slices.get(slice) else { continue };
                let pods = slice.endpoints.iter().filter_map(|endpoint| self.pod_of_endpoint(endpoint));
                for pod in pods {
                    ports.entry(&*pod.uid).or_default().extend(slice.ports.iter().map(|(_, number)| *number));
                }
            }
        }
        for pod in self.pods_of(workload) {
            for port in ports.get(&*pod.uid).into_iter().flatten() {
                let addresses = pod.ips.iter().map(|ip| SocketAddr::new(*ip, *port));
                if pod.is_parked() {
                    dialled.parked.extend(addresses.clone());
                }
                dialled.pods.extend(addresses);
            }
        }
        dialled
    }

    /// Addresses from which clients reach endpoints that carry the shares of a Canary: those of their Service, and those
    /// from which routes lead to it. Not of Services whose endpoints differ by the client's node: not all clients get
    /// shares there.
    pub fn shared_addresses(&self, key: &Key) -> Vec<SharedAddress> {
        let Some(canary) = self.canaries.get(key) else { return Vec::new() };
        let services = self.services_of(&target_of(&key.0, canary)).into_iter();
        let services = services.filter_map(|key| Some((key, self.services.get(key)?)));
        let mut shared = Vec::new();
        for (service_key, service) in services.filter(|(_, service)| !service.local_only) {
            let leading = self.leading_to(service_key);
            for (port, ipv4) in service.ports.iter().flat_map(|port| [(port, true), (port, false)]) {
                let name = EndpointsName { service: service_key.clone(), port: port.port, ipv4 };
                let own = self.addresses_at(service_key, service, port.port);
                let own = own.filter(|address| address.is_ipv4() == ipv4).map(|address| (address, None));
                let led = leading.iter().filter(|leading| leading.endpoints == name);
                let led = led.map(|leading| (leading.address, Some(leading.variant.clone())));
                let addresses: Vec<(SocketAddr, Option<Variant>)> = own.chain(led).collect();
                if addresses.is_empty() {
                    continue;
                }
                let mut endpoints = self.endpoints(service_key, service, port, ("", ipv4));
                let (_, shares_of, _) = self.split(&mut endpoints);
                if shares_of.is_some_and(|of| *of.namespace == *key.0 && *of.name == *key.1) {
                    let name: Arc<str> = name.to_string().into();
                    let address =
                        |(address, via)| SharedAddress { address, endpoints: Arc::clone(&name), via };
                    shared.extend(addresses.into_iter().map(address));
                }
            }
        }
        shared
    }

    /// Whether a Service has this address.
    pub fn is_a_service(&self, address: SocketAddr) -> bool {
        matches!(self.owner(address), Owner::Service(..))
    }

    /// The name of an older Canary that watches another workload behind the same Service.
    fn older_canary_behind(&self, service: &Key, workload: &WorkloadKey) -> Option<String> {
        let (own_key, own) = self.canary_of(workload)?;
        let others = self.workloads_behind(service).into_iter().filter(|other| other != workload);
        let mut older: Vec<&Key> = others
            .filter_map(|other| self.watching_canary(&other))
            .filter(|(key, canary)| by_age(canary, own).then((*key).cmp(own_key)).is_lt())
            .map(|(key, _)| key)
            .collect();
        older.sort();
        older.first().map(|key| key.1.to_string())
    }
}

/// What sidecars are sent of a steering. `own`: the share of the watched workload, in permille. Of other workloads'
/// requests no copies are made.
fn steer(steering: &CanarySteering, revision: &str, own: u32) -> proto::Steering {
    proto::Steering {
        revision: revision.to_owned(),
        r#match: steering.match_.iter().flat_map(matches_of).collect(),
        mirror_permille: (steering.mirror.min(100) * own).div_ceil(100),
        sticky_cookie: steering.sticky.clone(),
    }
}

/// Admission accepts one of the two in an entry. Of both, each chooses: they are alternatives everywhere.
fn matches_of(entry: &StepMatch) -> impl Iterator<Item = proto::ValueMatch> + use<> {
    use proto::value_match::Type;
    let header = entry.header.as_ref().map(|header| (Type::Exact, header));
    let cookie = entry.cookie.as_ref().map(|cookie| (Type::Cookie, cookie));
    let made = [header, cookie].map(|found| {
        found.map(|(kind, wanted)| proto::ValueMatch {
            r#type: kind.into(),
            name: wanted.name.clone(),
            value: wanted.exact.clone(),
        })
    });
    made.into_iter().flatten()
}

/// Whether a steering changes nothing.
fn is_idle(steering: &proto::Steering) -> bool {
    steering.r#match.is_empty() && steering.mirror_permille == 0 && steering.sticky_cookie.is_empty()
}

fn count<'a>(endpoints: impl Iterator<Item = &'a proto::Endpoint>) -> u32 {
    let ready = endpoints.filter(|endpoint| endpoint.state() == proto::EndpointState::Ready);
    u32::try_from(ready.count()).unwrap_or(u32::MAX)
}

/// The shares of the approved, the former, all other endpoints and the canary, which sum to 1000. `weight` is the
/// canary's share of the watched workload in permille; the workload's share is that of its ready endpoints among all.
/// A canary that is to get requests gets at least one in a thousand.
fn permilles(weight: u32, counts: Counts) -> [u32; 4] {
    let stable = counts.approved + counts.former;
    // Pods that are to get nothing do not make the workload larger.
    let own = match weight {
        0 => stable,
        1000 => counts.canary,
        _ => stable + counts.canary,
    };
    let total = match own + counts.others {
        0 => 1000,
        _ if counts.others == 0 => 1000,
        all => (1000 * own + all / 2) / all,
    };
    let canary = (total * weight).div_ceil(1000);
    let stables = total - canary;
    let formers = (stables * counts.former).checked_div(stable).unwrap_or(0);
    [stables - formers, formers, 1000 - total, canary]
}

#[cfg(test)]
mod tests;
