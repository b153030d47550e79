mod breaker;
mod choice;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, advance};
use tulle_mesh::identity::WorkloadId;

use super::*;
use crate::config::traffic::Traffic;
use crate::config::{CanaryRef, ConfigStore, Protocol, Route, ServiceRoute};
use crate::telemetry::Telemetry;
use crate::telemetry::attempts::Seen;

fn endpoint(port: u16, revision: &str, terminating: bool) -> Endpoint {
    Endpoint {
        revision: revision.into(),
        terminating,
        pod_uid: format!("pod-{port}").into(),
        ..Endpoint::at(SocketAddr::from(([10, 0, 0, 1], port)))
    }
}

fn of_client(pod_uid: &str) -> Balancer {
    Balancer::new(hash(pod_uid), &Rc::new(Group::named("", "")))
}

fn of_client_that_stays(pod_uid: &str) -> Balancer {
    let balancer = of_client(pod_uid);
    balancer.set_affinity(Some(Duration::from_secs(60)));
    balancer
}

fn split(shares: &[(&str, u32)]) -> Vec<(Arc<str>, u32)> {
    shares.iter().map(|(revision, share)| ((*revision).into(), *share)).collect()
}

fn balancer(endpoints: Vec<Endpoint>, shares: &[(&str, u32)]) -> Balancer {
    let balancer = of_client("");
    balancer.update(&Endpoints { endpoints, split: split(shares), ..Endpoints::default() });
    balancer
}

/// A request that has been there.
fn tried(addresses: &[SocketAddr]) -> Ask {
    let mut ask = Ask::default();
    addresses.iter().for_each(|address| ask.tried.push(*address));
    ask
}

fn pick(balancer: &Balancer) -> Rc<Upstream> {
    balancer.pick(&Ask::default()).unwrap()
}

fn share(balancer: &Balancer, revision: &str) -> f64 {
    let hits = (0..20_000).filter(|_| &*pick(balancer).endpoint.revision == revision).count();
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
    assert!(
        balancer(vec![endpoint(1, "new", false)], &[("old", 1000), ("new", 0)])
            .pick(&Ask::default())
            .is_none()
    );
}

#[test]
fn a_revision_that_nobody_named_gets_nothing() {
    let balancer = balancer(vec![endpoint(1, "old", false), endpoint(2, "stray", false)], &[("old", 1000)]);
    assert!((share(&balancer, "stray") - 0.0).abs() < f64::EPSILON);
}

#[test]
fn terminating_endpoints_serve_only_while_there_is_no_other() {
    let both = balancer(vec![endpoint(1, "", false), endpoint(2, "", true)], &[]);
    assert!((0..100).all(|_| pick(&both).endpoint.address.port() == 1));
    assert_eq!(pick(&balancer(vec![endpoint(2, "", true)], &[])).endpoint.address.port(), 2);
}

#[test]
fn terminating_endpoints_serve_while_only_versions_without_a_share_are_ready() {
    for (revision, shares) in [("new", &[("old", 1000), ("new", 0)][..]), ("stray", &[("old", 1000)])] {
        let balancer = balancer(vec![endpoint(1, "old", true), endpoint(2, revision, false)], shares);
        assert_eq!(pick(&balancer).endpoint.address.port(), 1);
        assert!(balancer.has_other(endpoint(2, "", false).address));
        assert!(!balancer.has_other(endpoint(1, "", false).address));
    }
}

#[test]
fn one_port_is_counted_by_what_each_connection_speaks() {
    let telemetry = Telemetry::default();
    let one = pick(&balancer(vec![endpoint(1, "a", false)], &[]));
    one.series(&telemetry, "opaque", None).connection(None, (1, 2));
    one.series(&telemetry, "http1", None).request(&Ok(200), None, Duration::ZERO, (0, 0));
    let protocols: Vec<_> = telemetry.all().into_iter().map(|(key, _)| key.protocol).collect();
    assert_eq!(protocols, ["http1", "opaque"]);
}

#[test]
fn a_client_stays_with_its_endpoint_where_the_service_says_so() {
    let endpoints: Vec<Endpoint> = (1..=4).map(|port| endpoint(port, "", false)).collect();
    let balancer = of_client_that_stays("");
    balancer.update(&Endpoints { endpoints, ..Endpoints::default() });
    let first = pick(&balancer).endpoint.address;
    assert!((0..100).all(|_| pick(&balancer).endpoint.address == first));
    let other = balancer.pick(&tried(&[first])).unwrap().endpoint.address;
    assert_ne!(other, first, "one that was tried is left");
    assert_eq!(pick(&balancer).endpoint.address, other);
}

