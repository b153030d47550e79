//! Keeps the XMesh `tulle`, which says which features of the Gateway API this mesh supports (GEP-3949).
//!
//! In: whether XMesh is installed, and that object. Out: the object with nothing but the controller's name, where there
//! is none, and its status. Never changes a `spec`, and leaves objects with another controller's name alone.

use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DynamicObject, PostParams};
use kube::core::ApiResource;
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::routes::{ACCEPTED, CONTROLLER, Decided, Truth, conditions, list, text};
use super::writer::{Target, Write, Writer};
use crate::lease::Leadership;
use crate::model::gateway::RouteKind;
use crate::watch::gateway::{EXPERIMENTAL_GROUP, MESH_VERSION, Served};

/// The name of the object.
pub const NAME: &str = "tulle";
/// Time between two looks at the object.
const LOOK_EVERY: Duration = Duration::from_secs(15);
/// Timeout of one look.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);

/// Features of the Gateway API that this mesh supports, in the order that the API asks for. Those for which the
/// conformance suite has a test in a mesh: `e2e/conformance` holds its report.
pub const FEATURES: [&str; 17] = [
    "GRPCRoute",
    "HTTPRoute",
    "HTTPRoute303RedirectStatusCode",
    "HTTPRoute307RedirectStatusCode",
    "HTTPRoute308RedirectStatusCode",
    "HTTPRouteParentRefPort",
    "HTTPRouteResponseHeaderModification",
    "Mesh",
    "MeshClusterIPMatching",
    "MeshConsumerRoute",
    "MeshHTTPRouteBackendRequestHeaderModification",
    "MeshHTTPRouteNamedRouteRule",
    "MeshHTTPRouteQueryParamMatching",
    "MeshHTTPRouteRedirectPath",
    "MeshHTTPRouteRedirectPort",
    "MeshHTTPRouteRewritePath",
    "MeshHTTPRouteSchemeRedirect",
];

/// How the API server names the kind.
pub fn resource() -> ApiResource {
    ApiResource {
        group: EXPERIMENTAL_GROUP.to_owned(),
        version: MESH_VERSION.to_owned(),
        api_version: format!("{EXPERIMENTAL_GROUP}/{MESH_VERSION}"),
        kind: "XMesh".to_owned(),
        plural: "xmeshes".to_owned(),
    }
}

/// Looks at the object while its CRD is installed and this replica leads. Never returns.
pub async fn run(
    client: Client,
    mut leadership: watch::Receiver<Leadership>,
    mut served: watch::Receiver<Option<Served>>,
    writer: &Writer,
) {
    let api = Api::<DynamicObject>::all_with(client, &resource());
    loop {
        let installed = (*served.borrow_and_update()).filter(|served| served.meshes);
        let leads = leadership.borrow_and_update().mine;
        let Some(installed) = installed.filter(|_| leads) else {
            writer.queue().withdraw(&Target::Mesh);
            tokio::select! {
                Ok(()) = served.changed() => {}
                Ok(()) = leadership.changed() => {}
                else => return std::future::pending().await,
            }
            continue;
        };
        match timeout(LOOK_TIMEOUT, mesh(&api)).await {
            Ok(Ok(mesh)) => {
                offer(&mesh, &installed, writer);
                writer.wake();
            }
            failed => tracing::warn!(?failed, name = NAME, "cannot read or create the XMesh"),
        }
        tokio::select! {
            () = sleep(LOOK_EVERY) => {}
            Ok(()) = served.changed() => {}
            Ok(()) = leadership.changed() => {}
        }
    }
}

/// The object, which is created where there is none.
async fn mesh(api: &Api<DynamicObject>) -> kube::Result<DynamicObject> {
    if let Some(mesh) = api.get_opt(NAME).await? {
        return Ok(mesh);
    }
    let new = DynamicObject::new(NAME, &resource()).data(json!({"spec": {"controllerName": CONTROLLER}}));
    api.create(&PostParams::default(), &new).await
}

/// Whether the API server serves the kind of route that a feature is of, without which nobody can use it.
fn is_installed(feature: &str, served: &Served) -> bool {
    let kinds = [("GRPCRoute", RouteKind::Grpc), ("HTTPRoute", RouteKind::Http)];
    kinds.iter().all(|(name, kind)| !feature.contains(name) || served.serves(*kind))
}

