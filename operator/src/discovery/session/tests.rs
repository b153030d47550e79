//! What a sidecar is sent for what it says.

use futures::FutureExt as _;
use prost::Message as _;
use tonic::Code;
use tulle_mesh::features::SPLIT_V1;
use tulle_mesh::proto::resource::Body;
use tulle_mesh::proto::{
    Ack, Nack, Resource, SeriesKey, Subscribe, Tap, TapEvent, Tapped, TelemetryReport, Unsubscribe, route,
    series_key,
};

mod in_force;

use super::*;
use crate::discovery::{AckTracker, Acknowledgement};
use crate::lease::Leadership;
use crate::model::gateway::{RouteKind, RouteObject, RouteSpec};
use crate::model::object::ServicePort;
use crate::model::tests::{canary, key, pod, shop};
use crate::model::{Model, Service};
use crate::tap::Wanted;

const VIP: &str = "10.96.0.1:80";
const EXTERNAL: &str = "203.0.113.1:80";
const WEB: &str = "shop/web:80";

fn named(kind: ResourceType, name: &str) -> Name {
    (kind as i32, name.into())
}

/// A sidecar's stream without a network.
struct Sidecar {
    session: Session,
    state: State,
    down: mpsc::Receiver<Down>,
    acks: Arc<AckTracker>,
}

impl Sidecar {
    /// Of pod `a`, whose sidecar holds these versions.
    fn holding(hub: &Arc<Hub>, held: &[(Name, String)]) -> Self {
        let acks = Arc::new(AckTracker::default());
        let (_, leadership) = tokio::sync::watch::channel(Leadership::default());
        let relay = LeaderRelay::new(Arc::clone(&acks), Arc::default(), Arc::clone(hub), leadership);
        let cache = Cache::following(hub);
        let (sender, down) = mpsc::channel(64);
        let namespace = Arc::clone(&hub.model().pod("uid-a").unwrap().namespace);
        let wake = cache.wake(namespace);
        let number = wake.session();
        let state = State::new(wake, held.iter().cloned().collect());
        relay.begins("uid-a", number);
        let session = Session {
            hub: Arc::clone(hub),
            cache,
            relay,
            admission: Arc::default(),
            taps: Arc::default(),
            pod_uid: "uid-a".into(),
            number,
            down: sender,
            hang_up: Arc::default(),
        };
        Self { session, state, down, acks }
    }

    fn new(hub: &Arc<Hub>) -> Self {
        Self::holding(hub, &[])
    }

    async fn says(&mut self, message: sidecar_message::Message) -> Result<(), Code> {
        let message = SidecarMessage { message: Some(message) };
        self.session.received(message, &mut self.state).await.map_err(|status| status.code())
    }

    async fn subscribes(&mut self, kind: ResourceType, name: &str) -> Result<(), Code> {
        let name = Some(resource_name(&named(kind, name)));
        self.says(sidecar_message::Message::Subscribe(Subscribe { name })).await
    }

    async fn unsubscribes(&mut self, kind: ResourceType, name: &str) {
        let name = Some(resource_name(&named(kind, name)));
        self.says(sidecar_message::Message::Unsubscribe(Unsubscribe { name })).await.unwrap();
    }

    async fn acknowledges(&mut self, resource: &Resource) {
        let ack = Ack { name: resource.name.clone(), version: resource.version.clone() };
        self.says(sidecar_message::Message::Ack(ack)).await.unwrap();
    }

    async fn refuses(&mut self, resource: &Resource) {
        let (name, version) = (resource.name.clone(), resource.version.clone());
        let nack = Nack { name, version, reason: "too new".into() };
        self.says(sidecar_message::Message::Nack(nack)).await.unwrap();
    }

    /// What it was sent, in order.
    fn resources(&mut self) -> Vec<Resource> {
        let mut all = Vec::new();
        while let Ok(message) = self.down.try_recv() {
            let message = *message.unwrap();
            let Some(operator_message::Message::Resource(resource)) = message.message else {
                panic!("not a resource")
            };
            all.push(resource);
        }
        all
    }

    /// Names of what it was sent, in order.
    fn names(&mut self) -> Vec<Name> {
        self.resources().into_iter().map(|resource| name_of(resource.name.unwrap())).collect()
    }

    /// Names of what it is sent after a change, sorted.
    async fn names_of_changed(&mut self) -> Vec<Name> {
        self.session.send_changed(&mut self.state).await.unwrap();
        let mut names = self.names();
        names.sort();
        names
    }

