//! What repairs an installation, and whether it is complete.

use serde_json::{Value, json};
use tulle_mesh::check::Outcome;

use super::super::facts::Part;
use super::{faults, namespace};
use crate::objects::Unread;

const MISSING: &str = "T0301 error: Deployment tulle-system/tulle-webhook does not exist => ";

#[test]
fn a_repair_keeps_to_the_tool_and_the_namespace_of_the_installation() {
    let fix = |change: fn(&mut super::Facts)| {
        let found = faults(|facts| {
            facts.deployments.insert("tulle-webhook", Ok(None));
            change(facts);
        });
        let of_webhook = found.iter().find_map(|fault| fault.split_once("tulle-webhook does not exist => "));
        of_webhook.map(|(_, fix)| fix.to_owned()).unwrap()
    };
    assert_eq!(fix(|_| {}), "tulle upgrade --apply --system-namespace tulle-system");
    assert_eq!(
        fix(|facts| facts.system = "mesh".to_owned()),
        "tulle upgrade --apply --system-namespace mesh"
    );
    let helm = |facts: &mut super::Facts| {
        let labels = json!({"app.kubernetes.io/managed-by": "Helm"});
        facts.mutating = Ok(Some(json!({"metadata": {"labels": labels}, "webhooks": []})));
    };
    assert_eq!(fix(helm), "upgrade with Helm");
    assert_eq!(
        fix(|facts| facts.cli = "0.2.0".to_owned()),
        "upgrade with tulle 0.3.0",
        "this program is older"
    );
    let nothing = |facts: &mut super::Facts| {
        facts.deployments.insert("tulle-operator", Ok(None));
        facts.mutating = Ok(None);
        facts.validating = Ok(None);
    };
    assert_eq!(fix(nothing), "tulle install --apply --registry REGISTRY --system-namespace tulle-system");
    assert!(
        faults(|facts| drop(facts.deployments.insert("tulle-webhook", Ok(None))))[0].starts_with(MISSING)
    );
}

#[test]
fn an_upgrade_takes_fields_over_from_a_kubectl_that_applied_them() {
    let fix = |operation: &str, cli: &str| {
        let managed = json!([{"manager": "kubectl", "operation": operation}]);
        let cli = cli.to_owned();
        let found = faults(move |facts| {
            let mut operator = super::deployment("tulle-operator");
            operator["metadata"]["managedFields"] = managed;
            facts.deployments.insert("tulle-operator", Ok(Some(operator)));
            facts.deployments.insert("tulle-webhook", Ok(None));
            facts.cli = cli;
        });
        found[0].strip_prefix(MISSING).map(str::to_owned)
    };
    let plain = Some("tulle upgrade --apply --system-namespace tulle-system".to_owned());
    let forced = "tulle upgrade --apply --force-conflicts --system-namespace tulle-system".to_owned();
    assert_eq!(fix("Apply", "0.3.1"), Some(forced));
    assert_eq!(fix("Apply", "0.3.0"), plain, "the same version changes nothing of kubectl's");
    assert_eq!(fix("Update", "0.3.1"), plain, "somebody has scaled it");
}

#[test]
fn a_lost_or_damaged_secret_of_the_root_is_an_error_while_the_operators_have_it_in_memory() {
    let with = |status: &str, reason: &str| {
        let condition = json!({"type": "RootValid", "status": status, "reason": reason, "message": "why"});
        move |facts: &mut super::Facts| {
            facts.config = Ok(Some(json!({"status": {"conditions": [condition]}})))
        }
    };
    let lost = "T0401 error: MeshConfig mesh: RootMissing: why => kubectl replace --force -f tulle-root.yaml";
    assert_eq!(faults(with("False", "RootMissing")), [lost]);
    assert_eq!(faults(with("True", "RootInUse")), Vec::<String>::new());
    let mut facts = super::healthy();
    with("False", "RootMissing")(&mut facts);
    let found = super::judge(&facts, super::OPTIONS);
    let of_root: Vec<Outcome> =
        found.iter().filter(|finding| finding.id == "T0401").map(|finding| finding.result).collect();
    assert_eq!(of_root, [Outcome::Error], "and it is not said to be well");
    let both = faults(|facts| {
        facts.health.as_mut().unwrap().root_not_after = Some(super::NOW + super::DAY);
        with("False", "RootMissing")(facts);
    });
    assert_eq!((both.len(), both[0].as_str()), (2, lost), "{both:?}");
}

