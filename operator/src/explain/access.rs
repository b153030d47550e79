//! Who may reach what, and the least policies that the traffic seen needs.
//!
//! ```text
//!   unidentified  clients that such a policy cannot name
//! ```

mod unidentified;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use serde_json::{Value, json};
use tulle_mesh::identity::WorkloadId;
use tulle_mesh::policy::{Access as Rules, Subject};
use tulle_mesh::proto;
use tulle_mesh::query::{Access, AccessRow, Party};
use tulle_mesh::reason::Reason;

use super::{identity_of, is_meshed, pods_named, words};
use crate::model::{Key, Model, Pod};
use crate::telemetry::history::{Counts, Direction, SeriesId, Sum};

/// What a series has instead of a service account where it names none.
const NOT_AN_ACCOUNT: char = '_';
/// Callers in a rule, as the schema of a MeshPolicy allows.
const MOST_CALLERS: usize = 64;
/// Labels in a selector, as the schema of a MeshPolicy allows.
const MOST_LABELS: usize = 16;
/// Labels that name an application by custom, which are tried first.
const NAMING: [&str; 3] = ["app.kubernetes.io/name", "app", "k8s-app"];
/// Labels that change with a version or differ from pod to pod.
const CHANGING: [&str; 8] = [
    "pod-template-hash",
    "controller-revision-hash",
    "pod-template-generation",
    "statefulset.kubernetes.io/pod-name",
    "apps.kubernetes.io/pod-index",
    "app.kubernetes.io/version",
    "helm.sh/chart",
    "version",
];

/// Rows of an answer at most. Beyond, it says that it was cut off.
const MOST_ROWS: usize = 5_000;

/// In which direction access is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessDirection {
    /// Who can reach it.
    WhoCan,
    /// What it can reach.
    WhatCan,
}

/// Lists who may reach a workload or Service, or what a workload may reach. With an empty name, who may reach each
/// workload of the namespace, or, without one, of the cluster. `counted`: the requests of some time, for the counts and
/// the suggestions.
///
/// # Errors
/// A sentence that says what does not exist.
pub fn access(
    model: &Model,
    counted: &Sum,
    namespace: &str,
    name: &str,
    direction: AccessDirection,
) -> Result<Access, String> {
    match direction {
        AccessDirection::WhoCan => who_can(model, counted, namespace, name),
        AccessDirection::WhatCan => what_can(model, counted, namespace, name),
    }
}

fn who_can(model: &Model, counted: &Sum, namespace: &str, name: &str) -> Result<Access, String> {
    let servers = if name.is_empty() {
        workloads(model.pods().filter(|pod| namespace.is_empty() || *pod.namespace == *namespace))
    } else {
        workloads(servers_named(model, namespace, name).into_iter())
    };
    if servers.is_empty() && !name.is_empty() {
        return Err(format!("there is no pod of a workload or Service {name} in namespace {namespace}"));
    }
    let inbound = Inbound::of(counted);
    let mut found = Access::default();
    for (party, pods) in &servers {
        let seen = inbound.of_party(party);
        if !take(&mut found, clients_of(model, seen, party, pods)) {
            break;
        }
        if is_open(model, pods) {
            found.suggested.extend(suggestion(model, seen, party, pods));
            found.unidentified.extend(unidentified::of(seen, party));
        }
    }
    unidentified::name_senders(model, counted, &mut found.unidentified);
    Ok(found)
}

/// Adds rows while there is room for them. Whether there was.
fn take(found: &mut Access, rows: Vec<AccessRow>) -> bool {
    let room = MOST_ROWS.saturating_sub(found.rows.len());
    found.truncated = rows.len() > room;
    found.rows.extend(rows.into_iter().take(room));
    !found.truncated
}

fn what_can(model: &Model, counted: &Sum, namespace: &str, name: &str) -> Result<Access, String> {
    let clients: Vec<&Pod> = pods_named(model, namespace, name).collect();
    if clients.is_empty() {
        return Err(format!("there is no pod of a workload {name} in namespace {namespace}"));
    }
    let mut callers: BTreeMap<Option<WorkloadId>, &Pod> = BTreeMap::new();
    for pod in clients {
        callers.entry(is_meshed(pod).then(|| identity_of(model, pod))).or_insert(pod);
    }
    let inbound = Inbound::of(counted);
    let mut sections = Sections::default();
    let mut found = Access::default();
    for (party, pods) in workloads(model.pods()) {
        let seen = inbound.of_party(&party);
        for (identity, pod) in &callers {
            let rows =
                reached(model, &mut sections, (&party, pods.as_slice(), seen), (identity.as_ref(), *pod));
            if !take(&mut found, rows) {
                return Ok(found);
            }
        }
    }
    Ok(found)
}

