//! Watches the routes of the Gateway API, whose CRDs may be installed or not.
//!
//! In: what the API server serves, asked for every [`ASK_EVERY`], and the objects of each kind that it does. Out: routes
//! in the model, and [`RouteRecords`] for whoever writes their status. The discovery API needs no right; a watch of CRDs
//! would, and does not say which versions are served. A kind that is not installed counts as listed, and one that this
//! account may not read after a while. One that vanishes takes its routes with it. That a kind is not served counts after
//! two answers that lack it: one that has just started may not serve everything yet.

use std::sync::Arc;
use std::time::Duration;

use kube::core::ApiResource;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{Config, watcher};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::error::Elapsed;
use tokio::time::{sleep, timeout};

use super::follow::{Handlers, Known, follow};
use super::records::{RouteRecord, RouteRecords};
use super::{Hub, convert, wire};
use crate::model::Model;
use crate::model::gateway::{RouteKey, RouteKind};

/// Group of the routes.
pub const GROUP: &str = "gateway.networking.k8s.io";
/// Group of what is not stable yet.
pub const EXPERIMENTAL_GROUP: &str = "gateway.networking.x-k8s.io";
/// Version of XMesh.
pub const MESH_VERSION: &str = "v1alpha1";
/// Number of kinds.
pub(super) const KINDS: usize = 4;

/// Time between two questions what is served. A CRD that comes or goes is noticed within twice this.
const ASK_EVERY: Duration = Duration::from_secs(2);
/// Time until the first answer is asked for again, where it lacks a kind. Nothing is served before that.
const CONFIRM_AFTER: Duration = Duration::from_secs(1);
/// The longest time between two questions while the API server does not answer.
const ASK_LATEST: Duration = Duration::from_secs(30);
/// Timeout of one question.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// After so many refusals in a row, which take 12 s, the operator goes on as if nothing were installed.
const REFUSALS: u32 = 3;
/// What is lacking where routes of a kind may not be read.
const WITHOUT: &str = "routes of this kind do not hold";

/// A kind of route, and the versions of it that this build reads, the best one first.
#[derive(Debug)]
struct Kind {
    kind: RouteKind,
    plural: &'static str,
    versions: &'static [&'static str],
}

static ALL: [Kind; KINDS] = [
    Kind { kind: RouteKind::Grpc, plural: "grpcroutes", versions: &["v1"] },
    Kind { kind: RouteKind::Http, plural: "httproutes", versions: &["v1"] },
    Kind { kind: RouteKind::Tls, plural: "tlsroutes", versions: &["v1", "v1alpha3", "v1alpha2"] },
    Kind { kind: RouteKind::Tcp, plural: "tcproutes", versions: &["v1", "v1alpha2"] },
];
/// All versions of [`ALL`], in the same order.
const VERSIONS: [&str; 3] = ["v1", "v1alpha3", "v1alpha2"];

/// How the API server names a kind of route in one version.
pub fn resource(kind: RouteKind, version: &str) -> ApiResource {
    let plural = ALL.iter().find(|known| known.kind == kind).map_or("", |known| known.plural);
    ApiResource {
        group: GROUP.to_owned(),
        version: version.to_owned(),
        api_version: format!("{GROUP}/{version}"),
        kind: kind.name().to_owned(),
        plural: plural.to_owned(),
    }
}

/// What the API server serves of the Gateway API.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// The version of each kind of [`ALL`] that is read.
    routes: [Option<&'static str>; KINDS],
    /// XMesh.
    pub meshes: bool,
}

impl Served {
    /// Adds the resources of one version. A version that was added before is better.
    fn add<'a>(&mut self, version: &'static str, plurals: impl Iterator<Item = &'a str> + Clone) {
        for (known, served) in ALL.iter().zip(&mut self.routes) {
            let is_read = known.versions.contains(&version);
            if served.is_none() && is_read && plurals.clone().any(|plural| plural == known.plural) {
                *served = Some(version);
            }
        }
    }

    /// Whether every kind of route is served.
    fn is_complete(&self) -> bool {
        self.routes.iter().all(Option::is_some)
    }

    /// What counts after this answer and the one before it. `None`: another answer has to confirm what the first one
    /// lacks, because without a kind its routes would be taken from the sidecars that hold them.
    fn confirmed_by(self, before: Option<Self>) -> Option<Self> {
        let Some(before) = before else { return self.is_complete().then_some(self) };
        let mut routes = self.routes;
        for (route, before) in routes.iter_mut().zip(before.routes) {
            *route = route.or(before);
        }
        Some(Self { routes, meshes: self.meshes || before.meshes })
    }

    /// Whether routes of a kind are served.
    pub fn serves(&self, kind: RouteKind) -> bool {
        ALL.iter().zip(self.routes).any(|(known, version)| known.kind == kind && version.is_some())
    }

    /// As an API server answers that serves routes of these kinds.
    #[cfg(test)]
    pub(crate) fn of(kinds: &[RouteKind]) -> Self {
        let routes = ALL.each_ref().map(|known| kinds.contains(&known.kind).then_some("v1"));
        Self { routes, meshes: true }
    }

    fn version(&self, index: usize) -> Option<&'static str> {
        self.routes.get(index).copied().flatten()
    }
}

