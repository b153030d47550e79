//! Routes for other protocols, and what a route for HTTP leaves alone.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{backend, head, http, meshed, parent, response_header, route, settled, weighted};
use crate::kubectl::Kube;
use crate::suites::namespace::{TestNamespace, borrows, service};

/// Greets each connection on one port before the client has said anything; serves HTTP on another one.
const GREETS: &str = "import http.server, socket, sys, threading
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b'web')
    def log_message(self, *_): pass
threading.Thread(target=http.server.ThreadingHTTPServer(('', 8080), Handler).serve_forever, daemon=True).start()
server = socket.create_server(('', 9090), backlog=128)
while True:
    connection, _ = server.accept()
    connection.sendall(sys.argv[1].encode() + b'\\n')
    connection.close()";

/// Connects so often, and counts what it was greeted with.
const GREETED: &str = "import collections, json, socket, sys
seen = collections.Counter()
for _ in range(int(sys.argv[3])):
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=8) as connection:
        seen[connection.makefile().readline().strip()] += 1
print(json.dumps(seen))";

/// Greets each TLS connection. Arguments: the greeting, certificate and key.
const GREETS_TLS: &str = "import socket, ssl, sys
open('/tmp/pem', 'w').write(sys.argv[2])
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain('/tmp/pem')
server = socket.create_server(('', 8443), backlog=128)
while True:
    connection, _ = server.accept()
    try:
        with context.wrap_socket(connection, server_side=True) as tls:
            tls.sendall(sys.argv[1].encode() + b'\\n')
            tls.unwrap()
    except OSError:
        pass";

/// Connects by TLS with each server name, and prints what it was greeted with.
const GREETED_TLS: &str = "import json, socket, ssl, sys
context = ssl.create_default_context()
context.check_hostname, context.verify_mode, seen = False, ssl.CERT_NONE, {}
for name in sys.argv[2:]:
    try:
        with socket.create_connection((sys.argv[1], 443), timeout=8) as connection:
            with context.wrap_socket(connection, server_hostname=name) as tls:
                seen[name] = tls.makefile().readline().strip()
    except OSError:
        seen[name] = 'closed'
print(json.dumps(seen))";

/// A Service `name` of ports 80 and 9090, and a pod behind it that greets with the name.
fn greeter(field: &TestNamespace<'_>, name: &str) -> Result<()> {
    let ports = json!([{"name": "http", "port": 80, "targetPort": 8080}, {"name": "tcp", "port": 9090, "targetPort": 9090}]);
    field.apply(service(name, json!({"ports": ports})))?;
    field.server_pod(name, 9090, &["/usr/bin/python3", "-c", GREETS, name])
}

fn greeted(field: &TestNamespace<'_>, host: &str, port: &str, number: &str) -> Result<BTreeMap<String, u64>> {
    let text = field.exec("client", &["/usr/bin/python3", "-c", GREETED, host, port, number])?;
    serde_json::from_str(&text).with_context(|| format!("the client printed {text:?}"))
}

pub(super) fn opaque(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = meshed(kube, "t-r-opaque")?;
    greeter(&field, "web")?;
    tls_greeter(&field, "secret")?;
    field.client("client")?;
    for name in ["web", "secret"] {
        let rules =
            json!([{"filters": [response_header("x-route", "yes")], "backendRefs": [backend("web")]}]);
        field.apply(http(name, name, rules))?;
        settled(&field, &format!("httproute/{name}"))?;
    }
    kube.wait_for("the route to hold for HTTP", 60, || {
        Ok(head(&field, "client", &["http://web/"])?.header("x-route") == "yes")
    })?;
    for _ in 0..2 {
        let seen = greeted(&field, "web", "9090", "5")?;
        ensure!(seen.get("web") == Some(&5), "a server that speaks first greeted with {seen:?}");
        let seen = greeted_tls(&field, "secret", &["a.example"])?;
        ensure!(seen["a.example"] == "secret", "TLS was answered {seen}");
    }
    Ok(())
}

/// A Service `name` of port 443 without a route's help, and a pod behind it that greets with the name by TLS.
fn tls_greeter(field: &TestNamespace<'_>, name: &str) -> Result<()> {
    let pair = rcgen::generate_simple_self_signed(["a.example".to_owned()])?;
    let pem = pair.cert.pem() + &pair.signing_key.serialize_pem();
    let ports = json!([{"name": "tls", "port": 443, "targetPort": 8443}]);
    field.apply(service(name, json!({"ports": ports})))?;
    field.server_pod(name, 8443, &["/usr/bin/python3", "-c", GREETS_TLS, name, &pem])
}

