//! HTTP handlers of the webhook.
//!
//! In: an AdmissionReview. Out: an AdmissionReview with a patch, warnings or a rejection.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, Path, State};
use axum::routing::post;
use axum::{Json, Router};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::jiff::Timestamp;
use kube::api::ListParams;
use kube::core::DynamicObject;
use kube::core::admission::{AdmissionRequest, AdmissionResponse, AdmissionReview, Operation};
use kube::{Api, Client};
use serde_json::Value;
use tulle_crds::{Canary, MeshConfig, MeshPolicy, WorkloadKind};

use crate::access;
use crate::canary::{self, Facts, Target};
use crate::cluster::{Cluster, READ_TIMEOUT};
use crate::inject::{self, Context, Mode, Outcome, SealKey};
use crate::operator::OperatorAddresses;
use crate::settings::Settings;
use crate::validate::{self, Validation};

/// Longest request body that is read: two objects (new and old) of at most 1.5 MiB, etcd's default limit.
const MAX_BODY: usize = 3 << 20;

/// State of the handlers.
#[derive(Clone)]
pub struct Admission {
    /// Command-line arguments.
    pub settings: Arc<Settings>,
    /// Watched objects.
    pub cluster: Arc<Cluster>,
    /// The addresses of the operator's Service.
    pub operator: Arc<OperatorAddresses>,
    /// Reads the target of a Canary, the Services of a namespace, and whether a namespace exists.
    pub client: Client,
    /// Signs injected sidecars.
    pub key: SealKey,
}

/// The routes.
pub fn routes(admission: Admission) -> Router {
    Router::new()
        .route("/inject/{mode}", post(inject_pod))
        .route("/update", post(update_pod))
        .route("/template/{mode}", post(review_template))
        .route("/validate", post(validate_object))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(admission)
}

type Review = AdmissionReview<DynamicObject>;

async fn inject_pod(
    State(admission): State<Admission>,
    Path(mode): Path<String>,
    Json(review): Json<Review>,
) -> Json<Review> {
    let namespace = admission.namespace_of(&review).await;
    respond(review, |request, response| admission.inject(mode_of(&mode), namespace, request, response))
}

/// Keeps the injected parts of an existing pod. Never rejects the update.
async fn update_pod(Json(review): Json<Review>) -> Json<Review> {
    respond(review, restore)
}

fn restore(request: &AdmissionRequest<DynamicObject>, response: AdmissionResponse) -> AdmissionResponse {
    let read = |pod: &Option<DynamicObject>| serde_json::to_value(pod.as_ref()?).ok();
    let (Some(old), Some(new)) = (read(&request.old_object), read(&request.object)) else { return response };
    let Some(patch) = inject::restore(&old, &new) else { return response };
    tracing::info!(
        namespace = request.namespace,
        pod = request.name,
        "an update of a pod keeps the injected parts that it would overwrite"
    );
    response.clone().with_patch(patch).unwrap_or(response)
}

/// Warns about the pods of a workload when the workload is applied, because warnings about its pods go to the
/// controller that creates them and not to the user.
async fn review_template(
    State(admission): State<Admission>,
    Path(mode): Path<String>,
    Json(review): Json<Review>,
) -> Json<Review> {
    let namespace = admission.namespace_of(&review).await;
    respond(review, |request, response| {
        admission.warn_about_template(mode_of(&mode), namespace, request, response)
    })
}

fn mode_of(path: &str) -> Mode {
    if path == "required" { Mode::Required } else { Mode::Enabled }
}

async fn validate_object(State(admission): State<Admission>, Json(review): Json<Review>) -> Json<Review> {
    let validation = match review.request.as_ref() {
        Some(request) => admission.validate(request).await,
        None => Validation::default(),
    };
    respond(review, |_, mut response| {
        response.warnings = (!validation.warnings.is_empty()).then(|| validation.warnings.clone());
        if validation.errors.is_empty() { response } else { response.deny(validation.errors.join("; ")) }
    })
}

