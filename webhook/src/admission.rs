//! AdmissionReview in and out.

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, Path, State};
use axum::routing::post;
use axum::{Json, Router};
use kube::core::DynamicObject;
use kube::core::admission::{AdmissionRequest, AdmissionResponse, AdmissionReview};
use kube::{Api, Client};
use serde_json::Value;
use tulle_crds::{Canary, MeshConfig, MeshPolicy, WorkloadKind};

use crate::cluster::Cluster;
use crate::inject::{self, Context, Mode, Outcome, SealKey};
use crate::settings::Settings;
use crate::validate::{self, Findings};

/// The longest review that is read: the API server's own limit for an object, twice (new and old).
const MAX_BODY: usize = 3 << 20;

/// What the handlers need.
#[derive(Clone)]
pub struct Admission {
    /// Arguments.
    pub settings: Arc<Settings>,
    /// What is known.
    pub cluster: Arc<Cluster>,
    /// To look at a Canary's target.
    pub client: Client,
    /// Signs what is injected.
    pub key: SealKey,
}

/// The routes.
pub fn routes(admission: Admission) -> Router {
    Router::new()
        .route("/inject/{mode}", post(inject_pod))
        .route("/template/{mode}", post(look_at_template))
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
    answer(review, |request, response| admission.inject(mode_of(&mode), request, response))
}

/// Warnings about a pod that a controller makes would end in the controller's log: whoever applies the
/// workload is told here.
async fn look_at_template(
    State(admission): State<Admission>,
    Path(mode): Path<String>,
    Json(review): Json<Review>,
) -> Json<Review> {
    answer(review, |request, response| admission.look_ahead(mode_of(&mode), request, response))
}

fn mode_of(path: &str) -> Mode {
    if path == "required" { Mode::Required } else { Mode::Enabled }
}

async fn validate_object(State(admission): State<Admission>, Json(review): Json<Review>) -> Json<Review> {
    let findings = match review.request.as_ref() {
        Some(request) => admission.validate(request).await,
        None => Findings::default(),
    };
    answer(review, |_, mut response| {
        response.warnings = (!findings.warnings.is_empty()).then(|| findings.warnings.clone());
        if findings.errors.is_empty() { response } else { response.deny(findings.errors.join("; ")) }
    })
}

fn answer(
    review: Review,
    decide: impl FnOnce(&AdmissionRequest<DynamicObject>, AdmissionResponse) -> AdmissionResponse,
) -> Json<Review> {
    let request: Result<AdmissionRequest<DynamicObject>, _> = review.try_into();
    let response = match request {
        Ok(request) => {
            let response = AdmissionResponse::from(&request);
            decide(&request, response)
        }
        Err(error) => AdmissionResponse::invalid(format!("not an AdmissionReview with a request: {error}")),
    };
    Json(response.into_review())
}

impl Admission {
    fn inject(
        &self,
        mode: Mode,
        request: &AdmissionRequest<DynamicObject>,
        mut response: AdmissionResponse,
    ) -> AdmissionResponse {
        let namespace = request.namespace.clone().unwrap_or_default();
        let Some(pod) = request.object.as_ref().and_then(|pod| serde_json::to_value(pod).ok()) else {
            return response;
        };
        let context = self.context(mode, &namespace, &pod);
        let (outcome, warnings) = inject::inject(&pod, &context);
        let who =
            pod.pointer("/metadata/generateName").or(pod.pointer("/metadata/name")).and_then(Value::as_str);
        tracing::info!(%namespace, pod = who, gated = context.on_trial, outcome = name(&outcome), ?warnings, "admitted a pod");
        response.warnings = (!warnings.is_empty()).then_some(warnings);
        match outcome {
            Outcome::Skip => response,
            Outcome::Refuse(why) => response.deny(why),
            Outcome::Inject(patch) => match response.clone().with_patch(patch) {
                Ok(patched) => patched,
                Err(error) => response.deny(format!("the sidecar's patch could not be written: {error}")),
            },
        }
    }

    fn context(&self, mode: Mode, namespace: &str, pod: &Value) -> Context {
        let account = pod.pointer("/spec/serviceAccountName").and_then(Value::as_str).unwrap_or("default");
        Context {
            mode,
            namespace: self.cluster.namespace(namespace),
            defaults: self.cluster.defaults(),
            exempt: self.cluster.is_exempt(namespace, account),
            on_trial: self.cluster.is_on_trial(namespace, pod),
            image: self.settings.sidecar_image.clone(),
            operator: self.settings.operator(),
            operator_identity: format!("{}/tulle-operator", self.settings.namespace),
            trust_domain: self.cluster.trust_domain(),
            key: self.key.clone(),
        }
    }

    /// Warns of what will be said about a workload's pods; it is never refused here.
    fn look_ahead(
        &self,
        mode: Mode,
        request: &AdmissionRequest<DynamicObject>,
        mut response: AdmissionResponse,
    ) -> AdmissionResponse {
        let template = |object: &Option<DynamicObject>| {
            let data = &object.as_ref()?.data;
            data.pointer("/spec/template").or(data.pointer("/spec/jobTemplate/spec/template")).cloned()
        };
        let (Some(pod), old) = (template(&request.object), template(&request.old_object)) else {
            return response;
        };
        // A new number of replicas is not the moment to say the same again.
        if old.as_ref() == Some(&pod) {
            return response;
        }
        let context = self.context(mode, request.namespace.as_deref().unwrap_or_default(), &pod);
        let (outcome, mut warnings) = inject::inject(&pod, &context);
        if let Outcome::Refuse(why) = outcome {
            warnings.push(format!("its pods will be rejected: {why}"));
        }
        response.warnings = (!warnings.is_empty()).then_some(warnings);
        response
    }

    async fn validate(&self, request: &AdmissionRequest<DynamicObject>) -> Findings {
        let Some(object) = request.object.as_ref().and_then(|o| serde_json::to_value(o).ok()) else {
            return Findings::default();
        };
        // A verb by annotation, or the end of an object: not the moment to ask for another spec.
        let old = request.old_object.as_ref().map(|old| old.data.get("spec"));
        if old.is_some_and(|old| old == object.get("spec")) {
            return validate::action(&object);
        }
        fn read<T: serde::de::DeserializeOwned>(object: Value) -> Result<T, Findings> {
            serde_json::from_value(object)
                .map_err(|error| Findings { errors: vec![error.to_string()], warnings: Vec::new() })
        }
        let found = match request.kind.kind.as_str() {
            "MeshPolicy" => read::<MeshPolicy>(object).map(|policy| validate::policy(&policy)),
            "MeshConfig" => read::<MeshConfig>(object).map(|config| validate::config(&config)),
            "Canary" => match read::<Canary>(object) {
                Ok(canary) => {
                    let namespace = request.namespace.clone().unwrap_or_default();
                    let target = self.target(&namespace, &canary).await;
                    Ok(validate::canary(
                        &canary,
                        &self.cluster.siblings(&namespace, &canary),
                        target.as_ref(),
                    ))
                }
                Err(findings) => Err(findings),
            },
            _ => Ok(Findings::default()),
        };
        found.unwrap_or_else(|findings| findings)
    }

    async fn target(&self, namespace: &str, canary: &Canary) -> Option<Value> {
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
        let object = api.get_opt(&canary.spec.target.name).await.ok()??;
        serde_json::to_value(object).ok()
    }
}

fn name(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Inject(_) => "injected",
        Outcome::Skip => "skipped",
        Outcome::Refuse(_) => "refused",
    }
}