    fn is_subscribed(&self, kind: ResourceType, name: &str) -> bool {
        self.state.subscribed.contains_key(&named(kind, name))
    }
}

fn hub() -> Arc<Hub> {
    Arc::new(Hub::complete(shop(&[pod("a", "10.1.0.1", "r1")])))
}

fn web() -> crate::model::Key {
    key("shop", "web")
}

fn with_canary(epoch: u64) -> impl FnOnce(&mut Model) {
    let status = serde_json::json!({"approvedRevision": "r1", "phase": "Stable", "epoch": epoch});
    move |model: &mut Model| model.apply_canary(key("shop", "web"), canary(status))
}

#[test]
fn what_each_of_many_streams_keeps_is_small() {
    // 2,000 sidecars have a queue with room for 32 messages each, and a subscription for each address and Service.
    assert!(size_of::<Down>() <= 16, "{}", size_of::<Down>());
    assert!(size_of::<Subscription>() <= 72, "{}", size_of::<Subscription>());
    let mut sidecar = Sidecar::new(&hub());
    let sending = size_of_val(&sidecar.session.send_changed(&mut sidecar.state));
    assert!(sending <= 2048, "{sending}");
}

#[tokio::test]
async fn two_streams_share_the_names_of_the_endpoints_that_a_route_leads_to() {
    let hub = hub();
    let (mut one, mut other) = (Sidecar::new(&hub), Sidecar::new(&hub));
    other.session.cache = Arc::clone(&one.session.cache);
    other.state = State::new(other.session.cache.wake("shop".into()), HashMap::new());
    for sidecar in [&mut one, &mut other] {
        sidecar.subscribes(ResourceType::Route, VIP).await.unwrap();
    }
    let name = |sidecar: &Sidecar| {
        let wanted = named(ResourceType::Endpoints, WEB);
        Arc::clone(&sidecar.state.subscribed.get_key_value(&wanted).unwrap().0.1)
    };
    assert!(Arc::ptr_eq(&name(&one), &name(&other)));
}

#[tokio::test]
async fn the_first_route_brings_the_endpoints_and_the_second_does_not() {
    let mut sidecar = Sidecar::new(&hub());
    sidecar.subscribes(ResourceType::Route, VIP).await.unwrap();
    let (route, endpoints) = (named(ResourceType::Route, VIP), named(ResourceType::Endpoints, WEB));
    assert_eq!(sidecar.names(), [endpoints, route], "when the route comes, it is complete");
    sidecar.subscribes(ResourceType::Endpoints, WEB).await.unwrap();
    assert!(sidecar.names().is_empty(), "what is subscribed already is not sent again");
    sidecar.subscribes(ResourceType::Route, EXTERNAL).await.unwrap();
    assert_eq!(sidecar.names(), [named(ResourceType::Route, EXTERNAL)]);
    assert_eq!(sidecar.state.subscribed.len(), 3, "the endpoints count once");
}

#[tokio::test]
async fn endpoints_are_kept_current_until_the_last_route_to_them_is_unsubscribed() {
    let hub = hub();
    let mut sidecar = Sidecar::new(&hub);
    for address in [VIP, EXTERNAL] {
        sidecar.subscribes(ResourceType::Route, address).await.unwrap();
    }
    sidecar.names();
    sidecar.unsubscribes(ResourceType::Route, VIP).await;
    hub.change(|model| model.apply_pod(pod("a", "10.1.0.1", "r2")));
    assert_eq!(sidecar.names_of_changed().await, [named(ResourceType::Endpoints, WEB)]);
    sidecar.unsubscribes(ResourceType::Route, EXTERNAL).await;
    hub.change(|model| model.apply_pod(pod("a", "10.1.0.1", "r3")));
    assert!(sidecar.names_of_changed().await.is_empty());
    assert!(sidecar.session.cache.is_empty() && sidecar.state.routes.is_empty(), "nothing is left");
}

