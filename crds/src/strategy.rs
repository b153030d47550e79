//! What in the update strategy of a workload hinders the rollouts of its Canary.
//!
//! In: a workload, as the API server has it or as a manifest says it. Out: [`Hindrance`]s. Pure, and the same for
//! admission, `tulle lint` and `tulle check`.

use std::fmt::{self, Display, Formatter};

use serde_json::Value;

use crate::WorkloadKind;

/// What a hindrance does to a rollout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// No stable pod is left to compare the new version with, so that the new version gets all traffic unjudged.
    Unjudged,
    /// It does not begin or does not end by itself.
    Waits,
    /// It costs stable pods.
    Costly,
}

/// Something in a workload that hinders the rollouts of its Canary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hindrance {
    /// What it does to a rollout.
    pub effect: Effect,
    /// The rest of a sentence that begins with the workload.
    pub what: String,
    /// What to write instead.
    pub remedy: &'static str,
    /// It is so because there are so few pods at present: an autoscaler may add replicas, and a cluster nodes.
    pub at_present: bool,
}

impl Display for Hindrance {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.what, self.remedy)
    }
}

impl Hindrance {
    fn new(effect: Effect, what: impl Into<String>, remedy: &'static str) -> Self {
        Self { effect, what: what.into(), remedy, at_present: false }
    }
}

/// What hinders the rollouts of this workload, if it has a Canary.
pub fn hindrances(kind: WorkloadKind, workload: &Value) -> Vec<Hindrance> {
    match kind {
        WorkloadKind::Deployment => deployment(workload),
        WorkloadKind::StatefulSet => stateful_set(workload),
        WorkloadKind::DaemonSet => daemon_set(workload),
    }
}

/// A number of pods, or a share of all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Amount {
    Pods(u64),
    Percent(u64),
}

impl Amount {
    /// What Kubernetes takes where a Deployment does not say.
    const OF_DEPLOYMENT: Self = Self::Percent(25);

    fn at(workload: &Value, pointer: &str) -> Option<Self> {
        match workload.pointer(pointer)? {
            Value::Number(pods) => pods.as_u64().map(Self::Pods),
            Value::String(text) => text.strip_suffix('%')?.parse().ok().map(Self::Percent),
            _ => None,
        }
    }

    fn is_zero(self) -> bool {
        matches!(self, Self::Pods(0) | Self::Percent(0))
    }

    /// Whether it is all pods, however many there are.
    fn is_everything(self) -> bool {
        matches!(self, Self::Percent(percent) if percent >= 100)
    }

    fn rounded_down(self, replicas: u64) -> u64 {
        match self {
            Self::Pods(pods) => pods,
            Self::Percent(percent) => replicas.saturating_mul(percent) / 100,
        }
    }

    fn rounded_up(self, replicas: u64) -> u64 {
        match self {
            Self::Pods(pods) => pods,
            Self::Percent(percent) => replicas.saturating_mul(percent).div_ceil(100),
        }
    }
}

impl Display for Amount {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pods(pods) => write!(f, "{pods}"),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

fn text<'a>(workload: &'a Value, pointer: &str) -> Option<&'a str> {
    workload.pointer(pointer).and_then(Value::as_str)
}

fn number(workload: &Value, pointer: &str) -> Option<u64> {
    workload.pointer(pointer).and_then(Value::as_u64)
}

/// All pods may be missing at once. `settings`: those that say so. `at_present`: with so few replicas.
fn all_at_once(settings: &str, at_present: bool, remedy: &'static str) -> Hindrance {
    let what = format!(
        "may lose all its pods at once ({settings}), so that no stable pod is left when the new version is to be judged"
    );
    Hindrance { at_present, ..Hindrance::new(Effect::Unjudged, what, remedy) }
}

