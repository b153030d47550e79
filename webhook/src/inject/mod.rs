//! Injects the sidecar into a pod.
//!
//! In: a pod as JSON and a [`Context`]. Out: an [`Outcome`] and warnings for the pod's author. Never reads the
//! cluster. The patch adds or replaces single fields, so fields that this build does not know survive. Injecting
//! twice changes nothing. An existing pod is never injected: its update only keeps what is there.
//!
//! ```text
//!   annotations  settings of a pod or namespace; invalid ones cause a warning
//!   containers   tulle-init and tulle-proxy
//!   probes       kubelet's probes, moved to the sidecar
//!   reserved     the names of what is injected
//!   resources    requests and limits that the namespace allows
//!   review       a pod that has the sidecar already
//!   seal         the signature by which a later call recognises an injected pod
//!   update       puts back what an update of a pod has overwritten
//! ```

mod annotations;
mod containers;
mod probes;
mod reserved;
mod resources;
mod review;
mod seal;
mod update;

use std::collections::BTreeMap;
use std::net::SocketAddr;

use json_patch::jsonptr::PointerBuf;
use json_patch::{AddOperation, MoveOperation, Patch, PatchOperation};
use serde_json::{Value, json};
use tulle_crds::{SidecarDefaults, keys};
use tulle_mesh::ports;

pub use annotations::{PodSettings, SourceAddress, warn_about_misplaced};
use resources::Asked;
pub use resources::NamespaceLimits;
pub use seal::SealKey;
pub use update::restore;

/// The injected init container.
pub const INIT: &str = "tulle-init";
/// The injected sidecar.
pub const PROXY: &str = "tulle-proxy";
/// Annotation by which `kubectl logs` and `kubectl exec` choose a container without a note about the others.
const DEFAULT_CONTAINER: &str = "kubectl.kubernetes.io/default-container";

/// Value of the namespace's label `tulle.dev/inject`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Pods get a sidecar; a pod can opt out.
    Enabled,
    /// Pods get a sidecar or are rejected.
    Required,
}

/// Inputs of injection besides the pod.
#[derive(Clone, Debug)]
pub struct Context {
    /// The namespace's injection mode.
    pub mode: Mode,
    /// The pod's namespace.
    pub namespace: Namespace,
    /// Mesh-wide defaults of sidecars, from MeshConfig.
    pub defaults: SidecarDefaults,
    /// Whether MeshConfig exempts the pod.
    pub exempt: bool,
    /// Whether a Canary targets the pod's workload and the pod's revision is not approved yet.
    pub needs_approval: bool,
    /// The sidecar's image.
    pub image: String,
    /// `host:port` of the operator.
    pub operator: String,
    /// The addresses of the operator's Service, for pods that cannot resolve `operator`; none while they are unknown.
    pub operator_addresses: Vec<SocketAddr>,
    /// `namespace/service-account` of the operator.
    pub operator_identity: String,
    /// The trust domain.
    pub trust_domain: String,
    /// Signs what is injected.
    pub key: SealKey,
}

/// A pod's namespace, as far as injection depends on it.
#[derive(Clone, Debug, Default)]
pub struct Namespace {
    /// Name of the namespace.
    pub name: String,
    /// Pod Security level that the namespace enforces.
    pub pod_security: Option<String>,
    /// Annotations of the namespace: default settings of the sidecars of its pods.
    pub annotations: BTreeMap<String, String>,
    /// LimitRanges and ResourceQuotas of the namespace.
    pub limits: NamespaceLimits,
}

/// Decision about a pod.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Admit the pod with this patch.
    Inject(Patch),
    /// Admit the pod unchanged.
    Skip,
    /// Reject the pod with this message.
    Refuse(String),
}

/// Decides what to do with a pod, and returns warnings for its author.
pub fn inject(pod: &Value, context: &Context) -> (Outcome, Vec<String>) {
    let mut warnings = Vec::new();
    let outcome = decide(pod, context, &mut warnings);
    (outcome, warnings)
}