/// Starts one watch per kind. Returns what is served; `None` until the API server has answered once.
pub(super) fn start(client: &Client, hub: &Arc<Hub>) -> watch::Receiver<Option<Served>> {
    let (sender, served) = watch::channel(None);
    tokio::spawn(ask(client.clone(), sender));
    for (index, kind) in ALL.iter().enumerate() {
        tokio::spawn(watch_kind(client.clone(), Arc::clone(hub), (index, kind), served.clone()));
    }
    served
}

/// Keeps `served` current. Never returns.
async fn ask(client: Client, served: watch::Sender<Option<Served>>) {
    let (mut before, mut pause, mut refusals) = (None, ASK_EVERY, 0);
    loop {
        match timeout(ASK_TIMEOUT, answer(&client)).await {
            Ok(Ok(seen)) => {
                let counts = seen.confirmed_by(before);
                pause = if counts.is_some() { ASK_EVERY } else { CONFIRM_AFTER };
                (before, refusals) = (Some(seen), 0);
                publish(&served, counts);
            }
            failed => {
                pause = (pause * 2).clamp(ASK_EVERY, ASK_LATEST);
                let retry_ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
                tracing::warn!(?failed, retry_ms, "cannot find out whether the Gateway API is installed");
                refusals = if is_forbidden(&failed) { refusals + 1 } else { 0 };
                if refusals >= REFUSALS && served.borrow().is_none() {
                    tracing::error!(
                        "this account may not ask what the API server serves, and no route holds; bind ClusterRole system:discovery to it"
                    );
                    publish(&served, Some(Served::default()));
                }
            }
        }
        sleep(pause).await;
    }
}

/// Publishes what is served, if that is known and differs.
fn publish(served: &watch::Sender<Option<Served>>, counts: Option<Served>) {
    served.send_if_modified(|known| {
        let differs = counts.is_some() && *known != counts;
        if differs {
            *known = counts;
        }
        differs
    });
}

/// Whether a question was refused to this account.
fn is_forbidden(answer: &Result<kube::Result<Served>, Elapsed>) -> bool {
    matches!(answer, Ok(Err(kube::Error::Api(status))) if status.is_forbidden())
}

/// Asks for the resources of those groups and versions only that there are: a missing one is an error.
async fn answer(client: &Client) -> kube::Result<Served> {
    let groups = client.list_api_groups().await?.groups;
    let is_served = |group: &str, version: &str| {
        let mut versions =
            groups.iter().filter(|known| known.name == group).flat_map(|known| &known.versions);
        versions.any(|known| known.version == version)
    };
    let mut served = Served::default();
    for version in VERSIONS {
        if !served.is_complete() && is_served(GROUP, version) {
            let found = client.list_api_group_resources(&format!("{GROUP}/{version}")).await?.resources;
            served.add(version, found.iter().map(|resource| resource.name.as_str()));
        }
    }
    if is_served(EXPERIMENTAL_GROUP, MESH_VERSION) {
        let name = format!("{EXPERIMENTAL_GROUP}/{MESH_VERSION}");
        let found = client.list_api_group_resources(&name).await?.resources;
        served.meshes = found.iter().any(|resource| resource.name == "xmeshes");
    }
    Ok(served)
}

