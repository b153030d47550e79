//! Routes of the Gateway API as they are kept. The part under `spec` is read as it is written, and tolerantly: fields
//! that this build does not know are skipped, and values of enums that it does not know are kept by name, so that the
//! status can say which they are. What they mean is decided in `check` and `backend`.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize};
use tulle_mesh::proto;

/// A kind of route. Of two kinds at one port of a Service, the first in this order holds (GEP-1294).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RouteKind {
    /// GRPCRoute.
    Grpc,
    /// HTTPRoute.
    Http,
    /// TLSRoute.
    Tls,
    /// TCPRoute.
    Tcp,
}

impl RouteKind {
    /// Every kind of route.
    pub const ALL: [Self; 4] = [Self::Grpc, Self::Http, Self::Tls, Self::Tcp];

    /// As Kubernetes writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Grpc => "GRPCRoute",
            Self::Http => "HTTPRoute",
            Self::Tls => "TLSRoute",
            Self::Tcp => "TCPRoute",
        }
    }

    /// As sidecars are told.
    pub fn proto(self) -> proto::RouteKind {
        match self {
            Self::Grpc => proto::RouteKind::Grpc,
            Self::Http => proto::RouteKind::Http,
            Self::Tls => proto::RouteKind::Tls,
            Self::Tcp => proto::RouteKind::Tcp,
        }
    }

    /// The kind that a resource names. `None`: one that this build does not know.
    pub fn of(kind: proto::RouteKind) -> Option<Self> {
        Self::ALL.into_iter().find(|known| known.proto() == kind)
    }

    /// The name of a route of this kind in a [`proto::Stamp`]: routes of two kinds may have the same name.
    pub fn stamped(self, name: &str) -> String {
        format!("{}/{name}", self.name())
    }

    /// Whether its rules concern requests, and not connections.
    pub(super) fn is_of_requests(self) -> bool {
        matches!(self, Self::Grpc | Self::Http)
    }
}

/// A route by kind, namespace and name.
///
/// Displays as `HTTPRoute namespace/name`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RouteKey {
    /// Its kind.
    pub kind: RouteKind,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

impl RouteKey {
    /// Its name in a [`proto::Stamp`].
    pub fn stamped(&self) -> String {
        self.kind.stamped(&self.name)
    }

    /// As sidecars name it: `HTTPRoute/namespace/name`.
    pub fn reported(&self) -> String {
        format!("{}/{}/{}", self.kind.name(), self.namespace, self.name)
    }

    /// The route that sidecars name so. `None`: the text has another form.
    pub fn of_reported(text: &str) -> Option<Self> {
        let (kind, rest) = text.split_once('/')?;
        let (namespace, name) = rest.split_once('/')?;
        let kind = RouteKind::ALL.into_iter().find(|known| known.name() == kind)?;
        Some(Self { kind, namespace: namespace.into(), name: name.into() })
    }
}

impl fmt::Display for RouteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}/{}", self.kind.name(), self.namespace, self.name)
    }
}

/// A route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteObject {
    /// Its kind.
    pub kind: RouteKind,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Its uid.
    pub uid: Arc<str>,
    /// Its generation.
    pub generation: i64,
    /// When it was created, in seconds since 1970.
    pub created: i64,
    /// What it is attached to.
    pub parents: Vec<ParentRef>,
    /// Server names of a TLSRoute. Those of other kinds have no meaning in a mesh.
    pub hostnames: Vec<Arc<str>>,
    /// Its rules, in order.
    pub rules: Vec<RuleSpec>,
}

impl RouteObject {
    /// Its kind, namespace and name.
    pub fn key(&self) -> RouteKey {
        RouteKey { kind: self.kind, namespace: Arc::clone(&self.namespace), name: Arc::clone(&self.name) }
    }
}

/// The `spec` of a route of any of the four kinds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct RouteSpec {
    /// What it is attached to.
    #[serde(rename = "parentRefs")]
    pub parents: Vec<ParentRef>,
    /// See [`RouteObject::hostnames`].
    #[serde(deserialize_with = "shared")]
    pub hostnames: Vec<Arc<str>>,
    /// Its rules, in order.
    pub rules: Vec<RuleSpec>,
}

fn shared<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Arc<str>>, D::Error> {
    let names = Vec::<String>::deserialize(deserializer)?;
    Ok(names.into_iter().map(Into::into).collect())
}

/// What a route is attached to. Written back into its status as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ParentRef {
    /// Its API group. The core group is written as an empty text; absent is the group of the Gateway API.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Its kind. Absent: Gateway.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// Its namespace. Absent: that of the route.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Its name.
    pub name: String,
    /// Name of a port of the Service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub section_name: Option<String>,
    /// Number of a port of the Service. Absent, and no name either: all its ports.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<i32>,
}

