use super::*;
use crate::telemetry::attempts::Seen;

fn endpoint(port: u16, revision: &str, terminating: bool) -> Endpoint {
    Endpoint {
        address: SocketAddr::from(([10, 0, 0, 1], port)),
        identity: None,
        revision: revision.into(),
        terminating,
        pod_uid: format!("pod-{port}").into(),
    }
}

fn balancer(endpoints: Vec<Endpoint>, split: &[(&str, u32)]) -> Balancer {
    let service = Service {
        endpoints,
        split: split.iter().map(|(revision, share)| ((*revision).into(), *share)).collect(),
        ..Service::default()
    };
    let balancer = Balancer::default();
    balancer.update(&service);
    balancer
}

fn share(balancer: &Balancer, revision: &str) -> f64 {
    let hits = (0..20_000).filter(|_| &*balancer.pick(&[]).unwrap().endpoint.revision == revision).count();
    hits as f64 / 20_000.0
}

#[test]
fn revisions_get_their_share_however_many_pods_they_have() {
    let endpoints = vec![
        endpoint(1, "old", false),
        endpoint(2, "old", false),
        endpoint(3, "old", false),
        endpoint(4, "new", false),
    ];
    let seen = share(&balancer(endpoints, &[("old", 950), ("new", 50)]), "new");
    assert!((0.04..0.06).contains(&seen), "{seen}");
}

#[test]
fn a_revision_without_a_ready_endpoint_gets_nothing() {
    let balancer =
        balancer(vec![endpoint(1, "old", false), endpoint(2, "new", true)], &[("old", 500), ("new", 500)]);
    assert!((share(&balancer, "new") - 0.0).abs() < f64::EPSILON);
}

#[test]
fn a_revision_of_weight_nought_gets_nothing_even_when_it_is_all_there_is() {
    assert!(balancer(vec![endpoint(1, "new", false)], &[("old", 1000), ("new", 0)]).pick(&[]).is_none());
}

#[test]
fn a_revision_that_nobody_named_gets_nothing() {
    let balancer = balancer(vec![endpoint(1, "old", false), endpoint(2, "stray", false)], &[("old", 1000)]);
    assert!((share(&balancer, "stray") - 0.0).abs() < f64::EPSILON);
}

#[test]
fn terminating_endpoints_serve_only_while_there_is_no_other() {
    let both = balancer(vec![endpoint(1, "", false), endpoint(2, "", true)], &[]);
    assert!((0..100).all(|_| both.pick(&[]).unwrap().endpoint.address.port() == 1));
    assert_eq!(balancer(vec![endpoint(2, "", true)], &[]).pick(&[]).unwrap().endpoint.address.port(), 2);
}

#[test]
fn one_port_is_counted_by_what_each_connection_speaks() {
    let telemetry = Telemetry::default();
    let one = balancer(vec![endpoint(1, "a", false)], &[]).pick(&[]).unwrap();
    one.series(&telemetry, "opaque").connection(None, (1, 2));
    one.series(&telemetry, "http1").request(&Ok(200), None, Duration::ZERO, (0, 0));
    let protocols: Vec<_> = telemetry.all().into_iter().map(|(key, _)| key.protocol).collect();
    assert_eq!(protocols, ["http1", "opaque"]);
}

#[test]
fn a_client_stays_with_its_endpoint_where_the_service_says_so() {
    let endpoints: Vec<Endpoint> = (1..=4).map(|port| endpoint(port, "", false)).collect();
    let service = Service { endpoints, affinity: Some(Duration::from_secs(60)), ..Service::default() };
    let balancer = Balancer::default();
    balancer.update(&service);
    let first = balancer.pick(&[]).unwrap().endpoint.address;
    assert!((0..100).all(|_| balancer.pick(&[]).unwrap().endpoint.address == first));
    let other = balancer.pick(&[first]).unwrap().endpoint.address;
    assert_ne!(other, first, "one that was tried is left");
    assert_eq!(balancer.pick(&[]).unwrap().endpoint.address, other);
}

fn sticky(split: &[(&str, u32)]) -> Service {
    let endpoint = |port| endpoint(port, if port <= 4 { "old" } else { "new" }, false);
    Service {
        endpoints: (1..=8).map(endpoint).collect(),
        split: split.iter().map(|(revision, share)| ((*revision).into(), *share)).collect(),
        affinity: Some(Duration::from_secs(60)),
        ..Service::default()
    }
}

