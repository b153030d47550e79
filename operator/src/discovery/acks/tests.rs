//! Who is connected, what each enforces, and what each dials.

use super::*;
use crate::model::object::ServicePort;
use crate::model::tests::{canary, key, pod, shop};
use crate::model::{Service, WorkloadKey};

fn name(text: &str) -> Name {
    (ResourceType::Destination as i32, text.into())
}

fn stamps(kind: stamp::Kind, name: &str, version: u64) -> Stamps {
    let (namespace, name) = ("shop".into(), name.into());
    Stamps::from([Stamp { kind: kind.into(), namespace, name, uid: "p".into(), version }])
}

fn epoch(version: u64) -> Stamps {
    stamps(stamp::Kind::Canary, "web", version)
}

fn none() -> Stamps {
    Stamps::from([])
}

fn with(reports: impl IntoIterator<Item = SidecarEvent>) -> AckTracker {
    let acks = AckTracker::default();
    acks.report("uid-a", SidecarEvent::Connected, |_| {});
    reports.into_iter().for_each(|report| acks.report("uid-a", report, |_| {}));
    acks
}

fn model() -> Model {
    shop(&[pod("a", "10.1.0.1", "r1"), pod("b", "10.1.0.2", "r1")])
}

fn acknowledged(acks: &AckTracker, epoch: u64) -> Acknowledgement {
    acks.acknowledged_canary(&model(), &key("shop", "web"), epoch)
}

fn awaited() -> Acknowledgement {
    Acknowledgement::Awaited("waiting for the sidecar of pod shop/a".to_owned())
}

#[test]
fn of_all_that_a_sidecar_has_not_acknowledged_what_it_refused_is_told() {
    let names = ["10.96.0.1:80", "203.0.113.1:80"].map(name);
    for refused in &names {
        let acks = with(names.clone().map(|name| SidecarEvent::Sent(name, epoch(1))));
        assert_eq!(acknowledged(&acks, 1), awaited());
        let report = SidecarEvent::Refused(refused.clone(), epoch(1), "too new".into());
        acks.report("uid-a", report, |_| {});
        // Whichever of the two a walk over them meets first.
        assert_eq!(acknowledged(&acks, 1), Acknowledgement::Refused("pod shop/a: too new".to_owned()));
    }
}

#[test]
fn a_canary_waits_for_its_own_clients_only() {
    let other = stamps(stamp::Kind::Canary, "other", 1);
    let web = name("10.96.0.1:80");
    let acks =
        with([SidecarEvent::Sent(name("10.96.0.2:80"), other), SidecarEvent::Sent(web.clone(), epoch(1))]);
    assert_eq!(acknowledged(&acks, 1), awaited());
    acks.report("uid-a", SidecarEvent::Acked(web.clone(), epoch(1)), |_| {});
    assert_eq!(acknowledged(&acks, 1), Acknowledgement::Complete);
    assert_eq!(acknowledged(&acks, 2), awaited(), "its resource is not even compiled yet");
    acks.report("uid-a", SidecarEvent::Sent(web.clone(), none()), |_| {});
    assert_eq!(acknowledged(&acks, 2), awaited(), "it still enforces old shares");
    acks.report("uid-a", SidecarEvent::Acked(web, none()), |_| {});
    assert_eq!(acknowledged(&acks, 2), Acknowledgement::Complete, "it has no shares any more");
}

#[test]
fn a_new_stream_must_say_anew_what_the_sidecar_enforces() {
    let web = name("10.96.0.1:80");
    let acks =
        with([SidecarEvent::Acked(web.clone(), epoch(1)), SidecarEvent::Gone, SidecarEvent::Connected]);
    assert_eq!(acknowledged(&acks, 2), awaited(), "meanwhile it enforces what it had");
    acks.report("uid-a", SidecarEvent::Acked(web, epoch(2)), |_| {});
    assert_eq!(acknowledged(&acks, 2), Acknowledgement::Complete);
}

