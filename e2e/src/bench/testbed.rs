//! Two network namespaces connected by a veth pair: servers in one, load generators in the other.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::host;

/// The client's namespace and address.
pub const CLIENT: (&str, &str) = ("tulle-bench-client", "10.77.0.1");
/// The server's namespace and address.
pub const SERVER: (&str, &str) = ("tulle-bench-server", "10.77.0.2");

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
        for (namespace, _) in [CLIENT, SERVER] {
            // New connections by the thousand must not run out of ports.
            let ports = ["-q", "-w", "net.ipv4.ip_local_port_range=1024 65535", "net.ipv4.tcp_tw_reuse=1"];
            host::output(testbed.inside(namespace, "sysctl").args(ports))?;
        }
        let nginx = testbed.nginx()?;
        testbed.servers.push(nginx);
        let iperf = testbed.start(SERVER.0, "iperf3", &["-s", "-p", "5201"])?;
        testbed.servers.push(iperf);
        Ok(testbed)
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

    /// A command in a namespace. `nsenter` and `sh` execute the program in their own process, so the child's
    /// process id is the program's.
    pub fn inside(&self, namespace: &str, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{namespace}"));
        command.args(["sh", "-c", "ulimit -Sn \"$(ulimit -Hn)\"; exec \"$0\" \"$@\""]).arg(program);
        command
    }

    fn nginx(&self) -> Result<Child> {
        fs::write(self.folder.join("body"), "x".repeat(1024))?;
        fs::write(self.folder.join("request"), "x".repeat(128))?;
        let folder = self.folder.display();
        // One process: the worker of a master that is killed would go on.
        let config = format!(
            "daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/nginx.log;
events {{ worker_connections 4096; }}
http {{ access_log off; keepalive_requests 100000000; keepalive_timeout 1h; root {folder};
  client_body_temp_path {folder}/t; proxy_temp_path {folder}/t; fastcgi_temp_path {folder}/t; uwsgi_temp_path {folder}/t; scgi_temp_path {folder}/t;
  open_file_cache max=10; server {{ listen 8080 backlog=4096; listen 8081 backlog=4096; listen 8082 http2 backlog=4096;
  location / {{ try_files /body =404; }} location /post {{ return 200 \"xxxxxxxxxxxxxxxx\"; }} }} }}
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
        bail!("no successful response from {target} within 20 s")
    }

    /// Keeps the files with the logs when a measurement failed.
    pub fn noting<T>(&self, outcome: Result<T>) -> Result<T> {
        self.failed.set(self.failed.get() || outcome.is_err());
        outcome.with_context(|| format!("logs are in {}", self.folder.display()))
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
