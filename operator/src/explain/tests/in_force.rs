//! A sidecar that has not taken what it was sent last works with what it had, and so does the explanation.

use std::sync::Arc;

use super::*;
use crate::discovery::report::resource_name;
use crate::discovery::{Enforced, Name, Stamps};

/// The pod's sidecar keeps this resource as it is now, and refuses the next version of it.
fn keeps(model: &Model, pod_uid: &str, kind: ResourceType, name: &str) -> AckTracker {
    let resource = model.resource(&resource_name(&(kind.into(), name.into())), pod_uid).unwrap();
    enforces(pod_uid, kind, name, Enforced::Earlier(Arc::new(resource)))
}

/// The pod's sidecar has refused the last version of this resource, and works with this.
fn enforces(pod_uid: &str, kind: ResourceType, name: &str, enforced: Enforced) -> AckTracker {
    let acks = AckTracker::default();
    let name: Name = (kind.into(), name.into());
    acks.report(pod_uid, SidecarEvent::Connected, |_| {});
    acks.report(pod_uid, SidecarEvent::Refused(name.clone(), Stamps::from([]), "too new".to_owned()), |_| {});
    acks.report(pod_uid, SidecarEvent::Enforces(name, Some(enforced)), |_| {});
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
    let said = "; pod shop/web-1 works with an earlier version, because it has refused a later one: too new";
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

#[test]
fn a_server_that_could_never_read_its_rules_lets_nobody_in() {
    let model = world();
    let acks = enforces("uid-web-1", ResourceType::Access, "uid-web-1", Enforced::Nothing);
    let explained = asked(&model, &acks);
    assert!(!explained.reaches && explained.outcome.contains("403 (PolicyDenied)"), "{explained:#?}");
    assert!(stage(&explained, "access").because.contains("shop/web-1 works without, because it has refused"));
}

#[test]
fn what_nobody_knows_leaves_the_outcome_open() {
    let model = world();
    let acks = enforces("uid-cart-1", ResourceType::Route, "10.96.0.1:80", Enforced::Unknown);
    let explained = asked(&model, &acks);
    assert!(explained.outcome.ends_with("depending on stage address."), "{explained:#?}");
    assert!(stage(&explained, "address").because.contains("that this operator does not have"));
}

#[test]
fn a_client_that_dialled_an_address_before_it_was_a_services_passes_through() {
    let mut model = world();
    let service = model.service(&key("shop", "web")).unwrap().clone();
    model.delete_service(&key("shop", "web"));
    let acks = keeps(&model, "uid-cart-1", ResourceType::Route, "10.96.0.1:80");
    model.apply_service(key("shop", "web"), service);
    let explained = asked(&model, &acks);
    assert!(explained.reaches, "{explained:#?}");
    let address = stage(&explained, "address");
    assert!(address.because.contains("as they are, and kube-proxy chooses the pod"), "{}", address.because);
    assert!(explained.outcome.ends_with("in plain text."), "{}", explained.outcome);
}

#[test]
fn pods_that_are_gone_are_said_to_be_and_shown_to_who_sees_their_namespace() {
    let mut model = world();
    let acks = keeps(&model, "uid-cart-1", ResourceType::Endpoints, "shop/web:80");
    model.delete_slice(&key("shop", "web-1"));
    model.delete_pod("uid-web-1");
    let explained = asked(&model, &acks);
    let endpoint = stage(&explained, "endpoint");
    assert_eq!(endpoint.verdict, Verdict::Depends);
    assert!(endpoint.because.contains("10.1.0.1:8080; its pod is gone"), "{}", endpoint.because);
    let mut endpoint = tulle_mesh::proto::Endpoint { pod_uid: "gone".into(), ..Default::default() };
    let shown = |endpoint: &tulle_mesh::proto::Endpoint| {
        let question = question("/");
        let client = Client::find(&model, &question.source).unwrap();
        let dialled = Dialled::find(&model, &question.destination).unwrap();
        let shown: &dyn Fn(&str) -> bool = &|namespace| namespace == "shop";
        World { model: &model, acks: &acks, question: &question, client, dialled, shown }
            .shows_endpoint(endpoint)
    };
    assert!(shown(&endpoint));
    endpoint.identity = "spiffe://cluster.local/ns/shop/sa/web".into();
    assert!(shown(&endpoint));
    endpoint.identity = "spiffe://cluster.local/ns/pay/sa/web".into();
    assert!(!shown(&endpoint));
}

#[test]
fn who_could_not_read_its_first_route_or_endpoints_works_without_rules_or_endpoints() {
    let mut model = world();
    apply_route(&mut model, json!([{"backendRefs": [to("api", 1)]}]));
    let acks = enforces("uid-cart-1", ResourceType::Route, "10.96.0.1:80", Enforced::Nothing);
    let explained = asked(&model, &acks);
    assert!(explained.reaches, "it goes to the Service itself: {explained:#?}");
    let model = world();
    let acks = enforces("uid-cart-1", ResourceType::Endpoints, "shop/web:80", Enforced::Nothing);
    let explained = asked(&model, &acks);
    assert!(!explained.reaches && explained.outcome.contains("503"), "{explained:#?}");
    let because = &stage(&explained, "endpoint").because;
    assert!(because.ends_with("that its client's sidecar has lists none"), "{because}");
}

#[test]
fn what_nobody_knows_leaves_open_that_a_request_is_refused() {
    let mut model = world();
    apply(&mut model, web("p", json!({"access": {"allow": []}})));
    let acks = enforces("uid-web-1", ResourceType::Access, "uid-web-1", Enforced::Unknown);
    let explained = asked(&model, &acks);
    let unless = "(PolicyDenied), unless a sidecar works with a version that the operator does not know of.";
    assert!(!explained.reaches && explained.outcome.ends_with(unless), "{}", explained.outcome);
}

#[test]
fn sidecars_that_are_not_connected_any_more_leave_it_open_and_those_never_heard_of_do_not() {
    let model = world();
    let acks = AckTracker::default();
    acks.report("uid-web-1", SidecarEvent::Connected, |_| {});
    assert!(asked(&model, &acks).outcome.ends_with("over mTLS."));
    acks.report("uid-web-1", SidecarEvent::Gone, |_| {});
    let explained = asked(&model, &acks);
    assert!(explained.outcome.contains("depending on stages tls"), "{}", explained.outcome);
    assert!(stage(&explained, "tls").because.contains("pod shop/web-1 is not connected to the operator"));
    acks.relayed("uid-web-1", SidecarEvent::Connected);
    assert!(asked(&model, &acks).outcome.ends_with("over mTLS."), "it is connected to another replica");
}