fn respond(
    review: Review,
    decide: impl FnOnce(&AdmissionRequest<DynamicObject>, AdmissionResponse) -> AdmissionResponse,
) -> Json<Review> {
    let request: Result<AdmissionRequest<DynamicObject>, _> = review.try_into();
    let response = match request {
        Ok(request) => {
            let response = AdmissionResponse::from(&request);
            decide(&request, response)
        }
        Err(error) => {
            AdmissionResponse::invalid(format!("the body is not an AdmissionReview with a request: {error}"))
        }
    };
    Json(response.into_review())
}

impl Admission {
    async fn namespace_of(&self, review: &Review) -> inject::Namespace {
        let name = review.request.as_ref().and_then(|request| request.namespace.as_deref()).unwrap_or("");
        self.cluster.namespace(&self.client, name).await
    }

    fn inject(
        &self,
        mode: Mode,
        namespace: inject::Namespace,
        request: &AdmissionRequest<DynamicObject>,
        mut response: AdmissionResponse,
    ) -> AdmissionResponse {
        let Some(pod) = request.object.as_ref().and_then(|pod| serde_json::to_value(pod).ok()) else {
            return response;
        };
        let context = self.context(mode, namespace, &pod);
        let (outcome, warnings) = inject::inject(&pod, &context);
        let who =
            pod.pointer("/metadata/generateName").or(pod.pointer("/metadata/name")).and_then(Value::as_str);
        tracing::info!(
            namespace = context.namespace.name,
            pod = who,
            gated = context.needs_approval,
            outcome = name(&outcome),
            ?warnings,
            "reviewed a pod"
        );
        response.warnings = (!warnings.is_empty()).then_some(warnings);
        match outcome {
            Outcome::Skip => response,
            Outcome::Refuse(why) => response.deny(why),
            Outcome::Inject(patch) => match response.clone().with_patch(patch) {
                Ok(patched) => patched,
                Err(error) => {
                    response.deny(format!("cannot encode the patch that injects the sidecar: {error}"))
                }
            },
        }
    }

    fn context(&self, mode: Mode, namespace: inject::Namespace, pod: &Value) -> Context {
        let account = pod.pointer("/spec/serviceAccountName").and_then(Value::as_str).unwrap_or("default");
        Context {
            mode,
            exempt: self.cluster.is_exempt(&namespace.name, account),
            needs_approval: self.cluster.needs_approval(&namespace.name, pod),
            namespace,
            defaults: self.cluster.defaults(),
            image: self.settings.sidecar_image.clone(),
            operator: self.settings.operator(),
            operator_addresses: self.operator.known(),
            operator_identity: format!("{}/tulle-operator", self.settings.namespace),
            trust_domain: self.cluster.trust_domain(),
            key: self.key.clone(),
        }
    }

    /// Reviews the pod template of a workload. Never rejects the workload.
    fn warn_about_template(
        &self,
        mode: Mode,
        namespace: inject::Namespace,
        request: &AdmissionRequest<DynamicObject>,
        mut response: AdmissionResponse,
    ) -> AdmissionResponse {
        let read = |object: &Option<DynamicObject>| serde_json::to_value(object.as_ref()?).ok();
        let (Some(workload), old) = (read(&request.object), read(&request.old_object)) else {
            return response;
        };
        let Some(pod) = template_of(&workload) else { return response };
        let mut warnings = misplaced(&workload, old.as_ref(), pod, &request.kind.kind);
        warnings.extend(self.hindrances(&namespace.name, request, &workload, old.as_ref()));
        // An update that keeps the template, such as scaling, would repeat the same warnings.
        if old.as_ref().and_then(template_of) != Some(pod) {
            let context = self.context(mode, namespace, pod);
            let (outcome, found) = inject::inject(pod, &context);
            warnings.extend(found);
            if let Outcome::Refuse(why) = outcome {
                warnings.push(format!("pods of this {} will be rejected: {why}", request.kind.kind));
            }
        }
        response.warnings = (!warnings.is_empty()).then_some(warnings);
        response
    }