/// Queues the object's status, if it is ours and has another one.
fn offer(mesh: &DynamicObject, served: &Served, writer: &Writer) {
    let generation = mesh.metadata.generation.unwrap_or_default();
    match status(&mesh.data, served, generation, &Time(Timestamp::now())) {
        Some(status) => {
            let version = mesh.metadata.resource_version.clone();
            writer.queue().offer(Target::Mesh, Write::new(version, status), std::time::Instant::now());
        }
        None => writer.queue().withdraw(&Target::Mesh),
    }
}

/// The status that an XMesh should have. `None`: it has it, or belongs to another controller.
fn status(mesh: &Value, served: &Served, generation: i64, now: &Time) -> Option<Value> {
    let spec = mesh.get("spec").unwrap_or(&Value::Null);
    if text(spec, "controllerName") != CONTROLLER {
        return None;
    }
    let has_parameters = spec.get("parametersRef").is_some_and(|parameters| !parameters.is_null());
    let (status, reason, message) = match has_parameters {
        false => (Truth::True, "Accepted", "Tulle implements this mesh"),
        true => (
            Truth::False,
            "InvalidParameters",
            "Tulle has no parameters here: remove parametersRef; its settings are MeshConfig mesh",
        ),
    };
    let accepted = Decided { type_: ACCEPTED, status, reason: reason.into(), message: message.to_owned() };
    let current = mesh.get("status").unwrap_or(&Value::Null);
    let supported = FEATURES.iter().filter(|name| is_installed(name, served));
    let features: Vec<Value> = supported.map(|name| json!({"name": name})).collect();
    let conditions = conditions(list(current, "conditions"), &[accepted], generation, now);
    let next = json!({"conditions": conditions, "supportedFeatures": features});
    (*current != next).then_some(next)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Time {
        Time(Timestamp::from_second(second).unwrap())
    }

    #[test]
    fn features_are_sorted_as_the_api_asks() {
        assert!(FEATURES.is_sorted());
    }

    #[test]
    fn our_mesh_is_accepted_once_with_its_features() {
        let pending = json!({"type": "Accepted", "status": "Unknown", "reason": "Pending",
            "message": "Waiting for controller", "lastTransitionTime": "1970-01-01T00:00:00Z"});
        let mut mesh = json!({
            "spec": {"controllerName": CONTROLLER}, "status": {"conditions": [pending]},
        });
        let all = Served::of(&[RouteKind::Grpc, RouteKind::Http]);
        let first = status(&mesh, &all, 1, &at(60)).unwrap();
        let condition = &first["conditions"][0];
        assert_eq!((&condition["status"], &condition["observedGeneration"]), (&json!("True"), &json!(1)));
        assert_eq!(condition["lastTransitionTime"], "1970-01-01T00:01:00Z");
        assert_eq!(first["supportedFeatures"][0], json!({"name": "GRPCRoute"}));
        mesh["status"] = first;
        assert_eq!(status(&mesh, &all, 1, &at(99)), None, "nothing but time differs");
    }

    #[test]
    fn features_of_a_route_whose_crd_is_not_installed_are_not_claimed() {
        let mesh = json!({"spec": {"controllerName": CONTROLLER}});
        let claimed = |kinds: &[RouteKind]| -> Vec<String> {
            let status = status(&mesh, &Served::of(kinds), 1, &at(0)).unwrap();
            let names = list(&status, "supportedFeatures").iter().map(|feature| text(feature, "name"));
            names.map(ToOwned::to_owned).collect()
        };
        assert_eq!(claimed(&[RouteKind::Grpc, RouteKind::Http]), FEATURES);
        let without_grpc: Vec<&str> = FEATURES.iter().copied().filter(|name| *name != "GRPCRoute").collect();
        assert_eq!(claimed(&[RouteKind::Http]), without_grpc);
        assert_eq!(claimed(&[]), ["Mesh", "MeshClusterIPMatching", "MeshConsumerRoute"]);
    }

    #[test]
    fn a_mesh_of_another_controller_is_left_alone() {
        let none = Served::default();
        assert_eq!(status(&json!({"spec": {"controllerName": "example.com/other"}}), &none, 1, &at(0)), None);
        assert_eq!(status(&json!({}), &none, 1, &at(0)), None);
    }

    #[test]
    fn parameters_that_there_are_none_of_are_refused() {
        let mesh = json!({"spec": {"controllerName": CONTROLLER, "parametersRef": {"name": "x"}}});
        let refused = status(&mesh, &Served::default(), 1, &at(0)).unwrap();
        assert_eq!(refused["conditions"][0]["reason"], "InvalidParameters");
    }
}
