//! Two HAProxies: HTTP/2 with mutual TLS between them, plain TLS for what is opaque.

use std::fs;
use std::process::Child;

use anyhow::Result;

use super::redirect::{self, SERVER_PORTS};
use super::testbed::{CLIENT, SERVER, Testbed};

/// Redirects connections to the two.
pub fn redirect(testbed: &Testbed) -> Result<()> {
    redirect::install(testbed, [15021, 15022, 15023, 15024], [15026, 15027, 15028, 15029])
}

/// Starts the proxy of a namespace.
pub fn start(testbed: &Testbed, namespace: (&str, &str)) -> Result<Child> {
    let (name, config) = if namespace == CLIENT { ("client", outbound()) } else { ("server", inbound()) };
    let read = |suffix: &str| fs::read_to_string(testbed.folder.join(format!("{name}.{suffix}")));
    fs::write(testbed.folder.join(format!("{name}.pem")), read("crt")? + &read("key")?)?;
    let path = testbed.folder.join(format!("haproxy-{name}.cfg"));
    fs::write(&path, config.replace("FOLDER", &testbed.folder.display().to_string()))?;
    testbed.start(namespace.0, "haproxy", &["-db", "-f", &path.display().to_string()])
}

const DEFAULTS: &str = "global
  nbthread 1
  maxconn 8000
  ssl-default-bind-options ssl-min-ver TLSv1.3
  ssl-default-server-options ssl-min-ver TLSv1.3
defaults
  mode http
  http-reuse always
  timeout connect 5s
  timeout client 1h
  timeout server 1h
  timeout http-keep-alive 1h
";

fn outbound() -> String {
    let tls = "ssl crt FOLDER/client.pem ca-file FOLDER/roots.pem verify required";
    let (server, [http1, http2, opaque, bulk]) = (SERVER.1, SERVER_PORTS);
    format!(
        "{DEFAULTS}
listen http1
  bind 127.0.0.1:15021
  server s {server}:{http1} {tls} alpn h2
listen http2
  bind 127.0.0.1:15022 proto h2
  server s {server}:{http2} {tls} alpn h2
listen opaque
  mode tcp
  bind 127.0.0.1:15023
  server s {server}:{opaque} {tls}
listen bulk
  mode tcp
  bind 127.0.0.1:15024
  server s {server}:{bulk} {tls}
"
    )
}

fn inbound() -> String {
    let tls = "ssl crt FOLDER/server.pem ca-file FOLDER/roots.pem verify required";
    format!(
        "{DEFAULTS}
listen http1
  bind 0.0.0.0:15026 {tls} alpn h2
  server s 127.0.0.1:8080
listen http2
  bind 0.0.0.0:15027 {tls} alpn h2
  server s 127.0.0.1:8082 proto h2
listen opaque
  mode tcp
  bind 0.0.0.0:15028 {tls}
  server s 127.0.0.1:8081
listen bulk
  mode tcp
  bind 0.0.0.0:15029 {tls}
  server s 127.0.0.1:5201
"
    )
}
