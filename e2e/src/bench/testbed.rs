//! Two network namespaces connected by a veth pair: servers in one, load generators in the other.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::host;

/// The client's namespace and address.
pub const CLIENT: (&str, &str) = ("tulle-bench-client", "10.77.0.1");
/// The server's namespace and address.
pub const SERVER: (&str, &str) = ("tulle-bench-server", "10.77.0.2");

/// Results of one round with one set of proxies.
#[derive(Clone, Copy, Debug, Default)]
pub struct Measurement {
    /// Requests per second at 64 connections.
    pub rps: f64,
    /// CPU seconds of both proxies per million requests.
    pub cpu_per_million: f64,
    /// Median latency at 1,000 requests per second, in microseconds.
    pub p50: f64,
    /// 99th percentile of latency at 1,000 requests per second, in microseconds.
    pub p99: f64,
    /// Throughput of one TCP connection, in GB per second.
    pub bulk: f64,
    /// Memory of one proxy before load.
    pub idle_kib: u64,
}

/// The namespaces, and the servers that all rounds share.
pub struct Testbed {
    /// Files of this run.
    pub folder: PathBuf,
    servers: Vec<Child>,
    /// Whether a measurement failed; the files with the logs are kept then.
    failed: Cell<bool>,
}

impl Testbed {
    /// Creates the namespaces and starts nginx and iperf3.
    pub fn new() -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("tulle-bench-{}", std::process::id()));
        fs::create_dir_all(&folder)?;
        let mut testbed = Self { folder, servers: Vec::new(), failed: Cell::new(false) };
        testbed.clear();
        let (client, server) = (CLIENT, SERVER);
        for command in [
            format!("netns add {}", client.0),
            format!("netns add {}", server.0),
            format!("link add tb0 netns {} type veth peer name tb1 netns {}", client.0, server.0),
            format!("-n {} addr add {}/24 dev tb0", client.0, client.1),
            format!("-n {} addr add {}/24 dev tb1", server.0, server.1),
            format!("-n {} link set tb0 up", client.0),
            format!("-n {} link set tb1 up", server.0),
            format!("-n {} link set lo up", client.0),
            format!("-n {} link set lo up", server.0),
            format!("-n {} route add default via {}", client.0, server.1),
        ] {
            host::output(Command::new("ip").args(command.split(' ')))?;
        }
        let nginx = testbed.nginx()?;
        testbed.servers.push(nginx);
        let iperf = testbed.start(SERVER.0, "iperf3", &["-s", "-p", "5201"])?;
        testbed.servers.push(iperf);
        Ok(testbed)
    }

    /// `host:port` of the HTTP server, without a proxy.
    pub fn direct(&self) -> String {
        format!("{}:8080", SERVER.1)
    }

    /// Host and port of the iperf3 server, without a proxy.
    pub fn direct_bulk(&self) -> (String, u16) {
        (SERVER.1.to_owned(), 5201)
    }

    /// Starts a program in a namespace.
    pub fn start(&self, namespace: &str, program: &str, arguments: &[&str]) -> Result<Child> {
        let name = Path::new(program).file_name().unwrap_or_default().to_string_lossy().into_owned();
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.folder.join(format!("{namespace}-{name}.log")))?;
        self.inside(namespace, program)
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(log.try_clone()?)
            .stdout(log)
            .spawn()
            .with_context(|| format!("cannot start {program}"))
    }

    /// A command in a namespace. `nsenter` executes the program in its own process, so the child's process id is the
    /// program's.
    pub fn inside(&self, namespace: &str, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{namespace}")).arg(program);
        command
    }

    fn nginx(&self) -> Result<Child> {
        fs::write(self.folder.join("body"), "x".repeat(1024))?;
        let folder = self.folder.display();
        let config = format!(
            "daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/nginx.log;
events {{ worker_connections 4096; }}
http {{ access_log off; keepalive_requests 100000000; root {folder};
  client_body_temp_path {folder}/t; proxy_temp_path {folder}/t; fastcgi_temp_path {folder}/t; uwsgi_temp_path {folder}/t; scgi_temp_path {folder}/t;
  open_file_cache max=10; server {{ listen 8080 backlog=4096; location / {{ try_files /body =404; }} }} }}
user root;
"
        );
        let path = self.folder.join("nginx.conf");
        fs::write(&path, config)?;
        self.start(SERVER.0, "nginx", &["-c", &path.display().to_string()])
    }

    /// Waits until a target responds with success.
    pub fn wait_for(&self, target: &str) -> Result<()> {
        let start = Instant::now();
        let url = format!("http://{target}/");
        while start.elapsed() < Duration::from_secs(20) {
            let answer =
                host::output(self.inside(CLIENT.0, "curl").args(["-sf", "-m", "2", "-o", "/dev/null", &url]));
            if answer.is_ok() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        self.failed.set(true);
        bail!("no successful response from {target} within 20 s; logs are in {}", self.folder.display())
    }

    /// Sends as many requests as 64 connections allow; returns requests per second and their number.
    pub fn closed_loop(&self, target: &str, seconds: u64) -> Result<(f64, u64)> {
        let (url, duration) = (format!("http://{target}/"), format!("-d{seconds}s"));
        let text = host::output(self.inside(CLIENT.0, "wrk").args(["-t1", "-c64", &duration, &url]))?;
        let number = |line: &str| line.split_whitespace().find_map(|word| word.parse::<f64>().ok());
        let rps = text.lines().find(|line| line.contains("Requests/sec")).and_then(number);
        let requests = text.lines().find(|line| line.contains("requests in")).and_then(number);
        if text.contains("Non-2xx") || text.contains("Socket errors") {
            bail!("requests failed:\n{text}");
        }
        Ok((
            rps.context("no request rate in the output of wrk")?,
            requests.context("no request count in the output of wrk")? as u64,
        ))
    }

    /// Sends 1,000 requests per second, independent of the response times; returns p50 and p99 in microseconds.
    pub fn open_loop(&self, target: &str, seconds: u64) -> Result<(f64, f64)> {
        let shop = std::env::current_exe()?.with_file_name("shop");
        let mut command = self.inside(CLIENT.0, &shop.display().to_string());
        command.args(["load", "--rate=1000", "--post-every=0", "--any-body"]);
        command.arg(format!("--target={target}")).arg(format!("--seconds={seconds}"));
        let text = host::output(&mut command)?;
        let line: Value =
            serde_json::from_str(text.lines().last().context("no output of the load generator")?)?;
        if line["failed"] != 0 {
            bail!("requests failed: {line}");
        }
        let value = |name: &str| line[name].as_f64().unwrap_or(0.0);
        Ok((value("p50_us"), value("p99_us")))
    }

    /// Sends bytes through one connection; returns GB per second.
    pub fn bulk(&self, target: &(String, u16), seconds: u64) -> Result<f64> {
        let port = target.1.to_string();
        let seconds = seconds.to_string();
        let text = host::output(
            self.inside(CLIENT.0, "iperf3").args(["-c", &target.0, "-p", &port, "-t", &seconds, "-J"]),
        )?;
        let result: Value = serde_json::from_str(&text)?;
        let bits = result["end"]["sum_received"]["bits_per_second"].as_f64();
        Ok(bits.context("no rate in the output of iperf3")? / 8e9)
    }

    fn clear(&self) {
        for namespace in [CLIENT.0, SERVER.0] {
            let _ = host::output(Command::new("ip").args(["netns", "del", namespace]));
        }
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        for server in &mut self.servers {
            let _ = server.kill();
            let _ = server.wait();
        }
        self.clear();
        if !self.failed.get() {
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}