#[test]
fn a_sidecar_that_is_not_heard_of_is_kept_while_its_pod_is_there() {
    let mut model = model();
    let acks = with([SidecarEvent::Acked(name("10.96.0.1:80"), epoch(1)), SidecarEvent::Gone]);
    let kept = |acks: &AckTracker| lock(&acks.own).by_pod.contains_key("uid-a");
    acks.forget_lost(&model);
    assert!(kept(&acks), "it may well go on enforcing what it had");
    assert_eq!(acks.connected(), 0);
    acks.relayed("uid-a", SidecarEvent::Connected);
    acks.forget_lost(&model);
    assert!(kept(&acks), "it may not have told the other replica everything yet");
    let long_ago = Instant::now().checked_sub(RESTATE_WITHIN);
    lock(&acks.relayed).by_pod.get_mut("uid-a").unwrap().since = long_ago;
    acks.forget_lost(&model);
    assert!(!kept(&acks), "another replica hears of it now");
    assert!(lock(&acks.own).by_canary.is_empty(), "the index forgets it too");
    acks.relayed("uid-a", SidecarEvent::Gone);
    model.delete_pod("uid-a");
    acks.forget_lost(&model);
    assert!(lock(&acks.relayed).by_pod.is_empty(), "its pod is gone");
}

fn policy(acks: &AckTracker, generation: i64, sections: Sections) -> PolicyAcknowledgement {
    let pods = ["uid-a", "uid-b"].map(|uid| -> (Arc<str>, Sections) { (uid.into(), sections) });
    acks.policy(&model(), &key("shop", "strict"), "p", generation, &pods)
}

#[test]
fn a_policy_counts_the_pods_that_enforce_its_generation() {
    let inbound: Name = (ResourceType::Inbound as i32, "uid-a".into());
    let of = |generation| stamps(stamp::Kind::Policy, "strict", generation);
    let acks =
        with([SidecarEvent::Acked(inbound.clone(), of(3)), SidecarEvent::Sent(inbound.clone(), of(4))]);
    let policy =
        |generation| policy(&acks, generation, Sections { mtls: true, access: true, ..Sections::default() });
    assert_eq!((policy(3).enforcing, policy(3).awaited), (1, Some("b".to_owned())));
    assert_eq!((policy(4).enforcing, policy(4).awaited), (0, Some("a".to_owned())));
    acks.report("uid-a", SidecarEvent::Refused(inbound, of(4), "too new".into()), |_| {});
    assert_eq!(policy(4).refusal, Some("pod a: too new".to_owned()));
}

#[test]
fn a_policy_is_enforced_where_all_its_sections_are_and_a_refused_section_is_named() {
    let [mtls, access] =
        [ResourceType::Mtls, ResourceType::Access].map(|kind| -> Name { (kind as i32, "uid-a".into()) });
    let of = |generation| stamps(stamp::Kind::Policy, "strict", generation);
    let both = Sections { mtls: true, access: true, ..Sections::default() };
    let acks = with([SidecarEvent::Acked(mtls.clone(), of(3)), SidecarEvent::Sent(access.clone(), of(3))]);
    assert_eq!(policy(&acks, 3, both).enforcing, 0, "who may call is not acknowledged");
    assert_eq!(policy(&acks, 3, Sections { mtls: true, access: false, ..Sections::default() }).enforcing, 1);
    acks.report("uid-a", SidecarEvent::Refused(access.clone(), of(3), "too new".into()), |_| {});
    let refusal = Some("pod a refused section access: too new".to_owned());
    assert_eq!(policy(&acks, 3, both).refusal, refusal);
    let narrower = policy(&acks, 3, Sections { mtls: true, access: false, ..Sections::default() });
    assert_eq!((narrower.enforcing, narrower.refusal), (1, None), "the section is another policy's");
    acks.report("uid-a", SidecarEvent::Acked(access, of(3)), |_| {});
    assert_eq!((policy(&acks, 3, both).enforcing, policy(&acks, 3, both).refusal), (1, None));
}

