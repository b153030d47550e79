//! Pods without the sidecar that their namespace asks for.
//!
//! In: pods, namespaces and exemptions of the model. Out: the pods to warn about, each with the reason. Pods
//! that can never have a sidecar are left out, except where one is required.

use std::sync::Arc;

use tulle_crds::keys;
use tulle_mesh::event_reason::EventReason;

use super::object::{Injection, Obstacle};
use super::{Model, Namespace, Pod};

/// Namespaces that the webhook leaves out whatever their labels, beside Tulle's own; see
/// `config/base/admission.yaml`.
const NEVER_INJECTED: [&str; 3] = ["kube-system", "kube-public", "kube-node-lease"];

/// A pod without the sidecar that its namespace asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UninjectedPod {
    /// Its uid.
    pub uid: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Why it has none.
    pub why: Uninjected,
}

/// Why a pod has no sidecar although its namespace asks for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Uninjected {
    /// It was created before its namespace was labelled, or while the webhook did not answer.
    NotAdmitted,
    /// It carries the label `disabled`, which has no effect where a sidecar is required.
    OptOutIgnored,
    /// A sidecar is required, and this pod cannot have one.
    Impossible(Obstacle),
}

impl Uninjected {
    /// The reason of the event.
    pub fn reason(self) -> EventReason {
        match self {
            Self::NotAdmitted => EventReason::NoSidecar,
            Self::OptOutIgnored => EventReason::OptOutIgnored,
            Self::Impossible(_) => EventReason::SidecarImpossible,
        }
    }

    /// The text of the event: the cause and the remedy.
    pub fn message(self, namespace: &str) -> String {
        match self {
            Self::NotAdmitted => format!(
                "no sidecar: the pod was created before namespace {namespace} was labelled {}, or while the webhook did not answer; recreate the pod to inject one",
                keys::INJECT
            ),
            Self::OptOutIgnored => format!(
                "no sidecar: label {}=disabled has no effect because namespace {namespace} requires one; recreate the pod without the label, or exempt its service account in MeshConfig mesh",
                keys::INJECT
            ),
            Self::Impossible(obstacle) => format!(
                "no sidecar: namespace {namespace} requires one, and {} cannot have it; move the pod to another namespace, or exempt its service account in MeshConfig mesh",
                match obstacle {
                    Obstacle::Mirror => "a static pod",
                    Obstacle::HostNetwork => "a pod with hostNetwork",
                    Obstacle::Windows => "a Windows pod",
                    Obstacle::OtherMesh => "a pod with the sidecar of another mesh",
                }
            ),
        }
    }
}

impl Model {
    /// Pods without the sidecar that their namespace asks for, in order of namespace and name.
    pub fn uninjected_pods(&self) -> Vec<UninjectedPod> {
        let mut found: Vec<UninjectedPod> = self
            .pods()
            .filter_map(|pod| {
                let why = uninjected(pod, self.injection(&pod.namespace)?, self.is_exempt(pod))?;
                let (uid, namespace, name) = (&pod.uid, &pod.namespace, &pod.name);
                Some(UninjectedPod {
                    uid: Arc::clone(uid),
                    namespace: Arc::clone(namespace),
                    name: Arc::clone(name),
                    why,
                })
            })
            .collect();
        found.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        found
    }

    /// Namespaces whose pods need the trust bundle: those whose new pods get a sidecar, and those where pods have one all
    /// the same, because the label was removed, or a stored manifest of an injected pod was created there.
    pub fn trusting_namespaces(&self) -> Vec<Arc<str>> {
        let needs = |(name, namespace): &(&Arc<str>, &Namespace)| {
            let has_sidecars = self.sidecars.contains_key(*name) && !namespace.terminating;
            has_sidecars || self.injection(name).is_some()
        };
        self.namespaces.iter().filter(needs).map(|(name, _)| Arc::clone(name)).collect()
    }

    /// What a namespace asks of its pods. `None`: nothing, or no pod can be created in it any more.
    fn injection(&self, namespace: &str) -> Option<Injection> {
        if NEVER_INJECTED.contains(&namespace) || self.own_namespace.as_deref() == Some(namespace) {
            return None;
        }
        let found = self.namespaces.get(namespace).filter(|found| !found.terminating)?;
        found.injection()
    }

    fn is_exempt(&self, pod: &Pod) -> bool {
        self.settings.exemptions.iter().any(|exempt| {
            exempt.namespace == *pod.namespace && exempt.service_account == *pod.service_account
        })
    }
}

