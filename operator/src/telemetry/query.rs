//! Tables, edges and timelines out of the history. Pure.
//!
//! ```text
//!   edges   who talks to whom
//!   routes  rules of routes, used or not
//! ```

mod edges;
mod routes;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use tulle_mesh::query::{By, Golden, Meshed, Party, Stat, StatRow, Timeline};

pub use edges::edges;
pub use routes::{is_routed, routes};

use super::history::{Counts, Direction, History, Reporter, SeriesId, Sum};
use crate::model::{Model, Pod, WorkloadKey};

/// The name that sidecars report for clients without a sidecar.
const PLAIN: &str = "_PLAIN";

/// What [`stat`] is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StatQuery {
    /// What rows are about.
    pub by: By,
    /// Only what is in this namespace. Of Services and routes: the namespace of the Service.
    pub namespace: Option<String>,
    /// Only what has this name; of routes also the name of the Service.
    pub name: Option<String>,
    /// Only what this workload sent, as `namespace/name`. What its servers have seen of it is known by its service
    /// account, which other workloads may have too.
    pub from: Option<String>,
    /// Only what was sent to this workload, as `namespace/name`. What its clients have seen of it is known by its
    /// Services, which other workloads may be behind too.
    pub to: Option<String>,
}

/// Who reports from a pod.
pub(crate) fn reporter(pod: &Pod) -> Reporter {
    match &pod.workload {
        Some(workload) => Reporter {
            namespace: Arc::clone(&workload.namespace),
            kind: workload.kind.name().into(),
            workload: Arc::clone(&workload.name),
        },
        None => Reporter {
            namespace: Arc::clone(&pod.namespace),
            kind: "Pod".into(),
            workload: Arc::clone(&pod.name),
        },
    }
}

/// What makes a row.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct RowId {
    party: Party,
    route: Option<String>,
    revision: Option<String>,
}

impl RowId {
    /// The row of a series. `None`: it is in no row of this table.
    fn of(by: By, id: &SeriesId, peers: &Peers<'_>) -> Option<Self> {
        let row = |party| Self { party, route: None, revision: None };
        let found = match (by, id.direction) {
            (By::Workload, Direction::Inbound) => Some(row(id.reporter.party())),
            (By::Revision, Direction::Inbound) => {
                Some(Self { revision: Some(id.revision.to_string()), ..row(id.reporter.party()) })
            }
            (By::Service, Direction::Outbound) => Some(row(peers.destination(id))),
            (By::Route, Direction::Outbound) if !id.route.is_empty() => {
                Some(Self { route: Some(id.route.to_string()), ..row(peers.destination(id)) })
            }
            _ => None,
        };
        // Pods that the model has never known have no name to show.
        found.filter(|row| !row.party.name.is_empty())
    }

    fn is_wanted(&self, wanted: &StatQuery) -> bool {
        let in_namespace =
            wanted.namespace.as_ref().is_none_or(|namespace| *namespace == self.party.namespace);
        let has_name = wanted.name.as_ref().is_none_or(|name| {
            let route = self.route.as_deref().and_then(|route| route.rsplit('/').next());
            *name == self.party.name || route == Some(name.as_str())
        });
        in_namespace && has_name
    }
}

/// A table.
pub fn stat(sum: &Sum, model: &Model, wanted: &StatQuery) -> Stat {
    let meshed = meshed(model, wanted.by);
    let (ends, peers) = (Ends::of(model, wanted), Peers::of(model));
    let mut counts: BTreeMap<RowId, Counts> = BTreeMap::new();
    if wanted.by == By::Workload && wanted.from.is_none() && wanted.to.is_none() {
        // Also those that nobody has sent anything.
        let idle = meshed.keys().filter(|row| row.is_wanted(wanted)).cloned();
        counts.extend(idle.map(|row| (row, Counts::default())));
    }
    for (id, of_series) in &sum.series {
        if let Some(row) = RowId::of(wanted.by, id, &peers).filter(|row| row.is_wanted(wanted))
            && ends.contain(id)
        {
            counts.entry(row).or_default().merge(of_series);
        }
    }
    let row = |(id, counts): (RowId, Counts)| StatRow {
        meshed: meshed.get(&id).copied(),
        party: id.party,
        route: id.route,
        revision: id.revision,
        golden: counts.golden(sum.window),
    };
    let mut rows: Vec<StatRow> = counts.into_iter().map(row).collect();
    // Stable: rows that are alike stay in order of their names. All rows are of the same number of seconds.
    let failures = |golden: &Golden| golden.failures.saturating_add(golden.failed_connections);
    rows.sort_by_key(|row| std::cmp::Reverse((failures(&row.golden), row.golden.requests)));
    Stat { window: sum.window, lost: sum.lost, rows }
}

/// What the workloads of a name have served over time.
pub fn timeline(history: &History, namespace: &str, name: &str, window: u64, now: i64) -> Timeline {
    history.timeline(window, now, |id| {
        id.direction == Direction::Inbound
            && &*id.reporter.namespace == namespace
            && &*id.reporter.workload == name
    })
}

/// Whether anything that is shown of a namespace is counted in a series: its reporter or its peer is there.
pub fn concerns(id: &SeriesId, namespace: Option<&str>) -> bool {
    namespace.is_none_or(|wanted| *id.reporter.namespace == *wanted || *id.namespace == *wanted)
}