/// A rule of a route.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct RuleSpec {
    /// Its name.
    pub name: Option<String>,
    /// Any of them must match. None: everything does.
    pub matches: Vec<MatchSpec>,
    /// What is done to a request that matches.
    pub filters: Vec<FilterSpec>,
    /// Where it goes.
    pub backend_refs: Vec<BackendRef>,
    /// How long it may take.
    pub timeouts: Option<TimeoutsSpec>,
    /// When it is sent again.
    pub retry: Option<RetrySpec>,
    /// What keeps a client with one pod.
    pub session_persistence: Option<SessionSpec>,
}

/// All of it must match.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct MatchSpec {
    /// The path of an HTTP request.
    pub path: Option<PathSpec>,
    /// Headers.
    pub headers: Vec<ValueSpec>,
    /// Query parameters.
    pub query_params: Vec<ValueSpec>,
    /// The method.
    pub method: Option<MethodSpec>,
}

/// How a value is compared.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub enum MatchType {
    /// It is equal.
    Exact,
    /// It begins with these segments.
    PathPrefix,
    /// It matches as a whole.
    RegularExpression,
    /// Not known to this build.
    #[serde(untagged)]
    Unknown(String),
}

/// A match of a path.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct PathSpec {
    /// Absent: a prefix.
    #[serde(rename = "type")]
    pub kind: Option<MatchType>,
    /// Absent: `/`.
    pub value: Option<String>,
}

/// A match of a header or query parameter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct ValueSpec {
    /// Absent: equal.
    #[serde(rename = "type")]
    pub kind: Option<MatchType>,
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: String,
}

/// A match of a method.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum MethodSpec {
    /// Of HTTP.
    Http(String),
    /// Of gRPC.
    Grpc {
        /// Absent: equal.
        #[serde(rename = "type")]
        kind: Option<MatchType>,
        /// The name of the service, with its package. Absent: any.
        service: Option<String>,
        /// The name of the method. Absent: any.
        method: Option<String>,
    },
}

/// A filter. Of its fields, the one that its type names is used.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct FilterSpec {
    /// Its type, known to this build or not.
    #[serde(rename = "type")]
    pub kind: String,
    /// Of type RequestHeaderModifier.
    pub request_header_modifier: Option<HeadersSpec>,
    /// Of type ResponseHeaderModifier.
    pub response_header_modifier: Option<HeadersSpec>,
    /// Of type RequestMirror.
    pub request_mirror: Option<MirrorSpec>,
    /// Of type RequestRedirect.
    pub request_redirect: Option<RedirectSpec>,
    /// Of type URLRewrite.
    pub url_rewrite: Option<RewriteSpec>,
    /// Of type CORS.
    pub cors: Option<CorsSpec>,
}

/// Changes of headers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct HeadersSpec {
    /// Replaces the values that there are.
    pub set: Vec<HeaderSpec>,
    /// Adds to them.
    pub add: Vec<HeaderSpec>,
    /// Removes them.
    pub remove: Vec<String>,
}

/// A header.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct HeaderSpec {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: String,
}

/// A copy of requests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct MirrorSpec {
    /// Where it goes.
    pub backend_ref: BackendRef,
    /// Of how many in a hundred. Absent, and no fraction either: of all.
    pub percent: Option<i64>,
    /// Of how many.
    pub fraction: Option<FractionSpec>,
}

/// A fraction.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct FractionSpec {
    /// Its numerator.
    pub numerator: i64,
    /// Its denominator. Absent: 100.
    pub denominator: Option<i64>,
}

/// Another path.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct PathModifierSpec {
    /// Its type, known to this build or not.
    #[serde(rename = "type")]
    pub kind: String,
    /// Of type ReplaceFullPath.
    pub replace_full_path: Option<String>,
    /// Of type ReplacePrefixMatch.
    pub replace_prefix_match: Option<String>,
}

/// A redirection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct RedirectSpec {
    /// Absent: that of the request.
    pub scheme: Option<String>,
    /// Absent: that of the request.
    pub hostname: Option<String>,
    /// Absent: that of the request.
    pub path: Option<PathModifierSpec>,
    /// Absent: by scheme, or that of the request.
    pub port: Option<i64>,
    /// Absent: 302.
    pub status_code: Option<i64>,
}

