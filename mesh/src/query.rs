//! What the operator answers about the mesh, as JSON over HTTP: `tulle` and the page read it. All but the tap
//! and the resources it answers over gRPC too: `proto/tulle/v1/query.proto` has the same fields, and a field that is
//! added here is added there.
//!
//! The operator listens on the loopback address of its pod ([`crate::ports::QUERY`]), so only who may forward a port of
//! that pod gets there. Every request carries a token of a service account with the audience [`AUDIENCE`]: a token of
//! a namespace shows that namespace, one of the account `tulle-viewer` in the operator's namespace shows all.
//!
//! Names that are not known to a reader are ignored by it, so fields may be added.

use serde::{Deserialize, Serialize};

pub use denials::{DenialRow, Denials};
pub use evidence::{Evidence, EvidenceTest, PodAttempts, VersionAttempts};
pub use routes::{RouteBackend, RouteRow, Routes, RuleName};

mod denials;
mod evidence;
mod routes;
mod secured;

/// The audience of tokens that the operator takes here.
pub const AUDIENCE: &str = "tulle.dev/query";
/// The service account in the operator's namespace whose token shows every namespace.
pub const VIEWER: &str = "tulle-viewer";

/// What rows are about: the value of `by` in [`Paths::STAT`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum By {
    /// Workloads, as their own sidecars have seen what they served.
    #[default]
    Workload,
    /// Services, as the sidecars of their clients have seen it.
    Service,
    /// Routes of the Gateway API, as the sidecars of clients have seen it.
    Route,
    /// Revisions of workloads, as their own sidecars have seen what they served.
    Revision,
}

/// Paths of the API. Parameters are those of a URL's query.
pub struct Paths;

impl Paths {
    /// [`Stat`]; parameters `by`, `namespace` (absent: all), `name`, `from` or `to` (`namespace/name` of a workload: only
    /// what it sent, or what was sent to it), `window` (seconds, 10 to 21,600; default 60).
    pub const STAT: &'static str = "/api/v1/stat";
    /// [`Edges`]; parameters `namespace`, `window`.
    pub const EDGES: &'static str = "/api/v1/edges";
    /// [`Routes`]; parameters `namespace` (of the Services that routes are attached to), `window`.
    pub const ROUTES: &'static str = "/api/v1/routes";
    /// [`Timeline`]; parameters `namespace`, `name` (of a workload), `window`.
    pub const TIMELINE: &'static str = "/api/v1/timeline";
    /// [`Sidecars`]; parameter `namespace`.
    pub const SIDECARS: &'static str = "/api/v1/sidecars";
    /// [`crate::resources::Resources`]: what the operator would send to a pod's sidecar now; parameters `namespace`, `pod`,
    /// and `resource` (`kind/name`, repeated: whose content is answered too). Not over gRPC. 404 where no such pod has a
    /// sidecar.
    pub const RESOURCES: &'static str = "/api/v1/resources";
    /// [`Health`]. Needs a token, and no right.
    pub const HEALTH: &'static str = "/api/v1/health";
    /// [`Explanation`]; parameters `source` and `destination` (`namespace/name`, the destination of a Service, with
    /// `:port` where it has several), `method`, `path`, `header` (`name:value`, repeated).
    pub const EXPLAIN: &'static str = "/api/v1/explain";
    /// [`Access`]; parameters `namespace`, `name`, `who` (`can` whom: clients of the workload) or `what` (what it may
    /// reach), and `window` (default 3,600 with a name; without one 21,600, which is everything that is kept).
    pub const ACCESS: &'static str = "/api/v1/access";
    /// [`Denials`]; parameters `namespace`, `name` (of a workload). Callers of other namespaces are hidden from whoever may
    /// not see all.
    pub const DENIALS: &'static str = "/api/v1/denials";
    /// [`Evidence`]; parameters `namespace` and `canary`. 404 where there is no such Canary.
    pub const EVIDENCE: &'static str = "/api/v1/evidence";
    /// POST of a MeshPolicy as JSON, answered with [`Diff`]; parameter `window` (default 3,600).
    pub const DIFF: &'static str = "/api/v1/diff";
    /// A stream of lines, each a [`Tap`] as JSON, of the sidecars that are connected to this replica; it ends with the
    /// request. Parameters `namespace`, `name` (of a workload; absent: all of the namespace), `direction` (`inbound` or
    /// `outbound`), `peer` (`namespace/name`), `method`, `path` (a glob), `status` (`503` or `5xx`), `denied` (`true`),
    /// `slow` (milliseconds), `header` (repeated), `rate` (events in a second and sidecar, 1 to 100; default 20).
    pub const TAP: &'static str = "/api/v1/tap";
}

