//! The store as its client and the data threads use it: resources arrive, addresses are dialled, and what is known and
//! asked for follows.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::Instant;
use tulle_mesh::identity::WorkloadId;
use tulle_mesh::policy::Subject;
use tulle_mesh::proto::{self, ResourceName, ResourceType};

use super::logs::AccessLog;
use super::resource::{AccessSection, MtlsSection, Resource, Workload};
use super::rules::decode_rules;
use super::store::{Name, Wanted};
use super::table::MAX_ADDRESSES;
use super::*;

fn connected() -> (Arc<ConfigStore>, UnboundedReceiver<Wanted>) {
    let (store, wanted) = ConfigStore::new();
    store.set_connected(true);
    (store, wanted)
}

fn address(number: u32) -> SocketAddr {
    SocketAddr::from((std::net::Ipv4Addr::from(0x0a60_0000 + number), 80))
}

fn endpoint(port: u16, meshed: bool) -> Endpoint {
    Endpoint {
        identity: meshed.then(|| WorkloadId::new("cluster.local", "shop", "web")),
        pod_uid: format!("pod-{port}").into(),
        ..Endpoint::at(SocketAddr::from(([10, 0, 0, 1], port)))
    }
}

fn endpoints(ports: &[u16]) -> Endpoints {
    let endpoints = ports.iter().map(|port| endpoint(*port, true)).collect();
    Endpoints { endpoints, ..Endpoints::default() }
}

fn service(endpoints: &str) -> Route {
    Route::Service(ServiceRoute {
        name: "web".into(),
        endpoints: endpoints.into(),
        ..ServiceRoute::default()
    })
}

/// A Service whose rules lead to these.
fn routed(endpoints: &str, backends: &[&str]) -> Route {
    let named = |endpoints: &&str| proto::Backend {
        weight: 1,
        endpoints: (*endpoints).into(),
        ..proto::Backend::default()
    };
    let rules = proto::Rules {
        kind: proto::RouteKind::Http.into(),
        routes: vec![proto::RouteRef::default()],
        rules: vec![proto::RouteRule {
            backends: backends.iter().map(named).collect(),
            ..proto::RouteRule::default()
        }],
        matches: vec![proto::Match::default()],
    };
    let rules = Some(Arc::new(decode_rules(&rules).unwrap()));
    match service(endpoints) {
        Route::Service(route) => Route::Service(ServiceRoute { rules, ..route }),
        other => other,
    }
}

fn pod(meshed: bool) -> Route {
    Route::Pod(PodRoute { endpoint: endpoint(80, meshed), protocol: Protocol::Detect })
}

/// Dials without waiting for an answer.
async fn dial(store: &ConfigStore, address: SocketAddr) -> Arc<Entry> {
    store.set_connected(false);
    let entry = store.resolve(address).await;
    store.set_connected(true);
    entry
}

fn ports(entry: &Entry) -> Option<Vec<u16>> {
    let endpoints = entry.current()?.endpoints()?;
    Some(endpoints.endpoints.iter().map(|endpoint| endpoint.address.port()).collect())
}

fn all(wanted: &mut UnboundedReceiver<Wanted>) -> Vec<Wanted> {
    std::iter::from_fn(|| wanted.try_recv().ok()).collect()
}