/// The pods of a workload of that name, or else those behind a Service of that name.
fn servers_named<'a>(model: &'a Model, namespace: &str, name: &str) -> Vec<&'a Pod> {
    let of_workload: Vec<&Pod> = pods_named(model, namespace, name).collect();
    if !of_workload.is_empty() {
        return of_workload;
    }
    let wanted: Key = (namespace.into(), name.into());
    let Some(service) = model.service(&wanted) else { return Vec::new() };
    model.pods().filter(|pod| *pod.namespace == *namespace && !pod.finished && service.selects(pod)).collect()
}

/// Pods by their workload, in order.
pub(super) fn workloads<'a>(pods: impl Iterator<Item = &'a Pod>) -> BTreeMap<Party, Vec<&'a Pod>> {
    let mut found: BTreeMap<Party, Vec<&'a Pod>> = BTreeMap::new();
    for pod in pods.filter(|pod| !pod.finished) {
        found.entry(pod.party()).or_default().push(pod);
    }
    for pods in found.values_mut() {
        pods.sort_by(|one, other| one.name.cmp(&other.name));
    }
    found
}

/// A series and what was counted for it.
pub(super) type Counted<'a> = (&'a SeriesId, &'a Counts);

/// What was counted by workloads' own sidecars, by workload.
pub(super) struct Inbound<'a>(HashMap<Party, Vec<Counted<'a>>>);

impl<'a> Inbound<'a> {
    /// Looks at every series once.
    pub(super) fn of(sum: &'a Sum) -> Self {
        let mut found: HashMap<Party, Vec<Counted<'a>>> = HashMap::new();
        // They are in order, the reporter first.
        for series in sum.series.chunk_by(|(one, _), (other, _)| one.reporter == other.reporter) {
            let Some((first, _)) = series.first() else { continue };
            let inbound = series.iter().filter(|(id, _)| id.direction == Direction::Inbound);
            found.entry(first.reporter.party()).or_default().extend(inbound.map(|(id, counts)| (id, counts)));
        }
        Self(found)
    }

    /// Those of a workload.
    pub(super) fn of_party(&self, party: &Party) -> &[Counted<'a>] {
        self.0.get(party).map(Vec::as_slice).unwrap_or_default()
    }
}

/// Who the client of an inbound series is; `None`: it has no certificate, or is one of many.
pub(super) fn client_of(model: &Model, id: &SeriesId) -> Option<WorkloadId> {
    is_named(id).then(|| WorkloadId::new(&model.settings().trust_domain, &id.namespace, &id.peer))
}

/// Whether an inbound series names its client.
fn is_named(id: &SeriesId) -> bool {
    id.mtls && !id.peer.starts_with(NOT_AN_ACCOUNT) && !id.peer.is_empty()
}

/// Requests and opaque connections.
pub(super) fn count(counts: &Counts) -> u64 {
    counts.classes.iter().sum::<u64>() + counts.connections
}

/// Of these those that access rules and Strict mTLS let through.
fn admitted(counts: &Counts) -> u64 {
    let refused = counts.reasons.iter().filter(|(name, _)| {
        matches!(Reason::from_name(name), Some(Reason::PolicyDenied | Reason::PolicyPlaintext))
    });
    count(counts).saturating_sub(refused.map(|(_, refused)| refused).sum())
}

/// The access section that a workload's pods enforce: that of the first with a sidecar, as all have the same labels.
fn enforced(model: &Model, pods: &[&Pod]) -> Option<proto::Inbound> {
    pods.iter().find(|pod| is_meshed(pod)).and_then(|pod| model.inbound(&pod.uid))
}