fn decide(pod: &Value, context: &Context, warnings: &mut Vec<String>) -> Outcome {
    let label = pod.pointer("/metadata/labels/tulle.dev~1inject").and_then(Value::as_str);
    // Kubelet runs a static pod from its file, so changes to its mirror pod would have no effect.
    if pod.pointer("/metadata/annotations/kubernetes.io~1config.mirror").is_some() {
        return Outcome::Skip;
    }
    if is_injected(pod) {
        return review::review(pod, context, warnings);
    }
    if context.exempt {
        return Outcome::Skip;
    }
    match (label, context.mode) {
        (Some("disabled"), Mode::Enabled) => return Outcome::Skip,
        (Some("disabled"), Mode::Required) => {
            warnings.push(format!(
                "label {}=disabled has no effect because namespace {} requires a sidecar; to leave the pod out, add its service account to spec.exemptions of MeshConfig mesh",
                keys::INJECT, context.namespace.name
            ));
        }
        (Some("enabled" | "required") | None, _) => {}
        (Some(other), _) => {
            warnings.push(format!(
                "label {}={other} has no effect because the value is unknown; to leave the pod out, set it to disabled",
                keys::INJECT
            ));
        }
    }
    annotations::warn_about_labels(pod, warnings);
    if let Some(why) = why_not_injectable(pod) {
        return refuse_or_skip(context, why, warnings);
    }
    if let Some(what) = reserved::name_taken(pod) {
        return Outcome::Refuse(format!("the name of {what} is reserved for the sidecar; rename it"));
    }
    if let Some(container) = runs_as_proxy_uid(pod) {
        return Outcome::Refuse(format!(
            "{container} runs as uid {uid}, which is reserved for the sidecar because traffic of this uid is not redirected; choose another runAsUser",
            uid = ports::PROXY_UID
        ));
    }
    if let Some(level @ ("baseline" | "restricted")) = context.namespace.pod_security.as_deref() {
        warnings.push(format!(
            "namespace {} enforces Pod Security {level}, which forbids the capability NET_ADMIN of the injected container {INIT}, so the pod will be rejected; label the namespace pod-security.kubernetes.io/enforce=privileged",
            context.namespace.name
        ));
    }
    if let Some(policy @ ("Default" | "None")) = pod.pointer("/spec/dnsPolicy").and_then(Value::as_str)
        && context.operator_addresses.is_empty()
    {
        warnings.push(format!(
            "spec.dnsPolicy is {policy}, so the sidecar may be unable to resolve {}; if the pod stays in Init, set dnsPolicy to ClusterFirst, or to None with the cluster's name server and the cluster's domain (cluster.local) in spec.dnsConfig.nameservers and spec.dnsConfig.searches",
            context.operator
        ));
    }
    warn_about_ports(pod, warnings);
    let settings = PodSettings::read(annotations_of(pod), "", warnings);
    if settings.skips_ports() && context.mode == Mode::Required {
        return Outcome::Refuse(format!(
            "annotations tulle.dev/skip-inbound-ports and tulle.dev/skip-outbound-ports are not allowed because namespace {} requires that all traffic passes through the sidecar; remove them, or exempt the service account in MeshConfig mesh",
            context.namespace.name
        ));
    }
    let all = settings.clone().or(context.defaults(warnings));
    if all.preserves_source_address() {
        warnings.push(format!(
            "annotation tulle.dev/source-address=preserve gives container {PROXY} the capability NET_RAW and allowPrivilegeEscalation: true, because the kernel lets a process without it send from no client's address; the sidecar stays unready where a policy takes it away"
        ));
    }
    Outcome::Inject(patch(pod, context, Asked { pod: &settings, all: &all }, warnings))
}

/// Labels a pod as one that has a sidecar.
fn label_version(pod: &Value, version: &str, operations: &mut Operations) {
    if pod.pointer("/metadata/labels").is_none() {
        operations.add(&["metadata", "labels"], json!({}));
    }
    operations.add(&["metadata", "labels", keys::INJECTED], json!(version));
}

impl Context {
    /// Default settings of the sidecar: the namespace's annotations, then MeshConfig.
    fn defaults(&self, warnings: &mut Vec<String>) -> PodSettings {
        let annotations =
            self.namespace.annotations.iter().map(|(key, value)| (key.as_str(), value.as_str()));
        let of = format!(" of namespace {}", self.namespace.name);
        let mut settings = PodSettings::read(annotations, &of, warnings);
        if settings.skips_ports() && self.mode == Mode::Required {
            warnings.push(format!(
                "annotations tulle.dev/skip-inbound-ports and tulle.dev/skip-outbound-ports{of} have no effect because the namespace requires that all traffic passes through the sidecar"
            ));
            settings = PodSettings { skip_inbound_ports: vec![], skip_outbound_ports: vec![], ..settings };
        }
        settings.or(PodSettings::of_mesh(&self.defaults, warnings))
    }
}

fn annotations_of(pod: &Value) -> impl Iterator<Item = (&str, &str)> {
    let annotations = pod.pointer("/metadata/annotations").and_then(Value::as_object);
    annotations.into_iter().flatten().map(|(key, value)| (key.as_str(), value.as_str().unwrap_or("")))
}