/// What the names that clients count under are of.
struct Peers<'a> {
    model: &'a Model,
    /// Namespace and name of the service accounts of pods: what is sent to a pod's own address is counted under its.
    accounts: HashSet<(&'a str, &'a str)>,
}

impl<'a> Peers<'a> {
    fn of(model: &'a Model) -> Self {
        let accounts = model.pods().map(|pod| (&*pod.namespace, &*pod.service_account)).collect();
        Self { model, accounts }
    }

    /// To whom a series was sent. What is neither any more was a Service most likely.
    fn destination(&self, id: &SeriesId) -> Party {
        let (namespace, name) = (&*id.namespace, &*id.peer);
        let is_account =
            self.accounts.contains(&(namespace, name)) && !self.model.has_service(namespace, name);
        destination(namespace, name, is_account)
    }
}

/// A destination that a sidecar names: a Service, or the service account of a pod whose own address was dialled.
pub fn destination(namespace: &str, name: &str, is_account: bool) -> Party {
    let kind = if is_account { "ServiceAccount" } else { "Service" };
    Party { namespace: namespace.to_owned(), kind: kind.to_owned(), name: name.to_owned() }
}

/// Whether a destination of this name is a service account. Looks at every pod, unless it is a Service.
pub fn is_account(model: &Model, namespace: &str, name: &str) -> bool {
    let has = |pod: &Pod| *pod.namespace == *namespace && *pod.service_account == *name;
    !namespace.is_empty() && !model.has_service(namespace, name) && model.pods().any(has)
}

/// A client that a sidecar names: a service account, or whoever has no sidecar.
pub fn client(namespace: &str, name: &str) -> Party {
    let (kind, name) = if name == PLAIN { ("Plain", "") } else { ("ServiceAccount", name) };
    Party { namespace: namespace.to_owned(), kind: kind.to_owned(), name: name.to_owned() }
}

/// How many pods of each workload, or of each revision, have a sidecar.
fn meshed(model: &Model, by: By) -> BTreeMap<RowId, Meshed> {
    let mut meshed: BTreeMap<RowId, Meshed> = BTreeMap::new();
    if !matches!(by, By::Workload | By::Revision) {
        return meshed;
    }
    for pod in model.pods().filter(|pod| !pod.finished) {
        let revision = (by == By::Revision).then(|| pod.revision().to_owned());
        let row = RowId { party: pod.party(), route: None, revision };
        let count = meshed.entry(row).or_default();
        count.of += 1;
        count.with += u32::from(pod.injected);
    }
    meshed
}

/// The workloads at both ends of what is wanted. `None`: anybody.
struct Ends {
    from: Option<Workloads>,
    to: Option<Workloads>,
}

/// Workloads of one name.
struct Workloads {
    namespace: String,
    name: String,
    /// Service accounts of their pods.
    accounts: HashSet<Arc<str>>,
    /// Services in their namespace that lead to them, and what else is counted as theirs: see [`Peers`].
    services: HashSet<String>,
}

impl Ends {
    fn of(model: &Model, wanted: &StatQuery) -> Self {
        let workloads = |name: &Option<String>| name.as_ref().map(|name| Workloads::of(model, name));
        Self { from: workloads(&wanted.from), to: workloads(&wanted.to) }
    }

    /// Whether a series is of what one of them sent and the other got.
    fn contain(&self, id: &SeriesId) -> bool {
        let from = self.from.as_ref().is_none_or(|from| match id.direction {
            Direction::Outbound => from.is(&id.reporter),
            Direction::Inbound => *from.namespace == *id.namespace && from.accounts.contains(&id.peer),
            Direction::Policy => false,
        });
        let to = self.to.as_ref().is_none_or(|to| match id.direction {
            Direction::Outbound => *to.namespace == *id.namespace && to.services.contains(&*id.peer),
            Direction::Inbound | Direction::Policy => to.is(&id.reporter),
        });
        from && to
    }
}

impl Workloads {
    fn of(model: &Model, name: &str) -> Self {
        let (namespace, name) = name.split_once('/').unwrap_or(("", name));
        let mut found = Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            accounts: HashSet::new(),
            services: HashSet::new(),
        };
        let mut keys: HashSet<&WorkloadKey> = HashSet::new();
        for pod in model.pods() {
            if found.is(&reporter(pod)) {
                found.accounts.insert(Arc::clone(&pod.service_account));
                keys.extend(pod.workload.as_ref());
            }
        }
        for key in keys {
            found.services.extend(model.workload(key).map(|seen| seen.services).unwrap_or_default());
            // One that is not in the model yet, although its pods are.
            found.services.extend(model.dialled(key).service);
        }
        let is_account = |name: &&Arc<str>| !model.has_service(&found.namespace, name);
        let accounts: Vec<String> =
            found.accounts.iter().filter(is_account).map(|name| name.to_string()).collect();
        found.services.extend(accounts);
        found
    }

    fn is(&self, reporter: &Reporter) -> bool {
        *self.namespace == *reporter.namespace && *self.name == *reporter.workload
    }
}

#[cfg(test)]
mod tests;
