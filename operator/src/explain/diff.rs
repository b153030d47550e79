//! Which of the traffic that was counted a policy would deny.
//!
//! What is counted names a client by its service account and nothing of a request. A rule that looks at methods, paths,
//! ports or addresses therefore may or may not match: what depends on it is said to depend.

use std::collections::BTreeMap;
use std::sync::Arc;

use tulle_crds::{AccessRule, AccessSpec, MeshPolicy, MtlsMode, PolicyMode};
use tulle_mesh::identity::WorkloadId;
use tulle_mesh::proto;
use tulle_mesh::query::{Diff, DiffRow, Edge, Party};

use super::access::{Inbound, client_of, count, names, workloads};
use super::{is_meshed, words};
use crate::model::{Key, Model, Pod, specificity};
use crate::telemetry::history::{Counts, SeriesId, Sum};

/// How sure a rule matches what is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Matches {
    No,
    Maybe,
    Yes,
}

/// What distinguishes edges to a workload.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct EdgeKey {
    namespace: Arc<str>,
    peer: Arc<str>,
    protocol: Arc<str>,
    mtls: bool,
}

/// What a policy would deny, once it is enforced. Where another policy would go on to decide, this one changes nothing.
pub fn diff(model: &Model, counted: &Sum, policy: &MeshPolicy) -> Diff {
    let namespace = policy.metadata.namespace.clone().unwrap_or_default();
    let name = policy.metadata.name.clone().unwrap_or_default();
    let key: Key = (namespace.as_str().into(), name.as_str().into());
    let selected: Vec<&Pod> = model
        .pods()
        .filter(|pod| is_meshed(pod) && !pod.terminating && !pod.ips.is_empty())
        .filter(|pod| model.selects(&key, policy, pod))
        .collect();
    let access = policy.spec.access.is_some().then(|| model.access_of(&key, policy));
    let inbound = Inbound::of(counted);
    let mut found = Diff::default();
    for (party, pods) in workloads(selected.into_iter()) {
        let deciding = pods.iter().map(|pod| Deciding::of(model, &key, policy, pod));
        let deciding: Vec<Deciding> = deciding.filter(|deciding| deciding.mtls || deciding.access).collect();
        found.pods = found.pods.saturating_add(u32::try_from(deciding.len()).unwrap_or(u32::MAX));
        let strict = policy.spec.mtls == Some(MtlsMode::Strict) && deciding.iter().any(|its| its.mtls);
        let access = access.as_ref().filter(|_| deciding.iter().any(|its| its.access));
        let mut edges: BTreeMap<EdgeKey, (&SeriesId, Counts)> = BTreeMap::new();
        for (id, counts) in inbound.of_party(&party) {
            edges.entry(EdgeKey::of(id)).or_insert_with(|| (*id, Counts::default())).1.merge(counts);
        }
        for (id, counts) in edges.values().filter(|(_, counts)| count(counts) > 0) {
            if let Some((verdict, because)) =
                judge(model, id, strict, access.map(|access| (access, policy.spec.access.as_ref())))
            {
                let edge = edge(&party, id, counts.golden(counted.window));
                found.rows.push(DiffRow { edge, verdict: verdict.to_owned(), because });
            }
        }
    }
    let weight = |row: &DiffRow| row.edge.golden.requests.saturating_add(row.edge.golden.connections);
    found.rows.sort_by_key(|row| std::cmp::Reverse(weight(row)));
    found
}

impl EdgeKey {
    fn of(id: &SeriesId) -> Self {
        Self {
            namespace: Arc::clone(&id.namespace),
            peer: Arc::clone(&id.peer),
            protocol: Arc::clone(&id.protocol),
            mtls: id.mtls,
        }
    }
}

/// Which sections of a policy would hold for a pod.
#[derive(Clone, Copy, Debug)]
struct Deciding {
    mtls: bool,
    access: bool,
}

impl Deciding {
    fn of(model: &Model, key: &Key, policy: &MeshPolicy, pod: &Pod) -> Self {
        let holds = |has: fn(&MeshPolicy) -> bool| {
            // Only what holds of a rival counts: its newest version may have been refused.
            let mut rivals = model.by_age(&key.0).filter(|(other, rival)| {
                *other != key
                    && has(rival)
                    && rival.spec.mode == PolicyMode::Enforce
                    && model.selects(other, rival, pod)
            });
            has(policy) && !rivals.any(|rival| outranks(model, rival, (key, policy)))
        };
        Self {
            mtls: holds(|policy| policy.spec.mtls.is_some()),
            access: holds(|policy| policy.spec.access.is_some()),
        }
    }
}