#[tokio::test]
async fn a_route_that_leads_elsewhere_takes_its_endpoints_along() {
    let hub = hub();
    let mut sidecar = Sidecar::new(&hub);
    sidecar.subscribes(ResourceType::Route, VIP).await.unwrap();
    sidecar.names();
    hub.change(|model| {
        model.delete_service(&key("shop", "web"));
        let port = ServicePort { name: "http".into(), port: 80, app_protocol: None };
        let cluster_ips = vec!["10.96.0.1".parse().unwrap()];
        model.apply_service(
            key("shop", "new"),
            Service { cluster_ips, ports: vec![port], ..Service::default() },
        );
    });
    sidecar.session.send_changed(&mut sidecar.state).await.unwrap();
    let names = sidecar.names();
    let new = named(ResourceType::Endpoints, "shop/new:80");
    let at = |name: &Name| names.iter().position(|sent| sent == name);
    assert!(at(&new).unwrap() < at(&named(ResourceType::Route, VIP)).unwrap(), "{names:?}");
    assert!(!sidecar.is_subscribed(ResourceType::Endpoints, WEB));
    assert!(sidecar.is_subscribed(ResourceType::Endpoints, "shop/new:80"));
    hub.change(|model| model.delete_service(&key("shop", "new")));
    sidecar.names_of_changed().await;
    assert_eq!(sidecar.state.subscribed.len(), 1, "nobody's address has no endpoints");
    hub.change(|model| *model = shop(&[pod("a", "10.1.0.1", "r1")]));
    assert_eq!(sidecar.names_of_changed().await.len(), 2, "and has them when it is somebody's again");
}

#[tokio::test]
async fn a_sidecar_that_comes_back_is_sent_only_what_it_does_not_hold() {
    let hub = hub();
    let mut before = Sidecar::new(&hub);
    before.subscribes(ResourceType::Route, VIP).await.unwrap();
    let held: Vec<_> =
        before.resources().into_iter().map(|one| (name_of(one.name.unwrap()), one.version)).collect();
    assert_eq!(held.len(), 2);
    let mut sidecar = Sidecar::holding(&hub, &held);
    sidecar.subscribes(ResourceType::Route, VIP).await.unwrap();
    assert!(sidecar.names().is_empty());
    hub.change(|model| model.apply_pod(pod("a", "10.1.0.1", "r2")));
    assert_eq!(sidecar.names_of_changed().await, [named(ResourceType::Endpoints, WEB)]);
}

#[tokio::test]
async fn what_a_pod_enforces_is_sent_to_nobody_else_and_endpoints_to_everybody() {
    use ResourceType::{Access, Endpoints, Inbound, Limits, Logs, Mtls, Workload};
    let hub = Arc::new(Hub::complete(shop(&[pod("a", "10.1.0.1", "r1"), pod("b", "10.1.0.2", "r1")])));
    for kind in [Inbound, Workload, Mtls, Access, Limits, Logs] {
        let mut sidecar = Sidecar::new(&hub);
        assert_eq!(sidecar.subscribes(kind, "uid-b").await, Err(Code::PermissionDenied), "{kind:?}");
        assert!(sidecar.names().is_empty());
        assert_eq!(sidecar.subscribes(kind, "uid-a").await, Ok(()));
        assert_eq!(sidecar.names(), [named(kind, "uid-a")]);
    }
    let mut sidecar = Sidecar::new(&hub);
    sidecar.subscribes(Endpoints, WEB).await.unwrap();
    assert_eq!(sidecar.names(), [named(Endpoints, WEB)], "before any route, as after a reconnect");
    sidecar.subscribes(Endpoints, "not a name").await.unwrap();
    assert!(sidecar.names().is_empty());
    assert_eq!(sidecar.subscribes(Endpoints, &"a".repeat(300)).await, Err(Code::InvalidArgument));
}

#[tokio::test]
async fn a_type_that_this_operator_does_not_know_does_not_end_the_stream() {
    let mut sidecar = Sidecar::new(&hub());
    let name = Some(resource_name(&(99, "uid-b".into())));
    sidecar.says(sidecar_message::Message::Subscribe(Subscribe { name })).await.unwrap();
    sidecar.subscribes(ResourceType::Route, VIP).await.unwrap();
    assert_eq!(sidecar.names().len(), 2);
}

#[tokio::test]
async fn an_old_sidecar_is_served_as_before() {
    let hub = hub();
    hub.change(with_canary(1));
    let mut sidecar = Sidecar::new(&hub);
    sidecar.subscribes(ResourceType::Inbound, "uid-a").await.unwrap();
    sidecar.subscribes(ResourceType::Destination, VIP).await.unwrap();
    let sent = sidecar.resources();
    let [inbound, destination] = sent.as_slice() else { panic!("{sent:?}") };
    assert!(matches!(inbound.body, Some(Body::Inbound(_))));
    assert!(matches!(destination.body, Some(Body::Destination(_))));
    assert_eq!(destination.requires, [SPLIT_V1]);
    hub.change(with_canary(2));
    assert_eq!(sidecar.names_of_changed().await, [named(ResourceType::Destination, VIP)]);
}

