//! Configuration files of the components, with the reason for each unusual setting.

use std::path::{Path, PathBuf};

use anyhow::Result;
use rustix::fs::Mode;

use crate::host;

/// Address of CoreDNS, on the first node.
pub const DNS: &str = "172.30.0.100";
/// CoreDNS's readiness endpoint: ready once it has listed the Services.
pub const DNS_READY: &str = "172.30.0.100:8181";
/// Service address ranges by IP family; the first family is the default of Services.
const SERVICES: &[&str] = &["10.96.0.0/16", "fd00:96::/112"];
/// Pod address ranges of all nodes, by IP family.
const PODS: &[&str] = &["10.244.0.0/16", "fd00:244::/48"];
/// The sandbox image of pods.
pub const PAUSE_IMAGE: &str = "tulle.local/pause:1";

/// Whether this machine's kernel has IPv6; the cluster is dual-stack then.
pub fn has_ipv6() -> bool {
    Path::new("/proc/sys/net/ipv6").exists()
}

/// Service address ranges of the available IP families.
pub fn services() -> &'static [&'static str] {
    SERVICES.split_at(if has_ipv6() { 2 } else { 1 }).0
}

fn pods() -> String {
    PODS.split_at(if has_ipv6() { 2 } else { 1 }).0.join(",")
}

/// A node of a cluster; the first one also runs the control plane.
#[derive(Clone, Debug)]
pub struct Node {
    /// Folder of the cluster's files.
    pub state: PathBuf,
    /// Number of the node, from 1.
    pub number: u8,
}

impl Node {
    /// Name of the Node object.
    pub fn name(&self) -> String {
        if self.number == 1 { "node".to_owned() } else { format!("node-{}", self.number) }
    }

    /// IPv4 address, on a bridge of the first node (not every kernel has `dummy` devices).
    pub fn address(&self) -> String {
        format!("172.30.0.{}", self.number)
    }

    /// IPv6 address.
    pub fn address_v6(&self) -> String {
        format!("fd00:30::{:x}", self.number)
    }

    /// Addresses of all available IP families, comma-separated.
    pub fn addresses(&self) -> String {
        if has_ipv6() { format!("{},{}", self.address(), self.address_v6()) } else { self.address() }
    }

    /// IPv4 range of the node's pods.
    pub fn pods(&self) -> String {
        format!("10.244.{}.0/24", self.number - 1)
    }

    /// IPv6 range of the node's pods.
    pub fn pods_v6(&self) -> String {
        format!("fd00:244:0:{:x}::/64", self.number)
    }

    /// Root control group of the node's kubelet, so that `down` removes it without touching those of another kubelet
    /// on this machine.
    pub fn cgroup(&self) -> String {
        format!("{}-{}", cgroup_prefix(&self.state), self.name())
    }

    /// Folder of the node's own files.
    pub fn folder(&self) -> PathBuf {
        self.state.join("nodes").join(self.name())
    }

    /// File that exists once the API server is ready.
    pub fn api_ready(&self) -> PathBuf {
        self.state.join("api-ready")
    }

    /// Socket of the node's containerd.
    pub fn containerd(&self) -> PathBuf {
        self.folder().join("containerd.sock")
    }
}

/// Prefix of the names of a cluster's control groups, different for each cluster on this machine.
pub fn cgroup_prefix(state: &Path) -> String {
    let name = state.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    format!("tulle-{name}")
}

/// File in a cluster's folder by which `down` knows that it may remove it.
pub const MARKER: &str = ".tulle-cluster";

/// Writes the configuration files of all nodes.
pub fn write(nodes: &[Node]) -> Result<()> {
    for node in nodes.iter().take(1) {
        host::write(&node.state.join(MARKER), "This folder is removed by: cargo xtask cluster down\n")?;
    }
    for node in nodes {
        let (folder, state) = (node.folder(), node.state.as_path());
        for made in ["cni", "kubelet", "var-cni", "podlogs", "containerlogs", "images", "static-pods"] {
            std::fs::create_dir_all(folder.join(made))?;
        }
        std::fs::create_dir_all(state.join("logs"))?;
        rustix::fs::chmod(state, Mode::from_bits_truncate(0o755))?;
        let files = [
            ("resolv.conf", String::new()),
            ("cni/10-node.conflist", cni(node)),
            ("containerd.toml", containerd(&folder.display().to_string())),
            ("kubelet.yaml", kubelet(node)),
            ("proxy.yaml", proxy(node)),
        ];
        for (name, content) in files {
            host::write(&folder.join(name), content)?;
        }
        if node.number == 1 {
            std::fs::create_dir_all(state.join("etcd"))?;
            host::write(&state.join("Corefile"), corefile(&state.display().to_string()))?;
            host::write(&state.join("dns.yaml"), dns_service())?;
        }
    }
    Ok(())
}