    /// What in a workload hinders the rollouts of its Canary, if it has one.
    fn hindrances(
        &self,
        namespace: &str,
        request: &AdmissionRequest<DynamicObject>,
        workload: &Value,
        old: Option<&Value>,
    ) -> Vec<String> {
        let name = workload.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
        match WorkloadKind::named(&request.kind.kind) {
            Some(kind) if self.cluster.has_canary(namespace, kind, name) => {
                canary::workload(kind, workload, old)
            }
            _ => Vec::new(),
        }
    }

    async fn validate(&self, request: &AdmissionRequest<DynamicObject>) -> Validation {
        if request.operation == Operation::Delete {
            return review_deletion(request);
        }
        let Some(object) = request.object.as_ref().and_then(|o| serde_json::to_value(o).ok()) else {
            return Validation::default();
        };
        // An action annotation or the removal of a finalizer must work on an object whose spec is invalid today.
        let old = request.old_object.as_ref().map(|old| old.data.get("spec"));
        if old.is_some_and(|old| old == object.get("spec")) {
            return canary::action(&object);
        }
        fn read<T: serde::de::DeserializeOwned>(object: Value) -> Result<T, Validation> {
            serde_json::from_value(object)
                .map_err(|error| Validation { errors: vec![error.to_string()], warnings: Vec::new() })
        }
        let mtls = old.flatten().and_then(|old| old.get("mtls")).and_then(Value::as_str);
        let found = match request.kind.kind.as_str() {
            "MeshPolicy" => match read::<MeshPolicy>(object) {
                Ok(policy) => {
                    let namespace = request.namespace.as_deref().unwrap_or("");
                    let mut validation = self.validate_policy(namespace, &policy).await;
                    validation.warnings.extend(validate::mtls_change(mtls, policy.spec.mtls));
                    Ok(validation)
                }
                Err(validation) => Err(validation),
            },
            "MeshConfig" => read::<MeshConfig>(object).map(|config| {
                let mut validation = validate::config(&config);
                validation.warnings.extend(validate::mtls_change(mtls, Some(config.spec.mtls)));
                validation
            }),
            "Canary" => match read::<Canary>(object) {
                Ok(canary) => {
                    Ok(self.validate_canary(request.namespace.as_deref().unwrap_or(""), &canary).await)
                }
                Err(validation) => Err(validation),
            },
            _ => Ok(Validation::default()),
        };
        found.unwrap_or_else(|validation| validation)
    }

    /// Reads what is needed for warnings about access rules. What cannot be read in time is not warned about.
    async fn validate_policy(&self, namespace: &str, policy: &MeshPolicy) -> Validation {
        let mut validation = validate::policy(policy, Timestamp::now());
        let Some(access) = &policy.spec.access else { return validation };
        let named = access::namespaces(access);
        let (absent, services) = tokio::join!(
            tokio::time::timeout(READ_TIMEOUT, self.absent(&named)),
            tokio::time::timeout(READ_TIMEOUT, self.services(namespace)),
        );
        let (absent, services) = (absent.unwrap_or_default(), services.unwrap_or_default());
        validation.warnings.extend(access::warnings(&policy.spec, &absent, &services));
        validation
    }

