//! Pid 1 of the node's namespaces: mounts, networks, starts and restarts components, reaps orphans.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind, mount_change};
use rustix::process::{WaitOptions, wait};

use super::files::{DNS, Node, has_ipv6, services};
use crate::host;

/// Runs the first node, and inside it the others up to `count`. Returns only on an error.
pub fn run(state: &Path, components: &Path, count: u8) -> Result<()> {
    let node = Node { state: state.to_path_buf(), number: 1 };
    mounts(&node)?;
    first_network(&node)?;
    let mut later = control_plane(&node, components);
    later.extend(worker_components(&node, components));
    let mut first = api_server(&node, components);
    for number in 2..=count {
        let worker = Node { state: state.to_path_buf(), number };
        connect_worker(&worker)?;
        first.push(nested_node(&worker, components)?);
    }
    supervise(&node, first, later)
}

/// Runs another node, in namespaces nested in those of the first one.
pub fn run_worker(state: &Path, components: &Path, number: u8) -> Result<()> {
    let node = Node { state: state.to_path_buf(), number };
    mounts(&node)?;
    rustix::system::sethostname(node.name().as_bytes())?;
    enable_forwarding()?;
    supervise(&node, Vec::new(), worker_components(&node, components))
}

/// A process of the node.
struct Component {
    name: String,
    program: PathBuf,
    arguments: Vec<String>,
}

/// Starts components, and restarts those that end: kubelet, for example, exits when containerd does not listen yet.
///
/// The components in `later` are started once the API server is ready, because their retries back off: on a slow machine
/// the cluster would have no Services for a minute after that. Pid 1 also waits for orphans of containerd's shims.
fn supervise(node: &Node, first: Vec<Component>, mut later: Vec<Component>) -> Result<()> {
    let mut running = Vec::new();
    start_all(node, &mut running, first)?;
    start_all(node, &mut running, vec![containerd(node)])?;
    loop {
        if !later.is_empty() && node.api_ready().exists() {
            start_all(node, &mut running, std::mem::take(&mut later))?;
        }
        let Ok(Some((ended, _))) = wait(WaitOptions::NOHANG) else {
            thread::sleep(Duration::from_millis(50));
            continue;
        };
        for (child, component) in &mut running {
            if child.id() == ended.as_raw_nonzero().get().unsigned_abs() {
                thread::sleep(Duration::from_millis(300));
                *child = start(&node.state, component)?;
            }
        }
    }
}

fn start_all(node: &Node, running: &mut Vec<(Child, Component)>, components: Vec<Component>) -> Result<()> {
    for component in components {
        running.push((start(&node.state, &component)?, component));
    }
    Ok(())
}

/// Folders of the machine over which the node mounts its own, and the names of these in the node's folder.
const FOLDERS: [(&str, &str); 4] = [
    ("/var/lib/kubelet", "kubelet"),
    ("/var/lib/cni", "var-cni"),
    ("/var/log/pods", "podlogs"),
    ("/var/log/containers", "containerlogs"),
];

/// Mounts a tmpfs and the node's own folders over the host's, so that no network namespaces and pod volumes remain in the
/// host's folders.
fn mounts(node: &Node) -> Result<()> {
    mount_change("/", MountPropagationFlags::SHARED | MountPropagationFlags::REC)?;
    mount("tmpfs", "/run", "tmpfs", MountFlags::empty(), None).context("cannot mount /run")?;
    for (folder, source) in FOLDERS {
        fs::create_dir_all(folder)?;
        mount_bind(node.folder().join(source), folder).with_context(|| format!("cannot mount {folder}"))?;
    }
    kernel_settings(node)
}

/// Mounts files with the values that kubelet expects over some kernel settings, because kubelet would otherwise change
/// them for the developer's whole machine, including its behaviour on a kernel panic.
fn kernel_settings(node: &Node) -> Result<()> {
    for (name, value) in host::KERNEL_SETTINGS {
        let (file, setting) = (node.folder().join("sysctl").join(name), Path::new("/proc/sys").join(name));
        if !setting.exists() {
            continue;
        }
        host::write(&file, value)?;
        mount_bind(&file, &setting).with_context(|| format!("cannot mount {}", setting.display()))?;
    }
    Ok(())
}

/// Network of the first node. Its default route is unreachable, so that connections that would leave the node fail at
/// once instead of timing out. The routes to the Service ranges let processes on the node reach Services, because the
/// kernel looks up the route before it translates the address.
fn first_network(node: &Node) -> Result<()> {
    rustix::system::sethostname(node.name().as_bytes())?;
    ip(&[
        "link set lo up".to_owned(),
        "link add node0 type bridge".to_owned(),
        format!("addr add {}/24 dev node0", node.address()),
        format!("addr add {DNS}/32 dev node0"),
        "link set node0 up".to_owned(),
        "route add unreachable default metric 4278198272".to_owned(),
    ])?;
    if has_ipv6() {
        ip(&[
            format!("addr add {}/64 dev node0 nodad", node.address_v6()),
            "-6 route add unreachable default metric 4278198272".to_owned(),
        ])?;
    }
    let routes: Vec<String> = services().iter().map(|range| format!("route add {range} dev node0")).collect();
    ip(&routes)?;
    enable_forwarding()
}

fn enable_forwarding() -> Result<()> {
    let files: &[&str] =
        if has_ipv6() { &["ipv4/ip_forward", "ipv6/conf/all/forwarding"] } else { &["ipv4/ip_forward"] };
    let enable = |file: &&str| fs::write(Path::new("/proc/sys/net").join(file), "1");
    files.iter().try_for_each(enable).context("cannot enable IP forwarding")
}

