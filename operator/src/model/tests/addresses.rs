//! Whose an address is, and endpoints of unknown pods.

use super::*;

fn service(created: i64, cluster: &str, other: &str, port: u16) -> Service {
    let ips = |text: &str| text.split_terminator(',').map(|ip| ip.parse().unwrap()).collect();
    let ports = vec![Port { name: "http".into(), port, app_protocol: None }];
    Service { created, cluster_ips: ips(cluster), other_ips: ips(other), ports, ..Service::default() }
}

fn leads_to(model: &Model, address: &str) -> String {
    match model.destination(address.parse().unwrap(), "").kind {
        Some(destination::Kind::Service(service)) => service.name,
        Some(destination::Kind::Pod(pod)) => pod.endpoint.unwrap().pod_uid,
        _ => "nobody".to_owned(),
    }
}

#[test]
fn a_cluster_address_is_its_services_whoever_else_claims_it_and_whenever() {
    let mut model = Model::default();
    model.apply_service(key("evil", "thief"), service(1, "", "10.96.0.1", 80));
    model.apply_service(key("shop", "web"), service(2, "10.96.0.1", "", 80));
    assert_eq!(leads_to(&model, VIP), "web");
    model.apply_service(key("evil", "thief"), service(0, "10.96.0.9", "10.96.0.1", 80));
    assert_eq!(leads_to(&model, VIP), "web");
    let found = model.colliding_claims();
    assert_eq!(
        (found.len(), &found[0].holder, &found[0].claimant),
        (1, &key("shop", "web"), &key("evil", "thief"))
    );
}

#[test]
fn an_external_address_is_that_of_the_oldest_service_with_the_port() {
    let mut model = Model::default();
    model.apply_service(key("b", "old"), service(1, "", "192.0.2.1", 80));
    model.apply_service(key("a", "young"), service(2, "", "192.0.2.1", 80));
    model.apply_service(key("a", "shares"), service(3, "", "192.0.2.1", 81));
    assert_eq!(leads_to(&model, "192.0.2.1:80"), "old");
    assert_eq!(leads_to(&model, "192.0.2.1:81"), "shares");
    assert_eq!(model.colliding_claims().len(), 1);
    model.delete_service(&key("b", "old"));
    assert_eq!(leads_to(&model, "192.0.2.1:80"), "young");
}

#[test]
fn a_pods_address_stays_the_pods() {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
    model.apply_service(key("evil", "thief"), service(1, "", "10.1.0.1", 80));
    assert_eq!(leads_to(&model, "10.1.0.1:80"), "uid-a");
}

#[test]
fn an_endpoint_is_held_back_until_its_pod_is_known_unless_it_has_none() {
    let a = pod("a", "10.1.0.1", "r1");
    let mut model = shop(&[]);
    let machine = Endpoint { pod_uid: None, ..endpoint(&pod("vm", "10.9.0.1", ""), true) };
    let endpoints = vec![endpoint(&a, true), machine];
    let slice = Slice { service: "web".into(), ports: vec![("http".into(), 8080)], endpoints };
    model.apply_slice(key("shop", "web-1"), slice);
    assert_eq!(addresses(&model), ["10.9.0.1:8080"]);
    model.take_touched();
    model.apply_pod(a);
    assert!(model.take_touched().services.contains(&key("shop", "web")));
    assert_eq!(addresses(&model), ["10.1.0.1:8080", "10.9.0.1:8080"]);
}

/// The Service `shop/web` with one endpoint that names no pod, at the address of this pod.
fn hand_made(at: &Pod) -> Model {
    let mut model = shop(&[]);
    let endpoints = vec![Endpoint { pod_uid: None, ..endpoint(at, true) }];
    let slice = Slice { service: "web".into(), ports: vec![("http".into(), 8080)], endpoints };
    model.apply_slice(key("shop", "web-1"), slice);
    model.take_touched();
    model
}

fn identities(model: &Model) -> Vec<String> {
    view(model, "node-a").endpoints.into_iter().map(|endpoint| endpoint.identity).collect()
}

#[test]
fn an_endpoint_that_names_no_pod_is_the_pod_whose_own_address_it_has() {
    let a = pod("a", "10.1.0.1", "r1");
    let mut model = hand_made(&a);
    let touches = |model: &mut Model| model.take_touched().services.contains(&key("shop", "web"));
    assert_eq!(identities(&model), [""], "nobody has the address");
    model.apply_pod(a.clone());
    assert!(touches(&mut model));
    assert_eq!(identities(&model), ["spiffe://cluster.local/ns/shop/sa/web"]);
    assert_eq!(view(&model, "").endpoints[0].pod_uid, "uid-a");
    model.apply_pod(Pod { service_account: "other".into(), ..a.clone() });
    assert!(touches(&mut model));
    assert_eq!(identities(&model), ["spiffe://cluster.local/ns/shop/sa/other"]);
    model.apply_pod(Pod { ips: Box::new(["10.1.0.2".parse().unwrap()]), ..a.clone() });
    assert!(touches(&mut model));
    assert_eq!(identities(&model), [""], "it has another address now");
    model.apply_pod(a);
    assert!(touches(&mut model));
    model.delete_pod("uid-a");
    assert!(touches(&mut model));
    assert_eq!(identities(&model), [""]);
}

#[test]
fn several_ports_of_a_pod_that_is_not_named_are_several_endpoints_and_a_named_one_is_listed_once() {
    let a = pod("a", "10.1.0.1", "r1");
    let mut model = hand_made(&a);
    model.apply_pod(a.clone());
    let slice = |port: u16, endpoint: Endpoint| Slice {
        service: "web".into(),
        ports: vec![("http".into(), port)],
        endpoints: vec![endpoint],
    };
    let second = slice(8081, Endpoint { pod_uid: None, ..endpoint(&a, true) });
    model.apply_slice(key("shop", "web-2"), second);
    assert_eq!(addresses(&model), ["10.1.0.1:8080", "10.1.0.1:8081"]);
    model.apply_slice(key("shop", "web-3"), slice(8080, endpoint(&a, true)));
    assert_eq!(addresses(&model), ["10.1.0.1:8080", "10.1.0.1:8081"]);
}

#[test]
fn a_policy_that_turns_mtls_off_holds_for_endpoints_that_name_no_pod_too() {
    let a = pod("a", "10.1.0.1", "r1");
    let mut model = hand_made(&a);
    model.apply_pod(a);
    model.take_touched();
    let disabled = json!({"target": {"kind": "Namespace"}, "mtls": "Disabled"});
    model.apply_policy(key("shop", "p"), policy("p", 1, disabled));
    assert!(model.take_touched().services.contains(&key("shop", "web")));
    assert_eq!(identities(&model), [""]);
}

#[test]
fn a_canary_shares_out_endpoints_that_name_no_pod() {
    let a = pod("a", "10.1.0.1", "r1");
    let mut model = hand_made(&a);
    model.apply_pod(a);
    model.take_touched();
    model.apply_canary(key("shop", "web"), canary(json!({"approvedRevision": "r1"})));
    assert!(model.take_touched().services.contains(&key("shop", "web")));
    assert_eq!(view(&model, "").split.len(), 1);
    assert_eq!(model.pods_behind(&key("shop", "web")).count(), 1);
}

#[test]
fn an_endpoint_at_the_address_of_a_node_is_not_the_pod_that_shares_it() {
    let host = Pod { host_network: true, ..pod("a", "192.168.0.1", "r1") };
    let mut model = hand_made(&host);
    model.apply_pod(host);
    assert_eq!(view(&model, "").endpoints[0].pod_uid, "");
}
