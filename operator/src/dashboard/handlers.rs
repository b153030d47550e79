//! One function per address: who asks, whether they may see it, and then what is rendered. The lookups run off the
//! threads that serve sidecars.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{FromRequestParts, Path, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{Html, IntoResponse, Response};
use maud::Markup;
use tokio::sync::Semaphore;
use tulle_crds::{Canary, CanaryAction};
use tulle_mesh::query::By;

use crate::api::sidecars::sidecars;
use crate::api::{Api, Authenticated, Caller, Parameters, Refused, Scope, health_of, is_name, turn};
use crate::model::Key;
use crate::telemetry::query::{self, StatQuery};

use super::action::Offer;
use super::findings::{Facts, judge};
use super::look::{Wanted, look};
use super::ranking::Ranking;
use super::words::Window;
use super::{health as health_page, layout, protect};

/// A page.
pub struct Shown(Markup);

impl IntoResponse for Shown {
    fn into_response(self) -> Response {
        let mut response = Html(self.0.into_string()).into_response();
        protect::protect(response.headers_mut());
        response
    }
}

/// A request that was refused, as a page.
pub struct Failed(Refused);

impl From<Refused> for Failed {
    fn from(refused: Refused) -> Self {
        Self(refused)
    }
}

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        let Refused { status, refusal } = self.0;
        let (error, hint) = (refusal.error, refusal.hint);
        let page = match status {
            StatusCode::UNAUTHORIZED => layout::no_token(&format!("{error}.")),
            StatusCode::FORBIDDEN => layout::message("Not allowed", &error, hint.as_deref()),
            StatusCode::NOT_FOUND => layout::message("Not found", &error, hint.as_deref()),
            _ => layout::message("No answer", &error, hint.as_deref()),
        };
        (status, Shown(page)).into_response()
    }
}

/// What a handler returns.
type Answer = Result<Shown, Failed>;

/// Somebody with a valid token. As an argument of a handler, it refuses everybody else with a page.
pub struct Viewer {
    caller: Arc<Caller>,
    /// The namespace that is shown; `None`: all.
    only: Option<String>,
}

impl FromRequestParts<Api> for Viewer {
    type Rejection = Failed;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, Failed> {
        let Authenticated(caller) = Authenticated::from_request_parts(parts, api).await?;
        let only = match (api.sees(&caller, None).await, &caller.scope) {
            (Ok(()), _) => None,
            (Err(_), Some(Scope::Namespace(own))) => Some(own.clone()),
            (Err(refused), _) => return Err(refused.into()),
        };
        Ok(Self { caller, only })
    }
}

/// A parameter of a form: one that was left empty is not there.
fn field(parameters: &Parameters, name: &str) -> Option<String> {
    parameters.all(name).next().filter(|value| !value.is_empty()).map(str::to_owned)
}

/// A name of Kubernetes. Others are refused before a hint for a shell is made with them.
fn name(text: String) -> Result<String, Failed> {
    match is_name(&text) {
        true => Ok(text),
        false => Err(not_found("This address has a name that no object in Kubernetes can have.")),
    }
}

fn not_found(text: impl Into<String>) -> Failed {
    Failed(Refused::new(StatusCode::NOT_FOUND, text))
}

/// `/`.
pub async fn ranking(State(api): State<Api>, viewer: Viewer, parameters: Parameters) -> Answer {
    let namespace = field(&parameters, "namespace").map(name).transpose()?;
    if let Some(namespace) = &namespace {
        api.sees(&viewer.caller, Some(namespace)).await?;
    }
    let contains = field(&parameters, "name");
    let window = Window::parse(parameters.all("window").next());
    compute(&Arc::clone(&api.turns), move || {
        let shown = namespace.clone().or_else(|| viewer.only.clone());
        let sum = api.aggregates.sum(window.seconds(), now(), |id| query::concerns(id, shown.as_deref()));
        let wanted =
            StatQuery { by: By::Workload, namespace: shown.clone(), name: None, from: None, to: None };
        let stat = query::stat(&sum, &api.hub.model(), &wanted);
        Ok(super::ranking::ranking(&Ranking {
            stat: &stat,
            window,
            namespace: namespace.as_deref(),
            name: contains.as_deref(),
            only: viewer.only.as_deref(),
            sidecars: u32::try_from(api.acks.connected()).unwrap_or(u32::MAX),
        }))
    })
    .await
}