    /// Those of the namespaces that do not exist.
    async fn absent<'a>(&self, namespaces: &BTreeSet<&'a str>) -> BTreeSet<&'a str> {
        let mut absent = BTreeSet::new();
        for namespace in namespaces {
            if !self.cluster.has_namespace(&self.client, namespace).await {
                absent.insert(*namespace);
            }
        }
        absent
    }

    /// Reads what is needed for warnings from the API server: Canaries are rarely applied, so that a watch on every
    /// workload and Service would cost more. What cannot be read in time is not warned about.
    async fn validate_canary(&self, namespace: &str, canary: &Canary) -> Validation {
        let (target, services) = tokio::join!(
            tokio::time::timeout(READ_TIMEOUT, self.target(namespace, canary)),
            tokio::time::timeout(READ_TIMEOUT, self.services(namespace)),
        );
        let target = match &target {
            Ok(Some(Some(found))) => Target::Found(found),
            Ok(Some(None)) => Target::Absent,
            Ok(None) | Err(_) => Target::Unknown,
        };
        let services = services.unwrap_or_default();
        let siblings = self.cluster.siblings(namespace, canary);
        canary::validate(canary, &Facts { siblings: &siblings, target, services: &services })
    }

    async fn services(&self, namespace: &str) -> Vec<Service> {
        let api = Api::<Service>::namespaced(self.client.clone(), namespace);
        // From the API server's cache, because a warning may be a second late.
        let listed = api.list(&ListParams::default().match_any()).await;
        listed.map_or_else(|_| Vec::new(), |listed| listed.items)
    }

    /// The target, or that it does not exist. None: it could not be read.
    async fn target(&self, namespace: &str, canary: &Canary) -> Option<Option<Value>> {
        let plural = match canary.spec.target.kind {
            WorkloadKind::Deployment => "deployments",
            WorkloadKind::StatefulSet => "statefulsets",
            WorkloadKind::DaemonSet => "daemonsets",
        };
        let resource = kube::core::ApiResource {
            group: "apps".into(),
            version: "v1".into(),
            api_version: "apps/v1".into(),
            kind: canary.spec.target.kind.name().into(),
            plural: plural.into(),
        };
        let api = Api::<DynamicObject>::namespaced_with(self.client.clone(), namespace, &resource);
        let object = api.get_opt(&canary.spec.target.name).await.ok()?;
        Some(object.and_then(|object| serde_json::to_value(object).ok()))
    }
}

/// Warns about the deletion of a Canary. Reads nothing and finds no error, because a deletion is neither delayed nor refused.
fn review_deletion(request: &AdmissionRequest<DynamicObject>) -> Validation {
    let deleted = request.old_object.as_ref().filter(|_| request.kind.kind == "Canary");
    let deleted = deleted.and_then(|canary| serde_json::to_value(canary).ok());
    deleted.as_ref().map(canary::deletion).unwrap_or_default()
}

/// The pod template of a workload.
fn template_of(workload: &Value) -> Option<&Value> {
    workload.pointer("/spec/template").or_else(|| workload.pointer("/spec/jobTemplate/spec/template"))
}

/// Warnings about settings of the sidecar that stand beside the pod template.
fn misplaced(workload: &Value, old: Option<&Value>, template: &Value, kind: &str) -> Vec<String> {
    let mut warnings = Vec::new();
    inject::warn_about_misplaced(workload, old, template, kind, &mut warnings);
    if let Some(job) = workload.pointer("/spec/jobTemplate") {
        let old = old.and_then(|old| old.pointer("/spec/jobTemplate"));
        inject::warn_about_misplaced(job, old, template, "jobTemplate", &mut warnings);
    }
    warnings
}

fn name(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Inject(_) => "injected",
        Outcome::Skip => "skipped",
        Outcome::Refuse(_) => "refused",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_deletion_of_a_canary_in_a_rollout_is_answered_from_the_deleted_object() {
        let reviewed = |kind: &str, phase: &str| {
            let named = json!({"group": "tulle.dev", "version": "v1alpha1", "kind": kind});
            let review: Review = serde_json::from_value(json!({
                "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
                "request": {
                    "uid": "1", "kind": named, "operation": "DELETE", "name": "web", "namespace": "shop",
                    "resource": {"group": "tulle.dev", "version": "v1alpha1", "resource": "canaries"},
                    "userInfo": {"username": "me"}, "object": null, "options": null,
                    "oldObject": {
                        "apiVersion": "tulle.dev/v1alpha1", "kind": kind,
                        "metadata": {"name": "web", "namespace": "shop"},
                        "spec": {"target": {"kind": "Deployment", "name": "web"}}, "status": {"phase": phase},
                    },
                },
            }))
            .unwrap();
            let request: AdmissionRequest<DynamicObject> = review.try_into().unwrap();
            review_deletion(&request)
        };
        let found = reviewed("Canary", "Paused");
        assert_eq!((found.errors.len(), found.warnings.len()), (0, 1), "{found:?}");
        assert!(found.warnings[0].contains("without Canary web"), "{found:?}");
        assert_eq!(reviewed("Canary", "Stable"), Validation::default());
        assert_eq!(reviewed("MeshPolicy", "Paused"), Validation::default());
    }
}