/// Decides whether to warn about a pod.
fn uninjected(pod: &Pod, injection: Injection, exempt: bool) -> Option<Uninjected> {
    if pod.injected || pod.finished || pod.terminating || exempt {
        return None;
    }
    let opted_out = pod.label(keys::INJECT) == Some("disabled");
    let obstacle = pod.obstacle.or_else(|| pod.host_network.then_some(Obstacle::HostNetwork));
    match (obstacle, injection) {
        // The API server admits the mirror of a static pod whatever the namespace requires.
        (Some(Obstacle::Mirror), _) | (Some(_), Injection::Enabled) => None,
        (Some(obstacle), Injection::Required) => Some(Uninjected::Impossible(obstacle)),
        (None, Injection::Enabled) if opted_out => None,
        (None, Injection::Required) if opted_out => Some(Uninjected::OptOutIgnored),
        (None, _) => Some(Uninjected::NotAdmitted),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::tests::pod;

    fn labelled(value: &str) -> Namespace {
        Namespace { labels: [(keys::INJECT.to_owned(), value.to_owned())].into(), terminating: false }
    }

    /// The pod `shop/a` without a sidecar.
    fn plain() -> Pod {
        Pod { injected: false, ..pod("a", "10.1.0.1", "r1") }
    }

    fn opted_out() -> Pod {
        Pod { labels: Box::new([(keys::INJECT.into(), "disabled".into())]), ..plain() }
    }

    fn with(obstacle: Obstacle) -> Pod {
        Pod { obstacle: Some(obstacle), ..plain() }
    }

    /// Why `shop/a` is reported where the namespace asks for `value`.
    fn reported(value: &str, pod: Pod) -> Option<Uninjected> {
        let mut model = Model::default();
        model.apply_namespace("shop".into(), labelled(value));
        model.apply_pod(pod);
        model.uninjected_pods().first().map(|pod| pod.why)
    }

    #[test]
    fn a_pod_that_was_not_admitted_is_reported() {
        assert_eq!(reported("enabled", plain()), Some(Uninjected::NotAdmitted));
        assert_eq!(reported("required", plain()), Some(Uninjected::NotAdmitted));
        assert_eq!(reported("other", plain()), None);
    }

    #[test]
    fn a_pod_with_a_sidecar_or_at_its_end_is_not_reported() {
        for pod in [
            Pod { injected: true, ..plain() },
            Pod { finished: true, ..plain() },
            Pod { terminating: true, ..plain() },
        ] {
            assert_eq!(reported("required", pod), None);
        }
    }

    #[test]
    fn a_pod_that_cannot_have_a_sidecar_is_reported_only_where_one_is_required() {
        for obstacle in [Obstacle::Windows, Obstacle::OtherMesh, Obstacle::HostNetwork] {
            assert_eq!(reported("enabled", with(obstacle)), None, "{obstacle:?}");
            assert_eq!(reported("required", with(obstacle)), Some(Uninjected::Impossible(obstacle)));
        }
        let on_the_node = || Pod { host_network: true, ..plain() };
        assert_eq!(reported("enabled", on_the_node()), None);
        assert_eq!(reported("required", on_the_node()), Some(Uninjected::Impossible(Obstacle::HostNetwork)));
    }

    #[test]
    fn a_static_pod_is_never_reported() {
        assert_eq!(reported("enabled", with(Obstacle::Mirror)), None);
        let on_the_node = Pod { host_network: true, ..with(Obstacle::Mirror) };
        assert_eq!(reported("required", on_the_node), None);
    }

    #[test]
    fn the_label_disabled_is_obeyed_where_a_sidecar_is_optional_and_reported_where_it_is_required() {
        assert_eq!(reported("enabled", opted_out()), None);
        assert_eq!(reported("required", opted_out()), Some(Uninjected::OptOutIgnored));
        let message = Uninjected::OptOutIgnored.message("shop");
        assert!(message.contains("has no effect because namespace shop requires one"), "{message}");
    }

    #[test]
    fn an_exempt_service_account_is_not_reported() {
        let mut model = Model::default();
        model.apply_namespace("shop".into(), labelled("required"));
        model.apply_pod(plain());
        let config = json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "MeshConfig", "metadata": {"name": "mesh"},
            "spec": {"exemptions": [{"namespace": "shop", "serviceAccount": "web"}]}});
        model.apply_config(Some(&serde_json::from_value(config).unwrap()));
        assert!(model.uninjected_pods().is_empty());
    }

    #[test]
    fn namespaces_that_the_webhook_leaves_out_or_that_terminate_are_not_meshed_by_a_label() {
        let mut model = Model::new("mesh-system", "cluster.local");
        for name in NEVER_INJECTED.into_iter().chain(["mesh-system"]) {
            model.apply_namespace(name.into(), labelled("enabled"));
            model.apply_pod(Pod { namespace: name.into(), uid: name.into(), ..plain() });
        }
        model.apply_namespace("shop".into(), Namespace { terminating: true, ..labelled("enabled") });
        model.apply_pod(plain());
        assert!(model.uninjected_pods().is_empty());
        assert!(model.trusting_namespaces().is_empty());
        model.apply_namespace("shop".into(), labelled("enabled"));
        assert_eq!(model.trusting_namespaces(), [Arc::<str>::from("shop")]);
    }

    #[test]
    fn a_namespace_needs_the_trust_bundle_while_a_pod_of_it_has_a_sidecar() {
        let mut model = Model::default();
        let unlabelled = |terminating| Namespace { terminating, ..Namespace::default() };
        let needing = |model: &Model| model.trusting_namespaces().len();
        model.apply_namespace("shop".into(), unlabelled(false));
        model.apply_pod(plain());
        assert_eq!(needing(&model), 0, "a pod without a sidecar");
        let injected = || Pod { uid: "b".into(), injected: true, ..plain() };
        model.apply_pod(injected());
        model.apply_pod(Pod { ready: !injected().ready, ..injected() });
        assert_eq!(model.trusting_namespaces(), [Arc::<str>::from("shop")]);
        model.apply_namespace("shop".into(), unlabelled(true));
        assert_eq!(needing(&model), 0, "nothing can be created in it");
        model.apply_namespace("shop".into(), unlabelled(false));
        model.apply_pod(Pod { finished: true, ..injected() });
        assert_eq!(needing(&model), 0, "the last sidecar has ended");
        model.delete_pod("b");
        model.apply_pod(injected());
        assert_eq!(needing(&model), 1);
        model.delete_pod("b");
        assert_eq!(needing(&model), 0, "the last sidecar is gone");
        model.apply_namespace("shop".into(), labelled("enabled"));
        assert_eq!(needing(&model), 1);
    }

    #[test]
    fn the_webhook_configurations_name_the_same_namespaces() {
        let configurations = include_str!("../../../config/base/admission.yaml");
        for name in NEVER_INJECTED {
            assert!(configurations.contains(name), "{name} is not in config/base/admission.yaml");
        }
    }
}