/// Watches one kind while it is served. Never returns.
async fn watch_kind(
    client: Client,
    hub: Arc<Hub>,
    (index, kind): (usize, &'static Kind),
    mut served: watch::Receiver<Option<Served>>,
) {
    let mut known = Known::default();
    loop {
        let now = (*served.borrow_and_update()).map(|served| served.version(index));
        if now == Some(None) {
            forget(&hub, &mut known);
        }
        if let Some(Some(version)) = now {
            tracing::info!(kind = kind.kind.name(), version, "watching routes of the Gateway API");
            tokio::select! {
                () = watch_version(&client, &hub, (kind, version), &mut known) => {}
                () = another(served.clone(), index, version) => {}
            }
        } else if served.changed().await.is_err() {
            // The task that asks has ended, and with it the runtime.
            return;
        }
    }
}

/// Waits until another version of a kind is served, or none.
async fn another(mut served: watch::Receiver<Option<Served>>, index: usize, version: &'static str) {
    let is_another =
        |served: &Option<Served>| served.as_ref().and_then(|served| served.version(index)) != Some(version);
    if served.wait_for(is_another).await.is_err() {
        std::future::pending().await
    }
}

/// Removes all routes of a kind that is not installed, which counts as listed.
fn forget(hub: &Hub, known: &mut Known<RouteKey>) {
    let gone = known.forget();
    if !gone.is_empty() {
        tracing::warn!(routes = gone.len(), "a CRD of the Gateway API was removed, and its routes with it");
    }
    for key in gone {
        hub.change(|model| delete(model, hub.routes(), &key));
    }
    known.count(hub);
}

/// Follows one version of a kind. Never returns.
async fn watch_version(
    client: &Client,
    hub: &Arc<Hub>,
    (kind, version): (&'static Kind, &'static str),
    known: &mut Known<RouteKey>,
) {
    let api = Api::<wire::Route>::all_with(client.clone(), &resource(kind.kind, version));
    let handlers = handlers(hub, kind.kind, version);
    loop {
        let events = watcher(api.clone(), Config::default()).default_backoff();
        follow(events, hub, known, &handlers).await;
    }
}

#[allow(clippy::type_complexity, reason = "closures have no names, and the watch and its test need them")]
fn handlers(
    hub: &Hub,
    kind: RouteKind,
    version: &'static str,
) -> Handlers<
    impl Fn(&wire::Route) -> RouteKey,
    impl Fn(&mut Model, wire::Route),
    impl Fn(&mut Model, &RouteKey),
> {
    Handlers {
        kind: kind.name().to_owned(),
        without: Some(WITHOUT),
        id: move |object: &wire::Route| convert::route_key(kind, object),
        apply: move |model: &mut Model, object: wire::Route| apply(model, hub, (kind, version), object),
        delete: move |model: &mut Model, key: &RouteKey| delete(model, hub.routes(), key),
    }
}

/// Takes a route over. The last readable version of one that cannot be decoded stays in force.
fn apply(model: &mut Model, hub: &Hub, (kind, version): (RouteKind, &'static str), object: wire::Route) {
    let key = convert::route_key(kind, &object);
    let records = hub.routes();
    let uid = object.metadata.uid.as_deref().unwrap_or_default();
    let unreadable = match convert::route(kind, &object) {
        Ok(route) => {
            model.apply_route(route);
            None
        }
        Err(error) => {
            tracing::error!(%key, %error, "cannot decode this route; its last readable version stays in force");
            // That of an object of the same name which is gone does not.
            if records.get(&key).is_some_and(|known| *known.uid != *uid) {
                model.delete_route(&key);
            }
            Some(error.to_string())
        }
    };
    records.put(key, RouteRecord::new(object, version, unreadable), hub.is_synced());
}

fn delete(model: &mut Model, records: &RouteRecords, key: &RouteKey) {
    model.delete_route(key);
    records.remove(key);
}

/// Takes a route over as if it had been watched, for tests.
#[cfg(test)]
pub(crate) fn see(hub: &Hub, kind: RouteKind, object: serde_json::Value) {
    let object = serde_json::from_value(object).unwrap();
    hub.change(|model| apply(model, hub, (kind, "v1"), object));
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use futures::stream;
    use kube::runtime::watcher::Event;
    use serde_json::{Value, json};

    use super::*;

    fn served(versions: &[(&'static str, &[&str])]) -> Served {
        let mut served = Served::default();
        for (version, plurals) in versions {
            served.add(version, plurals.iter().copied());
        }
        served
    }

    #[test]
    fn of_several_versions_the_best_one_is_read() {
        let standard = served(&[("v1", &["httproutes", "grpcroutes", "tlsroutes", "tcproutes", "gateways"])]);
        assert_eq!(standard.routes, [Some("v1"); KINDS]);
        assert!(standard.is_complete());
        let old = served(&[
            ("v1", &["httproutes", "grpcroutes", "httproutes/status"]),
            ("v1alpha3", &["tlsroutes"]),
            ("v1alpha2", &["tlsroutes", "tcproutes", "httproutes"]),
        ]);
        assert_eq!(old.routes, [Some("v1"), Some("v1"), Some("v1alpha3"), Some("v1alpha2")]);
    }

    #[test]
    fn versions_are_asked_for_in_the_order_of_preference_of_every_kind() {
        for kind in &ALL {
            let position = |version: &&str| VERSIONS.iter().position(|known| known == version);
            assert!(kind.versions.iter().map(position).is_sorted(), "{kind:?}");
            assert!(kind.versions.iter().all(|version| position(version).is_some()), "{kind:?}");
        }
    }

    #[test]
    fn a_kind_that_vanishes_counts_until_a_second_answer_lacks_it() {
        let (all, none) = (served(&[("v1", &["httproutes"])]), Served::default());
        assert_eq!(none.confirmed_by(Some(all)), Some(all), "the first answer without it");
        assert_eq!(none.confirmed_by(Some(none)), Some(none));
        assert_eq!(all.confirmed_by(Some(none)), Some(all), "what appears counts at once");
    }

    #[test]
    fn an_operator_that_starts_beside_its_api_server_does_not_take_a_first_answer_for_the_whole() {
        let some = served(&[("v1", &["httproutes"])]);
        let all = served(&[("v1", &["httproutes", "grpcroutes", "tlsroutes", "tcproutes"])]);
        assert_eq!(Served::default().confirmed_by(None), None);
        assert_eq!(some.confirmed_by(None), None, "another kind may come");
        assert_eq!(all.confirmed_by(None), Some(all));
        let (known, _) = watch::channel(None);
        publish(&known, None);
        assert_eq!(*known.borrow(), None);
        publish(&known, Some(some));
        publish(&known, None);
        assert_eq!(*known.borrow(), Some(some));
    }

    #[test]
    fn a_status_is_written_in_the_version_that_is_read() {
        let resource = resource(RouteKind::Tcp, "v1alpha2");
        assert_eq!(resource.api_version, "gateway.networking.k8s.io/v1alpha2");
        assert_eq!((resource.kind.as_str(), resource.plural.as_str()), ("TCPRoute", "tcproutes"));
    }

    fn route(uid: &str, generation: i64, spec: Value) -> wire::Route {
        serde_json::from_value(json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
            "metadata": {"namespace": "shop", "name": "web", "uid": uid, "generation": generation},
            "spec": spec,
        }))
        .unwrap()
    }

    #[test]
    fn the_last_readable_version_of_a_route_stays_until_another_object_takes_its_name() {
        let hub = Hub::complete(Model::default());
        let put = |object| hub.change(|model| apply(model, &hub, (RouteKind::Http, "v1"), object));
        let generations = || hub.model().routes().map(|route| route.generation).collect::<Vec<i64>>();
        put(route("a", 1, json!({"parentRefs": [{"group": "", "kind": "Service", "name": "web"}]})));
        assert_eq!(generations(), [1]);
        put(route("a", 2, json!({"rules": "none"})));
        assert_eq!(generations(), [1]);
        let key = convert::route_key(RouteKind::Http, &route("a", 2, json!({})));
        assert!(hub.routes().get(&key).unwrap().unreadable.is_some());
        put(route("b", 1, json!({"rules": "none"})));
        assert!(generations().is_empty());
    }

    #[tokio::test]
    async fn a_kind_that_is_removed_takes_its_routes_with_it_and_counts_as_listed_once() {
        let hub = Hub::default();
        let mut known = Known::default();
        let synced = || hub.synced.load(Ordering::Acquire);
        forget(&hub, &mut known);
        assert_eq!(synced(), 1, "it is not installed");
        let handlers = handlers(&hub, RouteKind::Http, "v1");
        let listed = [Event::Init, Event::InitApply(route("a", 1, json!({}))), Event::InitDone];
        follow(stream::iter(listed.map(Ok)), &hub, &mut known, &handlers).await;
        assert_eq!((hub.model().routes().count(), hub.routes().keys().len()), (1, 1));
        forget(&hub, &mut known);
        assert_eq!((hub.model().routes().count(), hub.routes().keys().len()), (0, 0));
        assert_eq!(synced(), 1);
    }
}