#[test]
fn a_sidecar_that_does_not_know_limits_refuses_them_and_the_policy_says_what_to_do() {
    let mtls: Name = (ResourceType::Mtls as i32, "uid-a".into());
    let of = |generation| stamps(stamp::Kind::Policy, "strict", generation);
    let limits = Sections { limits: true, ..Sections::default() };
    let lacks = SidecarEvent::Lacks(vec![LIMITS_V1]);
    let acks = with([SidecarEvent::Acked(mtls.clone(), of(3)), lacks.clone()]);
    let refusal = policy(&acks, 3, limits).refusal.unwrap();
    assert!(refusal.starts_with("pod a: ") && refusal.ends_with("restart the pod to update its sidecar"));
    let mtls_only = Sections { mtls: true, ..Sections::default() };
    assert_eq!((policy(&acks, 3, mtls_only).enforcing, policy(&acks, 3, mtls_only).refusal), (1, None));
    let mut snapshot = Vec::new();
    acks.snapshot(|_| true, |all| snapshot = all.into_iter().map(|(_, event)| event).collect());
    assert_eq!(snapshot[..2], [SidecarEvent::Connected, lacks], "the next leader learns it");
    // Its container runs another version by now.
    acks.report("uid-a", SidecarEvent::Gone, |_| {});
    acks.report("uid-a", SidecarEvent::Connected, |_| {});
    assert_eq!(policy(&acks, 3, limits).refusal, None);
}

#[test]
fn a_sidecar_that_does_not_know_logs_is_named_with_the_section_that_it_lacks() {
    let inbound: Name = (ResourceType::Inbound as i32, "uid-a".into());
    let telemetry = Sections { telemetry: true, ..Sections::default() };
    let of = |generation| stamps(stamp::Kind::Policy, "strict", generation);
    let acks = with([SidecarEvent::Acked(inbound, of(3)), SidecarEvent::Lacks(vec![LOGS_V1])]);
    let found = policy(&acks, 3, telemetry);
    assert_eq!(found.enforcing, 0, "what has all sections in one has none of these");
    let refusal = found.refusal.unwrap();
    assert!(refusal.contains("does not know section telemetry: restart the pod"), "{refusal}");
    let logs: Name = (ResourceType::Logs as i32, "uid-a".into());
    let acks = with([SidecarEvent::Acked(logs, of(3))]);
    assert_eq!((policy(&acks, 3, telemetry).enforcing, policy(&acks, 3, telemetry).refusal), (1, None));
}

#[test]
fn a_policy_is_not_enforced_where_a_section_that_it_no_longer_has_is_still_in_force() {
    let [mtls, access] =
        [ResourceType::Mtls, ResourceType::Access].map(|kind| -> Name { (kind as i32, "uid-a".into()) });
    let of = |generation| stamps(stamp::Kind::Policy, "strict", generation);
    let acks = with([SidecarEvent::Acked(mtls.clone(), of(3)), SidecarEvent::Acked(access.clone(), of(3))]);
    // Generation 4 has only `mtls`.
    acks.report("uid-a", SidecarEvent::Acked(mtls, of(4)), |_| {});
    let only_mtls = Sections { mtls: true, access: false, ..Sections::default() };
    assert_eq!(policy(&acks, 4, only_mtls).awaited, Some("a".to_owned()));
    acks.report("uid-a", SidecarEvent::Refused(access.clone(), none(), "too new".into()), |_| {});
    let refusal = Some("pod a refused section access: too new".to_owned());
    assert_eq!(policy(&acks, 4, only_mtls).refusal, refusal, "it keeps the old rules");
    assert_eq!(policy(&acks, 4, Sections::default()).awaited, Some("a".to_owned()), "nor when overruled");
    acks.relayed("uid-a", SidecarEvent::Connected);
    acks.relayed("uid-a", SidecarEvent::Acked(access, none()));
    let now = policy(&acks, 4, only_mtls);
    assert_eq!((now.enforcing, now.refusal), (1, None), "it has told another replica since");
    assert_eq!(policy(&acks, 4, Sections::default()).enforcing, 2, "where it decides nothing");
}

#[test]
fn what_an_earlier_process_told_another_replica_holds_no_policy_up() {
    let access: Name = (ResourceType::Access as i32, "uid-a".into());
    let of = stamps(stamp::Kind::Policy, "strict", 3);
    let acks = with([SidecarEvent::Acked(access, of), SidecarEvent::Gone]);
    assert_eq!(policy(&acks, 4, Sections::default()).enforcing, 1);
    acks.relayed("uid-a", SidecarEvent::Connected);
    let long_ago = Instant::now().checked_sub(RESTATE_WITHIN);
    lock(&acks.relayed).by_pod.get_mut("uid-a").unwrap().since = long_ago;
    assert_eq!(policy(&acks, 4, Sections::default()).enforcing, 2);
}

