//! Shares where a Service has more than the watched workload, and obstacles.

use super::*;

fn shares(model: &Model) -> Vec<(String, u32)> {
    view(model, "").split.into_iter().map(|share| (share.revision, share.permille)).collect()
}

fn trial(weight: u32) -> Canary {
    canary(
        json!({"approvedRevision": "r1", "canaryRevision": "r2", "weight": weight, "phase": "Progressing"}),
    )
}

fn other_workload(name: &str, ip: &str) -> Pod {
    let key = pod("a", "10.1.0.1", "r1").workload.unwrap();
    Pod { workload: Some(WorkloadKey { name: "other".into(), ..key }), ..pod(name, ip, "r2") }
}

#[test]
fn endpoints_of_another_workload_have_one_share_together() {
    let watched = [pod("a", "10.1.0.1", "r1"), pod("b", "10.1.0.2", "r2")];
    let mut model = shop(&[
        watched[0].clone(),
        watched[1].clone(),
        other_workload("c", "10.1.0.3"),
        other_workload("d", "10.1.0.4"),
    ]);
    model.apply_canary(key("shop", "web"), trial(10));
    assert_eq!(shares(&model), [("r1".into(), 450), (String::new(), 500), ("r2".into(), 50)]);
    let revisions: Vec<String> = view(&model, "").endpoints.into_iter().map(|e| e.revision).collect();
    assert_eq!(revisions, ["r1", "r2", "", ""], "one that is called like the canary is not the canary");
    let name = proto::ResourceName { r#type: 2, cluster: String::new(), name: VIP.into() };
    assert_eq!(model.resource(&name, "").unwrap().requires, ["split/v1", "split/v2"]);
    model.apply_canary(key("shop", "web"), canary(json!({"approvedRevision": "r1", "phase": "Stable"})));
    let addresses = addresses(&model);
    assert!(!addresses.contains(&"10.1.0.2:8080".to_owned()), "nobody has approved r2: {addresses:?}");
}

#[test]
fn a_headless_service_is_an_obstacle_unless_another_one_has_an_address() {
    let a = pod("a", "10.1.0.1", "r1");
    let workload = a.workload.clone().unwrap();
    let mut model = shop(std::slice::from_ref(&a));
    assert!(model.split_obstacles(&workload).is_empty());
    let web = model.services[&key("shop", "web")].clone();
    let headless = Service { cluster_ips: Vec::new(), other_ips: Vec::new(), headless: true, ..web };
    model.apply_service(key("shop", "peers"), headless);
    assert!(model.split_obstacles(&workload).is_empty());
    model.delete_service(&key("shop", "web"));
    let found = model.split_obstacles(&workload);
    assert_eq!((found.len(), found[0].service.as_str()), (1, "peers"));
    assert!(found[0].reason.starts_with("it is headless"));
}

#[test]
fn of_two_canaries_behind_a_service_the_older_sets_the_shares_and_the_younger_is_told() {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1"), other_workload("c", "10.1.0.3")]);
    let mut younger = trial(10);
    younger.metadata.name = Some("younger".to_owned());
    younger.spec.target.name = "other".to_owned();
    model.apply_canary(key("shop", "web"), trial(10));
    model.apply_canary(key("shop", "younger"), younger);
    assert_eq!(view(&model, "").canary.unwrap().name, "web");
    let own = other_workload("c", "10.1.0.3").workload.unwrap();
    assert!(model.split_obstacles(&own)[0].reason.contains("Canary web"));
    assert!(model.split_obstacles(&pod("a", "10.1.0.1", "r1").workload.unwrap()).is_empty());
}

#[test]
fn at_a_weight_of_100_the_stable_version_serves_while_the_other_has_no_pod() {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1"), pod("b", "10.1.0.2", "r2")]);
    model.apply_canary(key("shop", "web"), trial(100));
    assert_eq!(shares(&model), [("r1".into(), 0), ("r2".into(), 1000)]);
    model.delete_pod("uid-b");
    assert_eq!(shares(&model), [("r1".into(), 1000), ("r2".into(), 0)]);
}
