//! Configuration of every component, with the reason for each odd setting.

use std::path::Path;

use anyhow::Result;
use rustix::fs::Mode;

use crate::host;

/// The node's name.
pub const NODE: &str = "node";
/// The node's address, on a bridge of its own (not every kernel has `dummy` devices).
pub const ADDRESS: &str = "172.30.0.1";
/// Where CoreDNS listens on the node.
pub const DNS: &str = "172.30.0.10";
/// Pod addresses.
pub const PODS: &str = "10.244.0.0/24";
/// Service addresses.
pub const SERVICES: &str = "10.96.0.0/16";
/// The control group that kubelet makes its own groups in: `down` removes it without touching those
/// of another kubelet on this machine.
pub const CGROUP: &str = "tulle-node";
/// The image of every pod's first container.
pub const PAUSE_IMAGE: &str = "tulle.local/pause:1";

/// Writes all configuration files below `state`.
pub fn write(state: &Path) -> Result<()> {
    for folder in ["logs", "cni", "etcd", "kubelet", "var-cni", "podlogs", "images"] {
        std::fs::create_dir_all(state.join(folder))?;
    }
    rustix::fs::chmod(state, Mode::from_bits_truncate(0o755))?;
    let shown = state.display();
    let files = [
        ("resolv.conf", String::new()),
        ("cni/10-node.conflist", cni()),
        ("containerd.toml", containerd(&shown.to_string())),
        ("kubelet.yaml", kubelet(&shown.to_string())),
        ("proxy.yaml", proxy(&shown.to_string())),
        ("Corefile", corefile(&shown.to_string())),
        ("dns.yaml", dns_service()),
    ];
    for (name, content) in files {
        host::write(&state.join(name), content)?;
    }
    Ok(())
}

fn cni() -> String {
    format!(
        r#"{{"cniVersion": "1.0.0", "name": "node", "plugins": [
  {{"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
   "ipam": {{"type": "host-local", "ranges": [[{{"subnet": "{PODS}"}}]], "routes": [{{"dst": "0.0.0.0/0"}}]}}}},
  {{"type": "portmap", "capabilities": {{"portMappings": true}}}}]}}
"#
    )
}

/// `restrict_oom_score_adj`: without CAP_SYS_RESOURCE every sandbox would die at its first write.
fn containerd(state: &str) -> String {
    format!(
        r#"version = 2
root = "{state}/containerd"
state = "/run/containerd"
[grpc]
  address = "{state}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{state}/cni"
"#
    )
}

/// No eviction and no image collection (a developer's disk may be nearly full); cgroup v1 accepted; a
/// serving certificate of the cluster's authority, without which exec, logs and port-forward fail.
fn kubelet(state: &str) -> String {
    format!(
        r#"apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {{anonymous: {{enabled: false}}, webhook: {{enabled: true}}, x509: {{clientCAFile: {state}/pki/ca.crt}}}}
authorization: {{mode: Webhook}}
cgroupDriver: cgroupfs
cgroupRoot: /{CGROUP}
clusterDNS: [10.96.0.10]
clusterDomain: cluster.local
containerRuntimeEndpoint: unix://{state}/containerd.sock
enforceNodeAllocatable: []
evictionHard: {{memory.available: "0%", nodefs.available: "0%", nodefs.inodesFree: "0%", imagefs.available: "0%"}}
failCgroupV1: false
failSwapOn: false
imageGCHighThresholdPercent: 100
maxPods: 250
nodeStatusUpdateFrequency: 5s
resolvConf: {state}/resolv.conf
serializeImagePulls: false
shutdownGracePeriod: 0s
syncFrequency: 10s
tlsCertFile: {state}/pki/kubelet-server.crt
tlsPrivateKeyFile: {state}/pki/kubelet-server.key
"#
    )
}

fn proxy(state: &str) -> String {
    format!(
        r#"apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
clientConnection: {{kubeconfig: {state}/pki/proxy.conf}}
clusterCIDR: {PODS}
hostnameOverride: {NODE}
conntrack: {{maxPerCore: 0, min: 0, tcpCloseWaitTimeout: 0s, tcpEstablishedTimeout: 0s}}
"#
    )
}

/// No cache and a TTL of one second: a Service made again under the same name would otherwise
/// resolve to its old address.
fn corefile(state: &str) -> String {
    format!(
        ".:53 {{
  bind {DNS}
  errors
  kubernetes cluster.local in-addr.arpa ip6.arpa {{
    kubeconfig {state}/pki/admin.conf
    ttl 1
  }}
}}
"
    )
}

/// CoreDNS is a process on the node behind a Service without selector.
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
