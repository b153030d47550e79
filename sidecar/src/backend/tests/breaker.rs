//! How many endpoints the breaker leaves alone, and how they come back.

use super::*;
use crate::config::traffic::Breaker;

fn policy(max_ejected_percent: u32) -> Traffic {
    let breaker =
        Breaker { consecutive_failures: Some(3), eject_for: Duration::from_secs(10), max_ejected_percent };
    Traffic { breaker: Some(breaker), ..Traffic::default() }
}

fn under(traffic: &Traffic, endpoints: Vec<Endpoint>) -> Balancer {
    let balancer = of_client("");
    balancer.set_traffic(traffic, &Traffic::default());
    balancer.update(&Endpoints { endpoints, ..Endpoints::default() });
    balancer
}

fn plain(count: u16) -> Vec<Endpoint> {
    (1..=count).map(|port| endpoint(port, "", false)).collect()
}

/// The endpoint on this port, as long as it may be used.
fn at(balancer: &Balancer, port: u16) -> Rc<Upstream> {
    let stay = Some(endpoint(port, "", false).address);
    balancer.pick(&Ask { stay, ..Ask::default() }).unwrap()
}

/// So many attempts there that end like this.
fn ends(balancer: &Balancer, upstream: &Rc<Upstream>, verdict: Verdict, times: u32) -> Option<Change> {
    (0..times).map(|_| balancer.observe(upstream, Instant::now(), verdict, Instant::now())).last().flatten()
}