/// `/workload/{namespace}/{name}`.
pub async fn workload(
    State(api): State<Api>,
    viewer: Viewer,
    Path((namespace, workload)): Path<(String, String)>,
    parameters: Parameters,
) -> Answer {
    let (namespace, workload) = (name(namespace)?, name(workload)?);
    api.sees(&viewer.caller, Some(&namespace)).await?;
    let window = Window::parse(parameters.all("window").next());
    let wanted = Wanted { namespace, name: workload, kind: field(&parameters, "kind") };
    compute(&Arc::clone(&api.turns), move || {
        let Wanted { namespace, name, .. } = &wanted;
        let now = now();
        let timeline = query::timeline(&api.aggregates.history(), namespace, name, window.seconds(), now);
        let timeline = super::workload::whole(timeline, now);
        let sum = api.aggregates.sum(window.seconds(), now, |id| query::concerns(id, Some(namespace)));
        let states = api.acks.sidecars();
        let model = api.hub.model();
        let sidecars = sidecars(&model, states, &api.settings.pod_name, Instant::now(), Some(namespace));
        let found = look(&wanted, &model, &sum, timeline, sidecars, window);
        drop(model);
        let mut view = found.ok_or_else(|| {
            not_found(format!(
                "There is no workload {namespace}/{name}, and nothing was counted for it in the last {}.",
                window.name()
            ))
        })?;
        // After the model is released: the evidence locks it again.
        if let Some(canary) = &mut view.canary {
            let key: Key = (view.me.namespace.as_str().into(), canary.name.as_str().into());
            canary.evidence = api.evidence(&key).map(|(_, evidence)| evidence);
        }
        view.denials = api.denials(|by| by.is(&view.me), viewer.only.as_deref());
        view.only = viewer.only.as_deref();
        view.now = now;
        Ok(super::workload::workload(&view))
    })
    .await
}

/// `/canaries`.
pub async fn canaries(State(api): State<Api>, viewer: Viewer) -> Answer {
    compute(&Arc::clone(&api.turns), move || {
        let only = viewer.only.as_deref();
        let wanted = |key: &Key| only.is_none_or(|only| only == &*key.0);
        let model = api.hub.model();
        let found = model.canaries().filter(|(key, _)| wanted(key)).map(|(_, canary)| canary.clone());
        let mut found: Vec<Canary> = found.collect();
        drop(model);
        super::canary::sort(&mut found);
        Ok(super::canary::canaries(&found, only))
    })
    .await
}

/// `/canary/{namespace}/{name}`.
pub async fn canary(
    State(api): State<Api>,
    viewer: Viewer,
    Path((namespace, canary)): Path<(String, String)>,
    headers: HeaderMap,
) -> Answer {
    let key = visible_canary(&api, &viewer, namespace, canary).await?;
    let offers = Offer::of(&headers).is_some();
    compute(&Arc::clone(&api.turns), move || {
        let (found, evidence) = api.evidence(&key).ok_or_else(|| no_canary(&key))?;
        Ok(super::canary::canary(&found, &evidence, offers, viewer.only.as_deref()))
    })
    .await
}

/// `/canary/{namespace}/{name}/{action}`: shows a form. `tulle dashboard` takes it; there is no route for it here.
pub async fn canary_action(
    State(api): State<Api>,
    viewer: Viewer,
    Path((namespace, canary, action)): Path<(String, String, String)>,
    headers: HeaderMap,
) -> Result<Response, Failed> {
    let key = visible_canary(&api, &viewer, namespace, canary).await?;
    let found = api.hub.model().canary(&key).cloned();
    let found = found.ok_or_else(|| no_canary(&key))?;
    let action = CanaryAction::named(&action)
        .ok_or_else(|| not_found("There are the actions promote, pause, resume, abort and retry."))?;
    let offer = Offer::of(&headers).ok_or_else(|| {
        // Nobody has told the operator which of them it is.
        let why = "Actions are offered with this option only, and if the API server says that you may change this Canary; \
                   if it gave no answer, the terminal of the command shows why";
        Failed(Refused::new(StatusCode::FORBIDDEN, why).with_hint("tulle dashboard --allow-actions"))
    })?;
    let page = super::action::confirmation(&found, action, &offer, viewer.only.as_deref());
    let mut response = Shown(page).into_response();
    protect::name_origin(response.headers_mut());
    Ok(response)
}