#[tokio::test]
async fn a_canary_waits_for_the_endpoints_that_came_with_a_route() {
    let hub = hub();
    hub.change(with_canary(1));
    let mut sidecar = Sidecar::new(&hub);
    let acknowledged =
        |sidecar: &Sidecar, epoch| sidecar.acks.acknowledged_canary(&hub.model(), &key("shop", "web"), epoch);
    for kind in [ResourceType::Workload, ResourceType::Mtls, ResourceType::Access] {
        sidecar.subscribes(kind, "uid-a").await.unwrap();
    }
    for section in sidecar.resources() {
        sidecar.refuses(&section).await;
    }
    sidecar.subscribes(ResourceType::Route, VIP).await.unwrap();
    let sent = sidecar.resources();
    assert!(matches!(acknowledged(&sidecar, 1), Acknowledgement::Awaited(_)));
    for resource in &sent {
        sidecar.acknowledges(resource).await;
    }
    assert_eq!(acknowledged(&sidecar, 1), Acknowledgement::Complete, "refused sections are no matter");
    hub.change(with_canary(2));
    assert!(matches!(acknowledged(&sidecar, 2), Acknowledgement::Awaited(_)));
    sidecar.session.send_changed(&mut sidecar.state).await.unwrap();
    let sent = sidecar.resources();
    assert_eq!(sent.len(), 1, "a weight changes no route");
    sidecar.refuses(&sent[0]).await;
    let refused = Acknowledgement::Refused("pod shop/a: too new".into());
    assert_eq!(acknowledged(&sidecar, 2), refused);
    sidecar.unsubscribes(ResourceType::Route, VIP).await;
    assert_eq!(acknowledged(&sidecar, 2), Acknowledgement::Complete, "it sends nothing there any more");
}

#[tokio::test]
async fn who_subscribes_to_too_much_is_told_once_with_the_endpoints() {
    let hub = hub();
    let mut sidecar = Sidecar::new(&hub);
    for number in 0..MAX_SUBSCRIPTIONS {
        sidecar
            .state
            .subscribed
            .insert(named(ResourceType::Route, &number.to_string()), Subscription::default());
    }
    sidecar.subscribes(ResourceType::Route, VIP).await.unwrap();
    assert_eq!(sidecar.names(), [named(ResourceType::Endpoints, WEB), named(ResourceType::Route, VIP)]);
    assert_eq!(sidecar.state.subscribed.len(), MAX_SUBSCRIPTIONS);
    assert!(sidecar.session.cache.is_empty());
}

#[tokio::test]
async fn a_pod_that_begins_to_end_is_told_without_gathering() {
    let hub = hub();
    let mut sidecar = Sidecar::new(&hub);
    sidecar.subscribes(ResourceType::Route, VIP).await.unwrap();
    sidecar.names();
    let going = crate::model::Pod { terminating: true, ..pod("a", "10.1.0.1", "r1") };
    hub.change(|model| model.apply_pod(going));
    assert!(sidecar.state.wake.is_ending());
    assert_eq!(sidecar.names_of_changed().await, [named(ResourceType::Endpoints, WEB)]);
}

/// A route of `shop/web` that leads to these Services.
fn route_to(name: &str, namespace: &str, services: &[&str]) -> RouteObject {
    let backend = |service: &&str| serde_json::json!({"namespace": "shop", "name": service, "port": 80});
    let backends: Vec<_> = services.iter().map(backend).collect();
    let spec: RouteSpec = serde_json::from_value(serde_json::json!({
        "parentRefs": [{"group": "", "kind": "Service", "namespace": "shop", "name": "web"}],
        "rules": [{"backendRefs": backends}],
    }))
    .unwrap();
    RouteObject {
        kind: RouteKind::Http,
        namespace: namespace.into(),
        name: name.into(),
        uid: name.into(),
        generation: 1,
        created: 0,
        parents: spec.parents,
        hostnames: spec.hostnames,
        rules: spec.rules,
    }
}

