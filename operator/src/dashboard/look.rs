//! Collects what the page of one workload shows from the model, the history and the acknowledgements.

use std::collections::BTreeMap;

use tulle_crds::{Canary, MeshPolicy, PolicyMode, WorkloadKind};
use tulle_mesh::query::{By, Denials, Party, Sidecars, StatRow, Timeline};

use crate::model::{Key, Model, Pod, WorkloadKey};
use crate::telemetry::counts::Verdicts;
use crate::telemetry::history::{Direction, SeriesId, Sum};
use crate::telemetry::query::{self, StatQuery};
use crate::telemetry::rules::{self, RuleId};

use super::canary::phase;
use super::graph::Neighbours;
use super::words::Window;
use super::workload::{CanaryLine, FailureRow, PolicyRow, RuleRow, Workload};

/// Which workload.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its kind, where the address has it: a Deployment and a StatefulSet may have the same name.
    pub kind: Option<String>,
}

/// What the page shows; `None`: neither has such a workload pods, nor was anything counted for it. `sidecars` are those
/// of its namespace.
pub fn look(
    wanted: &Wanted,
    model: &Model,
    sum: &Sum,
    timeline: Timeline,
    sidecars: Sidecars,
    window: Window,
) -> Option<Workload<'static>> {
    let Wanted { namespace, name, kind } = wanted;
    let is_wanted = |party: &Party| {
        party.namespace == *namespace
            && party.name == *name
            && kind.as_ref().is_none_or(|kind| party.kind == *kind)
    };
    let by = |by| StatQuery { by, namespace: None, name: None, from: None, to: None };
    let here = StatQuery { namespace: Some(namespace.clone()), name: Some(name.clone()), ..by(By::Workload) };
    let counted = query::stat(sum, model, &here).rows.into_iter().find(|row| is_wanted(&row.party));
    let pods: Vec<&Pod> = model.pods().filter(|pod| !pod.finished && is_wanted(&pod.party())).collect();
    let me = match (&counted, pods.first()) {
        (Some(row), _) => row.party.clone(),
        (None, Some(pod)) => pod.party(),
        (None, None) => {
            let kind = kind_in(model, namespace, name, kind.as_deref())?;
            Party { namespace: namespace.clone(), kind: kind.name().to_owned(), name: name.clone() }
        }
    };
    let pods: Vec<&Pod> = pods.into_iter().filter(|pod| pod.party() == me).collect();
    let key = key_of(&me);
    let services = key.as_ref().and_then(|key| model.workload(key)).map(|seen| seen.services);
    let edges = query::edges(sum, model, Some(namespace)).edges;
    let to = StatQuery { to: Some(format!("{namespace}/{name}")), ..by(By::Route) };
    let without = pods
        .iter()
        .map(|pod| format!("{}/{}", pod.namespace, pod.name))
        .filter(|n| sidecars.without.contains(n));
    Some(Workload {
        window,
        covered: sum.window,
        lost: sum.lost,
        timeline,
        failures: failures(sum, &me),
        // Whoever knows the viewer adds them.
        denials: Denials::default(),
        neighbours: Neighbours::of(edges, &me, &services.unwrap_or_default()),
        routes: query::stat(sum, model, &to).rows,
        without: without.collect(),
        policies: policies(model, namespace, &pods, &rules::of_workload(sum, &me)),
        ejections: ejections(sum, model, wanted),
        canary: key.and_then(|key| model.canary_of(&key)).map(|(key, canary)| canary_line(key, canary)),
        pods: sidecars.sidecars.into_iter().filter(|sidecar| sidecar.workload == me).collect(),
        row: counted.unwrap_or_else(|| StatRow { party: me.clone(), ..StatRow::default() }),
        me,
        only: None,
        now: 0,
    })
}

/// What failed or was denied at a workload by reason and caller, as its own sidecars have seen it, the most frequent first.
fn failures(sum: &Sum, me: &Party) -> Vec<FailureRow> {
    let mut counts: BTreeMap<(&str, Party), u64> = BTreeMap::new();
    let here = |id: &SeriesId| id.direction == Direction::Inbound && id.reporter.party() == *me;
    for (id, of_series) in sum.series.iter().filter(|(id, _)| here(id)) {
        for (reason, number) in &of_series.reasons {
            let row = (&**reason, query::client(&id.namespace, &id.peer));
            let count = counts.entry(row).or_default();
            *count = count.saturating_add(*number);
        }
    }
    let row = |((reason, caller), count): ((&str, Party), u64)| FailureRow {
        reason: reason.to_owned(),
        caller,
        count,
    };
    let mut rows: Vec<FailureRow> = counts.into_iter().map(row).collect();
    // Stable: rows that are alike stay in order of their names.
    rows.sort_by_key(|row| std::cmp::Reverse(row.count));
    rows
}