/// Why a request of the API failed, as the body of every answer whose status is not 200.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Refusal {
    /// What is wrong.
    pub error: String,
    /// What to do about it: for 403 the rule of RBAC to add.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// Requests and connections of some time, summed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Golden {
    /// Requests that have ended.
    pub requests: u64,
    /// Of these: 5xx, gRPC server errors, and those without an answer for which the client is not to blame.
    pub failures: u64,
    /// Of these: 4xx.
    pub client_errors: u64,
    /// Of these: given up or got wrong by the client.
    pub abandoned: u64,
    /// Requests and opaque connections that a policy or a limit refused. They are not among the failures.
    pub denied: u64,
    /// Requests in a second.
    pub rps: f64,
    /// The part of the requests that did not fail, 0 to 1, without those that were denied or abandoned; `None`: there
    /// were none.
    pub success: Option<f64>,
    /// The same of attempts: each retry follows an attempt that failed.
    pub attempt_success: Option<f64>,
    /// Latencies in milliseconds.
    pub p50_ms: Option<f64>,
    /// The same.
    pub p95_ms: Option<f64>,
    /// The same.
    pub p99_ms: Option<f64>,
    /// Attempts beyond the first of each request.
    pub retries: u64,
    /// Requests and connections that were given up because a time of theirs was over: reasons `UpstreamTimeout`,
    /// `DeadlineExceeded`, `IdleTimeout` and `Timeout`.
    pub timeouts: u64,
    /// Failures by reason, the most frequent first.
    pub reasons: Vec<Reason>,
    /// Opaque connections that have ended.
    pub connections: u64,
    /// Of these: failed, neither denied nor ended by the client.
    pub failed_connections: u64,
    /// Bytes that clients have sent.
    pub bytes_up: u64,
    /// Bytes that servers have sent.
    pub bytes_down: u64,
    /// Endpoints that the breakers of clients ejected, each time; only in what clients have seen.
    pub ejections: u64,
}

/// Failures for one reason.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Reason {
    /// Its name, as in metrics and logs: `UpstreamReset`.
    pub name: String,
    /// How many.
    pub count: u64,
}

/// Somebody who sends or serves requests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Party {
    /// Its namespace; empty outside the cluster, and where it is not known.
    pub namespace: String,
    /// `Deployment`, `StatefulSet`, `DaemonSet`, `Job`, `Pod`, `Service`, `ServiceAccount`, or `Plain` for clients without
    /// a sidecar.
    pub kind: String,
    /// Its name.
    pub name: String,
}

/// How many pods have a sidecar.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Meshed {
    /// Pods with a sidecar.
    pub with: u32,
    /// All pods.
    pub of: u32,
}

/// A row of [`Stat`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct StatRow {
    /// Whom it is about.
    pub party: Party,
    /// The route, `HTTPRoute/namespace/name`; of rows by route only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub route: Option<String>,
    /// The revision; of rows by revision only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Of workloads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub meshed: Option<Meshed>,
    /// What was counted.
    pub golden: Golden,
}

/// Rows, the worst first: by failures of requests and connections, then by requests.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Stat {
    /// The time that is summed, in seconds; shorter than asked for where less is known.
    pub window: u64,
    /// Reports of sidecars in that time that are known to be lost: their counts are missing.
    pub lost: u64,
    /// The rows.
    pub rows: Vec<StatRow>,
}

/// Who talks to whom.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Edge {
    /// Who sends.
    pub source: Party,
    /// Who serves.
    pub destination: Party,
    /// The port of the Service; absent: it is not known, because the Service has several, or it is not a Service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// `http1`, `http2` or `opaque`.
    pub protocol: String,
    /// Whether mTLS secures it.
    pub mtls: bool,
    /// SPIFFE IDs of the client's pods; empty without mTLS, and where no such pod is left.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub client_ids: Vec<String>,
    /// The same of the server's.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub server_ids: Vec<String>,
    /// Zones of the nodes that the client's pods run on. Which of them sent what is not counted.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub client_zones: Vec<String>,
    /// The same of the server's.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub server_zones: Vec<String>,
    /// What was counted, by the client's sidecar where it has one.
    pub golden: Golden,
}

