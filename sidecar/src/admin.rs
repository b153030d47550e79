//! `/ready`, `/live`, `/metrics`, `/config`, `/config/resources`, `/denials` for kubelet, people and Prometheus, on a
//! thread of its own.

mod policies;
mod resources;

use std::future;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderValue};
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::config::{ConfigStore, Destination, Endpoint, Endpoints, Known, Mtls, ServiceRoute, Traffic};
use crate::liveness::Heartbeats;
use crate::serve;
use crate::settings::Settings;
use crate::telemetry::prometheus::{Form, Gauge};
use crate::telemetry::{Breakers, Telemetry, prometheus};
use crate::tls::TlsStore;

/// What the admin port shows.
pub struct Admin {
    /// The pod and its operator.
    pub settings: Arc<Settings>,
    /// What the operator has said.
    pub config: Arc<ConfigStore>,
    /// Key, chain, roots: of them only the dates are shown.
    pub tls: Arc<TlsStore>,
    /// Counters.
    pub telemetry: Arc<Telemetry>,
    /// Signs of life of the data threads.
    pub heartbeats: Arc<Heartbeats>,
    /// Why this sidecar cannot do what the pod asks of it, whatever the operator sends.
    pub unable: Option<String>,
}

impl Admin {
    /// Serves for ever.
    pub async fn serve(self: Arc<Self>, listener: TcpListener) {
        let answer = move |request: Request<Incoming>| future::ready(self.answer(&request));
        serve::http(listener, serve::IDLE_TIMEOUT, answer).await;
    }

    fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        match request.uri().path() {
            "/ready" => self.ready(),
            "/live" => self.live(),
            "/metrics" => self.metrics(request.headers()),
            "/config" => text(StatusCode::OK, "application/json", self.config()),
            tulle_mesh::resources::PATH => self.resources(request),
            "/denials" => self.denials(request),
            _ => text(
                StatusCode::NOT_FOUND,
                "text/plain",
                "there are /ready, /live, /metrics, /config, /config/resources and /denials\n".to_owned(),
            ),
        }
    }

    /// The last refusals. They name clients and paths: only who may forward a port of the pod sees them.
    fn denials(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        if !is_forwarded(request) {
            let why = "shown only through a port-forward: tulle explain --denial ID\n";
            return text(StatusCode::FORBIDDEN, "text/plain", why.to_owned());
        }
        let all = serde_json::to_string(&self.telemetry.denials.all()).unwrap_or_default();
        text(StatusCode::OK, "application/json", all)
    }

    /// The resources that are in force. They name who may call, and hosts and paths of routes: for the same people.
    fn resources(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        if !is_forwarded(request) {
            let why = "shown only through a port-forward: tulle config POD --diff\n";
            return text(StatusCode::FORBIDDEN, "text/plain", why.to_owned());
        }
        let query = request.uri().query().unwrap_or_default();
        text(StatusCode::OK, "application/json", resources::json(&self.config, query))
    }

    fn ready(&self) -> Response<Full<Bytes>> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let expired = |not_after: i64| u64::try_from(not_after).is_ok_and(|not_after| not_after <= now);
        let missing = match (self.tls.current(), self.config.inbound()) {
            // For good: an application that allows by address must not start with the sidecar's.
            _ if self.unable.is_some() => self.unable.as_deref(),
            (None, _) => Some("no certificate yet: is the operator running, and can this pod reach it?"),
            // Only where nobody can be served without it: an operator that is away for a day must not empty every
            // Service of a mesh that also takes plain text.
            (Some(tls), Some(inbound)) if inbound.mtls == Mtls::Strict && expired(tls.not_after) => {
                Some("the certificate has expired: is the operator running, and can this pod reach it?")
            }
            (_, None) => Some("no policy yet: the operator has not answered"),
            _ => None,
        };
        match missing {
            None => text(StatusCode::OK, "text/plain", "ready\n".to_owned()),
            Some(why) => text(StatusCode::SERVICE_UNAVAILABLE, "text/plain", format!("{why}\n")),
        }
    }

    fn live(&self) -> Response<Full<Bytes>> {
        match self.heartbeats.stuck() {
            None => text(StatusCode::OK, "text/plain", "alive\n".to_owned()),
            Some((worker, silent)) => {
                let seconds = silent.as_secs();
                tracing::error!(worker, seconds, "a data thread is stuck");
                let why = format!("data thread {worker} has been stuck for {seconds} s\n");
                text(StatusCode::SERVICE_UNAVAILABLE, "text/plain", why)
            }
        }
    }

    fn metrics(&self, headers: &HeaderMap) -> Response<Full<Bytes>> {
        let not_after = self.tls.current().map_or(0, |configs| configs.not_after);
        let gauges = [
            Gauge {
                name: "tulle_certificate_expiry_timestamp_seconds",
                help: "When the certificate expires; 0 without one.",
                value: not_after as f64,
            },
            Gauge {
                name: "tulle_operator_connected",
                help: "Whether the discovery stream is open.",
                value: f64::from(u8::from(self.config.is_connected())),
            },
        ];
        let accept = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
        let form = Form::preferred(accept);
        body(StatusCode::OK, form.content_type(), prometheus::encode(&self.telemetry, &gauges, form))
    }

    fn config(&self) -> String {
        let snapshot = self.config.snapshot();
        let destinations: Vec<_> =
            snapshot.iter().map(|known| show(known, &self.telemetry.breakers)).collect();
        let inbound = self.config.inbound().map(|inbound| {
            json!({
                "mtls": format!("{:?}", inbound.mtls),
                "revision": inbound.revision,
                "accessPolicy": inbound.access.as_ref().map(|access| &access.policy),
                "shadowPolicy": inbound.shadow.as_ref().map(|access| &access.policy),
                "limits": inbound.limits.as_ref().map(policies::limits),
            })
        });
        let tls = self.tls.current();
        let all = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "pod": format!("{}/{}", self.settings.pod_namespace, self.settings.pod_name),
            "identity": tls.as_ref().map(|configs| configs.identity.to_string()),
            "certificateNotAfter": tls.as_ref().map(|configs| configs.not_after),
            "operatorConnected": self.config.is_connected(),
            "inbound": inbound,
            "accessLog": self.config.access_log().to_string(),
            "destinations": destinations,
        });
        serde_json::to_string_pretty(&all).unwrap_or_default()
    }
}

/// Whether a request comes through a port-forward, or from the pod itself.
fn is_forwarded<B>(request: &Request<B>) -> bool {
    let peer = request.extensions().get::<serve::Peer>();
    peer.is_some_and(|peer| peer.0.ip().to_canonical().is_loopback())
}

fn show(known: &Known, breakers: &Breakers) -> Value {
    let leads_to = match known.destination.as_deref() {
        None => json!("not known yet"),
        Some(Destination::Unknown) => json!("nobody in the cluster: passed through"),
        Some(Destination::Pod(pod)) => json!({
            "pod": show_endpoint(&pod.endpoint),
            "protocol": format!("{:?}", pod.protocol),
        }),
        Some(Destination::Service(service)) => {
            show_service(&service.route, known.endpoints.as_deref(), breakers)
        }
    };
    json!({"address": known.address, "leadsTo": leads_to})
}

/// A Service as it is dialled, or as a rule leads to it.
fn show_backend(route: &ServiceRoute, breakers: &Breakers) -> Value {
    let mut shown = json!({
        "service": format!("{}/{}:{}", route.namespace, route.name, route.port),
        "protocol": format!("{:?}", route.protocol),
        "policies": policies::traffic(&route.traffic),
        "ejected": policies::ejected(breakers, &route.namespace, &route.name),
    });
    if let (true, Some(shown)) = (*route.shadow != Traffic::default(), shown.as_object_mut()) {
        shown.insert("shadowPolicies".to_owned(), policies::traffic(&route.shadow));
    }
    shown
}