#[test]
fn sections_may_be_acknowledged_to_different_replicas() {
    let of = |kind: ResourceType| {
        let name: Name = (kind as i32, "uid-a".into());
        SidecarEvent::Acked(name, stamps(stamp::Kind::Policy, "strict", 3))
    };
    let acks = with([of(ResourceType::Mtls)]);
    acks.relayed("uid-a", SidecarEvent::Connected);
    acks.relayed("uid-a", of(ResourceType::Access));
    assert_eq!(policy(&acks, 3, Sections { mtls: true, access: true, ..Sections::default() }).enforcing, 1);
}

#[test]
fn a_canary_waits_for_clients_of_its_endpoints() {
    let web: Name = (ResourceType::Endpoints as i32, "shop/web:80".into());
    let acks = with([SidecarEvent::Sent(web.clone(), epoch(1))]);
    assert_eq!(acknowledged(&acks, 1), awaited());
    let access: Name = (ResourceType::Access as i32, "uid-a".into());
    acks.report("uid-a", SidecarEvent::Refused(access, none(), "too new".into()), |_| {});
    acks.report("uid-a", SidecarEvent::Acked(web, epoch(1)), |_| {});
    assert_eq!(acknowledged(&acks, 1), Acknowledgement::Complete, "what else it refuses is no matter");
}

#[test]
fn a_canary_waits_for_a_client_that_has_a_route_to_its_service_and_no_shares_yet() {
    let mut model = model();
    let status = serde_json::json!({"approvedRevision": "r1", "phase": "Stable", "epoch": 1});
    model.apply_canary(key("shop", "web"), canary(status));
    let acknowledged = |acks: &AckTracker| acks.acknowledged_canary(&model, &key("shop", "web"), 1);
    let route: Name = (ResourceType::Route as i32, "10.96.0.1:80".into());
    let endpoints: Name = (ResourceType::Endpoints as i32, "shop/web:80".into());
    let acks =
        with([SidecarEvent::Acked(route.clone(), none()), SidecarEvent::Sent(endpoints.clone(), none())]);
    assert_eq!(acknowledged(&acks), awaited(), "its replica has not seen the Canary yet");
    acks.report("uid-a", SidecarEvent::Acked(endpoints, epoch(1)), |_| {});
    assert_eq!(acknowledged(&acks), Acknowledgement::Complete);
    let old = with([SidecarEvent::Acked(name("10.96.0.1:80"), none())]);
    assert_eq!(acknowledged(&old), awaited());
    old.report("uid-a", SidecarEvent::Acked(name("10.96.0.1:80"), epoch(1)), |_| {});
    assert_eq!(acknowledged(&old), Acknowledgement::Complete);
    let elsewhere = with([SidecarEvent::Acked((route.0, "10.96.0.1:81".into()), none())]);
    assert_eq!(acknowledged(&elsewhere), Acknowledgement::Complete, "a port that leads to no pod");
    let refused = with([SidecarEvent::Refused(route, none(), "too new".into())]);
    assert_eq!(acknowledged(&refused), Acknowledgement::Complete, "it passes through");
}

#[test]
fn a_canary_waits_for_a_client_whose_route_leads_to_its_service_and_that_has_no_shares_yet() {
    let status = serde_json::json!({"approvedRevision": "r1", "phase": "Stable", "epoch": 1});
    let led_by = |namespace: &str| {
        let mut model = model();
        model.apply_canary(key("shop", "web"), canary(status.clone()));
        let port = ServicePort { name: "http".into(), port: 80, app_protocol: None };
        let cluster_ips = vec!["10.96.0.5".parse().unwrap()];
        model.apply_service(
            key("shop", "front"),
            Service { cluster_ips, ports: vec![port], ..Service::default() },
        );
        model.apply_route(crate::model::tests::route("r", namespace, "front", "web"));
        model
    };
    let route: Name = (ResourceType::Route as i32, "10.96.0.5:80".into());
    let acks = with([SidecarEvent::Acked(route, none())]);
    let acknowledged =
        |acks: &AckTracker, model: &Model| acks.acknowledged_canary(model, &key("shop", "web"), 1);
    assert_eq!(acknowledged(&acks, &led_by("shop")), awaited(), "its replica has not seen the route yet");
    assert_eq!(
        acknowledged(&acks, &led_by("team")),
        Acknowledgement::Complete,
        "the route is for another namespace"
    );
    let old = with([SidecarEvent::Acked(name("10.96.0.5:80"), none())]);
    assert_eq!(
        acknowledged(&old, &led_by("shop")),
        Acknowledgement::Complete,
        "an earlier version does not follow routes"
    );
    let endpoints: Name = (ResourceType::Endpoints as i32, "shop/web:80".into());
    acks.report("uid-a", SidecarEvent::Acked(endpoints, epoch(1)), |_| {});
    assert_eq!(acknowledged(&acks, &led_by("shop")), Acknowledgement::Complete);
}