#[test]
fn at_rest_under_a_canary_a_client_stays_with_its_endpoint() {
    for split in [&[("old", 1000)][..], &[("old", 1000), ("new", 0)]] {
        let balancer = Balancer::of_client("client");
        balancer.update(&sticky(&[]));
        let free = balancer.pick(&[]).unwrap().endpoint.clone();
        balancer.update(&sticky(split));
        let first = balancer.pick(&[]).unwrap().endpoint.clone();
        assert!(&*free.revision == "new" || first == free, "a split that names its revision moves nobody");
        assert_eq!(&*first.revision, "old");
        assert!((0..100).all(|_| balancer.pick(&[]).unwrap().endpoint == first));
    }
}

#[test]
fn a_weight_holds_over_clients_that_stay_and_moves_them_one_way_as_it_grows() {
    let clients: Vec<Balancer> =
        (0..2_000).map(|client| Balancer::of_client(&format!("client-{client}"))).collect();
    let mut before = vec![false; clients.len()];
    for weight in [0, 50, 200, 500, 1000] {
        let split = [("old", 1000 - weight), ("new", weight)];
        let mut moved = 0;
        for (client, was) in clients.iter().zip(&mut before) {
            client.update(&sticky(&split));
            let first = client.pick(&[]).unwrap().endpoint.clone();
            assert!((0..10).all(|_| client.pick(&[]).unwrap().endpoint == first));
            let is = &*first.revision == "new";
            assert!(is || !*was, "nobody goes back while the weight grows");
            *was = is;
            moved += u32::from(is);
        }
        let expected = f64::from(weight) / 1000.0;
        let seen = f64::from(moved) / 2_000.0;
        assert!((seen - expected).abs() < 0.04, "{seen} for {expected}");
    }
}

#[test]
fn all_workers_of_a_pod_send_it_to_the_same_version() {
    let split = [("old", 500), ("new", 500)];
    for client in 0..50 {
        let worker = || {
            let balancer = Balancer::of_client(&format!("client-{client}"));
            balancer.update(&sticky(&split));
            balancer.pick(&[]).unwrap().endpoint.revision.clone()
        };
        assert_eq!(worker(), worker());
    }
}

#[test]
fn a_canary_of_one_workload_moves_no_client_that_stays_with_another() {
    let service = |split: &[(&str, u32)]| {
        let mut service = sticky(split);
        service.endpoints.extend((9..=12).map(|port| endpoint(port, "other", false)));
        service
    };
    let (mut of_canaried, mut on_new) = (0u32, 0u32);
    for client in 0..2_000 {
        let balancer = Balancer::of_client(&format!("client-{client}"));
        balancer.update(&service(&[]));
        let first = balancer.pick(&[]).unwrap().endpoint.clone();
        balancer.update(&service(&[("old", 350), ("new", 150), ("", 500)]));
        let then = balancer.pick(&[]).unwrap().endpoint.clone();
        if &*first.revision == "other" {
            assert_eq!(then, first);
        } else {
            assert_ne!(&*then.revision, "other");
            of_canaried += 1;
            on_new += u32::from(&*then.revision == "new");
        }
        balancer.update(&service(&[("old", 250), ("new", 150), ("", 600)]));
        let last = balancer.pick(&[]).unwrap().endpoint.clone();
        assert_eq!(*last.revision == *"other", *then.revision == *"other");
    }
    let seen = f64::from(on_new) / f64::from(of_canaried);
    assert!((seen - 0.3).abs() < 0.06, "{seen}");
}

#[test]
fn a_client_whose_version_has_no_ready_endpoint_uses_the_other_and_comes_back() {
    let balancer = Balancer::of_client("client");
    let all = sticky(&[("old", 1), ("new", 999_999)]);
    balancer.update(&all);
    assert_eq!(&*balancer.pick(&[]).unwrap().endpoint.revision, "new");
    let mut less = all.clone();
    less.endpoints.retain(|endpoint| &*endpoint.revision == "old");
    balancer.update(&less);
    assert_eq!(&*balancer.pick(&[]).unwrap().endpoint.revision, "old");
    balancer.update(&all);
    assert_eq!(&*balancer.pick(&[]).unwrap().endpoint.revision, "new");
}