/// Creates a network namespace for another node, with a veth pair to the first node's bridge and routes both ways.
fn connect_worker(worker: &Node) -> Result<()> {
    let (name, address, address_v6) = (worker.name(), worker.address(), worker.address_v6());
    let routes = |to: &Node, at: &str| {
        let mut routes = vec![format!("{at}route add {} via {}", to.pods(), to.address())];
        if has_ipv6() {
            routes.push(format!("{at}route add {} via {}", to.pods_v6(), to.address_v6()));
        }
        routes
    };
    ip(&[
        format!("netns add {name}"),
        format!("link add {name} type veth peer name uplink netns {name}"),
        format!("link set {name} master node0 up"),
        format!("-n {name} link set lo up"),
        format!("-n {name} addr add {address}/24 dev uplink"),
        format!("-n {name} link set uplink up"),
        format!("-n {name} route add unreachable default metric 4278198272"),
    ])?;
    if has_ipv6() {
        ip(&[
            format!("-n {name} addr add {address_v6}/64 dev uplink nodad"),
            format!("-n {name} -6 route add unreachable default metric 4278198272"),
        ])?;
    }
    ip(&routes(worker, ""))?;
    let to_services = services().iter().map(|range| format!("-n {name} route add {range} dev uplink"));
    ip(&to_services.collect::<Vec<_>>())?;
    for number in 1..worker.number {
        let other = Node { state: worker.state.clone(), number };
        ip(&routes(&other, &format!("-n {name} ")))?;
        if number > 1 {
            ip(&routes(worker, &format!("-n {} ", other.name())))?;
        }
    }
    Ok(())
}

fn ip(commands: &[String]) -> Result<()> {
    for command in commands {
        host::output(Command::new("ip").args(command.split(' ')))?;
    }
    Ok(())
}

/// Another node, as a process of the first one so that both end together.
fn nested_node(worker: &Node, components: &Path) -> Result<Component> {
    let mut arguments = vec![format!("--net=/run/netns/{}", worker.name()), "unshare".to_owned()];
    let flags = ["--mount", "--uts", "--ipc", "--fork", "--kill-child", "--propagation", "private"];
    arguments.extend(flags.map(str::to_owned));
    arguments.push(std::env::current_exe()?.display().to_string());
    arguments.extend(["cluster", "init"].map(str::to_owned));
    arguments.extend([worker.state.display().to_string(), components.display().to_string()]);
    arguments.push(format!("--worker={}", worker.number));
    Ok(Component { name: worker.name(), program: "nsenter".into(), arguments })
}

fn upstream(name: &str, node: &Node, components: &Path, mut arguments: Vec<String>) -> Component {
    arguments.insert(0, name.to_owned());
    Component { name: log_name(name, node), program: components.to_path_buf(), arguments }
}

/// Name of a component's log: that of the component, followed by the node's name except for the first node.
fn log_name(component: &str, node: &Node) -> String {
    if node.number == 1 { component.to_owned() } else { format!("{component}-{}", node.name()) }
}

fn containerd(node: &Node) -> Component {
    let config = node.folder().join("containerd.toml").display().to_string();
    let name = log_name("containerd", node);
    Component { name, program: "containerd".into(), arguments: vec!["-c".into(), config] }
}

/// Components of every node besides containerd.
fn worker_components(node: &Node, components: &Path) -> Vec<Component> {
    let path = |name: &str| node.folder().join(name).display().to_string();
    let kubeconfig = node.state.join("pki").join(format!("{}.conf", node.name()));
    let kubelet = vec![
        format!("--config={}", path("kubelet.yaml")),
        format!("--kubeconfig={}", kubeconfig.display()),
        format!("--hostname-override={}", node.name()),
        format!("--node-ip={}", node.addresses()),
    ];
    let proxy = vec![format!("--config={}", path("proxy.yaml"))];
    vec![upstream("kubelet", node, components, kubelet), upstream("kube-proxy", node, components, proxy)]
}

/// The API server and etcd.
fn api_server(node: &Node, components: &Path) -> Vec<Component> {
    let key = |name: &str| node.state.join("pki").join(name).display().to_string();
    let data = node.state.join("etcd").display().to_string();
    vec![
        upstream("etcd", node, components, vec!["--data-dir".into(), data, "--unsafe-no-fsync".into()]),
        upstream("kube-apiserver", node, components, api_server_arguments(&node.address(), &key)),
    ]
}

/// Components of the first node that are started once its API server is ready.
fn control_plane(node: &Node, components: &Path) -> Vec<Component> {
    let pki = node.state.join("pki");
    let path = |name: &str| node.state.join(name).display().to_string();
    let key = |name: &str| pki.join(name).display().to_string();
    let kubeconfig = |name: &str| format!("--kubeconfig={}", key(name));
    let upstream = |name: &str, arguments: Vec<String>| upstream(name, node, components, arguments);
    vec![
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
        upstream("coredns", vec!["-conf".into(), path("Corefile")]),
    ]
}

fn api_server_arguments(address: &str, key: &dyn Fn(&str) -> String) -> Vec<String> {
    vec![
        "--etcd-servers=http://127.0.0.1:2379".into(),
        format!("--advertise-address={address}"),
        format!("--service-cluster-ip-range={}", services().join(",")),
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
    let path = state.join("logs").join(&component.name);
    let log = File::options().create(true).append(true).open(path)?;
    let errors = log.try_clone()?;
    let mut command = Command::new(&component.program);
    command.env("PATH", host::path());
    command.args(&component.arguments).stdin(Stdio::null()).stdout(log).stderr(errors);
    command.spawn().with_context(|| format!("cannot start {}", component.name))
}