#[test]
fn a_sidecar_that_has_a_route_is_heard_of() {
    let route: Name = (ResourceType::Route as i32, "10.96.0.1:80".into());
    let acks = with([SidecarEvent::Sent(route, none())]);
    assert_eq!(acks.unheard(&model()), Some("the sidecar of pod shop/b has not reported yet".to_owned()));
    let acks = with([SidecarEvent::Sent((ResourceType::Mtls as i32, "uid-a".into()), none())]);
    let both = Some("2 sidecars have not reported yet, among them that of pod shop/a".to_owned());
    assert_eq!(acks.unheard(&model()), both, "what it sends to is not known yet");
}

#[test]
fn pods_that_were_never_heard_of_are_named() {
    assert_eq!(
        AckTracker::default().unheard(&model()),
        Some("2 sidecars have not reported yet, among them that of pod shop/a".to_owned())
    );
    let sent = || SidecarEvent::Sent(name("10.96.0.1:80"), epoch(1));
    let acks = with([sent()]);
    assert_eq!(acks.unheard(&model()), Some("the sidecar of pod shop/b has not reported yet".to_owned()));
    let acks = with([sent(), SidecarEvent::Gone]);
    acks.relayed("uid-b", SidecarEvent::Connected);
    acks.relayed("uid-b", sent());
    assert_eq!(acks.unheard(&model()), None);
}

#[test]
fn a_snapshot_names_every_stream_and_what_was_sent_and_not_acknowledged() {
    let web = name("10.0.0.1:80");
    let acks = with([SidecarEvent::Connected, SidecarEvent::Sent(web.clone(), epoch(1))]);
    acks.relayed("v", SidecarEvent::Connected);
    let mut seen = Vec::new();
    acks.snapshot(|_| true, |all| seen = all);
    let of_a = |report| (Arc::<str>::from("uid-a"), report);
    let sent = of_a(SidecarEvent::Sent(web, epoch(1)));
    assert_eq!(seen, [of_a(SidecarEvent::Connected), of_a(SidecarEvent::Connected), sent]);
    acks.snapshot(|_| false, |all| seen = all);
    assert!(seen.is_empty(), "of another shard");
}

/// `shop/front` beside the pods of `shop/web`, of which `b` waits behind its gate.
fn with_front() -> Model {
    let parked = Pod { gated: true, ..pod("b", "10.1.0.2", "r2") };
    let mut model = shop(&[pod("a", "10.1.0.1", "r1"), parked]);
    let own = pod("front", "10.1.0.9", "r1");
    let workload = own.workload.clone().map(|key| WorkloadKey { name: "front".into(), ..key });
    model.apply_pod(Pod { workload, labels: Box::default(), ..own });
    model
}

fn web() -> WorkloadKey {
    pod("a", "10.1.0.1", "r1").workload.unwrap()
}

/// Sidecars with these routes.
fn routed(routes: &[(&str, &str)]) -> AckTracker {
    let acks = AckTracker::default();
    for (uid, address) in routes {
        acks.report(uid, SidecarEvent::Connected, |_| {});
        let route: Name = (ResourceType::Route as i32, (*address).into());
        acks.report(uid, SidecarEvent::Sent(route, none()), |_| {});
    }
    acks
}

/// Who dials pods, where these sidecars have these routes.
fn dialling(routes: &[(&str, &str)]) -> Option<PodDialling> {
    routed(routes).dials_pods(&with_front(), &web())
}