#[test]
fn a_share_without_a_name_is_that_of_every_revision_that_no_other_names() {
    let endpoints = || {
        vec![
            endpoint(1, "old", false),
            endpoint(2, "new", false),
            endpoint(3, "stray", false),
            endpoint(4, "", false),
        ]
    };
    let split = [("old", 300), ("new", 200), ("", 500)];
    let seen = |revision| share(&balancer(endpoints(), &split), revision);
    for (revision, expected) in [("old", 0.3), ("new", 0.2)] {
        let seen = seen(revision);
        assert!((seen - expected).abs() < 0.02, "{seen} for {revision:?}");
    }
    // Of its endpoints the better is chosen, whatever their revisions.
    let others = 1.0 - seen("old") - seen("new");
    assert!((others - 0.5).abs() < 0.03, "{others} for the others");
    let only = balancer(vec![endpoint(3, "stray", false)], &split);
    assert!(only.pick(&[]).is_some(), "the others have no endpoint");
}

#[test]
fn only_what_a_canary_names_is_evidence_and_counts_in_the_epoch_that_chose_it() {
    let telemetry = Telemetry::default();
    let canary = |epoch| Some(CanaryRef { namespace: "shop".into(), name: "web".into(), epoch });
    let service = Service {
        endpoints: vec![endpoint(1, "old", false)],
        split: vec![("old".into(), 1000), ("".into(), 0)],
        canary: canary(1),
        ..Service::default()
    };
    let balancer = Balancer::default();
    balancer.update(&service);
    let upstream = balancer.pick(&[]).unwrap();
    let first = upstream.attempts(&telemetry).unwrap();
    balancer.update(&service);
    assert!(Arc::ptr_eq(&first, &upstream.attempts(&telemetry).unwrap()), "nothing has changed");
    balancer.update(&Service { canary: canary(2), ..service.clone() });
    assert!(Rc::ptr_eq(&upstream, &balancer.pick(&[]).unwrap()));
    let second = upstream.attempts(&telemetry).unwrap();
    second.count(Seen::Good, None);
    first.count(Seen::Failed, None);
    let mut taken = telemetry.attempts.take();
    taken.sort_by_key(|counts| counts.epoch);
    let seen: Vec<_> = taken.iter().map(|counts| (counts.epoch, counts.attempts, counts.failures)).collect();
    assert_eq!(seen, [(1, 1, 1), (2, 1, 0)]);
    balancer.update(&Service { canary: None, ..service.clone() });
    assert!(upstream.attempts(&telemetry).is_none());
    balancer.update(&Service { split: vec![("".into(), 1000)], ..service });
    assert!(upstream.attempts(&telemetry).is_none(), "it is none of the Canary's versions");
}

#[test]
fn an_endpoint_that_is_known_to_end_is_told_from_one_that_took_its_address() {
    let before = endpoint(1, "old", false);
    let ending = balancer(vec![endpoint(1, "old", true)], &[]);
    assert!(ending.is_ending(&before));
    assert!(!balancer(vec![before.clone()], &[]).is_ending(&before));
    assert!(!ending.is_ending(&Endpoint { pod_uid: "other".into(), ..before }));
}

#[test]
fn an_endpoint_that_was_tried_is_not_tried_again() {
    let two = balancer(vec![endpoint(1, "", false), endpoint(2, "", false)], &[]);
    let first = two.pick(&[]).unwrap().endpoint.address;
    assert_ne!(two.pick(&[first]).unwrap().endpoint.address, first);
}

#[test]
fn an_endpoint_that_could_not_be_reached_is_passed_over() {
    let two = balancer(vec![endpoint(1, "", false), endpoint(2, "", false)], &[]);
    let first = two.pick(&[]).unwrap();
    first.avoid();
    assert!((0..100).all(|_| two.pick(&[]).unwrap().endpoint != first.endpoint));
}

#[test]
fn when_every_endpoint_with_a_share_was_tried_the_approved_version_serves() {
    let endpoints = vec![endpoint(1, "old", false), endpoint(2, "new", false)];
    let balancer = balancer(endpoints, &[("old", 0), ("new", 1000)]);
    let first = balancer.pick(&[]).unwrap();
    assert_eq!(&*first.endpoint.revision, "new");
    assert_eq!(&*balancer.pick(&[first.endpoint.address]).unwrap().endpoint.revision, "old");
}