fn greeted_tls(field: &TestNamespace<'_>, host: &str, names: &[&str]) -> Result<Value> {
    let text = field.exec("client", &[&["/usr/bin/python3", "-c", GREETED_TLS, host], names].concat())?;
    serde_json::from_str(&text).with_context(|| format!("the client printed {text:?}"))
}

/// Calls methods of the counter, and prints the code of each.
const CALLS: &str = "import json, sys, grpc
channel, seen = grpc.insecure_channel(sys.argv[1]), {}
for name in sys.argv[2:]:
    try:
        call = channel.unary_unary(f'/shop.Counter/{name}')
        call(b'', timeout=8, metadata=[('x-user', 'a')]); seen[name] = 'OK'
    except grpc.RpcError as error:
        seen[name] = error.code().name
print(json.dumps(seen))";

pub(super) fn grpc(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = meshed(kube, "t-r-grpc")?;
    field.apply(service("counter", json!({"ports": [{"port": 80, "targetPort": 50051}]})))?;
    let server = include_str!("../../../peers/grpc_server.py");
    field.server_pod("counter", 50051, &["/usr/bin/python3", "-c", server, "50051"])?;
    field.client("client")?;
    let method = |name: &str| json!({"method": {"service": "shop.Counter", "method": name}});
    let with_header = |value: &str| {
        let mut found = method("Missing");
        found["headers"] = json!([{"name": "x-user", "value": value}]);
        found
    };
    let rules = json!([
        {"matches": [method("Caller")], "backendRefs": [backend("counter")]},
        {"matches": [method("Count")], "backendRefs": [backend("nobody")]},
        {"matches": [with_header("a")], "backendRefs": [backend("counter")]},
    ]);
    field.apply(route("GRPCRoute", "counter", json!([parent("counter")]), rules))?;
    settled(&field, "grpcroute/counter")?;
    let mut seen = Value::Null;
    let expected =
        json!({"Caller": "OK", "Count": "UNAVAILABLE", "Echo": "UNIMPLEMENTED", "Missing": "NOT_FOUND"});
    let calls = ["/usr/bin/python3", "-c", CALLS, "counter:80", "Caller", "Count", "Echo", "Missing"];
    let waited = kube.wait_for("the route to hold", 60, || {
        seen = serde_json::from_str(&field.exec("client", &calls)?)?;
        Ok(seen == expected)
    });
    waited.with_context(|| format!("the calls ended with {seen}"))
}

pub(super) fn tcp_and_tls(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = meshed(kube, "t-r-tcp")?;
    for name in ["a", "b"] {
        greeter(&field, name)?;
        tls_greeter(&field, &format!("tls-{name}"))?;
    }
    // A Service without pods of its own.
    let front = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "front"},
        "spec": {"ports": [{"name": "tcp", "port": 9090}, {"name": "tls", "port": 443}]}});
    field.apply(front)?;
    field.client("client")?;
    let section =
        |name: &str| json!([{"group": "", "kind": "Service", "name": "front", "sectionName": name}]);
    let to = |name: &str, port: u16, weight: u32| {
        let mut to = weighted(name, weight);
        to["port"] = json!(port);
        to
    };
    let rules = json!([{"backendRefs": [to("a", 9090, 3), to("b", 9090, 1)]}]);
    field.apply(route("TCPRoute", "split", section("tcp"), rules))?;
    settled(&field, "tcproute/split")?;
    let seen = greeted(&field, "front", "9090", "80")?;
    let (a, b) = (seen.get("a").copied().unwrap_or(0), seen.get("b").copied().unwrap_or(0));
    ensure!(a + b == 80 && (58..=62).contains(&a), "80 connections at 3 to 1 were greeted with {seen:?}");
    for (name, hostname) in [("a", "a.example"), ("b", "*.b.example")] {
        let backend = to(&format!("tls-{name}"), 443, 1);
        let mut tls = route("TLSRoute", name, section("tls"), json!([{"backendRefs": [backend]}]));
        tls["spec"]["hostnames"] = json!([hostname]);
        field.apply(tls)?;
        settled(&field, &format!("tlsroute/{name}"))?;
    }
    let expected = json!({"a.example": "tls-a", "x.b.example": "tls-b", "c.example": "closed"});
    let mut seen = Value::Null;
    let waited = kube.wait_for("the routes by server name to hold", 60, || {
        seen = greeted_tls(&field, "front", &["a.example", "x.b.example", "c.example"])?;
        Ok(seen == expected)
    });
    waited.with_context(|| format!("the connections were greeted with {seen}"))
}
