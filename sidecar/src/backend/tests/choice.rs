//! What policies, zones and versions make of the choice.

use super::*;
use crate::config::traffic::{Balance, BalanceBy, HashKey, ZonePolicy};
use crate::config::{Distribution, Steering};

fn address(port: u16) -> SocketAddr {
    endpoint(port, "", false).address
}

fn by(by: BalanceBy) -> Traffic {
    Traffic { balance: Some(Balance { by, ..Balance::default() }), ..Traffic::default() }
}

/// A balancer under this policy, with endpoints on ports from 1.
fn under(traffic: &Traffic, count: u16) -> Balancer {
    let balancer = of_client("");
    balancer.set_traffic(traffic, &Traffic::default());
    let endpoints = (1..=count).map(|port| endpoint(port, "", false)).collect();
    balancer.update(&Endpoints { endpoints, ..Endpoints::default() });
    balancer
}

fn port_of(upstream: &Upstream) -> u16 {
    upstream.endpoint.address.port()
}

fn hits(balancer: &Balancer, ask: &Ask, requests: u32) -> HashMap<u16, u32> {
    let mut hits = HashMap::new();
    for _ in 0..requests {
        *hits.entry(port_of(&balancer.pick(ask).unwrap())).or_default() += 1;
    }
    hits
}

#[tokio::test(start_paused = true)]
async fn of_three_equals_share_the_worst_gets_nothing_and_a_new_one_is_tried() {
    let (balancer, [one, two, three]) = with_endpoints();
    let even = hits(&balancer, &Ask::default(), 9_000);
    assert!(even.len() == 3 && even.values().all(|hits| (2_700..3_300).contains(hits)), "{even:?}");
    for (upstream, ms) in [(&one, 30), (&two, 10)] {
        answer(upstream, ms).await;
    }
    // Of the third nothing is known: it counts as the median, which is above the second.
    assert!((0..100).any(|_| Rc::ptr_eq(&pick(&balancer), &three)), "it would never be tried");
    answer(&three, 20).await;
    assert!((0..100).all(|_| !Rc::ptr_eq(&pick(&balancer), &one)));
}

#[tokio::test(start_paused = true)]
async fn what_a_pod_reports_counts_as_much_as_what_was_seen_and_fades() {
    let (balancer, [one, two]) = with_endpoints();
    for upstream in [&one, &two] {
        answer(upstream, 10).await;
    }
    one.report(Some(3), Some(100_000), Instant::now());
    let cost = |upstream: &Rc<Upstream>| upstream.cost(Instant::now());
    assert!((cost(&one) - 0.055).abs() < 0.002, "{}", cost(&one));
    assert!((0..100).all(|_| Rc::ptr_eq(&pick(&balancer), &two)));
    two.report(None, None, Instant::now());
    assert!((cost(&two) - 0.01).abs() < 0.001, "nothing was reported");
    advance(Duration::from_secs(600)).await;
    assert!((cost(&one) - cost(&two)).abs() < 0.001, "{} and {}", cost(&one), cost(&two));
}

#[test]
fn by_requests_the_one_with_fewer_in_flight_is_chosen() {
    let balancer = under(&by(BalanceBy::Requests), 2);
    let busy = pick(&balancer);
    busy.begin().end(Some(Outcome::Answered(Instant::now())));
    let _in_flight = busy.begin();
    assert!((0..100).all(|_| !Rc::ptr_eq(&pick(&balancer), &busy)));
}

#[test]
fn in_turns_every_endpoint_gets_the_same() {
    let balancer = under(&by(BalanceBy::RoundRobin), 5);
    assert_eq!(hits(&balancer, &Ask::default(), 100), (1..=5).map(|port| (port, 20)).collect());
    let ask = tried(&[address(2)]);
    assert_eq!(hits(&balancer, &ask, 80).values().collect::<Vec<_>>(), [&20; 4]);
}

#[test]
fn requests_with_the_same_hash_go_to_the_same_endpoint_and_few_move_when_one_goes() {
    let traffic = by(BalanceBy::Hash(HashKey::Header("x-user".into())));
    let balancer = under(&traffic, 10);
    assert_eq!(balancer.hash_key(), Some(HashKey::Header("x-user".into())));
    let of = |balancer: &Balancer, hash| {
        port_of(&balancer.pick(&Ask { hash: Some(hash), ..Ask::default() }).unwrap())
    };
    let before: Vec<u16> = (0..1_000).map(|hash| of(&balancer, hash)).collect();
    assert_eq!(before, (0..1_000).map(|hash| of(&balancer, hash)).collect::<Vec<_>>());
    for port in 1..=10 {
        let users = before.iter().filter(|before| **before == port).count();
        assert!((60..140).contains(&users), "{users} of 1000 at {port}");
    }
    let endpoints = (1..=9).map(|port| endpoint(port, "", false)).collect();
    balancer.update(&Endpoints { endpoints, ..Endpoints::default() });
    for (hash, before) in before.iter().enumerate() {
        let now = of(&balancer, hash as u64);
        assert!(now == *before || *before == 10, "{hash} has moved from {before} to {now}");
    }
    let chance = hits(&balancer, &Ask::default(), 1_000);
    assert_eq!(chance.len(), 9, "without a hash, as always");
}