/// Warns about ports of the sidecar that the pod's own containers declare or probe.
fn warn_about_ports(pod: &Value, warnings: &mut Vec<String>) {
    let lists = ["/spec/containers", "/spec/initContainers"];
    for container in lists.iter().flat_map(|path| containers_at(pod, path)) {
        let is_tcp =
            |port: &&Value| port.get("protocol").and_then(Value::as_str).is_none_or(|name| name == "TCP");
        let declared =
            containers_at(container, "/ports").filter(is_tcp).filter_map(|port| port.get("containerPort"));
        let probes = probes::KINDS.iter().filter_map(|kind| container.get(kind));
        let probed = probes.flat_map(|probe| {
            ["/httpGet/port", "/tcpSocket/port", "/grpc/port"]
                .into_iter()
                .filter_map(|path| probe.pointer(path))
        });
        let mut taken: Vec<u64> = declared.chain(probed).filter_map(Value::as_u64).collect();
        taken.retain(|port| ports::SIDECAR.iter().any(|ours| u64::from(*ours) == *port));
        taken.sort_unstable();
        taken.dedup();
        for port in taken {
            warnings.push(format!(
                "container {} uses port {port}, on which the sidecar listens, so one of the two will not start; choose a port outside {} to {}",
                name_of(container), ports::OUTBOUND, ports::PROBES
            ));
        }
    }
}

/// The reason why a pod cannot have a sidecar, if there is one.
fn why_not_injectable(pod: &Value) -> Option<&'static str> {
    if pod.pointer("/spec/hostNetwork") == Some(&Value::Bool(true)) {
        return Some("it has hostNetwork: true, and the redirect rules would apply to the whole node");
    }
    if is_windows(pod) {
        return Some("it is a Windows pod");
    }
    let mut containers =
        ["/spec/containers", "/spec/initContainers"].into_iter().flat_map(|path| containers_at(pod, path));
    containers
        .any(|container| ["istio-proxy", "linkerd-proxy"].contains(&name_of(container)))
        .then_some("it has the sidecar of another mesh, and both would redirect the same connections")
}

/// Whether `spec.os`, the node selector or the node affinity restricts a pod to Windows nodes.
fn is_windows(pod: &Value) -> bool {
    const LABELS: [&str; 2] = ["kubernetes.io/os", "beta.kubernetes.io/os"];
    let windows = Some("windows");
    let selector = pod.pointer("/spec/nodeSelector");
    let selected =
        || LABELS.iter().any(|label| selector.and_then(|s| s.get(label)).and_then(Value::as_str) == windows);
    let terms =
        "/spec/affinity/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution/nodeSelectorTerms";
    let only_windows = |term: &Value| {
        containers_at(term, "/matchExpressions").any(|expression| {
            let text = |name: &str| expression.get(name).and_then(Value::as_str).unwrap_or("");
            let mut values = containers_at(expression, "/values").map(Value::as_str).peekable();
            LABELS.contains(&text("key"))
                && text("operator") == "In"
                && values.peek().is_some()
                && values.all(|value| value == windows)
        })
    };
    // A node has to match only one of the terms.
    let mut terms = containers_at(pod, terms).peekable();
    pod.pointer("/spec/os/name").and_then(Value::as_str) == windows
        || selected()
        || (terms.peek().is_some() && terms.all(only_windows))
}

fn refuse_or_skip(context: &Context, why: &str, warnings: &mut Vec<String>) -> Outcome {
    match context.mode {
        Mode::Required => Outcome::Refuse(format!(
            "namespace {} requires a sidecar, and the pod cannot have one because {why}; move it to another namespace, or exempt its service account in MeshConfig mesh",
            context.namespace.name
        )),
        Mode::Enabled => {
            warnings.push(format!("the pod gets no sidecar because {why}"));
            Outcome::Skip
        }
    }
}

/// Whether a pod has the sidecar, of whichever version.
pub fn is_injected(pod: &Value) -> bool {
    proxy_of(pod).is_some()
}

/// The sidecar of a pod.
fn proxy_of(pod: &Value) -> Option<&Value> {
    containers_at(pod, "/spec/initContainers").find(|container| reserved::is_proxy(container))
}

fn containers_at<'a>(pod: &'a Value, path: &str) -> impl Iterator<Item = &'a Value> {
    pod.pointer(path).and_then(Value::as_array).into_iter().flatten()
}

fn name_of(container: &Value) -> &str {
    container.get("name").and_then(Value::as_str).unwrap_or("")
}

/// The container, or the pod, whose `runAsUser` is the sidecar's uid.
fn runs_as_proxy_uid(pod: &Value) -> Option<String> {
    let uid = |value: Option<&Value>| value.and_then(Value::as_u64) == Some(u64::from(ports::PROXY_UID));
    let lists = ["/spec/containers", "/spec/initContainers"];
    for container in lists.iter().flat_map(|path| containers_at(pod, path)) {
        let name = name_of(container);
        if name != PROXY && uid(container.pointer("/securityContext/runAsUser")) {
            return Some(format!("container {name}"));
        }
    }
    uid(pod.pointer("/spec/securityContext/runAsUser")).then(|| "the pod".to_owned())
}

