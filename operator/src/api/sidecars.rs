//! The state of each pod's sidecar: pods from the model, and what their sidecars have acknowledged.

use std::collections::HashMap;
use std::time::Instant;

use tulle_mesh::query::{Sidecar, Sidecars};

use crate::discovery::SidecarState;
use crate::model::{Model, Pod};

/// The sidecars of a namespace, or of all, in order of namespace and name. A pod whose sidecar has not been heard of is
/// among them; a sidecar whose pod is gone is not. `me` is the pod of this replica.
pub fn sidecars(
    model: &Model,
    states: Vec<SidecarState>,
    me: &str,
    now: Instant,
    namespace: Option<&str>,
) -> Sidecars {
    let wanted = |found: &str| namespace.is_none_or(|namespace| namespace == found);
    let mut states: HashMap<_, _> = states.into_iter().map(|state| (state.pod_uid.clone(), state)).collect();
    let pods = model.pods().filter(|pod| pod.injected && !pod.finished && wanted(&pod.namespace));
    let mut sidecars: Vec<Sidecar> = pods.map(|pod| sidecar(pod, states.remove(&pod.uid), me, now)).collect();
    sidecars.sort_by(|a, b| (&a.namespace, &a.pod).cmp(&(&b.namespace, &b.pod)));
    let without = model.uninjected_pods().into_iter().filter(|pod| wanted(&pod.namespace));
    let without = without.map(|pod| format!("{}/{}", pod.namespace, pod.name)).collect();
    Sidecars { sidecars, without }
}

fn sidecar(pod: &Pod, state: Option<SidecarState>, me: &str, now: Instant) -> Sidecar {
    let known = Sidecar {
        namespace: pod.namespace.to_string(),
        pod: pod.name.to_string(),
        workload: pod.party(),
        ..Sidecar::default()
    };
    let Some(state) = state else { return known };
    let replica = || state.replica.as_deref().unwrap_or(me).to_owned();
    Sidecar {
        version: state.version,
        connected: state.connected,
        operator: state.connected.then(replica),
        acknowledged: state.acknowledged,
        resources: state.resources,
        behind_seconds: state.behind_since.map(|since| now.saturating_duration_since(since).as_secs()),
        refused: state.refused,
        certificate_not_after: state.certificate_not_after,
        memory_bytes: state.memory_bytes,
        ..known
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tulle_mesh::query::Party;

    use super::*;
    use crate::model::tests::{pod, shop};

    fn state(uid: &str, behind_since: Instant) -> SidecarState {
        SidecarState {
            pod_uid: uid.into(),
            version: "0.1.0".to_owned(),
            connected: true,
            acknowledged: 3,
            resources: 4,
            behind_since: Some(behind_since),
            refused: vec!["Access: unknown feature".to_owned()],
            certificate_not_after: Some(7),
            memory_bytes: Some(8),
            replica: None,
        }
    }

    #[test]
    fn a_pod_is_listed_whether_its_sidecar_was_heard_of_or_not() {
        let model = shop(&[
            pod("b", "10.1.0.2", "r1"),
            pod("a", "10.1.0.1", "r1"),
            Pod { injected: false, ..pod("c", "10.1.0.3", "r1") },
        ]);
        let start = Instant::now();
        let states = vec![state("uid-a", start), state("uid-gone", start)];
        let found = sidecars(&model, states, "operator-0", start + Duration::from_millis(2500), Some("shop"));
        let party = Party { namespace: "shop".into(), kind: "Deployment".into(), name: "web".into() };
        let known = Sidecar {
            namespace: "shop".to_owned(),
            pod: "a".to_owned(),
            workload: party.clone(),
            version: "0.1.0".to_owned(),
            connected: true,
            acknowledged: 3,
            resources: 4,
            behind_seconds: Some(2),
            refused: vec!["Access: unknown feature".to_owned()],
            certificate_not_after: Some(7),
            operator: Some("operator-0".to_owned()),
            memory_bytes: Some(8),
        };
        let silent = Sidecar {
            namespace: "shop".to_owned(),
            pod: "b".to_owned(),
            workload: party,
            ..Sidecar::default()
        };
        assert_eq!(found.sidecars, [known, silent]);
        assert_eq!(found.without, ["shop/c"]);
    }

    #[test]
    fn the_operator_of_a_sidecar_is_the_replica_that_it_is_connected_to() {
        let model = shop(&[pod("a", "10.1.0.1", "r1")]);
        let now = Instant::now();
        let operator = |state: SidecarState| {
            let found = sidecars(&model, vec![state], "operator-0", now, None);
            found.sidecars.into_iter().next().unwrap().operator
        };
        let relayed = SidecarState { replica: Some("operator-1".into()), ..state("uid-a", now) };
        assert_eq!(operator(state("uid-a", now)).as_deref(), Some("operator-0"));
        assert_eq!(operator(relayed.clone()).as_deref(), Some("operator-1"));
        assert_eq!(operator(SidecarState { connected: false, ..relayed }), None);
    }

    #[test]
    fn another_namespace_is_not_shown() {
        let model =
            shop(&[pod("a", "10.1.0.1", "r1"), Pod { injected: false, ..pod("c", "10.1.0.3", "r1") }]);
        let of = |namespace| sidecars(&model, Vec::new(), "operator-0", Instant::now(), namespace);
        assert_eq!(of(Some("payments")), Sidecars::default());
        assert_eq!(of(None).sidecars.len(), 1);
    }

    #[test]
    fn a_pod_without_a_workload_is_its_own() {
        let lone = Pod { workload: None, ..pod("a", "10.1.0.1", "r1") };
        assert_eq!(lone.party(), Party { namespace: "shop".into(), kind: "Pod".into(), name: "a".into() });
    }
}
