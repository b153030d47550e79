//! The resources that a pod's sidecar would be sent now, to be compared with those that it has.
//!
//! In: a pod, and what its sidecar has subscribed to, as far as the acknowledgements say. Out: each of these resources,
//! compiled from the model as it is now, and not as the stream sent it last. Nobody names an address here: who sees one
//! namespace gets names and versions of what its pods have asked for, and contents that are about that namespace alone.
//! Never opens or changes a stream.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use axum::http::StatusCode;
use prost::Message as _;
use tulle_mesh::proto::resource::Body;
use tulle_mesh::proto::route::Kind;
use tulle_mesh::proto::{Endpoint, ResourceType, Route};
use tulle_mesh::resources::{Described, MAX_CONTENT_BYTES, MAX_CONTENTS, Resources};

use super::{Api, Caller, Parameters, Refused, turn};
use crate::discovery::Name;
use crate::discovery::report::{endpoints_name, resource_name};
use crate::model::{Compiled, Model};
use crate::watch::Hub;

/// What a pod enforces; the name is the pod's uid.
const SECTIONS: [ResourceType; 5] = [
    ResourceType::Workload,
    ResourceType::Mtls,
    ResourceType::Access,
    ResourceType::Limits,
    ResourceType::Logs,
];

pub async fn resources(api: Api, caller: Arc<Caller>, parameters: Parameters) -> Result<Resources, Refused> {
    let parameters = parameters.only(&["namespace", "pod", "resource"])?;
    let namespace = parameters.required_name("namespace", "shop")?;
    let pod = parameters.required_name("pod", "web-1")?;
    let with_content: HashSet<String> = parameters.all("resource").map(str::to_owned).collect();
    if with_content.len() > MAX_CONTENTS {
        return Err(Refused::bad_request(format!(
            "resource is repeated; write it {MAX_CONTENTS} times at most"
        )));
    }
    api.sees(&caller, Some(&namespace)).await?;
    // As with `explain`: routes and endpoints lead on to namespaces that were not asked about.
    let shows_all = !with_content.is_empty() && api.sees(&caller, None).await.is_ok();
    turn::compute(&Arc::clone(&api.turns), move || {
        let only = (!shows_all).then_some(namespace.as_str());
        let contents = Contents { wanted: &with_content, only, left: MAX_CONTENT_BYTES };
        of_pod(&api, &namespace, &pod, contents)
    })
    .await?
}

fn of_pod(api: &Api, namespace: &str, pod: &str, mut contents: Contents<'_>) -> Result<Resources, Refused> {
    let uid = uid_of(&api.hub.model(), namespace, pod);
    let uid = uid.ok_or_else(|| {
        let error = format!("no pod {namespace}/{pod} has a sidecar");
        Refused::new(StatusCode::NOT_FOUND, error)
    })?;
    let routes = api.acks.subscribed(&uid);
    let routes = routes.into_iter().filter(|(kind, _)| *kind == ResourceType::Route as i32);
    let sections = SECTIONS.into_iter().map(|kind| (kind as i32, Arc::clone(&uid)));
    let mut resources = Vec::new();
    // They follow routes, without a subscription.
    let mut endpoints: BTreeSet<Name> = BTreeSet::new();
    for name in sections.chain(routes) {
        let Some(compiled) = compiled(&api.hub, &name, &uid) else { continue };
        endpoints.extend(compiled.endpoints().into_iter().map(endpoints_name));
        resources.extend(contents.described(&api.hub, &compiled));
    }
    for name in &endpoints {
        let compiled = compiled(&api.hub, name, &uid);
        resources.extend(compiled.and_then(|compiled| contents.described(&api.hub, &compiled)));
    }
    resources.sort_by(|a: &Described, b| (&a.kind, &a.name).cmp(&(&b.kind, &b.name)));
    Ok(Resources { resources })
}

fn uid_of(model: &Model, namespace: &str, name: &str) -> Option<Arc<str>> {
    let mut pods = model.pods().filter(|pod| pod.injected && !pod.finished);
    let found = pods.find(|pod| *pod.namespace == *namespace && *pod.name == *name);
    found.map(|pod| Arc::clone(&pod.uid))
}

/// A resource for a pod, as of now. The model is locked for one resource at a time: everything that changes waits for it.
fn compiled(hub: &Hub, name: &Name, uid: &str) -> Option<Compiled> {
    let (model, name) = (hub.model(), resource_name(name));
    let variant = model.variant(&name, uid);
    model.compile(&name, &variant)
}