/// With Services `shop/v1` and `shop/v2` beside `shop/web`.
fn hub_with_versions() -> Arc<Hub> {
    let hub = hub();
    for (name, address) in [("v1", "10.96.0.11"), ("v2", "10.96.0.12")] {
        let port = ServicePort { name: "http".into(), port: 80, app_protocol: None };
        let cluster_ips = vec![address.parse().unwrap()];
        let service = Service { cluster_ips, ports: vec![port], ..Service::default() };
        hub.change(|model| model.apply_service(key("shop", name), service));
    }
    hub
}

fn endpoints_of(service: &str) -> Name {
    named(ResourceType::Endpoints, &format!("shop/{service}:80"))
}

#[tokio::test]
async fn all_endpoints_that_a_route_names_are_sent_before_it_and_released_with_it() {
    let hub = hub_with_versions();
    hub.change(|model| model.apply_route(route_to("split", "shop", &["v1", "v2", "nobody"])));
    let mut sidecar = Sidecar::new(&hub);
    sidecar.subscribes(ResourceType::Route, VIP).await.unwrap();
    let [v1, v2, web, route] =
        [endpoints_of("v1"), endpoints_of("v2"), endpoints_of("web"), named(ResourceType::Route, VIP)];
    assert_eq!(sidecar.names(), [v1.clone(), v2.clone(), web, route.clone()]);
    hub.change(|model| model.apply_route(route_to("split", "shop", &["v2"])));
    assert_eq!(
        sidecar.names_of_changed().await,
        std::slice::from_ref(&route),
        "the sidecar holds those already"
    );
    assert!(!sidecar.is_subscribed(ResourceType::Endpoints, "shop/v1:80"));
    hub.change(|model| model.apply_route(route_to("split", "shop", &["v1", "v2"])));
    sidecar.session.send_changed(&mut sidecar.state).await.unwrap();
    assert_eq!(sidecar.names(), [v1, route]);
    sidecar.unsubscribes(ResourceType::Route, VIP).await;
    assert!(sidecar.state.subscribed.is_empty() && sidecar.state.routes.is_empty());
    assert!(sidecar.session.cache.is_empty(), "nothing is left");
}

#[tokio::test]
async fn endpoints_that_two_addresses_lead_to_stay_until_the_second_is_left() {
    let hub = hub_with_versions();
    hub.change(|model| model.apply_route(route_to("r", "shop", &["v1"])));
    let mut sidecar = Sidecar::new(&hub);
    sidecar.subscribes(ResourceType::Route, VIP).await.unwrap();
    sidecar.subscribes(ResourceType::Route, "10.96.0.11:80").await.unwrap();
    assert_eq!(sidecar.names().last(), Some(&named(ResourceType::Route, "10.96.0.11:80")));
    hub.change(|model| model.delete_route(&route_to("r", "shop", &[]).key()));
    assert_eq!(sidecar.names_of_changed().await, [named(ResourceType::Route, VIP)]);
    assert!(sidecar.is_subscribed(ResourceType::Endpoints, "shop/v1:80"), "its own address leads there");
    sidecar.unsubscribes(ResourceType::Route, "10.96.0.11:80").await;
    assert!(!sidecar.is_subscribed(ResourceType::Endpoints, "shop/v1:80"));
}

#[tokio::test]
async fn a_consumers_route_reaches_the_sidecars_of_its_namespace_and_no_others() {
    let hub = hub_with_versions();
    let mut sidecar = Sidecar::new(&hub);
    sidecar.subscribes(ResourceType::Route, VIP).await.unwrap();
    sidecar.names();
    hub.change(|model| model.apply_route(route_to("r", "team", &["v1"])));
    assert!(sidecar.names_of_changed().await.is_empty(), "it is of namespace shop");
    hub.change(|model| {
        let pod = crate::model::Pod { namespace: "team".into(), ..pod("a", "10.1.0.1", "r1") };
        model.apply_pod(pod);
    });
    let mut sidecar = Sidecar::new(&hub);
    sidecar.subscribes(ResourceType::Route, VIP).await.unwrap();
    assert!(sidecar.names().contains(&endpoints_of("v1")));
    hub.change(|model| model.delete_route(&route_to("r", "team", &[]).key()));
    sidecar.session.send_changed(&mut sidecar.state).await.unwrap();
    let sent = sidecar.resources();
    let [resource] = sent.as_slice() else { panic!("{sent:?}") };
    let Some(Body::Route(found)) = &resource.body else { panic!("{resource:?}") };
    assert!(matches!(&found.kind, Some(route::Kind::Service(service)) if service.rules.is_none()));
    assert_eq!(sidecar.session.cache.len(), 2, "what was for its namespace alone is forgotten");
    hub.change(|model| model.apply_route(route_to("r", "team", &["v1"])));
    assert_eq!(sidecar.names_of_changed().await, [endpoints_of("v1"), named(ResourceType::Route, VIP)]);
}