/// Rows about who may reach a workload.
fn clients_of(model: &Model, counted: &[Counted<'_>], party: &Party, pods: &[&Pod]) -> Vec<AccessRow> {
    let row = |client: String, allowed_by: &str, seen: u64| AccessRow {
        client,
        destination: party.clone(),
        allowed_by: allowed_by.to_owned(),
        seen,
        ..AccessRow::default()
    };
    let seen = |from: &[proto::Peer]| seen_from(model, counted, from);
    let Some(inbound) = enforced(model, pods) else {
        let client = "everybody, because no pod has a sidecar".to_owned();
        return vec![row(client, "", seen(&[]))];
    };
    let strict = inbound.mtls() == proto::MtlsMode::Strict;
    let everybody = if strict { "everybody with a sidecar" } else { "everybody" };
    let Some(access) = &inbound.access else { return vec![row(everybody.to_owned(), "", seen(&[]))] };
    let policy = words::policy(access.policy.as_ref());
    let written = words::written(model, access);
    let (allow, deny) = (
        written.and_then(|written| written.allow.as_ref()),
        written.and_then(|written| written.deny.as_ref()),
    );
    let mut rows = Vec::new();
    for (index, rule) in access.allow.iter().enumerate() {
        let callers: Vec<(String, u64)> = match rule.from.as_slice() {
            [] => vec![(everybody.to_owned(), seen(&[]))],
            peers => words::each_caller(rule, words::rule_at(allow, index))
                .into_iter()
                .zip(peers)
                .map(|(client, peer)| (client, seen(std::slice::from_ref(peer))))
                .collect(),
        };
        for (client, seen) in callers {
            rows.extend(by_operation(rule, &row(client, &policy, seen)));
        }
    }
    if access.has_allow && access.allow.is_empty() {
        rows.push(row("nobody".to_owned(), &policy, 0));
    }
    if !access.has_allow {
        let client = if access.deny.is_empty() { everybody.to_owned() } else { format!("{everybody} else") };
        rows.push(row(client, "", seen(&[])));
    }
    for (index, rule) in access.deny.iter().enumerate() {
        let callers = words::callers(rule, words::rule_at(deny, index));
        // Also where a rule of allow has the port: what an opaque connection holds is not known.
        let opaque = if words::needs_http(rule) { ", with all opaque connections" } else { "" };
        let client = format!("{callers}, denied by {policy}{opaque}");
        rows.extend(by_operation(rule, &row(client, "", seen(&rule.from))));
    }
    rows
}

/// A row for each operation of a rule.
fn by_operation(rule: &proto::Rule, row: &AccessRow) -> Vec<AccessRow> {
    if rule.to.is_empty() {
        return vec![row.clone()];
    }
    let of = |operation: &proto::Operation| {
        let client = match operation.ports.as_slice() {
            [] => row.client.clone(),
            _ => format!("{} (port {})", row.client, words::ports(operation)),
        };
        let (methods, paths) = (operation.methods.clone(), operation.paths.clone());
        AccessRow { client, methods, paths, ..row.clone() }
    };
    rule.to.iter().map(of).collect()
}

/// Requests that were counted from any of these callers; from none: from all clients.
fn seen_from(model: &Model, counted: &[Counted<'_>], from: &[proto::Peer]) -> u64 {
    let is_from = |id: &SeriesId| {
        from.is_empty()
            || client_of(model, id).is_some_and(|client| from.iter().any(|peer| names(peer, &client)))
    };
    counted.iter().filter(|(id, _)| is_from(id)).map(|(_, counts)| count(counts)).sum()
}

/// Whether a caller of a rule names a client by its certificate.
pub(super) fn names(peer: &proto::Peer, client: &WorkloadId) -> bool {
    peer.cidr.is_empty()
        && (peer.service_account.is_empty() || peer.service_account == client.service_account)
        && (peer.any_namespace || peer.namespaces.contains(&client.namespace))
}

/// Access sections, each compiled once: many workloads share the one of a policy.
#[derive(Default)]
struct Sections(HashMap<(String, String), Arc<Section>>);

/// An access section.
struct Section {
    /// What it was compiled of.
    of: proto::Access,
    /// `None`: sidecars refuse it.
    whole: Option<Rules>,
    /// Each rule of allow, with all of deny.
    alone: Vec<Option<Rules>>,
    /// The ports that rules of allow name, and any other. Rules with ports are listed whatever the port is.
    ports: BTreeSet<u16>,
}

impl Sections {
    fn of(&mut self, access: &proto::Access) -> Arc<Section> {
        let policy = access.policy.as_ref();
        let key = policy.map(|policy| (policy.namespace.clone(), policy.name.clone())).unwrap_or_default();
        // Another generation may still hold for other pods.
        if let Some(known) = self.0.get(&key).filter(|known| known.of == *access) {
            return Arc::clone(known);
        }
        let section = Arc::new(Section::compile(access));
        self.0.insert(key, Arc::clone(&section));
        section
    }
}

impl Section {
    fn compile(access: &proto::Access) -> Self {
        let alone = |rule: &proto::Rule| {
            let (allow, deny) = (vec![rule.clone()], access.deny.clone());
            Rules::compile(&proto::Access { has_allow: true, allow, deny, ..proto::Access::default() }).ok()
        };
        let ports = access.allow.iter().flat_map(|rule| &rule.to).flat_map(|operation| &operation.ports);
        Self {
            of: access.clone(),
            whole: Rules::compile(access).ok(),
            alone: access.allow.iter().map(alone).collect(),
            ports: ports.filter_map(|port| u16::try_from(*port).ok()).chain([0]).collect(),
        }
    }
}

/// Rows about what a client may reach of a workload.
fn reached(
    model: &Model,
    sections: &mut Sections,
    (party, pods, counted): (&Party, &[&Pod], &[Counted<'_>]),
    (identity, client): (Option<&WorkloadId>, &Pod),
) -> Vec<AccessRow> {
    let account = format!("{}/{}", client.namespace, client.service_account);
    let who = if identity.is_some() { account } else { format!("{account} without a sidecar") };
    let seen = counted
        .iter()
        .filter(|(id, _)| identity.is_some() && client_of(model, id).as_ref() == identity)
        .map(|(_, counts)| count(counts))
        .sum();
    let row = AccessRow { client: who, destination: party.clone(), seen, ..AccessRow::default() };
    let Some(inbound) = enforced(model, pods) else { return vec![row] };
    if identity.is_none() && inbound.mtls() == proto::MtlsMode::Strict {
        return Vec::new();
    }
    let Some(access) = &inbound.access else { return vec![row] };
    let section = sections.of(access);
    let address = client.ips.first().copied().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    let subject = |port: u16| Subject { identity, address, port, http: None };
    let may = |rules: &Option<Rules>| {
        let rules = rules.as_ref();
        rules.is_some_and(|rules| section.ports.iter().any(|port| rules.may_allow_http(&subject(*port))))
    };
    if !may(&section.whole) {
        return Vec::new();
    }
    if !access.has_allow {
        return vec![row];
    }
    let row = AccessRow { allowed_by: words::policy(access.policy.as_ref()), ..row };
    let allowing = access.allow.iter().zip(&section.alone).filter(|(_, alone)| may(alone));
    allowing.flat_map(|(rule, _)| by_operation(rule, &row)).collect()
}

/// Whether a workload has a sidecar, and neither an access section nor one that is tried.
fn is_open(model: &Model, pods: &[&Pod]) -> bool {
    enforced(model, pods).is_some_and(|inbound| inbound.access.is_none() && inbound.shadow.is_none())
}

/// The least policy that admits the clients of a workload that has no access section. `None`: no client can be named.
/// Somebody who was only ever refused, by a policy that is not there any more, is not one.
fn suggestion(model: &Model, counted: &[Counted<'_>], party: &Party, pods: &[&Pod]) -> Option<Value> {
    let used = counted.iter().filter(|(_, counts)| admitted(counts) > 0);
    let clients: BTreeSet<(String, String)> = used
        .filter_map(|(id, _)| client_of(model, id))
        .map(|client| (client.namespace, client.service_account))
        .collect();
    if clients.is_empty() {
        return None;
    }
    let labels = selector(model, party, pods)?;
    let callers: Vec<Value> = clients
        .into_iter()
        .map(|(namespace, account)| json!({"serviceAccount": account, "namespace": namespace}))
        .collect();
    let rules: Vec<Value> = callers.chunks(MOST_CALLERS).map(|callers| json!({"from": callers})).collect();
    Some(json!({
        "apiVersion": "tulle.dev/v1alpha1",
        "kind": "MeshPolicy",
        "metadata": {"name": format!("{}-clients", party.name), "namespace": party.namespace},
        "spec": {
            "target": {"kind": "Workload", "selector": {"matchLabels": labels}},
            "mode": "Shadow",
            "access": {"allow": rules},
        },
    }))
}

/// Labels that select the pods of a workload and no others, as few as possible.
fn selector(model: &Model, party: &Party, pods: &[&Pod]) -> Option<BTreeMap<String, String>> {
    let (first, others) = pods.split_first()?;
    let shared = first.labels.iter().filter(|(name, value)| {
        !CHANGING.contains(&&**name) && others.iter().all(|pod| pod.label(name) == Some(&**value))
    });
    let shared: BTreeMap<String, String> =
        shared.map(|(name, value)| (name.to_string(), value.to_string())).collect();
    let selects_only_it = |labels: &BTreeMap<String, String>| {
        let mut selected = model
            .pods()
            .filter(|pod| *pod.namespace == *party.namespace && !pod.finished && pod.matches(labels));
        selected.all(|pod| pod.party() == *party)
    };
    let naming = NAMING.iter().filter_map(|name| shared.get_key_value(*name));
    for (name, value) in naming.chain(&shared) {
        let alone = BTreeMap::from([(name.clone(), value.clone())]);
        if selects_only_it(&alone) {
            return Some(alone);
        }
    }
    let usable = !shared.is_empty() && shared.len() <= MOST_LABELS && selects_only_it(&shared);
    usable.then_some(shared)
}