fn is_used(balancer: &Balancer, upstream: &Rc<Upstream>) -> bool {
    (0..200).any(|_| Rc::ptr_eq(&pick(balancer), upstream))
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_that_fails_is_left_alone_and_one_request_brings_it_back() {
    let balancer = under(&policy(50), plain(4));
    let bad = at(&balancer, 1);
    assert_eq!(ends(&balancer, &bad, Verdict::Failed, 2), None);
    assert!(is_used(&balancer, &bad));
    assert_eq!(ends(&balancer, &bad, Verdict::Failed, 1), Some(Change::Ejected));
    assert!(!is_used(&balancer, &bad));
    advance(Duration::from_secs(13)).await;
    assert!(Rc::ptr_eq(&pick(&balancer), &bad), "the probe");
    assert!(!is_used(&balancer, &bad), "only one");
    assert_eq!(ends(&balancer, &bad, Verdict::Failed, 1), None);
    advance(Duration::from_secs(13)).await;
    assert!(!is_used(&balancer, &bad), "the second time takes twice as long");
    advance(Duration::from_secs(13)).await;
    assert!(Rc::ptr_eq(&pick(&balancer), &bad));
    assert_eq!(ends(&balancer, &bad, Verdict::Good, 1), Some(Change::Restored));
    assert!(is_used(&balancer, &bad));
}

#[test]
fn a_part_of_the_endpoints_may_be_ejected_at_least_one_and_never_the_only_one() {
    for (count, percent, expected) in
        [(1, 100, 0), (2, 50, 1), (3, 50, 1), (10, 50, 5), (10, 5, 1), (10, 0, 1)]
    {
        let balancer = under(&policy(percent), plain(count));
        let all: Vec<_> = (1..=count).map(|port| at(&balancer, port)).collect();
        let changes: Vec<_> =
            all.iter().map(|upstream| ends(&balancer, upstream, Verdict::Failed, 3)).collect();
        let ejected = changes.iter().filter(|change| **change == Some(Change::Ejected)).count();
        assert_eq!(
            (ejected, balancer.counts().ejected),
            (expected, expected as u32),
            "{percent} % of {count}"
        );
        assert_eq!(
            changes.iter().filter(|change| **change == Some(Change::Capped)).count(),
            all.len() - ejected
        );
    }
}

#[test]
fn each_version_keeps_endpoints_so_that_its_failures_are_seen() {
    let endpoints: Vec<Endpoint> =
        (1..=5).map(|port| endpoint(port, if port <= 4 { "old" } else { "new" }, false)).collect();
    let balancer = of_client("");
    balancer.set_traffic(&policy(50), &Traffic::default());
    let split = split(&[("old", 500), ("new", 500)]);
    balancer.update(&Endpoints { endpoints, split, ..Endpoints::default() });
    let only = at(&balancer, 5);
    assert_eq!(ends(&balancer, &only, Verdict::Failed, 10), Some(Change::Capped));
    assert!((share(&balancer, "new") - 0.5).abs() < 0.03);
}

#[test]
fn when_fewer_than_half_are_left_all_are_used() {
    let balancer = under(&policy(100), plain(5));
    let all: Vec<_> = (1..=5).map(|port| at(&balancer, port)).collect();
    for upstream in all.iter().take(2) {
        ends(&balancer, upstream, Verdict::Failed, 3);
    }
    assert!(!balancer.counts().is_panicking && !is_used(&balancer, &all[0]));
    ends(&balancer, &all[2], Verdict::Failed, 3);
    assert!(balancer.counts().is_panicking);
    assert!(all.iter().all(|upstream| is_used(&balancer, upstream)));
    // More have come.
    balancer.update(&Endpoints { endpoints: plain(8), ..Endpoints::default() });
    assert!(!balancer.counts().is_panicking && !is_used(&balancer, &all[0]));
}

#[tokio::test(start_paused = true)]
async fn a_panic_ends_when_the_endpoints_that_are_used_all_the_same_serve_again() {
    let balancer = under(&policy(100), plain(4));
    let all: Vec<_> = (1..=4).map(|port| at(&balancer, port)).collect();
    for upstream in all.iter().take(3) {
        ends(&balancer, upstream, Verdict::Failed, 3);
    }
    assert!(balancer.counts().is_panicking);
    let serve = || {
        for _ in 0..200 {
            let chosen = pick(&balancer);
            balancer.observe(&chosen, Instant::now(), Verdict::Good, Instant::now());
        }
        (balancer.counts().ejected, balancer.counts().is_panicking)
    };
    assert_eq!(serve(), (3, true), "not before their time");
    advance(Duration::from_secs(13)).await;
    assert_eq!(serve(), (0, false));
}

#[tokio::test(start_paused = true)]
async fn a_choice_that_the_breaker_learns_nothing_from_does_not_use_up_the_probe() {
    let balancer = under(&policy(50), plain(4));
    let bad = at(&balancer, 1);
    ends(&balancer, &bad, Verdict::Failed, 3);
    advance(Duration::from_secs(13)).await;
    // The begin of a session, or a copy.
    let look = Ask { no_probe: true, ..Ask::default() };
    assert!((0..100).all(|_| !Rc::ptr_eq(&balancer.pick(&look).unwrap(), &bad)));
    assert!(Rc::ptr_eq(&pick(&balancer), &bad));
}

#[test]
fn who_turns_the_breaker_off_gets_the_ejected_endpoints_back() {
    let balancer = under(&policy(50), plain(4));
    let bad = at(&balancer, 1);
    ends(&balancer, &bad, Verdict::Failed, 3);
    assert!(!is_used(&balancer, &bad));
    let off = Breaker { consecutive_failures: None, ..policy(50).breaker.unwrap() };
    let off = Traffic { breaker: Some(off), ..Traffic::default() };
    assert!(balancer.set_traffic(&off, &Traffic::default()), "what is shown changes");
    assert!(is_used(&balancer, &bad));
    assert_eq!(ends(&balancer, &bad, Verdict::Failed, 100), None);
}

#[test]
fn an_ejected_endpoint_is_better_than_none() {
    let balancer = under(&policy(50), plain(2));
    let (bad, good) = (at(&balancer, 1), at(&balancer, 2));
    ends(&balancer, &bad, Verdict::Failed, 3);
    let chosen = balancer.pick(&tried(&[good.endpoint.address])).unwrap();
    assert!(Rc::ptr_eq(&chosen, &bad));
}

#[test]
fn without_a_policy_endpoints_that_cannot_be_reached_are_ejected_and_those_that_fail_are_not() {
    let balancer = under(&Traffic::default(), plain(4));
    let bad = at(&balancer, 1);
    assert_eq!(ends(&balancer, &bad, Verdict::Failed, 100), None);
    assert_eq!(ends(&balancer, &bad, Verdict::Unreached, 5), Some(Change::Ejected));
}

#[tokio::test]
async fn what_is_ejected_is_shown_as_long_as_the_backend_lives() {
    let telemetry = Telemetry::default();
    let (store, _wanted) = ConfigStore::new();
    let address = SocketAddr::from(([10, 96, 0, 1], 80));
    store.set_endpoints(&"shop/web:80".into(), Endpoints { endpoints: plain(2), ..Endpoints::default() });
    let destination = leads_to(&store, address, web(80, None)).await;
    let backends = Backends::of_client("client");
    let backend = backends.of(&destination).unwrap();
    let bad = backend.pick(&Ask::default()).unwrap();
    for _ in 0..5 {
        if backend.observe(&bad, Instant::now(), Verdict::Unreached, Instant::now()) == Some(Change::Ejected)
        {
            backend.show(|| telemetry.breakers.of("shop", "web"));
        }
    }
    let gauge = telemetry.breakers.of("shop", "web");
    assert_eq!(gauge.read(), (1, 0));
    store.set_endpoints(&"shop/web:80".into(), Endpoints { endpoints: plain(0), ..Endpoints::default() });
    assert!(backend.pick(&Ask::default()).is_none());
    assert_eq!(gauge.read(), (0, 0));
}