fn show_service(route: &ServiceRoute, served: Option<&Endpoints>, breakers: &Breakers) -> Value {
    let mut service = show_backend(route, breakers);
    if let (Some(rules), Some(service)) = (&route.rules, service.as_object_mut()) {
        let backends = rules.services.iter().map(|backend| show_backend(backend, breakers));
        service.insert("rules".to_owned(), rules.rules.iter().map(policies::rule).collect());
        service.insert("backends".to_owned(), backends.collect());
    }
    if let (Some(served), Some(service)) = (served, service.as_object_mut()) {
        let split = served.split.iter().map(|(r, s)| json!({"revision": &**r, "permille": s}));
        let canary = served.canary.as_ref().map(|c| format!("{}/{}, epoch {}", c.namespace, c.name, c.epoch));
        service.insert("endpoints".to_owned(), served.endpoints.iter().map(show_endpoint).collect());
        service.insert("split".to_owned(), split.collect());
        service.insert("canary".to_owned(), json!(canary));
    }
    service
}

fn show_endpoint(endpoint: &Endpoint) -> Value {
    json!({
        "address": endpoint.address,
        "identity": endpoint.identity.as_ref().map(ToString::to_string),
        "revision": &*endpoint.revision,
        "terminating": endpoint.terminating,
    })
}

fn text(status: StatusCode, kind: &'static str, text: String) -> Response<Full<Bytes>> {
    body(status, kind, text.into_bytes())
}

