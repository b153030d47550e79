//! What distinguishes a series, and one copy of each name.

use std::collections::HashSet;
use std::sync::Arc;

use tulle_mesh::proto::series_key;
use tulle_mesh::query;

use super::MAX_SERIES;
use crate::telemetry::counts::OTHER;

/// Who reports: a revision of a workload.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reporter {
    /// Namespace of the workload.
    pub namespace: Arc<str>,
    /// Its kind, as in [`query::Party`].
    pub kind: Arc<str>,
    /// Its name.
    pub workload: Arc<str>,
}

impl Reporter {
    /// A pod that the model does not know, or knows no more.
    pub fn unknown() -> Self {
        Self { namespace: Arc::default(), kind: "Pod".into(), workload: Arc::default() }
    }

    /// Whether it is this workload.
    pub fn is(&self, workload: &query::Party) -> bool {
        *self.namespace == *workload.namespace
            && *self.kind == *workload.kind
            && *self.workload == *workload.name
    }

    /// As it is shown.
    pub fn party(&self) -> query::Party {
        query::Party {
            namespace: self.namespace.to_string(),
            kind: self.kind.to_string(),
            name: self.workload.to_string(),
        }
    }
}

/// From which side requests are seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// The client's.
    Outbound,
    /// The server's.
    Inbound,
    /// The server's, by the rule of a MeshPolicy that refused: the policy is the peer, and the rule the route.
    Policy,
}

impl Direction {
    /// As it is reported.
    pub fn to_proto(self) -> series_key::Direction {
        match self {
            Self::Outbound => series_key::Direction::Outbound,
            Self::Inbound => series_key::Direction::Inbound,
            Self::Policy => series_key::Direction::Policy,
        }
    }
}

/// A series, summed over the pods of a revision.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeriesId {
    /// Who counts.
    pub reporter: Reporter,
    /// From which side.
    pub direction: Direction,
    /// Namespace of the destination Service, or of the client.
    pub namespace: Arc<str>,
    /// The Service, or the client's service account; `_PLAIN`, `_PASSTHROUGH`, `_OTHER`.
    pub peer: Arc<str>,
    /// The revision of the destination's pod, or of the pod that reports.
    pub revision: Arc<str>,
    /// `HTTPRoute/namespace/name`; empty: no route took it.
    pub route: Arc<str>,
    /// `http1`, `http2` or `opaque`.
    pub protocol: Arc<str>,
    /// Whether mTLS secures it.
    pub mtls: bool,
}

impl SeriesId {
    /// What stands for the series of a reporter that are not told apart.
    pub fn other(reporter: Reporter, direction: Direction, mtls: bool) -> Self {
        let none: Arc<str> = Arc::default();
        Self {
            reporter,
            direction,
            namespace: Arc::clone(&none),
            peer: OTHER.into(),
            revision: Arc::clone(&none),
            route: Arc::clone(&none),
            protocol: none,
            mtls,
        }
    }
}

/// Keeps one copy of each name and series: ten thousand sidecars name the same.
#[derive(Debug, Default)]
pub(in crate::telemetry) struct Interner {
    names: HashSet<Arc<str>>,
    ids: HashSet<Arc<SeriesId>>,
    /// Cleaned when it has grown to this.
    limit: usize,
}

impl Interner {
    /// A name.
    pub(in crate::telemetry) fn name(&mut self, name: &str) -> Arc<str> {
        if let Some(known) = self.names.get(name) {
            return Arc::clone(known);
        }
        let name: Arc<str> = name.into();
        self.names.insert(Arc::clone(&name));
        name
    }

    /// A series.
    pub(in crate::telemetry) fn id(&mut self, id: SeriesId) -> Arc<SeriesId> {
        if let Some(known) = self.ids.get(&id) {
            return Arc::clone(known);
        }
        if self.ids.len() + self.names.len() > self.limit {
            self.clean();
        }
        let id = Arc::new(id);
        self.ids.insert(Arc::clone(&id));
        id
    }

    /// Forgets what nobody else holds.
    pub(in crate::telemetry) fn clean(&mut self) {
        self.ids.retain(|id| Arc::strong_count(id) > 1);
        self.names.retain(|name| Arc::strong_count(name) > 1);
        self.limit = (2 * (self.ids.len() + self.names.len())).max(2 * MAX_SERIES);
    }
}