/// Edges, the one with the most requests first.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Edges {
    /// As in [`Stat`].
    pub window: u64,
    /// As in [`Stat`].
    pub lost: u64,
    /// The edges.
    pub edges: Vec<Edge>,
}

/// What a workload has served over time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Timeline {
    /// The length of a point in seconds: 10, 60 or 300.
    pub step: u64,
    /// The start of the first point, in Unix seconds.
    pub start: i64,
    /// Points one after the other, also of times without requests.
    pub points: Vec<Golden>,
}

/// A pod's sidecar.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Sidecar {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub pod: String,
    /// Its workload.
    pub workload: Party,
    /// The version of its sidecar; empty: not heard of.
    pub version: String,
    /// Whether its stream is up.
    pub connected: bool,
    /// Resources that it enforces in the version that was sent last.
    pub acknowledged: u32,
    /// Resources that were sent.
    pub resources: u32,
    /// For how many seconds the oldest resource has waited to be acknowledged.
    pub behind_seconds: Option<u64>,
    /// Resources that it has refused, and why.
    pub refused: Vec<String>,
    /// When its certificate ends, in Unix seconds.
    pub certificate_not_after: Option<i64>,
    /// The pod of the operator's replica that its stream is connected to. A replica that does not lead knows its own
    /// streams only.
    pub operator: Option<String>,
    /// Resident memory of its process in bytes, when it last reported counts or a new certificate, or opened a stream;
    /// absent: a version that does not report it.
    pub memory_bytes: Option<u64>,
}

/// Sidecars, by namespace and name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Sidecars {
    /// The sidecars.
    pub sidecars: Vec<Sidecar>,
    /// Pods in namespaces that ask for a sidecar which have none, as `namespace/name`.
    pub without: Vec<String>,
}

/// The operator's own state.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Health {
    /// Its version.
    pub version: String,
    /// Whether this replica leads.
    pub leader: bool,
    /// The name of its pod.
    pub pod: String,
    /// The mesh's trust domain.
    pub trust_domain: String,
    /// When the root certificate ends, in Unix seconds.
    pub root_not_after: Option<i64>,
    /// Sidecars that are connected.
    pub sidecars: u32,
    /// Seconds of history that it holds.
    pub history: u64,
    /// Series that it holds, and how many it takes.
    pub series: u32,
    /// How many it takes. Beyond, counts of further series are summed up as `_OTHER`.
    pub max_series: u32,
}

/// How one stage of a request ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It goes on.
    #[default]
    Pass,
    /// It ends here.
    Stop,
    /// It depends on what was not said, or on chance.
    Depends,
}

/// One stage of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Stage {
    /// `source`, `address`, `protocol`, `route`, `backend`, `split`, `endpoint`, `tls`, `access`, `limits`.
    pub name: String,
    /// How it ends.
    pub verdict: Verdict,
    /// What decides it, as `Kind/namespace/name`; empty: a default.
    pub object: String,
    /// Why, as a sentence.
    pub because: String,
}

/// What would become of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Explanation {
    /// Its stages, in order, up to the one where it ends.
    pub stages: Vec<Stage>,
    /// The outcome in one sentence.
    pub outcome: String,
    /// Whether it reaches the application. Also `false` where it goes on in a namespace that the token does not show: its
    /// last stage then is one that depends.
    pub reaches: bool,
}

/// A row of [`Access`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AccessRow {
    /// The client, in the words of the rule: `payments/checkout`, `namespace payments`, `10.0.0.0/8`, `everybody`.
    pub client: String,
    /// The workload or Service that is reached.
    pub destination: Party,
    /// Methods; empty: all.
    pub methods: Vec<String>,
    /// Paths; empty: all.
    pub paths: Vec<String>,
    /// The policy that allows it; empty: nothing restricts it.
    pub allowed_by: String,
    /// Requests and opaque connections in the window of the answer.
    pub seen: u64,
}

/// Requests of clients without an identity to a workload without access rules: no policy by service account admits them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Unidentified {
    /// The workload.
    pub destination: Party,
    /// Requests and opaque connections in plain text, in the window of the answer.
    pub plain: u64,
    /// The same of clients with a certificate whom the workload's sidecars did not tell apart, because there were too many.
    pub merged: u64,
    /// Workloads with a sidecar that sent plain text to a Service in front of it. Clients without one are not known.
    pub senders: Vec<Party>,
}

