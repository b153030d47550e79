//! What a pod enforces, section by section.

use tulle_mesh::features::{ACCESS_V1, SHADOW_V1};
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