/// The contents that are answered.
struct Contents<'a> {
    /// Of which resources, by [`Described::key`].
    wanted: &'a HashSet<String>,
    /// The namespace that whoever asks sees; `None`: all.
    only: Option<&'a str>,
    /// Bytes for which there is room.
    left: usize,
}

impl Contents<'_> {
    fn described(&mut self, hub: &Hub, compiled: &Compiled) -> Option<Described> {
        let described = Described::of(&compiled.resource, false)?;
        if !self.wanted.contains(&described.key()) {
            return Some(described);
        }
        if self.only.is_some_and(|namespace| !is_within(&hub.model(), compiled, namespace)) {
            return Some(described);
        }
        let Some(left) = self.left.checked_sub(compiled.resource.encoded_len()) else {
            return Some(described);
        };
        self.left = left;
        Described::of(&compiled.resource, true)
    }
}

/// Whether everything that a resource is about is in one namespace: the Service, where its requests are sent on to, the
/// routes that say so, and pods.
fn is_within(model: &Model, compiled: &Compiled, namespace: &str) -> bool {
    let has_name = |name: &str| name.split('/').next() == Some(namespace);
    // A slice may list pods of any namespace.
    let has_pod =
        |endpoint: &Endpoint| model.pod(&endpoint.pod_uid).is_none_or(|pod| *pod.namespace == *namespace);
    match &compiled.resource.body {
        Some(Body::Route(Route { kind: Some(Kind::Service(service)) })) => {
            let routes = service.rules.iter().flat_map(|rules| &rules.routes);
            let mut routes = routes.filter_map(|route| route.object.as_ref());
            service.namespace == namespace
                && compiled.endpoints().into_iter().all(has_name)
                && routes.all(|route| route.namespace == namespace)
        }
        Some(Body::Route(Route { kind: Some(Kind::Pod(pod)) })) => pod.endpoint.as_ref().is_none_or(has_pod),
        Some(Body::Endpoints(endpoints)) => {
            let name = compiled.resource.name.as_ref();
            name.is_some_and(|name| has_name(&name.name)) && endpoints.endpoints.iter().all(has_pod)
        }
        // What the pod itself enforces, and addresses of nobody in the cluster.
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use axum::body::to_bytes;
    use tower::ServiceExt as _;

    use super::super::tests::{api, get};
    use super::*;
    use crate::discovery::{SidecarEvent, Stamps};
    use crate::model::tests::{key, pod, route, shop};
    use crate::model::{Endpoint as SliceEndpoint, Pod, Slice, Variant};

    const PATH: &str = "/api/v1/resources?namespace=shop&pod=a";

    async fn asked(api: &Api, token: &str, path: &str) -> (StatusCode, Vec<u8>) {
        let response = crate::api::routes(api.clone()).oneshot(get(token, path)).await.unwrap();
        let status = response.status();
        (status, to_bytes(response.into_body(), 1 << 20).await.unwrap().to_vec())
    }

    async fn found(api: &Api, path: &str) -> Vec<Described> {
        let (status, body) = asked(api, "shop", path).await;
        assert_eq!(status, StatusCode::OK, "{}", String::from_utf8_lossy(&body));
        serde_json::from_slice::<Resources>(&body).unwrap().resources
    }

    fn dialling(api: Api) -> Api {
        let name: Name = (ResourceType::Route as i32, "10.96.0.1:80".into());
        api.acks.report("uid-a", SidecarEvent::Connected, |_| {});
        api.acks.report("uid-a", SidecarEvent::Acked(name, Stamps::from([])), |_| {});
        api
    }

    #[tokio::test]
    async fn a_pod_gets_its_sections_what_it_dials_and_the_endpoints_behind_it() {
        let found = found(&dialling(api()), PATH).await;
        let keys: Vec<String> = found.iter().map(Described::key).collect();
        let expected = [
            "access/uid-a",
            "endpoints/shop/web:80",
            "limits/uid-a",
            "mtls/uid-a",
            "route/10.96.0.1:80",
            "telemetry/uid-a",
            "workload/uid-a",
        ];
        assert_eq!(keys, expected);
        assert!(found.iter().all(|described| described.content.is_none() && !described.version.is_empty()));
    }

    #[tokio::test]
    async fn the_answer_is_of_the_model_as_it_is_now_and_has_the_content_that_was_asked_for() {
        let api = dialling(api());
        let path = format!("{PATH}&resource=endpoints/shop/web:80");
        let content = |found: Vec<Described>| {
            let mut contents = found.into_iter().filter(|described| described.content.is_some());
            let only = contents.next().unwrap();
            assert!(only.kind == "endpoints" && contents.next().is_none());
            only
        };
        let before = content(found(&api, &path).await);
        // No stream has sent anything meanwhile.
        api.hub.change(|model| model.delete_slice(&key("shop", "web-1")));
        let after = content(found(&api, &path).await);
        assert!(before.version != after.version && before.content != after.content);
    }

    /// The resources of pod `a` with content, as a token gets them that asks for its mTLS, its route and its endpoints.
    async fn with_content(api: &Api, token: &str) -> Vec<String> {
        let wanted = ["mtls/uid-a", "route/10.96.0.1:80", "endpoints/shop/web:80"];
        let path = wanted.iter().fold(PATH.to_owned(), |path, key| format!("{path}&resource={key}"));
        let (status, body) = asked(api, token, &path).await;
        assert_eq!(status, StatusCode::OK, "{}", String::from_utf8_lossy(&body));
        let found = serde_json::from_slice::<Resources>(&body).unwrap().resources;
        found.iter().filter(|described| described.content.is_some()).map(Described::key).collect()
    }

    #[tokio::test]
    async fn contents_about_other_namespaces_are_for_who_sees_all() {
        let all = ["endpoints/shop/web:80", "mtls/uid-a", "route/10.96.0.1:80"];
        let api = dialling(api());
        assert_eq!(with_content(&api, "shop").await, all);

        // A slice of the namespace lists a pod of another one.
        let ledger = Pod { namespace: "payments".into(), ..pod("ledger", "10.1.0.9", "r1") };
        let endpoint = SliceEndpoint {
            address: ledger.ips.first().copied(),
            ready: true,
            serving: true,
            pod_uid: Some(Arc::clone(&ledger.uid)),
            ..SliceEndpoint::default()
        };
        let ports = vec![("http".into(), 8080)];
        api.hub.change(|model| {
            model.apply_pod(ledger);
            let slice = Slice { service: "web".into(), ports, endpoints: vec![endpoint] };
            model.apply_slice(key("shop", "web-2"), slice);
        });
        assert_eq!(with_content(&api, "shop").await, ["mtls/uid-a", "route/10.96.0.1:80"]);
        assert_eq!(with_content(&api, "anna").await, ["mtls/uid-a", "route/10.96.0.1:80"]);
        assert_eq!(with_content(&api, "viewer").await, all);
    }

    #[test]
    fn a_route_is_about_its_service_and_the_routes_of_the_gateway_api_that_rule_there() {
        let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
        model.apply_route(route("r", "payments", "web", "web"));
        let name = resource_name(&(ResourceType::Route as i32, "10.96.0.1:80".into()));
        let of = |namespace: &str| model.compile(&name, &Variant::Namespace(namespace.into())).unwrap();
        assert!(is_within(&model, &of("shop"), "shop"));
        assert!(!is_within(&model, &of("payments"), "payments"), "the Service is of another namespace");
        assert!(!is_within(&model, &of("payments"), "shop"), "its rules are");
    }

    #[test]
    fn contents_beyond_the_bound_are_left_out() {
        let hub = Hub::complete(shop(&[pod("a", "10.1.0.1", "r1")]));
        let [mtls, access] = [ResourceType::Mtls, ResourceType::Access]
            .map(|kind| compiled(&hub, &(kind as i32, "uid-a".into()), "uid-a").unwrap());
        let wanted = HashSet::from(["mtls/uid-a".to_owned(), "access/uid-a".to_owned()]);
        let left = mtls.resource.encoded_len();
        let mut contents = Contents { wanted: &wanted, only: Some("shop"), left };
        let mut has_content = |compiled| contents.described(&hub, compiled).unwrap().content.is_some();
        assert_eq!([has_content(&mtls), has_content(&access)], [true, false]);
    }

    #[tokio::test]
    async fn only_who_may_see_the_namespace_of_the_pod_is_answered() {
        let api = dialling(api());
        for (token, path, expected) in [
            ("", PATH, StatusCode::UNAUTHORIZED),
            ("shop", "/api/v1/resources?namespace=payments&pod=a", StatusCode::FORBIDDEN),
            ("anna", "/api/v1/resources?namespace=payments&pod=a", StatusCode::FORBIDDEN),
            ("anna", PATH, StatusCode::OK),
            ("shop", "/api/v1/resources?namespace=shop&pod=other", StatusCode::NOT_FOUND),
            ("shop", "/api/v1/resources?namespace=shop", StatusCode::BAD_REQUEST),
        ] {
            assert_eq!(asked(&api, token, path).await.0, expected, "{token} {path}");
        }
    }
}
