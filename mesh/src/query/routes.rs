//! What is answered about routes of the Gateway API.

use serde::{Deserialize, Serialize};

use super::{Golden, Party};

/// The rules of routes that are attached to Services, used or not, in order of Service, route and rule.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Routes {
    /// As in [`super::Stat`].
    pub window: u64,
    /// As in [`super::Stat`].
    pub lost: u64,
    /// The rows.
    pub rows: Vec<RouteRow>,
}

/// One rule of a route, one of its backends, and one revision of that backend.
///
/// Sidecars count by route and backend Service. Rules of one route that lead to the same Service are told apart only as
/// long as no request was counted for any of them; after that they share a row. What is sent through a route that is
/// attached to several Services is counted once, and shown at each of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RouteRow {
    /// The Service that the route is attached to.
    pub party: Party,
    /// `HTTPRoute/namespace/name`.
    pub route: String,
    /// The rules that the figures are of, in order; empty: no rule that the route has now.
    pub rules: Vec<RuleName>,
    /// Where they lead; `None`: to no backend, because they redirect or answer with an error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<RouteBackend>,
    /// `stable` or `canary` where a Canary shares out the requests to the backend; empty: none does.
    pub set: String,
    /// The revision of the pods that served; absent: it has none, or nothing was counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// When a request or connection was counted last, in Unix seconds: up to the end of a slot of 10 s, or of 5 minutes
    /// where it was more than an hour ago. Absent: not in the last six hours, nor since all replicas restarted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_seen: Option<i64>,
    /// What was counted in the window; absent: nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub golden: Option<Golden>,
}

/// A rule of a route.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RuleName {
    /// Its place in the route's `spec.rules`, from 0.
    pub index: u32,
    /// Its name; empty: it has none.
    pub name: String,
}

/// Where a rule leads.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RouteBackend {
    /// The Service, or what is named in its place.
    pub party: Party,
    /// Its port; absent: the rule names none, or several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}