#[test]
fn what_stands_still_is_said_of_each_deployment_and_one_without_replicas_is_not_well() {
    let judged = |name: &'static str, wanted: u32| {
        let mut facts = super::healthy();
        let pods = json!({"spec": {"replicas": wanted}, "status": {"availableReplicas": 0}});
        facts.deployments.insert(name, Ok(Some(pods)));
        super::judge(&facts, super::OPTIONS)
    };
    for wanted in [0, 1, 3] {
        let hint = |name| {
            let found = judged(name, wanted);
            found.into_iter().find(|finding| finding.id == "T0301").map(|finding| finding.hint).unwrap()
        };
        let (operator, webhook) = (hint("tulle-operator"), hint("tulle-webhook"));
        assert!(operator.contains("wait for a certificate"), "{operator}");
        assert!(webhook.contains("start without a sidecar") && webhook.contains("rejected"), "{webhook}");
        assert!(!webhook.contains("certificate"), "{webhook}");
    }
    let without = judged("tulle-webhook", 0);
    assert!(!without.iter().any(|finding| finding.id == "T0302"), "it has no spare replica: {without:?}");
}

#[test]
fn a_restart_is_of_the_workload_that_kubectl_can_restart() {
    let fix = |kind: &str, owner: &str| {
        let pod = json!({"metadata": {"name": "db-0", "namespace": "shop", "labels": {"pod-template-hash": "6d9f"},
            "ownerReferences": [{"kind": kind, "name": owner}]}});
        let found = faults(move |facts| facts.uninjected = Ok(vec![pod]));
        found[0].split_once(" => ").map(|(_, fix)| fix.to_owned()).unwrap()
    };
    assert_eq!(fix("ReplicaSet", "db-6d9f"), "kubectl -n shop rollout restart deployment/db");
    assert_eq!(fix("StatefulSet", "db"), "kubectl -n shop rollout restart statefulset/db");
    assert_eq!(fix("DaemonSet", "db"), "kubectl -n shop rollout restart daemonset/db");
    for (kind, owner) in [("ReplicaSet", "alone"), ("Job", "db")] {
        assert_eq!(fix(kind, owner), "kubectl -n shop replace --force -f MANIFEST", "{kind} {owner}");
    }
}

#[test]
fn a_newer_operator_is_not_repaired_with_an_older_program() {
    assert_eq!(
        faults(|facts| facts.health.as_mut().unwrap().version = "0.4.0".to_owned()),
        ["T0305 warning: the operator has version 0.4.0, and this program 0.3.0 => tulle version"]
    );
}

#[test]
fn an_object_of_the_installation_that_is_missing_or_unreadable_is_reported() {
    let part = |exists| vec![Part { object: "ClusterRole/tulle-operator".to_owned(), exists }];
    assert_eq!(
        faults(|facts| facts.parts = part(Ok(false))),
        [
            "T0204 error: ClusterRole/tulle-operator does not exist => tulle upgrade --apply --system-namespace tulle-system"
        ]
    );
    let several: Vec<Part> =
        (0..7).map(|number| Part { object: format!("Role/mesh/{number}"), exists: Ok(false) }).collect();
    let found = faults(|facts| facts.parts = several);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].contains("Role/mesh/4 and 2 more do not exist"), "{found:?}");
    assert_eq!(
        faults(|facts| facts.parts = part(Err(Unread::Failed("timed out".to_owned())))),
        [
            "T0204 warning: ClusterRole/tulle-operator could not be checked: timed out => kubectl get clusterrole/tulle-operator"
        ]
    );
}