fn body(status: StatusCode, kind: &'static str, body: Vec<u8>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::time::Duration;

    use http_body_util::BodyExt as _;
    use tulle_mesh::identity::WorkloadId;

    use super::*;
    use crate::config::limits::{InUse, InboundLimits, Limit, LimitSet, LimitsSection};
    use crate::config::traffic::Timeouts;
    use crate::config::{CanaryRef, Inbound, PodRoute, Protocol};
    use crate::settings::SourceAddress;

    fn admin(unable: Option<&str>) -> Admin {
        let settings = Settings { source_address: SourceAddress::Preserve, ..Settings::of_test_pod("web") };
        Admin {
            settings: Arc::new(settings),
            config: ConfigStore::new().0,
            tls: Arc::default(),
            telemetry: Arc::default(),
            heartbeats: Arc::new(Heartbeats::new(1)),
            unable: unable.map(str::to_owned),
        }
    }

    async fn read(response: Response<Full<Bytes>>) -> (u16, String) {
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn a_sidecar_that_cannot_do_what_its_pod_asks_is_never_ready_and_says_why() {
        let admin = admin(Some("no capability NET_RAW"));
        admin.config.set_inbound(Inbound {
            mtls: Mtls::Permissive,
            access: None,
            shadow: None,
            shadow_strict: false,
            revision: String::new(),
            limits: None,
        });
        assert_eq!(read(admin.ready()).await, (503, "no capability NET_RAW\n".to_owned()));
    }

    #[tokio::test]
    async fn what_a_sidecar_waits_for_is_said() {
        let (status, why) = read(admin(None).ready()).await;
        assert!(status == 503 && why.contains("no certificate yet"), "{why}");
    }

    #[tokio::test]
    async fn metrics_are_protobuf_for_whoever_asks_for_it_and_text_for_everybody_else() {
        let admin = admin(None);
        let mut headers = HeaderMap::new();
        let response = admin.metrics(&headers);
        assert_eq!(response.headers()[CONTENT_TYPE], "text/plain; version=0.0.4");
        let (status, metrics) = read(response).await;
        assert!(status == 200 && metrics.contains("\ntulle_operator_connected 0\n"), "{metrics}");
        assert!(metrics.contains("\ntulle_certificate_expiry_timestamp_seconds 0\n"), "{metrics}");

        let accept = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;q=0.6,*/*;q=0.2";
        headers.insert(ACCEPT, HeaderValue::from_static(accept));
        let kind = admin.metrics(&headers).headers()[CONTENT_TYPE].clone();
        assert!(kind.to_str().unwrap().starts_with("application/vnd.google.protobuf; proto="), "{kind:?}");
    }

    #[test]
    fn config_shows_where_an_address_leads_and_who_serves_it() {
        let address: SocketAddr = "10.0.0.7:8080".parse().unwrap();
        let endpoint = Endpoint {
            identity: Some(WorkloadId::new("cluster.local", "shop", "web")),
            revision: "new".into(),
            terminating: true,
            pod_uid: "uid".into(),
            ..Endpoint::at(address)
        };
        let timeout = Timeouts { request: Some(Duration::from_secs(2)), ..Timeouts::default() };
        let route = ServiceRoute {
            namespace: "shop".to_owned(),
            name: "web".to_owned(),
            port: 80,
            protocol: Protocol::Http1,
            traffic: Arc::new(Traffic { timeout: Some(timeout), ..Traffic::default() }),
            ..ServiceRoute::default()
        };
        let served = Endpoints {
            endpoints: vec![endpoint.clone()],
            split: vec![("new".into(), 50)],
            canary: Some(CanaryRef { namespace: "shop".into(), name: "web".into(), epoch: 3 }),
            ..Endpoints::default()
        };
        let breakers = Breakers::default();
        let gauge = breakers.of("shop", "web");
        gauge.change(&[], &[address], 0);
        let shown = show_service(&route, Some(&served), &breakers);
        assert_eq!(shown["service"], "shop/web:80");
        assert_eq!(shown["protocol"], "Http1");
        assert_eq!(shown["endpoints"][0]["identity"], "spiffe://cluster.local/ns/shop/sa/web");
        assert_eq!(shown["endpoints"][0]["terminating"], true);
        assert_eq!(shown["split"], json!([{"revision": "new", "permille": 50}]));
        assert_eq!(shown["canary"], "shop/web, epoch 3");
        assert_eq!(shown["policies"], json!({"timeout": {"request": "2s"}}));
        assert_eq!(shown["ejected"], json!([{"address": "10.0.0.7:8080", "threads": 1}]));
        assert!(shown.get("shadowPolicies").is_none());

        let pod = Destination::Pod(PodRoute { endpoint, protocol: Protocol::Opaque });
        let known = Known { address, destination: Some(Arc::new(pod)), endpoints: None };
        assert_eq!(show(&known, &breakers)["leadsTo"]["pod"]["address"], "10.0.0.7:8080");
        let unknown = Known { address, destination: None, endpoints: None };
        assert_eq!(show(&unknown, &breakers)["leadsTo"], "not known yet");
    }

    #[test]
    fn what_a_port_forward_shows_is_not_shown_to_other_pods() {
        for (peer, expected) in
            [("127.0.0.1:1", true), ("[::ffff:127.0.0.1]:1", true), ("[::1]:1", true), ("10.0.0.7:1", false)]
        {
            let mut request = Request::new(());
            request.extensions_mut().insert(serve::Peer(peer.parse().unwrap()));
            assert_eq!(is_forwarded(&request), expected, "{peer}");
        }
        assert!(!is_forwarded(&Request::new(())));
    }

    #[test]
    fn config_shows_the_limits_of_the_pod() {
        let admin = admin(None);
        let limit = Limit { max: 64, policy: "shop/calm".into() };
        let enforced = LimitSet { concurrency: Some(limit), connections: None };
        let section = LimitsSection { enforced, shadow: LimitSet::default() };
        admin.config.set_inbound(Inbound {
            mtls: Mtls::Permissive,
            access: None,
            shadow: None,
            shadow_strict: false,
            revision: String::new(),
            limits: Some(InboundLimits { section, in_use: InUse::default() }),
        });
        let shown: Value = serde_json::from_str(&admin.config()).unwrap();
        assert_eq!(shown["inbound"]["limits"]["enforced"]["concurrency"]["max"], 64);
    }
}
