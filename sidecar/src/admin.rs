//! `/ready`, `/live`, `/metrics`, `/config` for kubelet, people and Prometheus, on a thread of its own.

use std::future;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use serde_json::json;
use tokio::net::TcpListener;

use crate::config::{ConfigStore, Destination, Mtls};
use crate::liveness::Heartbeats;
use crate::serve;
use crate::settings::Settings;
use crate::telemetry::{Telemetry, prometheus};
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
            "/metrics" => text(StatusCode::OK, "text/plain; version=0.0.4", self.metrics()),
            "/config" => text(StatusCode::OK, "application/json", self.config()),
            _ => text(
                StatusCode::NOT_FOUND,
                "text/plain",
                "there are /ready, /live, /metrics and /config\n".to_owned(),
            ),
        }
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

    fn metrics(&self) -> String {
        let mut out = prometheus::render(&self.telemetry);
        let not_after = self.tls.current().map_or(0, |configs| configs.not_after);
        out.push_str("# TYPE tulle_certificate_expiry_timestamp_seconds gauge\n");
        out.push_str(&format!("tulle_certificate_expiry_timestamp_seconds {not_after}\n"));
        out.push_str("# TYPE tulle_operator_connected gauge\n");
        out.push_str(&format!("tulle_operator_connected {}\n", u8::from(self.config.is_connected())));
        out
    }

    fn config(&self) -> String {
        let destinations: Vec<_> = self
            .config
            .snapshot()
            .into_iter()
            .map(
                |(address, destination)| json!({"address": address, "leadsTo": show(destination.as_deref())}),
            )
            .collect();
        let inbound = self.config.inbound().map(|inbound| {
            json!({
                "mtls": format!("{:?}", inbound.mtls),
                "revision": inbound.revision,
                "accessPolicy": inbound.access.as_ref().map(|access| &access.policy),
                "shadowPolicy": inbound.shadow.as_ref().map(|access| &access.policy),
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
            "destinations": destinations,
        });
        serde_json::to_string_pretty(&all).unwrap_or_default()
    }
}

fn show(destination: Option<&Destination>) -> serde_json::Value {
    let endpoint = |endpoint: &crate::config::Endpoint| {
        json!({
            "address": endpoint.address,
            "identity": endpoint.identity.as_ref().map(ToString::to_string),
            "revision": &*endpoint.revision,
            "terminating": endpoint.terminating,
        })
    };
    match destination {
        None => json!("not known yet"),
        Some(Destination::Unknown) => json!("nobody in the cluster: passed through"),
        Some(Destination::Pod(pod)) => json!({"pod": endpoint(pod)}),
        Some(Destination::Service(service)) => json!({
            "service": format!("{}/{}:{}", service.namespace, service.name, service.port),
            "protocol": format!("{:?}", service.protocol),
            "endpoints": service.endpoints.iter().map(endpoint).collect::<Vec<_>>(),
            "split": service.split.iter().map(|(r, s)| json!({"revision": &**r, "permille": s})).collect::<Vec<_>>(),
            "canary": service.canary.as_ref().map(|c| format!("{}/{}, epoch {}", c.namespace, c.name, c.epoch)),
        }),
    }
}

fn text(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static(kind));
    response
}