#[test]
fn a_definition_with_another_schema_is_a_warning_if_the_versions_are_the_same() {
    let change = |facts: &mut super::Facts| {
        let definition = facts.definitions.get_mut("canaries.tulle.dev").unwrap();
        let schema = &mut definition.as_mut().unwrap().as_mut().unwrap()["spec"]["versions"][0]["schema"];
        schema["openAPIV3Schema"]["properties"]["spec"]["properties"] = json!({});
    };
    assert_eq!(
        faults(change),
        [
            "T0205 warning: canaries.tulle.dev has another schema than version 0.3.0 of Tulle => tulle upgrade --apply --system-namespace tulle-system"
        ]
    );
    let older = faults(|facts| {
        change(facts);
        facts.health.as_mut().unwrap().version = "0.3.1".to_owned();
    });
    assert_eq!(older, Vec::<String>::new());
}

#[test]
fn a_namespace_that_wants_no_sidecar_may_enforce_any_level() {
    let labels = json!({"tulle.dev/inject": "disabled", "pod-security.kubernetes.io/enforce": "restricted"});
    assert_eq!(faults(|facts| facts.namespaces = Ok(vec![namespace("shop", labels)])), Vec::<String>::new());
}

/// A pod whose node took it `seconds` before the facts were read, long after it was created.
fn started(seconds: i64) -> Value {
    let at = jiff::Timestamp::from_second(super::NOW - seconds).unwrap();
    let mut pod = injected("2026-11-27T11:00:00Z", Value::Null);
    pod["status"] = json!({"startTime": at.to_string()});
    pod
}

fn injected(created: &str, deleted: Value) -> Value {
    json!({"metadata": {"name": "web-1", "namespace": "shop", "creationTimestamp": created,
        "deletionTimestamp": deleted}})
}

#[test]
fn pods_that_come_or_go_need_not_be_connected() {
    let unconnected = |pod: Option<Value>| {
        faults(|facts| {
            facts.injected = Ok(pod.into_iter().collect());
            facts.sidecars.as_mut().unwrap().sidecars[0].connected = false;
        })
    };
    assert_eq!(unconnected(Some(injected("2026-11-27T11:59:40Z", Value::Null))), Vec::<String>::new());
    assert_eq!(
        unconnected(Some(injected("2026-11-27T11:00:00Z", json!("2026-11-27T11:59:00Z")))),
        Vec::<String>::new()
    );
    assert_eq!(unconnected(Some(injected("2026-11-27T11:00:00Z", Value::Null))).len(), 1);
    assert_eq!(unconnected(Some(injected("2026-11-27T11:59:31Z", Value::Null))), Vec::<String>::new());
    assert_eq!(unconnected(Some(injected("2026-11-27T11:59:30Z", Value::Null))).len(), 1);
    assert_eq!(unconnected(Some(started(29))), Vec::<String>::new());
    assert_eq!(unconnected(Some(started(30))).len(), 1);
    assert_eq!(unconnected(None).len(), 1);
}

#[test]
fn commands_about_sidecars_are_about_the_namespace_that_is_looked_at() {
    let found = faults(|facts| {
        facts.namespace = Some("shop".to_owned());
        let sidecar = &mut facts.sidecars.as_mut().unwrap().sidecars[0];
        sidecar.connected = false;
        sidecar.version = "0.4.0".to_owned();
    });
    assert!(found[0].ends_with(" => kubectl get pods -n shop -L tulle.dev/sidecar"), "{found:?}");
    assert!(found[1].ends_with(" => tulle pods -n shop"), "{found:?}");
}

#[test]
fn a_replica_that_does_not_lead_cannot_tell_which_sidecars_are_behind() {
    let found = faults(|facts| {
        facts.health.as_mut().unwrap().leader = false;
        facts.sidecars.as_mut().unwrap().sidecars[0].connected = false;
    });
    assert_eq!(
        found,
        [
            "T0703 warning: sidecars could not be checked: pod tulle-operator-1 does not lead, and knows only those that are connected to it => kubectl -n tulle-system get lease tulle-operator"
        ]
    );
}
