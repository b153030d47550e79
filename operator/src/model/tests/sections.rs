//! What a pod enforces, section by section.

use tulle_mesh::features::{ACCESS_V1, LIMITS_V1, LOGS_V1, SHADOW_V1};
use tulle_mesh::proto::resource::Body;
use tulle_mesh::proto::{ResourceName, ResourceType};

use super::*;

fn section(model: &Model, kind: ResourceType) -> Compiled {
    let name = ResourceName { r#type: kind.into(), cluster: String::new(), name: "uid-a".into() };
    model.compile(&name, &Variant::default()).unwrap()
}

fn stamped(compiled: &Compiled) -> Vec<&str> {
    compiled.stamps.iter().map(|stamp| stamp.name.as_str()).collect()
}

#[test]
fn a_section_is_stamped_with_the_policy_that_supplies_it_and_requires_what_it_needs() {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
    for kind in [ResourceType::Workload, ResourceType::Mtls, ResourceType::Access] {
        let made = section(&model, kind);
        assert!(made.stamps.is_empty() && made.resource.requires.is_empty(), "{kind:?}");
    }
    let wide = json!({"target": {"kind": "Namespace"}, "mtls": "Strict", "access": {"allow": []}});
    let narrow = json!({"target": {"kind": "Service", "name": "web"}, "mtls": "Permissive"});
    model.apply_policy(key("shop", "wide"), policy("wide", 1, wide));
    model.apply_policy(key("shop", "narrow"), policy("narrow", 2, narrow));
    let [workload, mtls, access] =
        [ResourceType::Workload, ResourceType::Mtls, ResourceType::Access].map(|kind| section(&model, kind));
    assert_eq!((stamped(&workload).len(), stamped(&mtls)), (0, vec!["narrow"]));
    assert_eq!(stamped(&access), ["wide"]);
    assert!(mtls.resource.requires.is_empty(), "what only access needs holds back nothing else");
    assert_eq!(access.resource.requires, [ACCESS_V1]);
    let of = |name: &str| model.sections(&key("shop", name), "uid-a");
    assert_eq!(of("wide"), Sections { mtls: false, access: true, ..Sections::default() });
    assert_eq!(of("narrow"), Sections { mtls: true, access: false, ..Sections::default() });
}

#[test]
fn what_is_only_tried_is_stamped_and_required_in_its_own_section() {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
    let tried = json!({"target": {"kind": "Namespace"}, "mode": "Shadow", "mtls": "Strict"});
    model.apply_policy(key("shop", "tried"), policy("tried", 1, tried));
    let (mtls, access) = (section(&model, ResourceType::Mtls), section(&model, ResourceType::Access));
    assert_eq!((stamped(&mtls), mtls.resource.requires.clone()), (vec!["tried"], vec![SHADOW_V1.to_owned()]));
    assert!(stamped(&access).is_empty() && access.resource.requires.is_empty());
    let rules = json!({"target": {"kind": "Namespace"}, "mode": "Shadow", "access": {"allow": []}});
    model.apply_policy(key("shop", "tried"), policy("tried", 1, rules));
    let (mtls, access) = (section(&model, ResourceType::Mtls), section(&model, ResourceType::Access));
    assert!(stamped(&mtls).is_empty() && mtls.resource.requires.is_empty());
    assert_eq!((stamped(&access), access.resource.requires.len()), (vec!["tried"], 2));
}

#[test]
fn the_sections_say_together_what_an_old_sidecar_is_sent_in_one() {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
    let spec = json!({"target": {"kind": "Namespace"}, "mtls": "Strict", "access": {"allow": []}});
    model.apply_policy(key("shop", "p"), policy("p", 1, spec));
    let tried = json!({"target": {"kind": "Namespace"}, "mode": "Shadow", "access": {"deny": []}});
    model.apply_policy(key("shop", "tried"), policy("tried", 2, tried));
    let [workload, mtls, access] = [ResourceType::Workload, ResourceType::Mtls, ResourceType::Access]
        .map(|kind| section(&model, kind).resource.body.unwrap());
    let (Body::Workload(workload), Body::Mtls(mtls), Body::Access(access)) = (workload, mtls, access) else {
        panic!("other sections")
    };
    let together = proto::Inbound {
        mtls: mtls.mode,
        mtls_from: mtls.from,
        shadow_strict: mtls.shadow_strict,
        access: access.access,
        shadow: access.shadow,
        workload: workload.workload,
        revision: workload.revision,
    };
    assert_eq!(model.inbound("uid-a"), Some(together.clone()));
    assert_eq!((together.workload.as_str(), together.revision.as_str()), ("Deployment/web", "r1"));
    let Some(Body::Inbound(inbound)) = section(&model, ResourceType::Inbound).resource.body else { panic!() };
    assert_eq!(inbound, together);
}

#[test]
fn a_changed_rule_changes_no_other_section() {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
    let version = |model: &Model, kind| section(model, kind).resource.version;
    let before = [ResourceType::Workload, ResourceType::Mtls].map(|kind| version(&model, kind));
    let access = version(&model, ResourceType::Access);
    let rules = json!({"target": {"kind": "Namespace"}, "access": {"allow": []}});
    model.apply_policy(key("shop", "p"), policy("p", 1, rules));
    assert_eq!([ResourceType::Workload, ResourceType::Mtls].map(|kind| version(&model, kind)), before);
    assert_ne!(version(&model, ResourceType::Access), access);
}

#[test]
fn limits_are_a_resource_of_their_own_with_the_policies_that_set_them() {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
    let limits = |model: &Model| {
        let made = section(model, ResourceType::Limits);
        let Some(Body::Limits(limits)) = made.resource.body.clone() else { panic!("{made:?}") };
        (made, limits)
    };
    let (none, empty) = limits(&model);
    assert!(none.stamps.is_empty() && none.resource.requires.is_empty());
    assert_eq!(empty, proto::Limits::default());
    let wide = json!({"target": {"kind": "Namespace"}, "limits": {"concurrency": 64, "connections": 9}});
    let narrow = json!({"target": {"kind": "Service", "name": "web"}, "limits": {"concurrency": 3}});
    let tried = json!({"target": {"kind": "Namespace"}, "mode": "Shadow", "limits": {"connections": 5}});
    model.apply_policy(key("shop", "wide"), policy("wide", 1, wide));
    model.apply_policy(key("shop", "narrow"), policy("narrow", 2, narrow));
    model.apply_policy(key("shop", "tried"), policy("tried", 3, tried));
    let (made, limits) = limits(&model);
    assert_eq!(
        (stamped(&made), made.resource.requires.clone()),
        (vec!["narrow", "tried"], vec![LIMITS_V1.to_owned()])
    );
    let (enforced, shadow) = (limits.enforced.unwrap(), limits.shadow.unwrap());
    assert_eq!(enforced.concurrency.map(|limit| limit.max), Some(3));
    assert!(enforced.connections.is_none(), "a section is of one policy");
    assert_eq!(shadow.connections.map(|limit| limit.max), Some(5));
    let only = |name: &str| model.sections(&key("shop", name), "uid-a");
    assert_eq!(only("narrow"), Sections { limits: true, ..Sections::default() });
    assert_eq!(only("wide"), Sections::default());
    let old = section(&model, ResourceType::Inbound);
    assert!(
        old.stamps.is_empty() && old.resource.requires.is_empty(),
        "an old sidecar is not asked for limits"
    );
}

fn logs(model: &Model) -> (Compiled, proto::Logs) {
    let made = section(model, ResourceType::Logs);
    let Some(Body::Logs(logs)) = made.resource.body.clone() else { panic!("{made:?}") };
    (made, logs)
}

#[test]
fn what_a_pod_logs_is_what_the_narrowest_policy_says() {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
    let (none, empty) = logs(&model);
    assert!(none.stamps.is_empty() && none.resource.requires.is_empty());
    assert_eq!(empty, proto::Logs::default());
    let wide =
        json!({"target": {"kind": "Namespace"}, "telemetry": {"accessLog": "Sampled", "sample": "0.5%"}});
    model.apply_policy(key("shop", "wide"), policy("wide", 1, wide));
    let (made, sampled) = logs(&model);
    assert_eq!((sampled.access(), sampled.sample_permyriad), (proto::AccessLog::Sampled, 50));
    assert_eq!((stamped(&made), made.resource.requires.clone()), (vec!["wide"], vec![LOGS_V1.to_owned()]));
    let narrow =
        |log: &str| json!({"target": {"kind": "Service", "name": "web"}, "telemetry": {"accessLog": log}});
    model.apply_policy(key("shop", "narrow"), policy("narrow", 2, narrow("Errors")));
    let (made, errors) = logs(&model);
    assert_eq!((errors.access(), errors.sample_permyriad), (proto::AccessLog::Errors, 0));
    assert_eq!(stamped(&made), ["narrow"]);
    let only = |model: &Model, name: &str| model.sections(&key("shop", name), "uid-a");
    assert_eq!(only(&model, "narrow"), Sections { telemetry: true, ..Sections::default() });
    assert_eq!(only(&model, "wide"), Sections::default());
    model.apply_policy(key("shop", "narrow"), policy("narrow", 2, narrow("Disabled")));
    let (made, off) = logs(&model);
    assert_eq!(off.access(), proto::AccessLog::Unspecified, "it switches off what the wider one asks for");
    assert_eq!((stamped(&made), made.resource.requires.len()), (vec!["narrow"], 0));
    model.delete_policy(&key("shop", "narrow"));
    assert_eq!(logs(&model).1, sampled);
}

#[test]
fn a_policy_in_shadow_makes_nobody_log() {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
    let tried = json!({"target": {"kind": "Namespace"}, "mode": "Shadow", "telemetry": {"accessLog": "All"}});
    model.apply_policy(key("shop", "tried"), policy("tried", 1, tried));
    assert_eq!(logs(&model).1, proto::Logs::default());
    assert_eq!(model.sections(&key("shop", "tried"), "uid-a"), Sections::default());
}

#[test]
fn a_sidecar_learns_in_which_zone_it_runs_and_when_that_changes() {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
    model.apply_node("node-a".into(), "zone-1".into());
    let Some(Body::Workload(workload)) = section(&model, ResourceType::Workload).resource.body else {
        panic!()
    };
    assert_eq!((workload.node.as_str(), workload.zone.as_str()), ("node-a", "zone-1"));
    model.take_touched();
    model.apply_node("node-a".into(), "zone-2".into());
    assert!(model.take_touched().inbound.contains("uid-a"));
}

#[test]
fn a_sidecar_learns_where_spans_go_and_how_many_traces_begin_and_when_that_changes() {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
    let tracing = |model: &Model| match section(model, ResourceType::Workload).resource.body {
        Some(Body::Workload(workload)) => workload.tracing.map(|tracing| (tracing.endpoint, tracing.share)),
        _ => panic!(),
    };
    assert_eq!(tracing(&model), None);
    for (sampling, share) in [("50%", 1 << 55), ("100%", 1 << 56), ("0%", 0), ("soon", 0)] {
        let config = json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "MeshConfig", "metadata": {"name": "mesh"},
            "spec": {"tracing": {"endpoint": "http://collector:4317", "sampling": sampling}}});
        model.take_touched();
        model.apply_config(Some(&serde_json::from_value(config).unwrap()));
        assert!(model.take_touched().everything);
        assert_eq!(tracing(&model), Some(("http://collector:4317".to_owned(), share)), "{sampling}");
    }
}