/// CNI configuration: a routed veth pair per pod, not a bridge. On a bridge, replies between two pods bypass the
/// translation back to the Service's address unless the kernel has br_netfilter. Version 0.4.0, because distributions
/// still ship plugins of 2020.
fn cni(node: &Node) -> String {
    let (mut ranges, mut routes) =
        (format!(r#"[{{"subnet": "{}"}}]"#, node.pods()), r#"{"dst": "0.0.0.0/0"}"#.to_owned());
    if has_ipv6() {
        ranges += &format!(r#", [{{"subnet": "{}"}}]"#, node.pods_v6());
        routes += r#", {"dst": "::/0"}"#;
    }
    format!(
        r#"{{"cniVersion": "0.4.0", "name": "node", "plugins": [
  {{"type": "ptp", "ipMasq": false,
   "ipam": {{"type": "host-local", "ranges": [{ranges}], "routes": [{routes}]}}}},
  {{"type": "portmap", "capabilities": {{"portMappings": true}}}}]}}
"#
    )
}

/// `restrict_oom_score_adj`, because without CAP_SYS_RESOURCE a sandbox cannot lower its OOM score and fails to start.
fn containerd(folder: &str) -> String {
    format!(
        r#"version = 2
root = "{folder}/containerd"
state = "/run/containerd"
[plugins."io.containerd.internal.v1.opt"]
  path = "{folder}/opt"
[grpc]
  address = "{folder}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{folder}/cni"
"#
    )
}

/// No eviction and no image collection (a developer's disk may be nearly full); cgroup v1 accepted; a
/// serving certificate of the cluster's authority, without which exec, logs and port-forward fail.
fn kubelet(node: &Node) -> String {
    let (state, folder, cgroup) = (node.state.display(), node.folder(), node.cgroup());
    let (folder, name) = (folder.display(), node.name());
    format!(
        r#"apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {{anonymous: {{enabled: false}}, webhook: {{enabled: true}}, x509: {{clientCAFile: {state}/pki/ca.crt}}}}
authorization: {{mode: Webhook}}
cgroupDriver: cgroupfs
cgroupRoot: /{cgroup}
clusterDNS: [10.96.0.10]
clusterDomain: cluster.local
containerRuntimeEndpoint: unix://{folder}/containerd.sock
enforceNodeAllocatable: []
evictionHard: {{memory.available: "0%", nodefs.available: "0%", nodefs.inodesFree: "0%", imagefs.available: "0%"}}
failCgroupV1: false
failSwapOn: false
imageGCHighThresholdPercent: 100
maxPods: 250
nodeStatusUpdateFrequency: 5s
resolvConf: {folder}/resolv.conf
serializeImagePulls: false
shutdownGracePeriod: 0s
staticPodPath: {folder}/static-pods
syncFrequency: 10s
volumePluginDir: {folder}/volume-plugins
tlsCertFile: {state}/pki/{name}-server.crt
tlsPrivateKeyFile: {state}/pki/{name}-server.key
"#
    )
}

fn proxy(node: &Node) -> String {
    let (state, name, pods) = (node.state.display(), node.name(), pods());
    format!(
        r#"apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
clientConnection: {{kubeconfig: {state}/pki/proxy.conf}}
clusterCIDR: {pods}
hostnameOverride: {name}
conntrack: {{maxPerCore: 0, min: 0, tcpCloseWaitTimeout: 0s, tcpEstablishedTimeout: 0s}}
"#
    )
}

/// No cache and a TTL of one second, because otherwise a Service that is created again resolves to its old address.
fn corefile(state: &str) -> String {
    format!(
        ".:53 {{
  bind {DNS}
  errors
  ready {DNS_READY}
  kubernetes cluster.local in-addr.arpa ip6.arpa {{
    kubeconfig {state}/pki/admin.conf
    ttl 1
  }}
}}
"
    )
}

/// Service kube-dns, without selector because CoreDNS is a process on the node.
fn dns_service() -> String {
    format!(
        r#"apiVersion: v1
kind: Service
metadata: {{name: kube-dns, namespace: kube-system}}
spec: {{clusterIP: 10.96.0.10, ports: [{{name: dns, port: 53, protocol: UDP}}, {{name: dns-tcp, port: 53, protocol: TCP}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: kube-dns, namespace: kube-system, labels: {{kubernetes.io/service-name: kube-dns}}}}
addressType: IPv4
ports: [{{name: dns, port: 53, protocol: UDP}}, {{name: dns-tcp, port: 53, protocol: TCP}}]
endpoints: [{{addresses: [{DNS}], conditions: {{ready: true}}}}]
"#
    )
}
