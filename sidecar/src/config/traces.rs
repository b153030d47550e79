//! Where spans go, and how many of the requests without a parent become traces.

use std::sync::Arc;

use tulle_mesh::proto;
use tulle_mesh::trace::Share;

/// The port that OTLP over gRPC has where none is named.
const DEFAULT_PORT: u16 = 4317;

/// Where spans go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tracing {
    /// `host:port` of the collector.
    pub collector: Arc<str>,
    /// How many requests without a parent become traces.
    pub share: Share,
    /// The kind of the pod's workload, such as `Deployment`; empty: it has none.
    pub kind: String,
    /// The name of the pod's workload; empty: it has none.
    pub workload: String,
    /// The pod's revision.
    pub revision: String,
}

impl Tracing {
    /// Of the section with what the pod is. `None`: no spans are made; of a collector that cannot be read that is logged,
    /// because nothing else of the section is worse for it.
    pub(super) fn decode(workload: &proto::Workload) -> Option<Self> {
        let proto::Tracing { endpoint, share } = workload.tracing.as_ref()?;
        let Some(collector) = collector(endpoint) else {
            tracing::warn!(
                endpoint,
                "no spans are made: the collector is not an address as http://host:4317"
            );
            return None;
        };
        let (kind, name) = workload.workload.split_once('/').unwrap_or_default();
        Some(Self {
            collector: collector.into(),
            share: Share::new(*share),
            kind: kind.to_owned(),
            workload: name.to_owned(),
            revision: workload.revision.clone(),
        })
    }
}

/// `host:port` of an address without TLS.
fn collector(endpoint: &str) -> Option<String> {
    let uri: http::Uri = endpoint.parse().ok()?;
    let authority = uri.authority()?;
    let is_plain =
        uri.scheme_str() == Some("http") && matches!(uri.path(), "" | "/") && uri.query().is_none();
    // Names of users would go out in plain text.
    if !is_plain || authority.as_str().contains('@') || authority.host().is_empty() {
        return None;
    }
    let port = match authority.port_u16() {
        Some(port) => port,
        // A colon in front of what is no port.
        None if authority.as_str() != authority.host() => return None,
        None => DEFAULT_PORT,
    };
    Some(format!("{}:{port}", authority.host()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_collector_is_a_host_and_a_port_without_tls() {
        for (endpoint, expected) in [
            ("http://collector.observability:4317", Some("collector.observability:4317")),
            ("http://collector/", Some("collector:4317")),
            ("http://[fd00::1]:4317", Some("[fd00::1]:4317")),
            ("https://collector:4317", None),
            ("collector:4317", None),
            ("http://collector:4317/v1/traces", None),
            ("http://me:secret@collector:4317", None),
            ("http://collector:x", None),
            ("", None),
        ] {
            assert_eq!(collector(endpoint).as_deref(), expected, "{endpoint}");
        }
    }

    #[test]
    fn who_the_pod_is_goes_with_its_spans_and_a_bad_collector_only_costs_the_spans() {
        let section = |endpoint: &str| proto::Workload {
            workload: "Deployment/checkout".into(),
            revision: "r1".into(),
            tracing: Some(proto::Tracing { endpoint: endpoint.into(), share: 1 << 55 }),
            ..proto::Workload::default()
        };
        let tracing = Tracing::decode(&section("http://collector:4317")).unwrap();
        assert_eq!((tracing.kind.as_str(), tracing.workload.as_str()), ("Deployment", "checkout"));
        assert_eq!((tracing.share, tracing.revision.as_str()), (Share::of_fraction(0.5), "r1"));
        assert_eq!(Tracing::decode(&section("nowhere")), None);
        assert_eq!(Tracing::decode(&proto::Workload::default()), None);
    }
}