#[tokio::test]
async fn a_route_to_more_endpoints_than_may_be_subscribed_is_sent_without_following_them() {
    let hub = hub_with_versions();
    hub.change(|model| model.apply_route(route_to("split", "shop", &["v1", "v2"])));
    let mut sidecar = Sidecar::new(&hub);
    for number in 0..MAX_SUBSCRIPTIONS - 2 {
        let name = named(ResourceType::Route, &number.to_string());
        sidecar.state.subscribed.insert(name, Subscription::default());
    }
    sidecar.subscribes(ResourceType::Route, VIP).await.unwrap();
    assert_eq!(sidecar.names(), [endpoints_of("v1"), named(ResourceType::Route, VIP)]);
    sidecar.subscribes(ResourceType::Endpoints, "shop/v2:80").await.unwrap();
    assert_eq!(sidecar.names(), [endpoints_of("v2")], "it is told when it asks");
    assert_eq!(sidecar.state.subscribed.len(), MAX_SUBSCRIPTIONS);
}

#[tokio::test]
async fn what_is_counted_of_a_service_that_is_not_subscribed_any_more_keeps_its_name() {
    let hub = hub();
    let mut sidecar = Sidecar::new(&hub);
    let key = |peer: &str| SeriesKey {
        direction: series_key::Direction::Outbound.into(),
        namespace: "shop".into(),
        peer: peer.into(),
        ..SeriesKey::default()
    };
    let named = |sidecar: &Sidecar, peer: &str| {
        let mut report = TelemetryReport { keys: vec![key(peer)], ..TelemetryReport::default() };
        sidecar.session.bound(&mut report, &sidecar.state);
        report.keys[0].peer.clone()
    };
    assert_eq!(named(&sidecar, "web"), "web");
    assert_eq!(named(&sidecar, "made-up"), "_OTHER");
    hub.change(|model| model.delete_service(&web()));
    assert_eq!(named(&sidecar, "web"), "_OTHER", "there is no such Service");
    sidecar.subscribes(ResourceType::Route, "10.1.0.1:8080").await.unwrap();
    assert_eq!(named(&sidecar, "web"), "web", "the service account of a pod that it sends to");
}

#[tokio::test]
async fn a_second_report_waits_a_moment() {
    let mut sidecar = Sidecar::new(&hub());
    let report = TelemetryReport { sequence: 1, ..TelemetryReport::default() };
    let Sidecar { session, state, .. } = &mut sidecar;
    assert_eq!(session.telemetry(report.clone(), state).now_or_never().map(|end| end.is_ok()), Some(true));
    assert!(session.telemetry(report, state).now_or_never().is_none());
}

#[tokio::test]
async fn a_tap_reaches_the_sidecar_of_its_stream_and_what_that_has_seen_the_reader() {
    let hub = Arc::new(Hub::complete(shop(&[pod("a", "10.1.0.1", "r1")])));
    let mut sidecar = Sidecar::new(&hub);
    sidecar.state.tapped = sidecar.session.register(true);
    let wanted = Wanted { namespace: Some("shop".into()), workload: Some("web".into()) };
    let message = Tap { rate: 20, ..Tap::default() };
    let mut tapping = sidecar.session.taps.start("anna", wanted, message, std::time::Instant::now()).unwrap();
    let sent = *sidecar.down.try_recv().unwrap().unwrap();
    let Some(operator_message::Message::Tap(tap)) = sent.message else { panic!("not a tap") };
    let event = TapEvent { path: "/cart".into(), ..TapEvent::default() };
    let tapped =
        Tapped { id: tap.id, events: vec![event.encode_to_vec()], passed: 1, lost: 0, ..Tapped::default() };
    sidecar.says(sidecar_message::Message::Tapped(tapped)).await.unwrap();
    let seen = tapping.events.try_recv().unwrap();
    assert_eq!((&*seen.sidecar.pod, seen.event.path.as_str()), ("a", "/cart"));
    sidecar.state.tapped = None;
    drop(tapping);
    assert!(sidecar.down.try_recv().is_err(), "a stream that has ended is sent nothing");
}
