//! A sidecar that has not taken what it was sent last works with what it had, and so does the explanation.

use std::sync::Arc;

use super::*;
use crate::discovery::report::resource_name;
use crate::discovery::{Name, Stamps};

/// The pod's sidecar keeps this resource as it is now, and refuses the next version of it.
fn keeps(model: &Model, pod_uid: &str, kind: ResourceType, name: &str) -> AckTracker {
    let acks = AckTracker::default();
    let name: Name = (kind.into(), name.into());
    let resource = model.resource(&resource_name(&name), pod_uid).unwrap();
    acks.report(pod_uid, SidecarEvent::Connected, |_| {});
    acks.report(pod_uid, SidecarEvent::Refused(name.clone(), Stamps::from([]), "too new".to_owned()), |_| {});
    acks.report(pod_uid, SidecarEvent::Enforces(name, Some(Arc::new(resource))), |_| {});
    acks
}

fn asked(model: &Model, acks: &AckTracker) -> Explanation {
    explain(model, acks, &question("/"), &|_: &str| true).unwrap()
}

#[test]
fn a_server_that_has_refused_new_rules_decides_by_those_that_it_has() {
    let mut model = world();
    let acks = keeps(&model, "uid-web-1", ResourceType::Access, "uid-web-1");
    apply(&mut model, web("p", json!({"access": {"allow": []}})));
    assert!(!ask(&model, &question("/")).reaches);
    let explained = asked(&model, &acks);
    assert!(explained.reaches, "{explained:#?}");
    let because = &stage(&explained, "access").because;
    assert!(because.starts_with("no access section holds for the server"), "{because}");
    let said =
        "; pod shop/web-1 works with an earlier version, because it has refused the present one: too new";
    assert!(because.ends_with(said), "{because}");
}

#[test]
fn a_server_that_still_denies_is_explained_as_denying() {
    let mut model = world();
    apply(&mut model, web("p", json!({"access": {"allow": []}})));
    let acks = keeps(&model, "uid-web-1", ResourceType::Access, "uid-web-1");
    model.delete_policy(&key("shop", "p"));
    assert!(ask(&model, &question("/")).reaches);
    let explained = asked(&model, &acks);
    assert!(!explained.reaches && explained.outcome.contains("403 (PolicyDenied)"), "{explained:#?}");
    let access = stage(&explained, "access");
    assert_eq!(access.object, "MeshPolicy/shop/p");
}

#[test]
fn a_client_with_earlier_rules_or_endpoints_sends_by_those() {
    let mut model = world();
    let acks = keeps(&model, "uid-cart-1", ResourceType::Route, "10.96.0.1:80");
    apply_route(&mut model, json!([{"backendRefs": [to("api", 1)]}]));
    assert!(!ask(&model, &question("/")).reaches, "api has no pods");
    let explained = asked(&model, &acks);
    assert!(explained.reaches, "{explained:#?}");
    assert!(stage(&explained, "address").because.contains("shop/cart-1 works with an earlier version"));

    let mut model = world();
    let acks = keeps(&model, "uid-cart-1", ResourceType::Endpoints, "shop/web:80");
    model.delete_slice(&key("shop", "web-1"));
    assert!(!ask(&model, &question("/")).reaches);
    let explained = asked(&model, &acks);
    assert!(explained.reaches, "{explained:#?}");
    assert!(stage(&explained, "split").because.contains("shop/cart-1 works with an earlier version"));
}