/// A request that goes to its backend as another one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct RewriteSpec {
    /// Absent: as it is.
    pub hostname: Option<String>,
    /// Absent: as it is.
    pub path: Option<PathModifierSpec>,
}

/// Cross-origin requests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct CorsSpec {
    /// Origins that may read the answer.
    pub allow_origins: Vec<String>,
    /// With credentials.
    pub allow_credentials: Option<bool>,
    /// By which methods.
    pub allow_methods: Vec<String>,
    /// With which headers.
    pub allow_headers: Vec<String>,
    /// Headers of the answer that may be read.
    pub expose_headers: Vec<String>,
    /// For how many seconds the answer to a preflight holds. Absent: 5.
    pub max_age: Option<i64>,
}

/// A backend.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct BackendRef {
    /// Its API group. Absent: the core group.
    pub group: Option<String>,
    /// Its kind. Absent: Service.
    pub kind: Option<String>,
    /// Its namespace. Absent: that of the route.
    pub namespace: Option<String>,
    /// Its name.
    pub name: String,
    /// Its port. A Service needs one.
    pub port: Option<i64>,
    /// Its share beside the others'. Absent: 1.
    pub weight: Option<i64>,
    /// What is done to a request that goes there.
    pub filters: Vec<FilterSpec>,
}

/// Timeouts of a rule, as durations of GEP-2257.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct TimeoutsSpec {
    /// Of the request with all its attempts.
    pub request: Option<String>,
    /// Of each attempt.
    pub backend_request: Option<String>,
}

/// Retries of a rule (GEP-1731).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct RetrySpec {
    /// Status codes that are retried.
    pub codes: Vec<i64>,
    /// How often, beside the first attempt.
    pub attempts: Option<i64>,
    /// The least wait, as a duration of GEP-2257.
    pub backoff: Option<String>,
}

/// What keeps a client with one pod (GEP-1619).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct SessionSpec {
    /// The name of the cookie or header.
    pub session_name: Option<String>,
    /// For how long at most.
    pub absolute_timeout: Option<String>,
    /// For how long without a request.
    pub idle_timeout: Option<String>,
    /// Cookie or Header, or not known to this build. Absent: Cookie.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// Of type Cookie.
    pub cookie_config: Option<CookieSpec>,
}

/// A session's cookie.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct CookieSpec {
    /// Session or Permanent, or not known to this build. Absent: Session.
    pub lifetime_type: Option<String>,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_this_build_does_not_know_is_kept_by_name_or_skipped() {
        let spec: RouteSpec = serde_json::from_value(json!({
            "useDefaultGateways": "All",
            "parentRefs": [{"group": "", "kind": "Service", "name": "web", "sectionName": "http"}],
            "hostnames": ["a.example"],
            "rules": [{
                "matches": [{"path": {"type": "Glob", "value": "/*"}, "method": "GET"},
                    {"method": {"service": "a.B", "method": "C"}, "headers": [{"name": "x", "value": "1"}]}],
                "filters": [{"type": "ExternalAuth", "externalAuth": {"protocol": "GRPC"}}],
                "backendRefs": [{"name": "web", "port": 80}],
                "timeouts": {"request": "1s", "backendRequest": "500ms"},
            }],
        }))
        .unwrap();
        assert_eq!(&*spec.hostnames[0], "a.example");
        let rule = &spec.rules[0];
        let path = rule.matches[0].path.as_ref().unwrap();
        assert_eq!(path.kind, Some(MatchType::Unknown("Glob".into())));
        assert_eq!(rule.matches[0].method, Some(MethodSpec::Http("GET".into())));
        assert!(
            matches!(&rule.matches[1].method, Some(MethodSpec::Grpc { service: Some(name), .. }) if name == "a.B")
        );
        assert_eq!(rule.filters[0].kind, "ExternalAuth");
        assert_eq!(rule.timeouts.as_ref().unwrap().backend_request.as_deref(), Some("500ms"));
        assert_eq!((rule.backend_refs[0].port, rule.backend_refs[0].weight), (Some(80), None));
    }

    #[test]
    fn a_parent_is_written_back_as_it_was_read() {
        for parent in [
            json!({"group": "", "kind": "Service", "name": "web", "port": 80, "namespace": "shop"}),
            json!({"group": "", "kind": "Service", "name": "web", "sectionName": "http"}),
            json!({"name": "web"}),
        ] {
            let read: ParentRef = serde_json::from_value(parent.clone()).unwrap();
            assert_eq!(serde_json::to_value(read).unwrap(), parent);
        }
    }

    #[test]
    fn kinds_are_in_order_of_precedence() {
        assert!(RouteKind::ALL.is_sorted());
    }
}