fn of(kind: ResourceType, name: &str) -> ResourceName {
    ResourceName { r#type: kind.into(), cluster: String::new(), name: name.to_owned() }
}

#[tokio::test(start_paused = true)]
async fn an_address_is_asked_for_once_and_forgotten_when_idle() {
    let (store, mut wanted) = connected();
    let entry = store.resolve(address(1)).await;
    store.resolve(address(1)).await;
    assert_eq!(all(&mut wanted), [Wanted::Subscribe(Name::Route(address(1)))]);
    store.forget_idle();
    assert!(!entry.is_gone());
    entry.current();
    store.forget_idle();
    assert!(!entry.is_gone(), "it was used");
    store.forget_idle();
    assert!(entry.is_gone());
    assert_eq!(all(&mut wanted), [Wanted::Unsubscribe(Name::Route(address(1)))]);
}

#[tokio::test(start_paused = true)]
async fn a_new_address_does_not_wait_while_the_operator_is_away() {
    let (store, _wanted) = ConfigStore::new();
    let before = Instant::now();
    assert!(store.resolve(address(1)).await.current().is_none());
    assert_eq!(before.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn an_address_whose_route_is_refused_does_not_wait_for_another() {
    let (store, _wanted) = connected();
    let entry = dial(&store, address(1)).await;
    store.refuse(&of(ResourceType::Route, &address(1).to_string()), None);
    let before = Instant::now();
    store.resolve(address(1)).await;
    assert_eq!(before.elapsed(), Duration::ZERO);
    assert!(entry.current().is_none() && !store.holds(&Name::Route(address(1))));
    store.set_route(address(1), pod(true));
    store.refuse(&of(ResourceType::Route, &address(1).to_string()), None);
    assert!(entry.current().is_some(), "the last good one stays");
}

#[tokio::test(start_paused = true)]
async fn addresses_of_one_service_share_its_endpoints_until_the_last_of_them_goes() {
    let (store, mut wanted) = connected();
    let (first, second) = (dial(&store, address(1)).await, dial(&store, address(2)).await);
    store.set_route(address(1), service("shop/web:80"));
    assert!(first.current().is_none(), "its endpoints are not known yet");
    store.set_endpoints(&"shop/web:80".into(), endpoints(&[1]));
    store.set_route(address(2), service("shop/web:80"));
    let shared = |entry: &Entry| match &*entry.current().unwrap() {
        Destination::Service(service) => Arc::clone(&service.endpoints),
        other => panic!("{other:?}"),
    };
    assert!(Arc::ptr_eq(&shared(&first), &shared(&second)));
    store.set_endpoints(&"shop/web:80".into(), endpoints(&[1, 2]));
    assert_eq!((ports(&first), ports(&second)), (Some(vec![1, 2]), Some(vec![1, 2])));
    let endpoints = Name::Endpoints("shop/web:80".into());
    assert_eq!(all(&mut wanted), [Wanted::Subscribe(endpoints.clone())]);

    store.set_route(address(1), Route::Unknown);
    assert!(all(&mut wanted).is_empty() && store.holds(&endpoints), "the other still leads there");
    store.set_route(address(2), pod(true));
    assert_eq!(all(&mut wanted), [Wanted::Unsubscribe(endpoints.clone())]);
    assert!(!store.holds(&endpoints));
}

#[tokio::test(start_paused = true)]
async fn endpoints_of_a_route_whose_next_version_is_refused_are_asked_for_again() {
    let (store, mut wanted) = connected();
    let entry = dial(&store, address(1)).await;
    store.set_route(address(1), service("shop/a:80"));
    store.set_endpoints(&"shop/a:80".into(), endpoints(&[1]));
    store.set_route(address(1), service("shop/b:80"));
    all(&mut wanted);
    // The operator keeps only those of the refused one current.
    store.refuse(&of(ResourceType::Route, &address(1).to_string()), None);
    let named = |name: &str| Wanted::Subscribe(Name::Endpoints(name.into()));
    assert_eq!(all(&mut wanted), [named("shop/a:80"), named("shop/b:80")]);
    store.set_endpoints(&"shop/a:80".into(), endpoints(&[2]));
    assert_eq!(ports(&entry), Some(vec![2]));
}

#[tokio::test(start_paused = true)]
async fn endpoints_that_come_before_their_route_are_used_and_those_that_nobody_names_are_dropped() {
    let (store, mut wanted) = connected();
    let entry = dial(&store, address(1)).await;
    store.set_endpoints(&"shop/web:80".into(), endpoints(&[1]));
    store.set_endpoints(&"shop/other:80".into(), endpoints(&[2]));
    store.set_route(address(1), service("shop/web:80"));
    assert_eq!(ports(&entry), Some(vec![1]));
    assert_eq!(all(&mut wanted), [Wanted::Subscribe(Name::Endpoints("shop/web:80".into()))]);
    for _ in 0..3 {
        entry.current();
        store.forget_idle();
    }
    assert_eq!(all(&mut wanted), [Wanted::Unsubscribe(Name::Endpoints("shop/other:80".into()))]);
    assert!(store.holds(&Name::Endpoints("shop/web:80".into())));
}

#[tokio::test(start_paused = true)]
async fn a_route_that_names_other_endpoints_is_in_force_once_they_are_known() {
    let (store, mut wanted) = connected();
    let entry = dial(&store, address(1)).await;
    store.set_route(address(1), service("shop/a:80"));
    store.set_endpoints(&"shop/a:80".into(), endpoints(&[1]));
    store.set_route(address(1), service("shop/b:80"));
    assert_eq!(ports(&entry), Some(vec![1]));
    // Before they came, another was named.
    store.set_route(address(1), service("shop/c:80"));
    store.set_endpoints(&"shop/c:80".into(), endpoints(&[3]));
    assert_eq!(ports(&entry), Some(vec![3]));
    let named = |name: &str| Name::Endpoints(name.into());
    assert_eq!(
        all(&mut wanted),
        [
            Wanted::Subscribe(named("shop/a:80")),
            Wanted::Subscribe(named("shop/b:80")),
            Wanted::Subscribe(named("shop/c:80")),
            Wanted::Unsubscribe(named("shop/b:80")),
            Wanted::Unsubscribe(named("shop/a:80")),
        ]
    );
}

fn behind(entry: &Entry) -> Vec<usize> {
    match &*entry.current().unwrap() {
        Destination::Service(service) => {
            service.behind.iter().map(|service| service.endpoints.current().endpoints.len()).collect()
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_route_with_rules_waits_for_all_endpoints_and_releases_those_that_it_names_no_longer() {
    let (store, mut wanted) = connected();
    let entry = dial(&store, address(1)).await;
    store.set_route(address(1), routed("shop/web:80", &["shop/a:80", "shop/b:80", "shop/a:80"]));
    let named = |name: &str| Name::Endpoints(name.into());
    let subscribed = ["shop/web:80", "shop/a:80", "shop/b:80"].map(|name| Wanted::Subscribe(named(name)));
    assert_eq!(all(&mut wanted), subscribed);
    for name in ["shop/web:80", "shop/b:80", "shop/a:80"] {
        assert!(entry.current().is_none(), "{name} is not known yet");
        store.set_endpoints(&name.into(), endpoints(&[1]));
    }
    assert_eq!(behind(&entry), [1, 1]);
    store.set_endpoints(&"shop/b:80".into(), endpoints(&[1, 2]));
    assert_eq!(behind(&entry), [1, 2], "they are kept current");
    store.set_route(address(1), routed("shop/web:80", &["shop/b:80"]));
    assert_eq!(all(&mut wanted), [Wanted::Unsubscribe(named("shop/a:80"))]);
    assert_eq!(behind(&entry), [2]);
}

#[tokio::test(start_paused = true)]
async fn endpoints_that_do_not_come_count_as_none_after_a_second_and_as_what_they_are_later() {
    let (store, _wanted) = connected();
    let entry = dial(&store, address(1)).await;
    store.set_endpoints(&"shop/web:80".into(), endpoints(&[1]));
    store.set_route(address(1), routed("shop/web:80", &["shop/late:80"]));
    tokio::time::sleep(Duration::from_millis(900)).await;
    assert!(entry.current().is_none());
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!((ports(&entry), behind(&entry)), (Some(vec![1]), vec![0]));
    store.set_endpoints(&"shop/late:80".into(), endpoints(&[1, 2]));
    assert_eq!(behind(&entry), [2]);
}

#[tokio::test(start_paused = true)]
async fn a_first_route_that_is_refused_is_used_without_its_rules_until_there_is_a_good_one() {
    let (store, _wanted) = connected();
    let entry = dial(&store, address(1)).await;
    let name = of(ResourceType::Route, &address(1).to_string());
    store.set_endpoints(&"shop/web:80".into(), endpoints(&[1]));
    store.set_endpoints(&"shop/a:80".into(), endpoints(&[1]));
    store.refuse(&name, Some(service("shop/web:80")));
    assert_eq!(ports(&entry), Some(vec![1]));
    assert!(!store.holds(&Name::Route(address(1))), "it is to be sent again");
    store.refuse(&name, Some(service("shop/a:80")));
    let leads_to = |entry: &Entry| match &*entry.current().unwrap() {
        Destination::Service(service) => service.route.endpoints.to_string(),
        other => panic!("{other:?}"),
    };
    assert_eq!(leads_to(&entry), "shop/a:80", "what is known best");
    store.set_route(address(1), routed("shop/a:80", &["shop/a:80"]));
    store.refuse(&name, Some(service("shop/web:80")));
    assert_eq!(
        (leads_to(&entry).as_str(), behind(&entry)),
        ("shop/a:80", vec![1]),
        "the last good one stays"
    );
}

#[tokio::test(start_paused = true)]
async fn beyond_the_bound_the_oldest_idle_addresses_are_forgotten_and_the_operator_keeps_no_more() {
    let (store, mut wanted) = connected();
    let (used, idle) = (store.resolve(address(0)).await, store.resolve(address(1)).await);
    store.set_route(address(0), Route::Unknown);
    store.set_route(address(1), service("shop/web:80"));
    store.set_endpoints(&"shop/web:80".into(), endpoints(&[1]));
    let mut kept_current: HashSet<Name> = HashSet::new();
    let routes = |names: &HashSet<Name>| names.iter().filter(|name| matches!(name, Name::Route(_))).count();
    for number in 2..12_000 {
        let entry = store.resolve(address(number)).await;
        if number % 2 == 0 {
            store.set_route(address(number), Route::Unknown);
        }
        used.current();
        assert!(!entry.is_gone());
        for wanted in all(&mut wanted) {
            match wanted {
                Wanted::Subscribe(name) => assert!(kept_current.insert(name)),
                Wanted::Unsubscribe(name) => assert!(kept_current.remove(&name)),
            }
        }
        assert!(kept_current.len() <= MAX_ADDRESSES + 1);
    }
    assert!(!used.is_gone() && idle.is_gone());
    assert!(!store.holds(&Name::Endpoints("shop/web:80".into())), "they went with the last route");
    assert!(routes(&kept_current) > MAX_ADDRESSES * 9 / 10, "no more is forgotten than must be");
    assert_eq!(store.subscribed().into_iter().collect::<HashSet<_>>(), kept_current);
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_passed_through_without_an_answer_ends_when_the_answer_is_a_sidecar() {
    for (route, ends) in [(pod(true), true), (pod(false), false), (Route::Unknown, false)] {
        let (store, _wanted) = connected();
        let entry = dial(&store, address(1)).await;
        let meshed = tokio::spawn({
            let (store, entry) = (Arc::clone(&store), Arc::clone(&entry));
            async move { store.becomes_meshed(address(1), entry).await }
        });
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(!meshed.is_finished());
        store.set_route(address(1), route);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(meshed.is_finished(), ends);
        // What was right at the time stays so.
        store.set_route(address(1), pod(true));
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(meshed.is_finished(), ends);
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_whose_address_was_forgotten_without_an_answer_asks_again() {
    let (store, mut wanted) = connected();
    let entry = dial(&store, address(1)).await;
    let meshed = store.becomes_meshed(address(1), Arc::clone(&entry));
    tokio::pin!(meshed);
    let wait = tokio::time::timeout(Duration::from_secs(1), &mut meshed).await;
    assert!(wait.is_err());
    (0..3).for_each(|_| store.forget_idle());
    assert!(entry.is_gone());
    all(&mut wanted);
    assert!(tokio::time::timeout(Duration::from_secs(61), &mut meshed).await.is_err());
    assert_eq!(all(&mut wanted), [Wanted::Subscribe(Name::Route(address(1)))]);
    store.set_route(address(1), pod(true));
    tokio::time::timeout(Duration::from_secs(1), meshed).await.expect("a sidecar listens there");
}

fn sections() -> [Resource; 3] {
    [
        Resource::Workload(Workload {
            revision: "r1".into(),
            place: Place { zone: "z1".into(), node: "n1".into() },
            tracing: None,
        }),
        Resource::Mtls(MtlsSection { mode: Mtls::Permissive, shadow_strict: false }),
        Resource::Access(AccessSection::default()),
    ]
}

fn allows(store: &ConfigStore) -> bool {
    let subject = Subject { identity: None, address: [10u8, 0, 0, 1].into(), port: 80, http: None };
    let inbound = store.inbound().unwrap();
    inbound.access.as_ref().is_none_or(|access| access.rules.decide(&subject).allowed)
}

#[tokio::test(start_paused = true)]
async fn what_is_enforced_is_known_after_all_three_sections_in_any_order() {
    for first in 0..3 {
        let (store, _wanted) = connected();
        let mut sections = sections();
        sections.rotate_left(first);
        for (count, section) in sections.into_iter().enumerate() {
            assert!(store.inbound().is_none(), "{count} of three");
            store.apply(section);
        }
        tokio::time::timeout(Duration::from_secs(1), store.inbound_known()).await.expect("known");
        let inbound = store.inbound().unwrap();
        assert_eq!((inbound.mtls, inbound.revision.as_str()), (Mtls::Permissive, "r1"));
        assert_eq!((&*store.place().zone, &*store.place().node), ("z1", "n1"));
        assert!(allows(&store));
    }
}

#[tokio::test(start_paused = true)]
async fn sections_that_are_refused_at_first_fail_closed_instead_of_waiting_for_ever() {
    let (store, _wanted) = connected();
    for kind in [ResourceType::Workload, ResourceType::Mtls, ResourceType::Access] {
        assert!(tokio::time::timeout(Duration::from_secs(1), store.inbound_known()).await.is_err());
        store.refuse(&of(kind, "uid"), None);
    }
    tokio::time::timeout(Duration::from_secs(1), store.inbound_known()).await.expect("known");
    assert_eq!(store.inbound().unwrap().mtls, Mtls::Strict);
    assert!(!allows(&store));
    sections().into_iter().for_each(|section| store.apply(section));
    assert!(allows(&store), "one that can be enforced takes over");
    store.refuse(&of(ResourceType::Access, "uid"), None);
    store.refuse(&of(ResourceType::Mtls, "uid"), None);
    assert_eq!(store.inbound().unwrap().mtls, Mtls::Permissive, "the last good one stays");
    assert!(allows(&store));
}

#[tokio::test(start_paused = true)]
async fn a_change_that_comes_before_the_future_is_polled_is_not_missed() {
    let (store, _wanted) = connected();
    let entry = dial(&store, address(1)).await;
    let changed = entry.changed();
    store.set_route(address(1), Route::Unknown);
    tokio::time::timeout(Duration::from_secs(1), changed).await.expect("it has changed");
    assert!(tokio::time::timeout(Duration::from_secs(1), entry.changed()).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn nothing_waits_for_what_is_logged_and_a_refused_version_changes_nothing() {
    let (store, _wanted) = connected();
    sections().into_iter().for_each(|section| store.apply(section));
    assert!(store.inbound().is_some(), "an operator that does not know logs");
    assert_eq!(store.access_log(), AccessLog::Off);
    store.refuse(&of(ResourceType::Logs, "uid"), None);
    assert_eq!(store.access_log(), AccessLog::Off);
    store.apply(Resource::Logs(AccessLog::Errors));
    store.refuse(&of(ResourceType::Logs, "uid"), None);
    assert_eq!(store.access_log(), AccessLog::Errors);
    store.apply(Resource::Logs(AccessLog::Off));
    assert_eq!(store.access_log(), AccessLog::Off);
}