#[test]
fn a_request_leaves_the_endpoint_of_its_hash_when_that_has_much_more_in_flight_than_the_others() {
    let balancer = under(&by(BalanceBy::Hash(HashKey::Source)), 4);
    let at = |tried: &Ask| balancer.pick(&Ask { hash: Some(7), ..tried.clone() }).unwrap();
    let first = at(&Ask::default());
    let second = at(&tried(&[first.endpoint.address]));
    let _few: Vec<InFlight> = (0..3).map(|_| first.begin()).collect();
    assert!(Rc::ptr_eq(&at(&Ask::default()), &first), "three are not much");
    first.report(Some(50), None, Instant::now());
    assert!(Rc::ptr_eq(&at(&Ask::default()), &second));
    second.report(Some(50), None, Instant::now());
    let other = at(&Ask::default());
    assert!(!Rc::ptr_eq(&other, &first) && !Rc::ptr_eq(&other, &second));
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_that_has_become_ready_gets_its_share_bit_by_bit() {
    let unix =
        || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64;
    let balance = Balance { warm_up: Some(Duration::from_secs(30)), ..Balance::default() };
    let traffic = Traffic { balance: Some(balance), ..Traffic::default() };
    for count in [4, 40] {
        let balancer = under(&traffic, 0);
        let now = unix();
        let with_new = |new: u16| {
            let ready = |port| if port <= new { now } else { now - 3_600 };
            let endpoint = |port| Endpoint { ready_unix: ready(port), ..endpoint(port, "", false) };
            let endpoints = (1..=count).map(endpoint).collect();
            balancer.update(&Endpoints { endpoints, ..Endpoints::default() });
        };
        let share = || f64::from(hits(&balancer, &Ask::default(), 40_000)[&1]) / 40_000.0 * f64::from(count);
        with_new(1);
        let cold = share();
        assert!((0.05..0.2).contains(&cold), "{cold} of {count}");
        advance(Duration::from_secs(15)).await;
        let tepid = share();
        assert!((0.4..0.7).contains(&tepid), "{tepid} of {count}");
        advance(Duration::from_secs(16)).await;
        let warm = share();
        assert!((0.85..1.15).contains(&warm), "{warm} of {count}");
        with_new(count / 2 + 2);
        let many = share();
        assert!((0.85..1.15).contains(&many), "{many} of {count}: nobody else is there");
    }
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_is_ahead_does_not_keep_an_endpoint_cold_for_ever() {
    let unix = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64;
    let balance = Balance { warm_up: Some(Duration::from_secs(30)), ..Balance::default() };
    let balancer = under(&Traffic { balance: Some(balance), ..Traffic::default() }, 0);
    let update = |ready_unix: i64| {
        let ready = |port| if port == 1 { ready_unix } else { unix - 3_600 };
        let endpoint = |port| Endpoint { ready_unix: ready(port), ..endpoint(port, "", false) };
        let endpoints = (1..=4).map(endpoint).collect();
        balancer.update(&Endpoints { endpoints, ..Endpoints::default() });
        f64::from(hits(&balancer, &Ask::default(), 40_000)[&1]) / 10_000.0
    };
    let cold = update(unix + 600);
    assert!((0.05..0.2).contains(&cold), "{cold}");
    advance(Duration::from_secs(31)).await;
    let warm = update(unix + 600);
    assert!((0.85..1.15).contains(&warm), "{warm}: a new list is not a new endpoint");
    let again = update(unix + 601);
    assert!((0.05..0.2).contains(&again), "{again}: it has become ready once more");
}

fn zoned(traffic: &Traffic, near: u16, far: u16, distribution: Distribution) -> Balancer {
    let balancer = under(traffic, 0);
    balancer.set_place(&Arc::new(Place { zone: "a".into(), node: "n".into() }));
    update_zones(&balancer, near, far, distribution);
    balancer
}

/// Ports below 100 are near.
fn update_zones(balancer: &Balancer, near: u16, far: u16, distribution: Distribution) {
    let of = |port, zone: &str| Endpoint { zone: zone.into(), ..endpoint(port, "", false) };
    let ports = (1..=near).map(|port| of(port, "a")).chain((101..=100 + far).map(|port| of(port, "b")));
    balancer.update(&Endpoints { endpoints: ports.collect(), distribution, ..Endpoints::default() });
}

fn share_of_near(balancer: &Balancer) -> f64 {
    let hits = hits(balancer, &Ask::default(), 10_000);
    f64::from(hits.iter().filter(|(port, _)| **port < 100).map(|(_, hits)| hits).sum::<u32>()) / 10_000.0
}

fn zone(zone: ZonePolicy) -> Traffic {
    Traffic { balance: Some(Balance { zone, ..Balance::default() }), ..Traffic::default() }
}

#[test]
fn where_the_service_says_so_the_zone_serves_and_the_others_when_it_has_none_left() {
    let balancer = zoned(&Traffic::default(), 2, 8, Distribution::SameZone);
    assert!((share_of_near(&balancer) - 1.0).abs() < f64::EPSILON);
    let both = tried(&[address(1), address(2)]);
    assert!(port_of(&balancer.pick(&both).unwrap()) > 100);
    let any = zoned(&Traffic::default(), 2, 8, Distribution::Any);
    assert!((0.15..0.25).contains(&share_of_near(&any)));
}

#[tokio::test(start_paused = true)]
async fn a_zone_that_is_preferred_is_left_by_a_few_and_by_more_when_it_cannot_take_them() {
    let balancer = zoned(&zone(ZonePolicy::Prefer), 10, 10, Distribution::Any);
    let near = share_of_near(&balancer);
    assert!((0.97..0.99).contains(&near), "{near}");
    update_zones(&balancer, 6, 10, Distribution::Any);
    let spilling = share_of_near(&balancer);
    assert!((0.3..0.45).contains(&spilling), "{spilling}: four of ten have gone");
    advance(Duration::from_secs(1_200)).await;
    let used_to_it = share_of_near(&balancer);
    assert!((0.97..0.99).contains(&used_to_it), "{used_to_it}");
    let report = |ports: std::ops::RangeInclusive<u16>, load| {
        for port in ports {
            let stay = Ask { stay: Some(address(port)), ..Ask::default() };
            balancer.pick(&stay).unwrap().report(Some(load), None, Instant::now());
        }
    };
    report(1..=6, 20);
    report(101..=110, 4);
    advance(Duration::from_secs(1)).await;
    let busy = share_of_near(&balancer);
    assert!((0.3..0.45).contains(&busy), "{busy}: the others are less busy");
}

#[test]
fn requests_with_the_same_hash_leave_the_zone_together() {
    let by = BalanceBy::Hash(HashKey::Header("x-user".into()));
    let balance = Balance { by, zone: ZonePolicy::Prefer, ..Balance::default() };
    let traffic = Traffic { balance: Some(balance), ..Traffic::default() };
    let balancer = zoned(&traffic, 10, 10, Distribution::Any);
    let mut far = 0;
    for hash in 0..2_000 {
        let hits = hits(&balancer, &Ask { hash: Some(hash), ..Ask::default() }, 20);
        assert_eq!(hits.len(), 1, "{hash} is at {hits:?}");
        far += u32::from(hits.keys().any(|port| *port > 100));
    }
    assert!((20..70).contains(&far), "{far} of 2000");
}

#[test]
fn a_hash_comes_before_the_affinity_of_the_service() {
    let balancer = of_client_that_stays("");
    balancer.set_traffic(&by(BalanceBy::Hash(HashKey::Cookie("user".into()))), &Traffic::default());
    let endpoints = (1..=4).map(|port| endpoint(port, "", false)).collect();
    balancer.update(&Endpoints { endpoints, ..Endpoints::default() });
    let user = |hash| Ask { hash: Some(hash), ..Ask::default() };
    let mut used: Vec<u16> = (0..50).map(|hash| port_of(&balancer.pick(&user(hash)).unwrap())).collect();
    used.sort_unstable();
    used.dedup();
    assert_eq!(used, [1, 2, 3, 4]);
    assert_eq!(hits(&balancer, &Ask::default(), 100).len(), 1, "others stay");
}

#[test]
fn a_zone_that_is_the_only_one_is_never_left() {
    let balancer = zoned(&zone(ZonePolicy::Only), 1, 9, Distribution::Any);
    assert!((share_of_near(&balancer) - 1.0).abs() < f64::EPSILON);
    assert!(balancer.pick(&tried(&[address(1)])).is_none());
    assert!(!balancer.has_other(address(1)));
}

#[test]
fn what_is_known_of_an_endpoint_outlives_a_change_of_its_hints() {
    let balancer = zoned(&Traffic::default(), 1, 0, Distribution::SameZone);
    let before = pick(&balancer);
    let hinted = Endpoint { for_zones: [Arc::from("a")].into(), ready_unix: 7, ..before.endpoint.clone() };
    balancer.update(&Endpoints { endpoints: vec![hinted], ..Endpoints::default() });
    assert!(Rc::ptr_eq(&before, &pick(&balancer)));
}

#[test]
fn a_cohort_goes_to_its_version_whatever_the_shares() {
    let service = |shares: &[(&str, u32)]| {
        let balancer = of_client("");
        let steering = Some(Steering { revision: "new".into(), ..Steering::default() });
        balancer.update(&Endpoints { steering, ..sticky(shares) });
        balancer
    };
    let share_of_new = |balancer: &Balancer, cohort| {
        let ask = Ask { cohort, ..Ask::default() };
        let new = |_: &u32| &*balancer.pick(&ask).unwrap().endpoint.revision == "new";
        (0..2_000).filter(new).count() as f64 / 2_000.0
    };
    let balancer = service(&[("old", 1000), ("new", 0)]);
    for (cohort, expected) in
        [(Cohort::OnTrial, 1.0), (Cohort::Stable, 0.0), (Cohort::Point(0.0), 0.0), (Cohort::ByShare, 0.0)]
    {
        assert!((share_of_new(&balancer, cohort) - expected).abs() < f64::EPSILON, "{cohort:?}");
    }
    let balancer = service(&[("old", 700), ("new", 300)]);
    for (cohort, expected) in [(Cohort::Point(0.29), 1.0), (Cohort::Point(0.31), 0.0), (Cohort::Stable, 0.0)]
    {
        assert!((share_of_new(&balancer, cohort) - expected).abs() < f64::EPSILON, "{cohort:?}");
    }
    let by_share = share_of_new(&balancer, Cohort::ByShare);
    assert!((by_share - 0.3).abs() < 0.05, "{by_share}");
    let all: Vec<SocketAddr> = (5..=8).map(address).collect();
    let gone = Ask { cohort: Cohort::OnTrial, ..tried(&all) };
    assert_eq!(&*balancer.pick(&gone).unwrap().endpoint.revision, "old", "there is no other");
}

#[test]
fn a_session_does_not_outlast_a_switch_nor_keep_an_insider_from_the_version_on_trial() {
    let balancer = of_client("");
    let at = |shares: &[(&str, u32)], cohort, port: u16| {
        let steering = Some(Steering { revision: "new".into(), ..Steering::default() });
        balancer.update(&Endpoints { steering, ..sticky(shares) });
        balancer.pick(&Ask { cohort, stay: Some(address(port)), ..Ask::default() }).unwrap().endpoint.clone()
    };
    let insiders = [("old", 1000), ("new", 0)];
    assert_eq!(&*at(&insiders, Cohort::OnTrial, 1).revision, "new");
    assert!((0..50).all(|_| at(&insiders, Cohort::OnTrial, 6).address == address(6)), "it stays there");
    assert!((0..50).all(|_| at(&insiders, Cohort::ByShare, 2).address == address(2)));
    assert_eq!(&*at(&insiders, Cohort::ByShare, 6).revision, "old");
    let part = [("old", 950), ("new", 50)];
    assert!((0..50).all(|_| at(&part, Cohort::ByShare, 6).address == address(6)), "in between each stays");
    assert_eq!(&*at(&[("old", 0), ("new", 1000)], Cohort::ByShare, 2).revision, "new", "all switch at once");
}

#[test]
fn copies_and_insiders_do_not_take_a_client_from_its_endpoint() {
    let balancer = of_client_that_stays("client");
    let steering = Some(Steering { revision: "new".into(), ..Steering::default() });
    balancer.update(&Endpoints { steering, ..sticky(&[("old", 1000), ("new", 0)]) });
    let on_trial = Ask { cohort: Cohort::OnTrial, ..Ask::default() };
    let (first, copy) = (port_of(&pick(&balancer)), port_of(&balancer.pick(&on_trial).unwrap()));
    assert!(first <= 4 && copy > 4);
    for _ in 0..50 {
        assert_eq!(port_of(&balancer.pick(&on_trial).unwrap()), copy);
        assert_eq!(port_of(&pick(&balancer)), first);
    }
}

#[test]
fn a_session_stays_with_its_endpoint_as_long_as_that_may_be_used() {
    let balancer = under(&Traffic::default(), 4);
    let stay = |port: u16, tried: &Ask| {
        let ask = Ask { stay: Some(address(port)), ..tried.clone() };
        port_of(&balancer.pick(&ask).unwrap())
    };
    assert!((0..100).all(|_| stay(3, &Ask::default()) == 3));
    assert_ne!(stay(3, &tried(&[address(3)])), 3);
    let endpoints = (1..=4).map(|port| endpoint(port, "", port == 3)).collect();
    balancer.update(&Endpoints { endpoints, ..Endpoints::default() });
    assert_ne!(stay(3, &Ask::default()), 3, "it is about to end");
}