const KINDS: [WorkloadKind; 3] =
    [WorkloadKind::Deployment, WorkloadKind::StatefulSet, WorkloadKind::DaemonSet];

/// The kind of a workload that has neither pods nor counts: one that is scaled to zero.
fn kind_in(model: &Model, namespace: &str, name: &str, kind: Option<&str>) -> Option<WorkloadKind> {
    let of = |kind| WorkloadKey { kind, namespace: namespace.into(), name: name.into() };
    let mut kinds = KINDS.into_iter().filter(|known| kind.is_none_or(|kind| known.name() == kind));
    kinds.find(|kind| model.workload(&of(*kind)).is_some())
}

fn key_of(party: &Party) -> Option<WorkloadKey> {
    let kind = KINDS.into_iter().find(|kind| kind.name() == party.kind)?;
    Some(WorkloadKey { kind, namespace: party.namespace.as_str().into(), name: party.name.as_str().into() })
}

/// How often breakers of clients ejected endpoints of the workload's Services.
fn ejections(sum: &Sum, model: &Model, wanted: &Wanted) -> u64 {
    let to = Some(format!("{}/{}", wanted.namespace, wanted.name));
    let services = StatQuery { by: By::Service, to, ..StatQuery::default() };
    let rows = query::stat(sum, model, &services).rows;
    rows.iter().fold(0, |sum: u64, row| sum.saturating_add(row.golden.ejections))
}

fn policies(
    model: &Model,
    namespace: &str,
    pods: &[&Pod],
    rules: &BTreeMap<RuleId, Verdicts>,
) -> Vec<PolicyRow> {
    let here = model.policies().filter(|(key, _)| &*key.0 == namespace);
    // Of a policy whose newest version is refused an earlier one may be in force, with another target.
    let applies = |key: &Key, policy: &MeshPolicy| {
        pods.iter().any(|pod| model.selects(key, policy, pod) || model.is_selected(key, &pod.uid))
    };
    let row = |(key, policy)| PolicyRow { rules: rule_rows(key, rules), ..policy_row(key, policy) };
    here.filter(|(key, policy)| applies(key, policy)).map(row).collect()
}

fn rule_rows(policy: &Key, rules: &BTreeMap<RuleId, Verdicts>) -> Vec<RuleRow> {
    let of_policy = rules.iter().filter(|(id, _)| id.policy == *policy);
    let row =
        |(id, verdicts): (&RuleId, &Verdicts)| RuleRow { rule: id.rule.to_string(), verdicts: *verdicts };
    of_policy.map(row).collect()
}

fn policy_row(key: &Key, policy: &MeshPolicy) -> PolicyRow {
    let spec = &policy.spec;
    let mut sections = spec.pod_sections();
    sections.extend(spec.call_sections());
    let status = policy.status.as_ref();
    let ready = status.and_then(|status| status.conditions.iter().find(|c| c.type_ == "Ready"));
    PolicyRow {
        name: key.1.to_string(),
        mode: match spec.mode {
            PolicyMode::Enforce => "Enforce".to_owned(),
            PolicyMode::Shadow => "Shadow".to_owned(),
        },
        sections,
        enforced: status.and_then(|status| status.enforced.clone()).unwrap_or_default(),
        problem: ready.filter(|ready| ready.status != "True").map(|ready| ready.message.clone()),
        rules: Vec::new(),
    }
}