/// Whether a rival's section holds rather than that of a policy: it is narrower, or as narrow and older. A policy that
/// does not exist yet is the youngest.
fn outranks(
    model: &Model,
    (rival_key, rival): (&Key, &MeshPolicy),
    (key, policy): (&Key, &MeshPolicy),
) -> bool {
    let (one, other) = (specificity(rival), specificity(policy));
    if one != other {
        return one > other;
    }
    let age = |policy: &MeshPolicy| policy.metadata.creation_timestamp.clone();
    model.policy(key).is_none_or(|existing| (age(rival), rival_key) < (age(existing), key))
}

/// What becomes of an edge, and why. `None`: it goes on. `access`: compiled, and as it is written.
fn judge(
    model: &Model,
    id: &SeriesId,
    strict: bool,
    access: Option<(&proto::Access, Option<&AccessSpec>)>,
) -> Option<(&'static str, String)> {
    if strict && !id.mtls {
        return Some(("denied", "the client sends plain text, and mtls is Strict".to_owned()));
    }
    let (access, written) = access?;
    let client = client_of(model, id);
    if id.mtls && client.is_none() {
        let because =
            "these are clients that are not told apart, so rules by service account may or may not match";
        return Some(("depends", because.to_owned()));
    }
    let is_opaque = *id.protocol == *"opaque";
    let best = |rules: &[proto::Rule], deny: bool| {
        let matched = rules.iter().enumerate();
        let matched = matched.map(|(index, rule)| (matches(rule, client.as_ref(), (is_opaque, deny)), index));
        // Of equals the first.
        matched.rev().max_by_key(|(matched, _)| *matched)
    };
    // In the words of the policy: what its labels stand for is not for everybody who may post one.
    let text = |rules: &[proto::Rule], written: Option<&Vec<AccessRule>>, index: usize| {
        rules.get(index).map(|rule| words::rule(rule, words::rule_at(written, index))).unwrap_or_default()
    };
    let deny = |index: usize| text(&access.deny, written.and_then(|written| written.deny.as_ref()), index);
    let allow = |index: usize| text(&access.allow, written.and_then(|written| written.allow.as_ref()), index);
    let denied = best(&access.deny, true);
    if let Some((Matches::Yes, index)) = denied {
        return Some(("denied", format!("rule {} of deny matches ({})", index + 1, deny(index))));
    }
    let allowed = best(&access.allow, false);
    if access.has_allow && allowed.is_none_or(|(matched, _)| matched == Matches::No) {
        return Some(("denied", format!("no rule of allow matches {}", client_name(client.as_ref()))));
    }
    let looks = "looks at methods, paths, ports or addresses";
    match (denied, allowed) {
        (Some((Matches::Maybe, index)), _) => {
            Some(("depends", format!("rule {} of deny {looks} ({})", index + 1, deny(index))))
        }
        (_, Some((Matches::Maybe, index))) if access.has_allow => {
            Some(("depends", format!("rule {} of allow {looks} ({})", index + 1, allow(index))))
        }
        _ => None,
    }
}

/// Whether a rule matches. An opaque connection may hold what a deny looks for, and is never surely what an allow does.
fn matches(rule: &proto::Rule, client: Option<&WorkloadId>, (is_opaque, deny): (bool, bool)) -> Matches {
    let by_address = rule.from.iter().any(|peer| !peer.cidr.is_empty());
    let is_named = || client.is_some_and(|client| rule.from.iter().any(|peer| names(peer, client)));
    let caller = match (rule.from.is_empty() || is_named(), by_address) {
        (true, _) => Matches::Yes,
        (false, true) => Matches::Maybe,
        (false, false) => Matches::No,
    };
    let operation = |operation: &proto::Operation| {
        let looks_at_http = !operation.methods.is_empty() || !operation.paths.is_empty();
        match (looks_at_http && is_opaque, deny) {
            (true, false) => Matches::No,
            (true, true) if operation.ports.is_empty() => Matches::Yes,
            _ => Matches::Maybe,
        }
    };
    let operations = match rule.to.as_slice() {
        [] => Matches::Yes,
        all => all.iter().map(operation).max().unwrap_or(Matches::No),
    };
    caller.min(operations)
}

fn client_name(client: Option<&WorkloadId>) -> String {
    match client {
        Some(client) => format!("{}/{}", client.namespace, client.service_account),
        None => "a client without a certificate".to_owned(),
    }
}

fn edge(party: &Party, id: &SeriesId, golden: tulle_mesh::query::Golden) -> Edge {
    let source = if id.mtls {
        Party {
            namespace: id.namespace.to_string(),
            kind: "ServiceAccount".to_owned(),
            name: id.peer.to_string(),
        }
    } else {
        Party { kind: "Plain".to_owned(), ..Party::default() }
    };
    let (destination, protocol) = (party.clone(), id.protocol.to_string());
    Edge { source, destination, protocol, mtls: id.mtls, golden, ..Edge::default() }
}