fn deployment(workload: &Value) -> Vec<Hindrance> {
    if text(workload, "/spec/strategy/type") == Some("Recreate") {
        return vec![Hindrance::new(
            Effect::Unjudged,
            "has strategy Recreate, which deletes all stable pods before the new version starts",
            "set its spec.strategy.type to RollingUpdate, with maxSurge 1 and maxUnavailable 0",
        )];
    }
    let surge = Amount::at(workload, "/spec/strategy/rollingUpdate/maxSurge");
    let unavailable = Amount::at(workload, "/spec/strategy/rollingUpdate/maxUnavailable");
    // A manifest without replicas keeps what an autoscaler has set.
    let replicas = number(workload, "/spec/replicas").filter(|replicas| *replicas > 0);
    let most = (unavailable.unwrap_or(Amount::OF_DEPLOYMENT), surge.unwrap_or(Amount::OF_DEPLOYMENT));
    let loses_all = match replicas {
        Some(replicas) => match (most.0.rounded_down(replicas), most.1.rounded_up(replicas)) {
            // Kubernetes lets one pod be unavailable where nothing else would let it make progress.
            (0, 0) => replicas == 1,
            (unavailable, _) => unavailable >= replicas,
        },
        None => most.0.is_everything(),
    };
    if loses_all {
        let of = replicas.map(|replicas| format!("replicas {replicas}, ")).unwrap_or_default();
        let settings = format!("{of}maxUnavailable {}, maxSurge {}", most.0, most.1);
        return vec![all_at_once(
            &settings,
            !most.0.is_everything(),
            "set maxUnavailable to 0, and maxSurge to 1 or more",
        )];
    }
    let mut found = Vec::new();
    if surge.is_some_and(Amount::is_zero) {
        found.push(Hindrance::new(
            Effect::Costly,
            "has maxSurge 0, so the first pod of the new version replaces a stable pod, and counts as unavailable while it is held back, so that a PodDisruptionBudget may keep nodes from being drained",
            "set maxSurge to 1 or more",
        ));
    }
    if unavailable.is_some_and(|unavailable| !unavailable.is_zero()) {
        found.push(Hindrance::new(
            Effect::Costly,
            "has maxUnavailable above 0, so stable pods may be deleted while pods of the new version are not ready yet",
            "set maxUnavailable to 0",
        ));
    }
    found
}

fn on_delete() -> Hindrance {
    Hindrance::new(
        Effect::Waits,
        "has updateStrategy OnDelete, so a pod gets the new version only when somebody deletes it, and a rollout neither begins nor ends by itself",
        "set its spec.updateStrategy.type to RollingUpdate",
    )
}

fn stateful_set(workload: &Value) -> Vec<Hindrance> {
    if text(workload, "/spec/updateStrategy/type") == Some("OnDelete") {
        return vec![on_delete()];
    }
    let replicas = number(workload, "/spec/replicas");
    let mut found = Vec::new();
    let partition = number(workload, "/spec/updateStrategy/rollingUpdate/partition").unwrap_or(0);
    if partition > 0 {
        let remedy = "set its spec.updateStrategy.rollingUpdate.partition to 0";
        // Kubernetes counts from the first pod, whatever its ordinal is.
        let first = number(workload, "/spec/ordinals/start").unwrap_or(0);
        let what = match replicas {
            Some(replicas) if partition >= replicas => format!(
                "has partition {partition}, which none of its {replicas} pods reaches, so no pod gets a new version and no rollout begins"
            ),
            _ => format!(
                "has partition {partition}, so pods with an ordinal below {} keep the old version, and a promotion stalls",
                first.saturating_add(partition)
            ),
        };
        found.push(Hindrance::new(Effect::Waits, what, remedy));
    }
    let unavailable = Amount::at(workload, "/spec/updateStrategy/rollingUpdate/maxUnavailable");
    if let Some(unavailable) = unavailable.filter(|unavailable| {
        let of = |replicas: u64| replicas > 1 && unavailable.rounded_down(replicas) >= replicas;
        unavailable.is_everything() || replicas.is_some_and(of)
    }) {
        let of = replicas.map(|replicas| format!("replicas {replicas}, ")).unwrap_or_default();
        let settings = format!("{of}maxUnavailable {unavailable}");
        found.push(all_at_once(&settings, !unavailable.is_everything(), "set maxUnavailable to 1"));
        return found;
    }
    found.push(match replicas {
        Some(0) => Hindrance::new(
            Effect::Costly,
            "has no replicas at the moment, so there is no stable pod to compare a new version with",
            "scale it to 2 replicas or more before it gets a new version",
        ),
        Some(1) => Hindrance::new(
            Effect::Costly,
            "has one replica, so the new version replaces the only stable pod and cannot be compared with it",
            "use 2 replicas or more",
        ),
        _ => Hindrance::new(
            Effect::Costly,
            "has no surge because it is a StatefulSet, so the pod with the highest ordinal is replaced, and counts as unavailable while it is held back, so that a PodDisruptionBudget may keep nodes from being drained",
            "let it have one replica more than the load needs",
        ),
    });
    found
}

