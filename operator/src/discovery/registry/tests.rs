//! Who is connected, what each enforces, and what each dials.

use super::*;
use crate::model::tests::{key, pod, shop};

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

fn with(reports: impl IntoIterator<Item = Report>) -> Registry {
    let registry = Registry::default();
    registry.report("uid-a", Report::Connected, |_| {});
    reports.into_iter().for_each(|report| registry.report("uid-a", report, |_| {}));
    registry
}

fn model() -> Model {
    shop(&[pod("a", "10.1.0.1", "r1"), pod("b", "10.1.0.2", "r1")])
}

fn acknowledged(registry: &Registry, epoch: u64) -> Acknowledgement {
    registry.acknowledged_canary(&model(), &key("shop", "web"), epoch)
}

fn awaited() -> Acknowledgement {
    Acknowledgement::Awaited("the sidecar of pod shop/a has not acknowledged it".to_owned())
}

#[test]
fn of_all_that_a_sidecar_has_not_acknowledged_what_it_refused_is_told() {
    let names = ["10.96.0.1:80", "203.0.113.1:80"].map(name);
    for refused in &names {
        let registry = with(names.clone().map(|name| Report::Sent(name, epoch(1))));
        assert_eq!(acknowledged(&registry, 1), awaited());
        let report = Report::Refused(refused.clone(), epoch(1), "too new".into());
        registry.report("uid-a", report, |_| {});
        // Whichever of the two a walk over them meets first.
        assert_eq!(acknowledged(&registry, 1), Acknowledgement::Refused("pod shop/a: too new".to_owned()));
    }
}

#[test]
fn a_canary_waits_for_its_own_clients_only() {
    let other = stamps(stamp::Kind::Canary, "other", 1);
    let web = name("10.96.0.1:80");
    let registry = with([Report::Sent(name("10.96.0.2:80"), other), Report::Sent(web.clone(), epoch(1))]);
    assert_eq!(acknowledged(&registry, 1), awaited());
    registry.report("uid-a", Report::Acked(web.clone(), epoch(1)), |_| {});
    assert_eq!(acknowledged(&registry, 1), Acknowledgement::Complete);
    assert_eq!(acknowledged(&registry, 2), awaited(), "its resource is not even compiled yet");
    registry.report("uid-a", Report::Sent(web.clone(), none()), |_| {});
    assert_eq!(acknowledged(&registry, 2), awaited(), "it still enforces old shares");
    registry.report("uid-a", Report::Acked(web, none()), |_| {});
    assert_eq!(acknowledged(&registry, 2), Acknowledgement::Complete, "it has no shares any more");
}

#[test]
fn a_new_stream_must_say_anew_what_the_sidecar_enforces() {
    let web = name("10.96.0.1:80");
    let registry = with([Report::Acked(web.clone(), epoch(1)), Report::Gone, Report::Connected]);
    assert_eq!(acknowledged(&registry, 2), awaited(), "meanwhile it enforces what it had");
    registry.report("uid-a", Report::Acked(web, epoch(2)), |_| {});
    assert_eq!(acknowledged(&registry, 2), Acknowledgement::Complete);
}

#[test]
fn a_sidecar_that_is_not_heard_of_is_kept_while_its_pod_is_there() {
    let mut model = model();
    let registry = with([Report::Acked(name("10.96.0.1:80"), epoch(1)), Report::Gone]);
    let kept = |registry: &Registry| lock(&registry.own).by_pod.contains_key("uid-a");
    registry.forget_lost(&model);
    assert!(kept(&registry), "it may well go on enforcing what it had");
    assert_eq!(registry.connected(), 0);
    registry.relayed("uid-a", Report::Connected);
    registry.forget_lost(&model);
    assert!(kept(&registry), "it may not have told the other replica everything yet");
    let long_ago = Instant::now().checked_sub(RESTATE_WITHIN);
    lock(&registry.relayed).by_pod.get_mut("uid-a").unwrap().since = long_ago;
    registry.forget_lost(&model);
    assert!(!kept(&registry), "another replica hears of it now");
    assert!(lock(&registry.own).by_canary.is_empty(), "the index forgets it too");
    registry.relayed("uid-a", Report::Gone);
    model.delete_pod("uid-a");
    registry.forget_lost(&model);
    assert!(lock(&registry.relayed).by_pod.is_empty(), "its pod is gone");
}

#[test]
fn a_policy_counts_the_pods_that_enforce_its_generation() {
    let inbound: Name = (ResourceType::Inbound as i32, "uid-a".into());
    let of = |generation| stamps(stamp::Kind::Policy, "strict", generation);
    let registry = with([Report::Acked(inbound.clone(), of(3)), Report::Sent(inbound.clone(), of(4))]);
    let pods: [Arc<str>; 2] = ["uid-a".into(), "uid-b".into()];
    let policy = |generation| registry.policy(&model(), &key("shop", "strict"), "p", generation, &pods);
    assert_eq!((policy(3).enforcing, policy(3).awaited), (1, Some("b".to_owned())));
    assert_eq!((policy(4).enforcing, policy(4).awaited), (0, Some("a".to_owned())));
    registry.report("uid-a", Report::Refused(inbound, of(4), "too new".into()), |_| {});
    assert_eq!(policy(4).refusal, Some("pod a: too new".to_owned()));
}

#[test]
fn pods_that_were_never_heard_of_are_named() {
    assert_eq!(
        Registry::default().unheard(&model()),
        Some("pod shop/a and 1 more have not been heard of".to_owned())
    );
    let sent = || Report::Sent(name("10.96.0.1:80"), epoch(1));
    let registry = with([sent()]);
    assert_eq!(registry.unheard(&model()), Some("pod shop/b has not been heard of".to_owned()));
    let registry = with([sent(), Report::Gone]);
    registry.relayed("uid-b", Report::Connected);
    registry.relayed("uid-b", sent());
    assert_eq!(registry.unheard(&model()), None);
}

#[test]
fn a_snapshot_names_every_stream_and_what_was_sent_and_not_acknowledged() {
    let web = name("10.0.0.1:80");
    let registry = with([Report::Connected, Report::Sent(web.clone(), epoch(1))]);
    registry.relayed("v", Report::Connected);
    let mut seen = Vec::new();
    registry.snapshot(|_| true, |all| seen = all);
    let of_a = |report| (Arc::<str>::from("uid-a"), report);
    let sent = of_a(Report::Sent(web, epoch(1)));
    assert_eq!(seen, [of_a(Report::Connected), of_a(Report::Connected), sent]);
    registry.snapshot(|_| false, |all| seen = all);
    assert!(seen.is_empty(), "of another shard");
}