fn canary_line(key: &Key, canary: &Canary) -> CanaryLine {
    let status = canary.status.clone().unwrap_or_default();
    CanaryLine {
        name: key.1.to_string(),
        phase: phase(status.phase).to_owned(),
        step: status.step_summary,
        sentence: status.evidence_summary,
        // Whoever has the judge's input adds it.
        evidence: None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tulle_mesh::proto::RuleCounts;

    use super::super::workload::workload;
    use super::*;
    use crate::model::tests::{key, pod, policy, shop};
    use crate::telemetry::history::{Counts, Reporter};

    fn found(name: &str, kind: Option<&str>) -> Option<Workload<'static>> {
        let model = shop(&[pod("a", "10.1.0.1", "r1")]);
        let sum = Sum { window: 60, lost: 0, series: Vec::new() };
        let (name, kind) = (name.to_owned(), kind.map(str::to_owned));
        let wanted = Wanted { namespace: "shop".to_owned(), name, kind };
        let sidecars = crate::api::sidecars::sidecars(
            &model,
            Vec::new(),
            "operator-0",
            std::time::Instant::now(),
            Some("shop"),
        );
        look(&wanted, &model, &sum, Timeline::default(), sidecars, Window::Minute)
    }

    #[test]
    fn a_workload_is_found_by_its_pods_before_anything_was_counted() {
        let view = found("web", None).unwrap();
        assert_eq!(view.me.kind, "Deployment");
        let pods: Vec<&str> = view.pods.iter().map(|pod| pod.pod.as_str()).collect();
        assert_eq!(pods, ["a"]);
    }

    #[test]
    fn a_policy_is_listed_while_an_earlier_version_of_it_is_in_force() {
        let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
        let target = |name: &str| json!({"kind": "Service", "name": name});
        let valid = json!({"target": target("web"), "mtls": "Strict"});
        let range = json!({"deny": [{"from": [{"cidr": "10.0.0.0/99"}]}]});
        model.apply_policy(key("shop", "p"), policy("p", 1, valid));
        model.apply_policy(
            key("shop", "p"),
            policy("p", 1, json!({"target": target("gone"), "access": range})),
        );
        let pods: Vec<&Pod> = model.pods().collect();
        let names: Vec<String> =
            policies(&model, "shop", &pods, &BTreeMap::new()).into_iter().map(|row| row.name).collect();
        assert_eq!(names, ["p"]);
    }

    #[test]
    fn what_each_rule_of_a_policy_would_deny_is_shown_beside_it() {
        let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
        let spec =
            json!({"target": {"kind": "Service", "name": "web"}, "mode": "Shadow", "access": {"deny": []}});
        model.apply_policy(key("shop", "p"), policy("p", 1, spec));
        let reporter =
            Reporter { namespace: "shop".into(), kind: "Deployment".into(), workload: "web".into() };
        let series = |name: &str, rule: &str, would_deny| {
            let other = SeriesId::other(reporter.clone(), Direction::Policy, false);
            let id = SeriesId { namespace: "shop".into(), peer: name.into(), route: rule.into(), ..other };
            (id, Counts::of_rule(&RuleCounts { would_deny, ..RuleCounts::default() }))
        };
        let series =
            vec![series("p", "DenyRule(0)", 3), series("p", "DenyRule(1)", 4), series("q", "DenyRule(0)", 5)];
        let sum = Sum { window: 60, lost: 0, series };
        let pods: Vec<&Pod> = model.pods().collect();
        let rows = policies(&model, "shop", &pods, &rules::of_workload(&sum, &reporter.party()));
        let seen: Vec<_> = rows.iter().flat_map(|row| &row.rules).collect();
        let row = |rule: &str, would_deny| RuleRow {
            rule: rule.to_owned(),
            verdicts: Verdicts { denied: 0, would_deny },
        };
        assert_eq!(seen, [&row("DenyRule(0)", 3), &row("DenyRule(1)", 4)]);
        let page = workload(&Workload { policies: rows, ejections: 6, ..Workload::default() }).into_string();
        for part in ["DenyRule(1): 4 would be denied</li>", "<dt>Ejections by breakers</dt><dd>6</dd>"] {
            assert!(page.contains(part), "{part} in {page}");
        }
    }

    #[test]
    fn failures_are_those_of_the_workload_itself_by_reason_and_caller() {
        let series = |workload: &str, direction, peer: &str, revision: &str, failures: u64| {
            let reporter =
                Reporter { namespace: "shop".into(), kind: "Deployment".into(), workload: workload.into() };
            let mut counts = Counts::default();
            counts.add_reason(&"PolicyDenied".into(), failures);
            let other = SeriesId::other(reporter, direction, true);
            let id =
                SeriesId { namespace: "pay".into(), peer: peer.into(), revision: revision.into(), ..other };
            (id, counts)
        };
        let series = vec![
            series("web", Direction::Inbound, "cart", "r1", 2),
            series("web", Direction::Inbound, "cart", "r2", 3),
            series("web", Direction::Inbound, "_PLAIN", "r1", 9),
            series("web", Direction::Outbound, "stock", "r1", 70),
            series("api", Direction::Inbound, "cart", "r1", 80),
        ];
        let me = Party { namespace: "shop".into(), kind: "Deployment".into(), name: "web".into() };
        let rows = failures(&Sum { window: 60, lost: 0, series }, &me);
        let found: Vec<_> = rows
            .iter()
            .map(|row| (row.reason.as_str(), row.caller.kind.as_str(), row.caller.name.as_str(), row.count))
            .collect();
        assert_eq!(found, [("PolicyDenied", "Plain", "", 9), ("PolicyDenied", "ServiceAccount", "cart", 5)]);
    }

    #[test]
    fn what_does_not_exist_is_not_shown_empty() {
        assert!(found("nothing", None).is_none());
        assert!(found("web", Some("StatefulSet")).is_none(), "of this name there is a Deployment only");
    }
}
