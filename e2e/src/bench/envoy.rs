//! Two Envoys, configured as in a mesh: mutual TLS and an HTTP connection manager on both sides.

use std::fs;
use std::process::Child;

use anyhow::Result;
use serde_json::json;

use super::proxies::Programs;
use super::redirect::{self, SERVER_PORTS};
use super::testbed::{CLIENT, SERVER, Testbed};

/// Redirects connections to the two.
pub fn redirect(testbed: &Testbed) -> Result<()> {
    redirect::install(testbed, [15001, 15003, 15004, 15002], [15006, 15008, 15009, 15007])
}

/// Starts the proxy of a namespace.
pub fn start(testbed: &Testbed, programs: &Programs, namespace: (&str, &str)) -> Result<Child> {
    let (base, config) = if namespace == CLIENT { ("1", outbound(testbed)) } else { ("2", inbound(testbed)) };
    let path = testbed.folder.join(format!("{}.json", namespace.0));
    fs::write(&path, config.to_string())?;
    let path = path.display().to_string();
    let arguments = [
        "-c",
        &path,
        "--concurrency",
        "1",
        "--base-id",
        base,
        "--log-level",
        "error",
        "--disable-hot-restart",
    ];
    testbed.start(namespace.0, &programs.envoy.display().to_string(), &arguments)
}

fn tls(testbed: &Testbed, name: &str, server: bool) -> serde_json::Value {
    let file = |file: String| json!({"filename": testbed.folder.join(file).display().to_string()});
    let kind = if server { "DownstreamTlsContext" } else { "UpstreamTlsContext" };
    let mut config = json!({
        "@type": format!("type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{kind}"),
        "common_tls_context": {
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
            "tls_certificates": [{"certificate_chain": file(format!("{name}.crt")), "private_key": file(format!("{name}.key"))}],
            "validation_context": {"trusted_ca": file("roots.pem".to_owned())},
            "alpn_protocols": ["h2"],
        },
    });
    if server {
        config["require_client_certificate"] = json!(true);
    }
    json!({"name": "tls", "typed_config": config})
}

fn manager(cluster: &str) -> serde_json::Value {
    json!({"name": "hcm", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "h", "codec_type": "AUTO",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": cluster}}]}]},
        "http_filters": [{"name": "router", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}],
    }})
}

fn tcp(cluster: &str) -> serde_json::Value {
    json!({"name": "tcp", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy", "stat_prefix": "t", "cluster": cluster,
    }})
}

fn listener(
    name: &str,
    address: &str,
    port: u16,
    filter: serde_json::Value,
    tls: Option<serde_json::Value>,
) -> serde_json::Value {
    let mut chain = json!({"filters": [filter]});
    if let Some(tls) = tls {
        chain["transport_socket"] = tls;
    }
    json!({"name": name, "address": {"socket_address": {"address": address, "port_value": port}}, "filter_chains": [chain]})
}

fn cluster(
    name: &str,
    address: &str,
    port: u16,
    h2: bool,
    tls: Option<serde_json::Value>,
) -> serde_json::Value {
    let endpoint =
        json!({"endpoint": {"address": {"socket_address": {"address": address, "port_value": port}}}});
    let mut cluster = json!({
        "name": name, "type": "STATIC", "connect_timeout": "2s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
    });
    if let Some(tls) = tls {
        cluster["transport_socket"] = tls;
    }
    if h2 {
        cluster["typed_extension_protocol_options"] = json!({"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http2_protocol_options": {}},
        }});
    }
    cluster
}

fn outbound(testbed: &Testbed) -> serde_json::Value {
    let to_server = |name, port, h2| cluster(name, SERVER.1, port, h2, Some(tls(testbed, "client", false)));
    let [http, http2, opaque, bulk] = SERVER_PORTS;
    json!({"static_resources": {
        "listeners": [
            listener("http", "127.0.0.1", 15001, manager("http"), None),
            listener("bulk", "127.0.0.1", 15002, tcp("bulk"), None),
            listener("http2", "127.0.0.1", 15003, manager("http2"), None),
            listener("opaque", "127.0.0.1", 15004, tcp("opaque"), None),
        ],
        "clusters": [
            to_server("http", http, true),
            to_server("bulk", bulk, false),
            to_server("http2", http2, true),
            to_server("opaque", opaque, false),
        ],
    }})
}

fn inbound(testbed: &Testbed) -> serde_json::Value {
    let from_client =
        |name, port, filter| listener(name, "0.0.0.0", port, filter, Some(tls(testbed, "server", true)));
    json!({"static_resources": {
        "listeners": [
            from_client("http", 15006, manager("http")),
            from_client("bulk", 15007, tcp("bulk")),
            from_client("http2", 15008, manager("http2")),
            from_client("opaque", 15009, tcp("opaque")),
        ],
        "clusters": [
            cluster("http", "127.0.0.1", 8080, false, None),
            cluster("bulk", "127.0.0.1", 5201, false, None),
            cluster("http2", "127.0.0.1", 8082, true, None),
            cluster("opaque", "127.0.0.1", 8081, false, None),
        ],
    }})
}
