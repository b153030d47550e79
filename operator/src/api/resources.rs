//! The resources that a pod's sidecar would be sent now, to be compared with those that it has.
//!
//! In: a pod, and what its sidecar has subscribed to, as far as the acknowledgements say. Out: each of these resources,
//! compiled from the model as it is now, and not as the stream sent it last. Nobody names an address here: what is shown
//! to whoever may see a namespace is what its pods have asked for. Never opens or changes a stream.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use axum::http::StatusCode;
use prost::Message as _;
use tulle_mesh::proto::ResourceType;
use tulle_mesh::resources::{Described, MAX_CONTENTS, Resources};

use super::{Api, Caller, Parameters, Refused, turn};
use crate::discovery::Name;
use crate::discovery::report::{endpoints_name, resource_name};
use crate::model::{Compiled, Model};
use crate::watch::Hub;

/// Bytes of contents in one answer, which takes about five times as many while it is written; beyond them, versions
/// alone. An endpoint takes about 200 bytes.
const MAX_ANSWER: usize = 4 << 20;
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
    turn::compute(&Arc::clone(&api.turns), move || of_pod(&api, &namespace, &pod, &with_content)).await?
}

fn of_pod(
    api: &Api,
    namespace: &str,
    pod: &str,
    with_content: &HashSet<String>,
) -> Result<Resources, Refused> {
    let uid = uid_of(&api.hub.model(), namespace, pod);
    let uid = uid.ok_or_else(|| {
        let error = format!("no pod {namespace}/{pod} has a sidecar");
        Refused::new(StatusCode::NOT_FOUND, error)
    })?;
    let routes = api.acks.subscribed(&uid);
    let routes = routes.into_iter().filter(|(kind, _)| *kind == ResourceType::Route as i32);
    let sections = SECTIONS.into_iter().map(|kind| (kind as i32, Arc::clone(&uid)));
    let mut resources = Vec::new();
    let mut left = MAX_ANSWER;
    // They follow routes, without a subscription.
    let mut endpoints: BTreeSet<Name> = BTreeSet::new();
    for name in sections.chain(routes) {
        let Some(compiled) = compiled(&api.hub, &name, &uid) else { continue };
        endpoints.extend(compiled.endpoints().into_iter().map(endpoints_name));
        resources.extend(described(&compiled, with_content, &mut left));
    }
    for name in &endpoints {
        let compiled = compiled(&api.hub, name, &uid);
        resources.extend(compiled.and_then(|compiled| described(&compiled, with_content, &mut left)));
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

/// A resource, and its content where that was asked for and the answer has that much room `left`.
fn described(compiled: &Compiled, with_content: &HashSet<String>, left: &mut usize) -> Option<Described> {
    let bare = Described::of(&compiled.resource, false)?;
    if !with_content.contains(&bare.key()) {
        return Some(bare);
    }
    match left.checked_sub(compiled.resource.encoded_len()) {
        Some(rest) => {
            *left = rest;
            Described::of(&compiled.resource, true)
        }
        None => Some(bare),
    }
}

#[cfg(test)]
mod tests {
    use axum::body::to_bytes;
    use tower::ServiceExt as _;

    use super::super::tests::{api, get};
    use super::*;
    use crate::discovery::{SidecarEvent, Stamps};
    use crate::model::tests::key;

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

    #[tokio::test]
    async fn an_answer_has_a_bound_and_beyond_it_versions_alone() {
        let name: Name = (ResourceType::Endpoints as i32, "shop/web:80".into());
        let compiled = compiled(&api().hub, &name, "uid-a").unwrap();
        let asked = HashSet::from(["endpoints/shop/web:80".to_owned()]);
        let mut left = compiled.resource.encoded_len();
        assert!(described(&compiled, &asked, &mut left).unwrap().content.is_some());
        let second = described(&compiled, &asked, &mut left).unwrap();
        assert!(second.content.is_none() && second.version == compiled.resource.version);
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