/// Who may reach what.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Access {
    /// The rows.
    pub rows: Vec<AccessRow>,
    /// The least policies that the traffic in the window needs, as MeshPolicies in Shadow mode.
    pub suggested: Vec<serde_json::Value>,
    /// Clients that the suggested policies leave out because they have no identity, by workload.
    pub unidentified: Vec<Unidentified>,
    /// Whether there are more: ask for one namespace or workload.
    pub truncated: bool,
    /// As in [`Stat`].
    pub window: u64,
    /// As in [`Stat`].
    pub lost: u64,
}

/// An edge that a policy would change.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DiffRow {
    /// The edge.
    pub edge: Edge,
    /// `denied`, or `depends` where rules look at methods or paths.
    pub verdict: String,
    /// Why, as a sentence.
    pub because: String,
}

/// What a policy would deny of the traffic in a window.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Diff {
    /// Sidecars that would enforce it.
    pub pods: u32,
    /// The edges, those with the most requests first.
    pub rows: Vec<DiffRow>,
    /// As in [`Stat`].
    pub window: u64,
    /// As in [`Stat`].
    pub lost: u64,
}

/// A line of a tap.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "type")]
pub enum Tap {
    /// The first: it has begun.
    #[serde(rename_all = "camelCase")]
    Started {
        /// Sidecars of this replica that show their requests.
        sidecars: u64,
        /// Pods that cannot: their sidecars' builds know no tap.
        unable: Vec<String>,
    },
    /// A request has ended.
    Request(Box<TapRequest>),
    /// How many there were since the last line of this kind; sent at least every second.
    #[serde(rename_all = "camelCase")]
    Counts {
        /// Requests that passed the filter.
        passed: u64,
        /// Of these: not shown, for the rate or because a reader was slow.
        lost: u64,
        /// Sidecars of this replica that the tap wants and does not look at, because there are too many; absent: none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        not_shown: Option<u64>,
        /// Pods whose sidecars have refused the tap since the last line of this kind, as `namespace/name: why`.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        refused: Vec<String>,
    },
}

/// A request that a sidecar has seen.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TapRequest {
    /// When it ended, RFC 3339 with milliseconds.
    pub time: String,
    /// `inbound` or `outbound`: of the pod's sidecar.
    pub direction: String,
    /// The pod whose sidecar saw it: `namespace/name`.
    pub pod: String,
    /// Who sent it.
    pub source: Party,
    /// Who serves it.
    pub destination: Party,
    /// The method.
    pub method: String,
    /// The host as the client named it.
    pub host: String,
    /// The path, without its query.
    pub path: String,
    /// The status; `None`: the client got none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// The status of gRPC.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grpc_status: Option<u32>,
    /// From the head of the request to the end of the answer, in milliseconds.
    pub latency_ms: f64,
    /// Whether it travelled under mutual TLS.
    pub mtls: bool,
    /// Why it failed, as in metrics: `UpstreamReset`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Its route: `HTTPRoute/namespace/name`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub route: Option<String>,
    /// The revision that served it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// `http1`, `http2`.
    pub protocol: String,
    /// How often it was sent.
    pub attempts: u32,
    /// Headers of the request that were asked for: name, value.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<(String, String)>,
}

/// A refusal that a sidecar remembers, as its admin port shows it to whoever may forward that port. What it says of the
/// request is what the log says: never its query or its headers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Denial {
    /// [`crate::denial::DenialId`], as in the header `tulle-denial` of the answer and in the log.
    pub id: String,
    /// When, in milliseconds since 1970.
    pub at_unix_ms: i64,
    /// The policy, `MeshPolicy/namespace/name`; empty: no policy was known yet, or mTLS is Strict.
    pub policy: String,
    /// What decided: `DenyRule(0)`, `NoAllowMatched`, `Plaintext`.
    pub rule: String,
    /// The client's identity; empty for a client without a sidecar.
    pub client: String,
    /// The client's address.
    pub address: String,
    /// The port of the pod.
    pub port: u16,
    /// The method of the request; empty: a connection whose content is opaque.
    pub method: String,
    /// The host that the client named.
    pub host: String,
    /// The path, without its query.
    pub path: String,
    /// Method, host or path was longer than what the sidecar keeps: what stands here is its beginning.
    pub cut: bool,
}