#[test]
fn clients_that_dial_pods_are_named_where_nobody_dials_the_service() {
    let found =
        PodDialling { service: "web".into(), clients: 1, first: "shop/front".into(), by_choice: false };
    assert_eq!(dialling(&[("uid-front", "10.1.0.1:8080")]), Some(found));
    for service in ["10.96.0.1:80", "203.0.113.1:80"] {
        for who in ["uid-front", "uid-a"] {
            assert_eq!(dialling(&[("uid-front", "10.1.0.1:8080"), (who, service)]), None);
        }
    }
}

#[test]
fn who_dials_pods_by_choice_holds_nothing() {
    assert_eq!(dialling(&[("uid-front", "10.1.0.1:9090")]), None, "no Service leads to that port");
    assert_eq!(dialling(&[("uid-a", "10.1.0.1:8080")]), None, "members of one workload");
    let every = [("uid-front", "10.1.0.1:8080"), ("uid-front", "10.1.0.2:8080")];
    assert_eq!(dialling(&every), None, "no load balancer leads to a pod behind its gate");
    assert_eq!(dialling(&[("uid-gone", "10.1.0.1:8080")]), None, "its pod is gone");
}

#[test]
fn a_client_that_dials_other_services_by_their_address_dials_pods_by_choice() {
    let mut model = with_front();
    let cluster_ips = vec!["10.96.0.2".parse().unwrap()];
    model.apply_service(key("shop", "api"), Service { cluster_ips, ..Service::default() });
    let acks = routed(&[("uid-front", "10.1.0.1:8080"), ("uid-front", "10.96.0.2:443")]);
    assert!(acks.dials_pods(&model, &web()).unwrap().by_choice);
}

#[test]
fn a_scraper_is_still_known_when_the_gates_are_open_and_until_its_pod_is_gone() {
    let acks = routed(&[("uid-front", "10.1.0.1:8080"), ("uid-front", "10.1.0.2:8080")]);
    let mut model = with_front();
    assert_eq!(acks.dials_pods(&model, &web()), None);
    model.apply_pod(pod("b", "10.1.0.2", "r2"));
    assert_eq!(acks.dials_pods(&model, &web()), None);
    model.delete_pod("uid-front");
    acks.forget_lost(&model);
    assert!(lock(&acks.finders).is_empty());
}

#[test]
fn a_workload_has_clients_while_a_sidecar_uses_an_address_of_its_services_or_pods() {
    let canary = key("shop", "web");
    let has = |routes: &[(&str, &str)]| routed(routes).has_clients(&with_front(), &canary, &web());
    assert!(!has(&[]));
    assert!(!has(&[("uid-front", "10.96.0.7:80")]), "that is another Service");
    assert!(has(&[("uid-front", "10.96.0.1:80")]));
    assert!(has(&[("uid-front", "10.1.0.1:8080")]));
    let acks = routed(&[]);
    acks.relayed("uid-front", SidecarEvent::Connected);
    let route: Name = (ResourceType::Route as i32, "10.96.0.1:80".into());
    acks.relayed("uid-front", SidecarEvent::Sent(route, none()));
    assert!(acks.has_clients(&with_front(), &canary, &web()), "another replica serves its sidecar");
}

#[test]
fn an_address_that_is_unsubscribed_is_dialled_no_more() {
    let route: Name = (ResourceType::Route as i32, "10.1.0.1:8080".into());
    let acks = AckTracker::default();
    acks.report("uid-front", SidecarEvent::Connected, |_| {});
    acks.report("uid-front", SidecarEvent::Acked(route.clone(), none()), |_| {});
    let workload = web();
    let mut model = with_front();
    assert!(acks.dials_pods(&model, &workload).is_some());
    acks.report("uid-front", SidecarEvent::Unsubscribed(route.clone()), |_| {});
    assert_eq!(acks.dials_pods(&model, &workload), None);
    acks.report("uid-front", SidecarEvent::Acked(route, none()), |_| {});
    acks.report("uid-front", SidecarEvent::Gone, |_| {});
    model.delete_pod("uid-front");
    acks.forget_lost(&model);
    assert!(lock(&acks.own).by_address.is_empty(), "the index forgets whose pod is gone");
}