fn sticky(shares: &[(&str, u32)]) -> Endpoints {
    let endpoint = |port| endpoint(port, if port <= 4 { "old" } else { "new" }, false);
    Endpoints { endpoints: (1..=8).map(endpoint).collect(), split: split(shares), ..Endpoints::default() }
}

#[test]
fn at_rest_under_a_canary_a_client_stays_with_its_endpoint() {
    for split in [&[("old", 1000)][..], &[("old", 1000), ("new", 0)]] {
        let balancer = of_client_that_stays("client");
        balancer.update(&sticky(&[]));
        let free = pick(&balancer).endpoint.clone();
        balancer.update(&sticky(split));
        let first = pick(&balancer).endpoint.clone();
        assert!(&*free.revision == "new" || first == free, "a split that names its revision moves nobody");
        assert_eq!(&*first.revision, "old");
        assert!((0..100).all(|_| pick(&balancer).endpoint == first));
    }
}

#[test]
fn a_weight_holds_over_clients_that_stay_and_moves_them_one_way_as_it_grows() {
    let clients: Vec<Balancer> =
        (0..2_000).map(|client| of_client_that_stays(&format!("client-{client}"))).collect();
    let mut before = vec![false; clients.len()];
    for weight in [0, 50, 200, 500, 1000] {
        let split = [("old", 1000 - weight), ("new", weight)];
        let mut moved = 0;
        for (client, was) in clients.iter().zip(&mut before) {
            client.update(&sticky(&split));
            let first = pick(client).endpoint.clone();
            assert!((0..10).all(|_| pick(client).endpoint == first));
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
            let balancer = of_client_that_stays(&format!("client-{client}"));
            balancer.update(&sticky(&split));
            pick(&balancer).endpoint.revision.clone()
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
        let balancer = of_client_that_stays(&format!("client-{client}"));
        balancer.update(&service(&[]));
        let first = pick(&balancer).endpoint.clone();
        balancer.update(&service(&[("old", 350), ("new", 150), ("", 500)]));
        let then = pick(&balancer).endpoint.clone();
        if &*first.revision == "other" {
            assert_eq!(then, first);
        } else {
            assert_ne!(&*then.revision, "other");
            of_canaried += 1;
            on_new += u32::from(&*then.revision == "new");
        }
        balancer.update(&service(&[("old", 250), ("new", 150), ("", 600)]));
        let last = pick(&balancer).endpoint.clone();
        assert_eq!(*last.revision == *"other", *then.revision == *"other");
    }
    let seen = f64::from(on_new) / f64::from(of_canaried);
    assert!((seen - 0.3).abs() < 0.06, "{seen}");
}

#[test]
fn a_client_whose_version_has_no_ready_endpoint_uses_the_other_and_comes_back() {
    let balancer = of_client_that_stays("client");
    let all = sticky(&[("old", 1), ("new", 999_999)]);
    balancer.update(&all);
    assert_eq!(&*pick(&balancer).endpoint.revision, "new");
    let mut less = all.clone();
    less.endpoints.retain(|endpoint| &*endpoint.revision == "old");
    balancer.update(&less);
    assert_eq!(&*pick(&balancer).endpoint.revision, "old");
    balancer.update(&all);
    assert_eq!(&*pick(&balancer).endpoint.revision, "new");
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
    assert!(only.pick(&Ask::default()).is_some(), "the others have no endpoint");
}

#[test]
fn only_what_a_canary_names_is_evidence_and_counts_in_the_epoch_that_chose_it() {
    let telemetry = Telemetry::default();
    let canary = |epoch| Some(CanaryRef { namespace: "shop".into(), name: "web".into(), epoch });
    let service = Endpoints {
        endpoints: vec![endpoint(1, "old", false)],
        split: split(&[("old", 1000), ("", 0)]),
        canary: canary(1),
        ..Endpoints::default()
    };
    let balancer = of_client("");
    balancer.update(&service);
    let upstream = pick(&balancer);
    let first = upstream.attempts(&telemetry).unwrap();
    balancer.update(&service);
    assert!(Arc::ptr_eq(&first, &upstream.attempts(&telemetry).unwrap()), "nothing has changed");
    balancer.update(&Endpoints { canary: canary(2), ..service.clone() });
    assert!(Rc::ptr_eq(&upstream, &pick(&balancer)));
    let second = upstream.attempts(&telemetry).unwrap();
    second.count(Seen::Good, None);
    first.count(Seen::Failed, None);
    let mut taken = telemetry.attempts.take();
    taken.sort_by_key(|counts| counts.epoch);
    let seen: Vec<_> = taken.iter().map(|counts| (counts.epoch, counts.attempts, counts.failures)).collect();
    assert_eq!(seen, [(1, 1, 1), (2, 1, 0)]);
    balancer.update(&Endpoints { canary: None, ..service.clone() });
    assert!(upstream.attempts(&telemetry).is_none());
    balancer.update(&Endpoints { split: split(&[("", 1000)]), ..service });
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
    let first = pick(&two).endpoint.address;
    assert_ne!(two.pick(&tried(&[first])).unwrap().endpoint.address, first);
}

#[test]
fn an_endpoint_that_could_not_be_reached_is_passed_over() {
    let two = balancer(vec![endpoint(1, "", false), endpoint(2, "", false)], &[]);
    let first = pick(&two);
    first.avoid();
    assert!((0..100).all(|_| pick(&two).endpoint != first.endpoint));
}

#[test]
fn when_every_endpoint_with_a_share_was_tried_the_approved_version_serves() {
    let endpoints = vec![endpoint(1, "old", false), endpoint(2, "new", false)];
    let balancer = balancer(endpoints, &[("old", 0), ("new", 1000)]);
    let first = pick(&balancer);
    assert_eq!(&*first.endpoint.revision, "new");
    assert_eq!(&*balancer.pick(&tried(&[first.endpoint.address])).unwrap().endpoint.revision, "old");
}

#[test]
fn a_request_goes_to_four_endpoints_at_most() {
    let mut tried = Tried::default();
    assert!(tried.is_empty());
    let address = |port| endpoint(port, "", false).address;
    (1..=5).for_each(|port| tried.push(address(port)));
    assert_eq!(tried.as_slice(), [1, 2, 3, 4].map(address));
    assert!(tried.contains(address(4)) && !tried.contains(address(5)) && tried.len() == 4);
}

#[tokio::test(start_paused = true)]
async fn in_a_long_list_every_endpoint_that_may_be_used_has_the_same_chance() {
    let many = balancer((1..=40).map(|port| endpoint(port, "", port == 1)).collect(), &[]);
    let address = |port| endpoint(port, "", false).address;
    let second = std::iter::repeat_with(|| pick(&many)).find(|up| up.endpoint.address == address(2)).unwrap();
    second.avoid();
    let mut hits: HashMap<u16, u32> = HashMap::new();
    for _ in 0..20_000 {
        let chosen = many.pick(&tried(&[address(3)])).unwrap();
        *hits.entry(chosen.endpoint.address.port()).or_default() += 1;
    }
    assert!([1, 2, 3].iter().all(|port| !hits.contains_key(port)), "{hits:?}");
    assert_eq!(hits.len(), 37);
    assert!(hits.values().all(|hits| (400..700).contains(hits)), "{hits:?}");
}

#[test]
fn what_is_known_of_endpoints_that_stay_is_kept_in_short_and_long_lists() {
    for count in [4u16, 100] {
        let list = |ports: std::ops::RangeInclusive<u16>| Endpoints {
            endpoints: ports.map(|port| endpoint(port, "", false)).collect(),
            ..Endpoints::default()
        };
        let balancer = of_client("");
        balancer.update(&list(1..=count));
        let find = |port: u16| {
            let found = || Some(pick(&balancer)).filter(|up| up.endpoint.address.port() == port);
            std::iter::repeat_with(found).flatten().next().unwrap()
        };
        let (stays, goes, changes) = (find(3), find(1), find(4));
        let mut next = list(2..=count + 1);
        next.endpoints[2].revision = "other".into();
        balancer.update(&next);
        assert!(Rc::ptr_eq(&stays, &find(3)));
        assert!(!Rc::ptr_eq(&changes, &find(4)), "it is another pod now");
        assert!((0..1000).all(|_| pick(&balancer).endpoint != goes.endpoint));
    }
}

#[test]
fn another_endpoint_could_serve_only_if_it_would_be_chosen() {
    let address = |port| endpoint(port, "", false).address;
    let two = |revision, ending, shares: &[(&str, u32)]| {
        balancer(vec![endpoint(1, "old", false), endpoint(2, revision, ending)], shares)
    };
    assert!(!balancer(vec![endpoint(1, "", false)], &[]).has_other(address(1)));
    assert!(two("old", false, &[]).has_other(address(1)));
    assert!(
        two("old", true, &[]).has_other(address(1)),
        "one that terminates serves while there is no other"
    );
    assert!(!two("new", false, &[("old", 1000), ("new", 0)]).has_other(address(1)));
    assert!(two("new", false, &[("old", 1000), ("new", 0)]).has_other(address(2)));
    assert!(two("new", false, &[("old", 0), ("new", 1000)]).has_other(address(2)), "the approved version");
}

/// One request, answered after so many milliseconds.
async fn answer(upstream: &Rc<Upstream>, ms: u64) {
    let in_flight = upstream.begin();
    advance(Duration::from_millis(ms)).await;
    in_flight.end(Some(Outcome::Answered(Instant::now())));
}

/// A balancer of endpoints on ports from 1, and these.
fn with_endpoints<const COUNT: usize>() -> (Balancer, [Rc<Upstream>; COUNT]) {
    let ports: [u16; COUNT] = std::array::from_fn(|index| index as u16 + 1);
    let balancer = balancer(ports.iter().map(|port| endpoint(*port, "", false)).collect(), &[]);
    let upstreams = ports.map(|port| {
        let found = || Some(pick(&balancer)).filter(|up| up.endpoint.address.port() == port);
        std::iter::repeat_with(found).flatten().next().unwrap()
    });
    (balancer, upstreams)
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_fails_fast_is_not_preferred() {
    let (balancer, [_, bad]) = with_endpoints();
    let mut failed = 0;
    for _ in 0..500 {
        let chosen = pick(&balancer);
        if Rc::ptr_eq(&chosen, &bad) {
            chosen.begin().end(Some(Outcome::Failed));
            failed += 1;
        } else {
            answer(&chosen, 5).await;
        }
    }
    assert!(failed < 25, "{failed} of 500");
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_failed_is_tried_again_with_time() {
    let (balancer, [good, bad]) = with_endpoints();
    answer(&good, 5).await;
    for _ in 0..10 {
        bad.begin().end(Some(Outcome::Failed));
    }
    let busy: Vec<InFlight> = (0..20).map(|_| good.begin()).collect();
    assert!(Rc::ptr_eq(&pick(&balancer), &good), "twenty in hand are better than one that fails");
    drop(busy);
    advance(Duration::from_secs(60)).await;
    let _busy = good.begin();
    assert!(Rc::ptr_eq(&pick(&balancer), &bad));
}

#[tokio::test(start_paused = true)]
async fn latency_fades_to_the_median_of_the_service_and_not_to_nothing() {
    let (_, [fast, slow, new]) = with_endpoints();
    for _ in 0..50 {
        answer(&fast, 10).await;
    }
    answer(&slow, 100).await;
    let cost = |upstream: &Rc<Upstream>| upstream.cost(Instant::now());
    assert!(cost(&slow) > 0.099, "{}", cost(&slow));
    assert!((0.009..0.012).contains(&cost(&new)), "one without history is like the others: {}", cost(&new));
    advance(Duration::from_secs(100)).await;
    assert!((0.009..0.012).contains(&cost(&slow)), "{}", cost(&slow));
    assert!((0.009..0.012).contains(&cost(&fast)), "{}", cost(&fast));
}

#[tokio::test(start_paused = true)]
async fn the_median_follows_a_service_whose_first_answer_was_slow() {
    let (_, [first, new]) = with_endpoints();
    answer(&first, 1_000).await;
    for _ in 0..200 {
        answer(&first, 10).await;
    }
    let cost = new.cost(Instant::now());
    assert!((0.009..0.013).contains(&cost), "{cost}");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_gave_up_says_that_an_answer_takes_longer_and_never_that_it_is_fast() {
    let (_, [upstream]) = with_endpoints();
    let gave_up = async |ms| {
        let in_flight = upstream.begin();
        advance(Duration::from_millis(ms)).await;
        in_flight.end(Some(Outcome::Abandoned));
        upstream.cost(Instant::now())
    };
    answer(&upstream, 10).await;
    let after_little = gave_up(1).await;
    assert!(after_little > 0.009, "{after_little}");
    let after_long = gave_up(500).await;
    assert!(after_long > 0.49, "{after_long}");
}

#[tokio::test(start_paused = true)]
async fn what_is_in_hand_counts_until_it_ends_also_an_opaque_connection() {
    let (balancer, [one, two]) = with_endpoints();
    let connection = one.begin();
    advance(Duration::from_secs(3600)).await;
    assert!((0..100).all(|_| Rc::ptr_eq(&pick(&balancer), &two)));
    drop(connection);
    assert!((0..100).any(|_| Rc::ptr_eq(&pick(&balancer), &one)));
}

async fn leads_to(store: &ConfigStore, address: SocketAddr, route: Route) -> Arc<Destination> {
    let entry = store.resolve(address).await;
    store.set_route(address, route);
    entry.current().unwrap()
}

fn web(port: u16, affinity: Option<Duration>) -> Route {
    let (namespace, name) = ("shop".to_owned(), "web".to_owned());
    let endpoints = "shop/web:80".into();
    let protocol = Protocol::Detect;
    Route::Service(ServiceRoute {
        namespace,
        name,
        port,
        protocol,
        affinity,
        endpoints,
        ..ServiceRoute::default()
    })
}

#[tokio::test]
async fn addresses_of_one_service_share_a_backend_for_as_long_as_one_of_them_uses_it() {
    let (store, _wanted) = ConfigStore::new();
    let [first, second] = [1, 2].map(|last| SocketAddr::from(([10, 96, 0, last], 80)));
    let list = |ports: &[u16]| Endpoints {
        endpoints: ports.iter().map(|port| endpoint(*port, "", false)).collect(),
        ..Endpoints::default()
    };
    store.set_endpoints(&"shop/web:80".into(), list(&[1]));
    let a = leads_to(&store, first, web(80, None)).await;
    let b = leads_to(&store, second, web(80, None)).await;
    let backends = Backends::of_client("client");
    let (one, other) = (backends.of(&a).unwrap(), backends.of(&b).unwrap());
    assert!(Rc::ptr_eq(&one, &other));
    assert_eq!(one.service().as_deref(), Some(b"shop/web:80".as_slice()));
    assert_eq!(one.counted_as(), ("shop", "web"));
    let chosen = one.pick(&Ask::default()).unwrap();
    assert!(!one.has_other(chosen.endpoint.address));
    store.set_endpoints(&"shop/web:80".into(), list(&[1, 2]));
    assert!(one.has_other(chosen.endpoint.address), "the next use sees what is current");
    drop((one, other));
    backends.sweep();
    assert_eq!(backends.len(), 0);
}

#[tokio::test]
async fn endpoints_that_were_forgotten_and_came_back_get_a_backend_that_is_kept_current() {
    let (store, _wanted) = ConfigStore::new();
    let address = SocketAddr::from(([10, 96, 0, 1], 80));
    let backends = Backends::of_client("client");
    store.set_endpoints(&"shop/web:80".into(), Endpoints::default());
    let before = backends.of(&*leads_to(&store, address, web(80, None)).await).unwrap();
    store.set_route(address, Route::Unknown);
    let endpoints = vec![endpoint(1, "", false)];
    store.set_endpoints(&"shop/web:80".into(), Endpoints { endpoints, ..Endpoints::default() });
    let after = backends.of(&*leads_to(&store, address, web(80, None)).await).unwrap();
    assert!(before.pick(&Ask::default()).is_none() && after.pick(&Ask::default()).is_some());
}

#[test]
fn a_pods_own_address_is_a_backend_of_one_and_its_identity_is_written_once() {
    let identity = Some(WorkloadId::new("cluster.local", "shop", "redis"));
    let pod = PodRoute {
        endpoint: Endpoint { identity, ..endpoint(6379, "r1", false) },
        protocol: Protocol::Opaque,
    };
    let backends = Backends::of_client("client");
    let backend = backends.of(&Destination::Pod(pod)).unwrap();
    assert_eq!((backend.service(), backend.counted_as()), (None, ("shop", "redis")));
    let upstream = backend.pick(&Ask::default()).unwrap();
    assert!(!backend.has_other(upstream.endpoint.address) && !backend.is_ending(&upstream.endpoint));
    let text = upstream.identity_text();
    assert_eq!(&*text, b"spiffe://cluster.local/ns/shop/sa/redis");
    assert_eq!(text.as_ptr(), upstream.identity_text().as_ptr());
    assert!(backend.pick(&tried(&[upstream.endpoint.address])).is_none());
    assert!(backends.of(&Destination::Unknown).is_none());
}