fn patch(pod: &Value, context: &Context, asked: Asked<'_>, warnings: &mut Vec<String>) -> Patch {
    let mut operations = Operations::default();
    let probes = probes::move_all(pod, &mut operations, warnings);
    let settings = asked.all;
    let resources = resources::resources(pod, asked, &context.namespace.limits, warnings);
    let (init, proxy) = (
        containers::init(context, settings, &resources),
        containers::proxy(context, settings, &resources, &probes),
    );
    let ours = json!({"spec": {"initContainers": [init, proxy], "volumes": containers::volumes()}});
    let seal = context.key.seal(&ours, &context.namespace.name, context.mode, &context.image);
    for (kind, resource, amount) in resources::pod_level(pod, &resources) {
        operations.add(&["spec", "resources", kind, resource], json!(amount));
    }
    if pod.pointer("/spec/initContainers").and_then(Value::as_array).is_none() {
        operations.add(&["spec", "initContainers"], json!([]));
    }
    // A pod that was copied without its sidecar may still have other parts of the injection.
    operations.remove_named(pod, "initContainers", &[INIT]);
    // Each is inserted at the front, so the resulting order is init, proxy, the pod's own init containers.
    operations.add(&["spec", "initContainers", "0"], proxy);
    operations.add(&["spec", "initContainers", "0"], init);
    if pod.pointer("/spec/volumes").and_then(Value::as_array).is_none() {
        operations.add(&["spec", "volumes"], json!([]));
    }
    let volumes = containers::volumes();
    operations.remove_named(pod, "volumes", &[name_of(&volumes[0]), name_of(&volumes[1])]);
    for volume in volumes {
        operations.add(&["spec", "volumes", "-"], volume);
    }
    label_version(pod, env!("CARGO_PKG_VERSION"), &mut operations);
    if pod.pointer("/metadata/annotations").is_none() {
        operations.add(&["metadata", "annotations"], json!({}));
    }
    operations.add(&["metadata", "annotations", keys::SEAL], json!(seal));
    if let Some(name) = default_container(pod) {
        operations.add(&["metadata", "annotations", DEFAULT_CONTAINER], json!(name));
    }
    if context.needs_approval {
        if pod.pointer("/spec/readinessGates").and_then(Value::as_array).is_none() {
            operations.add(&["spec", "readinessGates"], json!([]));
        }
        operations.add(&["spec", "readinessGates", "-"], json!({"conditionType": keys::GATE}));
    }
    Patch(operations.0)
}

/// The container that kubectl would choose without a note if there were no sidecar: the only one of the pod. One that
/// the pod's author has chosen stays.
fn default_container(pod: &Value) -> Option<&str> {
    let mut containers = containers_at(pod, "/spec/containers");
    let name = name_of(containers.next()?);
    let is_chosen = annotations_of(pod).any(|(key, _)| key == DEFAULT_CONTAINER);
    (containers.next().is_none() && !is_chosen && !name.is_empty()).then_some(name)
}

/// Operations of a patch.
#[derive(Default)]
struct Operations(Vec<PatchOperation>);

impl Operations {
    fn add(&mut self, path: &[&str], value: Value) {
        let path = PointerBuf::from_tokens(path.iter().copied());
        self.0.push(PatchOperation::Add(AddOperation { path, value }));
    }

    /// Removes the items of a list in the pod's spec that have one of these names.
    fn remove_named(&mut self, pod: &Value, list: &str, names: &[&str]) {
        let items: Vec<&Value> = containers_at(pod, &format!("/spec/{list}")).collect();
        // From the end, so that the places of the others stay.
        for (index, item) in items.into_iter().enumerate().rev() {
            if names.contains(&name_of(item)) {
                self.remove(&["spec", list, &index.to_string()]);
            }
        }
    }

    fn remove(&mut self, path: &[&str]) {
        let path = PointerBuf::from_tokens(path.iter().copied());
        self.0.push(PatchOperation::Remove(json_patch::RemoveOperation { path }));
    }

    /// Moves an item of a list in the pod's spec to the front.
    fn move_to_front(&mut self, list: &str, index: usize) {
        let index = index.to_string();
        let from = PointerBuf::from_tokens(["spec", list, index.as_str()]);
        let path = PointerBuf::from_tokens(["spec", list, "0"]);
        self.0.push(PatchOperation::Move(MoveOperation { from, path }));
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