fn daemon_set(workload: &Value) -> Vec<Hindrance> {
    if text(workload, "/spec/updateStrategy/type") == Some("OnDelete") {
        return vec![on_delete()];
    }
    let surge = Amount::at(workload, "/spec/updateStrategy/rollingUpdate/maxSurge");
    if surge.is_some_and(|surge| !surge.is_zero()) {
        return Vec::new();
    }
    let unavailable = Amount::at(workload, "/spec/updateStrategy/rollingUpdate/maxUnavailable");
    // One for each node; where there is one node, nothing but a surge helps, which the other sentence says.
    let pods = number(workload, "/status/desiredNumberScheduled").filter(|pods| *pods > 1);
    if let Some(unavailable) = unavailable.filter(|unavailable| {
        unavailable.is_everything() || pods.is_some_and(|pods: u64| unavailable.rounded_up(pods) >= pods)
    }) {
        let of = pods.map(|pods| format!("pods {pods}, ")).unwrap_or_default();
        return vec![all_at_once(
            &format!("{of}maxUnavailable {unavailable}"),
            !unavailable.is_everything(),
            "set spec.updateStrategy.rollingUpdate.maxSurge to 1, and maxUnavailable to 0",
        )];
    }
    vec![Hindrance::new(
        Effect::Costly,
        "has no maxSurge, so each pod of the new version replaces the stable pod of its node",
        "set spec.updateStrategy.rollingUpdate.maxSurge to 1, and maxUnavailable to 0",
    )]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn effects(kind: WorkloadKind, spec: Value) -> Vec<Effect> {
        hindrances(kind, &json!({"spec": spec})).into_iter().map(|found| found.effect).collect()
    }

    fn rolling(replicas: Option<u64>, surge: &Value, unavailable: &Value) -> Value {
        let rolling = json!({"maxSurge": surge, "maxUnavailable": unavailable});
        json!({"replicas": replicas, "strategy": {"type": "RollingUpdate", "rollingUpdate": rolling}})
    }

    #[test]
    fn a_deployment_that_loses_all_stable_pods_is_not_judged() {
        let of = |spec| effects(WorkloadKind::Deployment, spec);
        assert_eq!(of(json!({"strategy": {"type": "Recreate"}})), [Effect::Unjudged]);
        for (replicas, surge, unavailable) in [
            (Some(4), json!(1), json!("100%")),
            (None, json!(1), json!("100%")),
            (Some(0), json!(1), json!("100%")),
            (Some(4), json!("25%"), json!(4)),
            (Some(1), json!(1), json!(1)),
            // Kubernetes makes one of 25 % of one pod, because no surge is allowed either.
            (Some(1), json!(0), json!("25%")),
            (Some(1), json!(0), Value::Null),
        ] {
            let found = of(rolling(replicas, &surge, &unavailable));
            assert_eq!(found, [Effect::Unjudged], "{replicas:?} {surge} {unavailable}");
        }
    }

    #[test]
    fn a_deployment_that_keeps_stable_pods_is_judged() {
        let of = |spec| effects(WorkloadKind::Deployment, spec);
        for (replicas, surge, unavailable, expected) in [
            (Some(4), json!(1), json!(0), vec![]),
            (Some(4), json!("25%"), json!("0%"), vec![]),
            (Some(1), Value::Null, Value::Null, vec![]),
            (Some(4), json!(1), json!(3), vec![Effect::Costly]),
            (None, json!(1), json!(1), vec![Effect::Costly]),
            (Some(0), json!(1), json!(1), vec![Effect::Costly]),
            (Some(2), json!(0), Value::Null, vec![Effect::Costly]),
            (Some(2), json!("0%"), json!(1), vec![Effect::Costly, Effect::Costly]),
        ] {
            let found = of(rolling(replicas, &surge, &unavailable));
            assert_eq!(found, expected, "{replicas:?} {surge} {unavailable}");
        }
        assert_eq!(of(json!({})), Vec::<Effect>::new());
    }

    #[test]
    fn no_surge_is_said_to_hinder_the_draining_of_nodes() {
        let of = |kind, spec| hindrances(kind, &json!({"spec": spec})).remove(0).to_string();
        let without = rolling(Some(3), &json!(0), &json!(1));
        assert!(of(WorkloadKind::Deployment, without).contains("PodDisruptionBudget"));
        assert!(of(WorkloadKind::StatefulSet, json!({"replicas": 3})).contains("PodDisruptionBudget"));
    }

    #[test]
    fn a_stateful_set_is_told_what_its_replicas_and_its_strategy_mean() {
        let of = |spec: Value| {
            let found = hindrances(WorkloadKind::StatefulSet, &json!({"spec": spec}));
            found.iter().map(Hindrance::to_string).collect::<Vec<_>>()
        };
        let says = |spec: Value, parts: &[&str]| {
            let found = of(spec.clone());
            let said = parts.iter().zip(&found).all(|(part, found)| found.contains(part));
            assert!(found.len() == parts.len() && said, "{spec}: {found:?}");
        };
        says(json!({"replicas": 0}), &["no replicas at the moment"]);
        says(json!({"replicas": 1}), &["has one replica"]);
        says(json!({}), &["has no surge"]);
        says(
            json!({"replicas": 3, "updateStrategy": {"type": "OnDelete"}}),
            &["only when somebody deletes it"],
        );
        let partition = |partition: u64, start: u64| {
            let strategy = json!({"rollingUpdate": {"partition": partition}});
            json!({"replicas": 3, "ordinals": {"start": start}, "updateStrategy": strategy})
        };
        says(partition(0, 0), &["has no surge"]);
        says(partition(2, 0), &["ordinal below 2 keep the old version", "has no surge"]);
        says(partition(3, 0), &["no pod gets a new version", "has no surge"]);
        says(partition(2, 1), &["ordinal below 3 keep the old version", "has no surge"]);
        says(partition(3, 1), &["no pod gets a new version", "has no surge"]);
        let unavailable = |unavailable: Value| {
            let strategy = json!({"rollingUpdate": {"maxUnavailable": unavailable}});
            json!({"replicas": 3, "updateStrategy": strategy})
        };
        says(unavailable(json!(3)), &["may lose all its pods at once (replicas 3, maxUnavailable 3)"]);
        says(unavailable(json!("100%")), &["may lose all"]);
        says(unavailable(json!(2)), &["has no surge"]);
    }

    #[test]
    fn a_daemon_set_needs_a_surge() {
        let of = |unavailable: Value, surge: Value, pods: u64| {
            let rolling = json!({"maxUnavailable": unavailable, "maxSurge": surge});
            let set = json!({"spec": {"updateStrategy": {"rollingUpdate": rolling}},
                "status": {"desiredNumberScheduled": pods}});
            hindrances(WorkloadKind::DaemonSet, &set).iter().map(|found| found.effect).collect::<Vec<_>>()
        };
        assert_eq!(of(json!(0), json!(1), 3), Vec::<Effect>::new());
        assert_eq!(of(json!(1), json!(0), 3), [Effect::Costly]);
        assert_eq!(of(json!(1), json!(0), 1), [Effect::Costly]);
        assert_eq!(of(json!(3), json!(0), 3), [Effect::Unjudged]);
        assert_eq!(of(json!("100%"), Value::Null, 0), [Effect::Unjudged]);
        let by_hand = json!({"updateStrategy": {"type": "OnDelete"}});
        assert_eq!(effects(WorkloadKind::DaemonSet, by_hand), [Effect::Waits]);
    }

    #[test]
    fn what_holds_with_the_present_number_of_pods_only_is_told_from_what_always_holds() {
        let set = |unavailable: &Value| {
            json!({"spec": {"replicas": 2, "updateStrategy": {"rollingUpdate": {"maxUnavailable": unavailable}}},
                "status": {"desiredNumberScheduled": 2}})
        };
        let deployment = |unavailable: &Value| json!({"spec": rolling(Some(2), &json!(1), unavailable)});
        for (unavailable, at_present) in [(json!(2), true), (json!("100%"), false)] {
            for (kind, workload) in [
                (WorkloadKind::Deployment, deployment(&unavailable)),
                (WorkloadKind::StatefulSet, set(&unavailable)),
                (WorkloadKind::DaemonSet, set(&unavailable)),
            ] {
                let found = hindrances(kind, &workload);
                let [Hindrance { effect: Effect::Unjudged, at_present: found, .. }] = found[..] else {
                    panic!("{kind:?} {unavailable}: {found:?}")
                };
                assert_eq!(found, at_present, "{kind:?} {unavailable}");
            }
        }
    }
}