/// The key of a Canary, if the viewer may see its namespace.
async fn visible_canary(
    api: &Api,
    viewer: &Viewer,
    namespace: String,
    canary: String,
) -> Result<Key, Failed> {
    let (namespace, canary) = (name(namespace)?, name(canary)?);
    api.sees(&viewer.caller, Some(&namespace)).await?;
    Ok((namespace.as_str().into(), canary.as_str().into()))
}

fn no_canary((namespace, name): &Key) -> Failed {
    not_found(format!("There is no Canary {namespace}/{name}."))
}

/// `/health`.
pub async fn health(State(api): State<Api>, viewer: Viewer) -> Answer {
    compute(&Arc::clone(&api.turns), move || {
        let only = viewer.only.as_deref();
        let now = now();
        // Before the model is locked, which it does itself.
        let health = health_of(&api);
        let is_led = {
            let leadership = api.leadership.borrow();
            leadership.mine || leadership.address.is_some()
        };
        let states = api.acks.sidecars();
        let model = api.hub.model();
        let sidecars = sidecars(&model, states, &api.settings.pod_name, Instant::now(), only);
        let system = api.settings.namespace.as_str();
        let facts = Facts { health: &health, sidecars: &sidecars, is_led, system, only, now };
        let judged = judge(&facts, &model);
        drop(model);
        let view =
            health_page::MeshHealth { health: &health, sidecars: &sidecars, judged: &judged, only, now };
        Ok(health_page::health(&view))
    })
    .await
}

/// Runs work that may take a while off the threads that serve sidecars, when its turn has come.
async fn compute(
    turns: &Arc<Semaphore>,
    work: impl FnOnce() -> Result<Markup, Failed> + Send + 'static,
) -> Answer {
    turn::compute(turns, work).await.map_err(Failed)?.map(Shown)
}

/// Unix seconds.
fn now() -> i64 {
    crate::telemetry::now()
}

#[cfg(test)]
mod tests {
    use axum::http::header;

    use super::*;

    fn status_and_headers(failed: Failed) -> (StatusCode, HeaderMap) {
        let response = failed.into_response();
        (response.status(), response.headers().clone())
    }

    #[test]
    fn a_refusal_is_a_page_with_its_status_and_the_policy_of_every_page() {
        let (status, headers) = status_and_headers(not_found("nothing"));
        assert_eq!(status, StatusCode::NOT_FOUND);
        let policy = headers.get(header::CONTENT_SECURITY_POLICY).unwrap().to_str().unwrap();
        assert!(policy.contains("default-src 'none'") && policy.contains("frame-ancestors 'none'"));
        assert_eq!(headers.get(header::CACHE_CONTROL).unwrap(), "no-store");
        assert!(headers.get(header::CONTENT_TYPE).unwrap().to_str().unwrap().starts_with("text/html"));
    }

    #[test]
    fn a_name_that_could_run_in_a_shell_is_not_looked_up() {
        for bad in ["", "$(reboot)", "a b", "../x", "A"] {
            assert!(name(bad.to_owned()).is_err(), "{bad}");
        }
        assert!(name("web-0.shop".to_owned()).is_ok());
    }

    #[tokio::test]
    async fn the_page_of_a_workload_with_a_canary_shows_its_evidence() {
        use axum::body::{Body, to_bytes};
        use tower::ServiceExt as _;

        let api = crate::api::tests::api();
        let canary = crate::rollout::input::tests::in_progress();
        api.hub.change(|model| model.apply_canary(crate::rollout::input::tests::key(), canary));
        let request = axum::http::Request::get("/workload/shop/web");
        let request = request.header(header::AUTHORIZATION, "Bearer h.shop.s").body(Body::empty()).unwrap();
        let response = crate::dashboard::routes(api).oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        let body = to_bytes(response.into_body(), 1 << 20).await.unwrap();
        let text = String::from_utf8_lossy(&body);
        for part in ["99 more requests to the canary are needed", "100, failed 1", "900, failed 2"] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn without_a_token_the_page_names_the_command() {
        let text = layout::no_token("no token.").into_string();
        assert!(text.contains("no token.") && text.contains("<code>tulle dashboard</code>"), "{text}");
        assert!(!text.contains("<nav"), "the views need a token");
    }
}
