//! Pid 1 of the node's namespaces: prepares them, starts every component, reaps what dies.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind, mount_change};
use rustix::process::{WaitOptions, wait};

use super::files::{ADDRESS, DNS, NODE, SERVICES};
use crate::host;

/// Runs the node; returns only on an error before the components run.
pub fn run(state: &Path, components: &Path) -> Result<()> {
    mounts(state)?;
    network()?;
    let mut running = Vec::new();
    for component in all(state, components) {
        running.push((start(state, &component)?, component));
    }
    supervise(state, running)
}

/// A program of the node and its arguments.
struct Component {
    name: &'static str,
    program: PathBuf,
    arguments: Vec<String>,
}

/// Starts again what ends: kubelet, say, gives up when containerd does not listen yet. Orphans of
/// containerd's shims are children of pid 1 too, and nobody else waits for them.
fn supervise(state: &Path, mut running: Vec<(Child, Component)>) -> Result<()> {
    loop {
        let Ok(Some((ended, _))) = wait(WaitOptions::empty()) else {
            thread::sleep(Duration::from_millis(200));
            continue;
        };
        for (child, component) in &mut running {
            if child.id() == ended.as_raw_nonzero().get().unsigned_abs() {
                thread::sleep(Duration::from_millis(300));
                *child = start(state, component)?;
            }
        }
    }
}

/// A tmpfs and binds keep the host's own folders clean: without them network namespaces and pod
/// volumes would stay behind there.
fn mounts(state: &Path) -> Result<()> {
    mount_change("/", MountPropagationFlags::SHARED | MountPropagationFlags::REC)?;
    mount("tmpfs", "/run", "tmpfs", MountFlags::empty(), None).context("mounting /run")?;
    for (folder, source) in
        [("/var/lib/kubelet", "kubelet"), ("/var/lib/cni", "var-cni"), ("/var/log/pods", "podlogs")]
    {
        fs::create_dir_all(folder)?;
        mount_bind(state.join(source), folder).with_context(|| format!("mounting {folder}"))?;
    }
    Ok(())
}

/// No default route: what tries to leave the node fails at once instead of hanging. The route to the
/// Service range lets processes on the node reach Services (the route is looked up before the
/// address is rewritten).
fn network() -> Result<()> {
    rustix::system::sethostname(NODE.as_bytes())?;
    let commands = [
        "link set lo up".to_owned(),
        "link add node0 type bridge".to_owned(),
        format!("addr add {ADDRESS}/32 dev node0"),
        format!("addr add {DNS}/32 dev node0"),
        "link set node0 up".to_owned(),
        format!("route add {SERVICES} dev node0"),
        "route add unreachable default metric 4278198272".to_owned(),
    ];
    for command in commands {
        host::output(Command::new("ip").args(command.split(' ')))?;
    }
    fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("enabling forwarding")
}

fn all(state: &Path, components: &Path) -> Vec<Component> {
    let pki = state.join("pki");
    let path = |name: &str| state.join(name).display().to_string();
    let key = |name: &str| pki.join(name).display().to_string();
    let kubeconfig = |name: &str| format!("--kubeconfig={}", key(name));
    let upstream = |name: &'static str, mut arguments: Vec<String>| {
        let program = components.to_path_buf();
        arguments.insert(0, name.to_owned());
        Component { name, program, arguments }
    };
    let containerd = vec!["-c".into(), path("containerd.toml")];
    vec![
        Component { name: "containerd", program: "containerd".into(), arguments: containerd },
        upstream("etcd", vec!["--data-dir".into(), path("etcd"), "--unsafe-no-fsync".into()]),
        upstream("kube-apiserver", api_server(&key)),
        upstream(
            "kube-controller-manager",
            vec![
                kubeconfig("controller-manager.conf"),
                "--leader-elect=false".into(),
                format!("--service-account-private-key-file={}", key("sa.key")),
                format!("--root-ca-file={}", key("ca.crt")),
                "--use-service-account-credentials=true".into(),
                "--bind-address=127.0.0.1".into(),
            ],
        ),
        upstream(
            "kube-scheduler",
            vec![
                kubeconfig("scheduler.conf"),
                "--leader-elect=false".into(),
                "--bind-address=127.0.0.1".into(),
            ],
        ),
        upstream(
            "kubelet",
            vec![
                format!("--config={}", path("kubelet.yaml")),
                kubeconfig("kubelet.conf"),
                format!("--hostname-override={NODE}"),
                format!("--node-ip={ADDRESS}"),
            ],
        ),
        upstream("kube-proxy", vec![format!("--config={}", path("proxy.yaml"))]),
        upstream("coredns", vec!["-conf".into(), path("Corefile")]),
    ]
}

fn api_server(key: &dyn Fn(&str) -> String) -> Vec<String> {
    vec![
        "--etcd-servers=http://127.0.0.1:2379".into(),
        format!("--advertise-address={ADDRESS}"),
        format!("--service-cluster-ip-range={SERVICES}"),
        "--authorization-mode=Node,RBAC".into(),
        "--allow-privileged=true".into(),
        format!("--client-ca-file={}", key("ca.crt")),
        format!("--tls-cert-file={}", key("apiserver.crt")),
        format!("--tls-private-key-file={}", key("apiserver.key")),
        format!("--kubelet-client-certificate={}", key("kubelet-client.crt")),
        format!("--kubelet-client-key={}", key("kubelet-client.key")),
        format!("--kubelet-certificate-authority={}", key("ca.crt")),
        "--kubelet-preferred-address-types=InternalIP".into(),
        format!("--service-account-key-file={}", key("sa.pub")),
        format!("--service-account-signing-key-file={}", key("sa.key")),
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local".into(),
    ]
}

fn start(state: &Path, component: &Component) -> Result<Child> {
    let path = state.join("logs").join(component.name);
    let log = File::options().create(true).append(true).open(path)?;
    let errors = log.try_clone()?;
    let mut command = Command::new(&component.program);
    command.args(&component.arguments).stdin(Stdio::null()).stdout(log).stderr(errors);
    command.spawn().with_context(|| format!("cannot start {}", component.name))
}
