//! The query API: what the operator knows about the mesh, as JSON over HTTP ([`tulle_mesh::query`]), and over gRPC.
//!
//! In: requests with a token, from whoever may forward a port of the operator's pod. Out: answers of the pure functions
//! of [`crate::telemetry`], [`crate::explain`] and [`crate::rollout`], limited to the namespaces that the token shows.
//! Every replica answers with what it knows; the leader knows all. Never changes anything.
//!
//! ```text
//!   serve       listeners and connections; stalled, clients that take no bytes
//!   auth        whose token it is, and which namespaces it shows; kept, what the API server has answered about it
//!   limits      what one caller may take
//!   parameters  what is asked for, checked; posted, the policy in a body
//!   handlers    one function per path
//!   grpc        the same over gRPC
//!   turn        the turns of the work that they do
//!   sidecars    the state of each pod's sidecar; resources, what one would be sent now
//!   tap         single requests, as a stream that ends with its client
//!   refused     answers that are not 200
//! ```

pub mod auth;
pub mod grpc;
mod handlers;
mod kept;
mod limits;
mod parameters;
mod posted;
mod refused;
mod resources;
mod serve;
pub mod sidecars;
mod stalled;
mod tap;
#[cfg(test)]
pub(crate) mod tests;
pub mod turn;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{any, get, post};
use k8s_openapi::jiff::Timestamp;
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;
use tulle_crds::Canary;
use tulle_mesh::query::{Denials, Evidence, Paths};

pub use auth::{Authenticator, Caller, Scope};
pub use handlers::health_of;
pub use parameters::{Parameters, is_name};
pub use refused::Refused;
pub use serve::{bind, serve};

use handlers::json;
use limits::Running;

use crate::discovery::AckTracker;
use crate::identity::authority::Authority;
use crate::lease::Leadership;
use crate::model::Key;
use crate::rollout::answer;
use crate::rollout::input::{JudgeInput, JudgeInputs};
use crate::settings::Settings;
use crate::tap::Taps;
use crate::telemetry::Aggregates;
use crate::telemetry::history::Reporter;
use crate::watch::Hub;

/// The longest query of a URL, in bytes, and the longest message of gRPC without a MeshPolicy.
const MAX_QUERY: usize = 8 * 1024;
/// The longest body, in bytes: that of a MeshPolicy.
const MAX_BODY: usize = 256 * 1024;
/// Requests that are answered at a time; others wait for their turn.
const MAX_REQUESTS: usize = 32;
/// How long a request may take, its turn included. The lines of a tap come after its answer has begun, and have limits of
/// their own.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// Sources of the answers.
#[derive(Clone)]
pub struct Api {
    /// The model.
    pub hub: Arc<Hub>,
    /// What each sidecar enforces.
    pub acks: Arc<AckTracker>,
    /// What sidecars have counted.
    pub aggregates: Arc<Aggregates>,
    /// What the judge of each Canary decides by.
    pub judge_inputs: Arc<JudgeInputs>,
    /// Who leads.
    pub leadership: watch::Receiver<Leadership>,
    /// The root.
    pub authority: Arc<Authority>,
    /// The operator's arguments.
    pub settings: Arc<Settings>,
    /// Who asks, and what they may see.
    pub authenticator: Arc<Authenticator>,
    /// Turns of the work that answers are made by.
    pub turns: Arc<Semaphore>,
    /// Who looks at single requests.
    pub taps: Arc<Taps>,
}

impl Api {
    /// Whether a caller may see a namespace, or, with `None`, all of them.
    ///
    /// # Errors
    /// 403 with the rule to add, 503 where the API server does not answer.
    pub async fn sees(&self, caller: &Caller, namespace: Option<&str>) -> Result<(), Refused> {
        self.authenticator.sees(caller, namespace).await
    }

    /// The last denials at the workloads that are wanted. With `only`, callers of other namespaces are hidden.
    pub fn denials(&self, wanted: impl Fn(&Reporter) -> bool, only: Option<&str>) -> Denials {
        let mut found = self.aggregates.denials(wanted);
        found.leader = self.leadership.borrow().mine;
        if let Some(namespace) = only {
            found.hide_callers_outside(namespace);
        }
        found
    }

    /// A Canary, and what its judge decides by at present. `None`: there is no such Canary.
    ///
    /// Only the leader has the running block. Another replica answers with the status, and says that it does not lead.
    pub fn evidence(&self, key: &Key) -> Option<(Canary, Evidence)> {
        let leads = self.leadership.borrow().mine;
        let (canary, input) = {
            // Together: with a status that is newer, a block would count twice or not at all. Not longer: everything that
            // changes waits for the model.
            let model = self.hub.model();
            let canary = model.canary(key)?;
            let input = match leads {
                true => self.judge_inputs.read(key, canary, Timestamp::now()),
                false => JudgeInput::default(),
            };
            (canary.clone(), input)
        };
        let name = |uid: &str| self.hub.model().pod(uid).map(|pod| pod.name.to_string());
        let evidence = answer::evidence(name, key, &canary, &input, leads);
        Some((canary, evidence))
    }
}

/// Whose token a request has. As an argument of a handler, it refuses requests without a valid token.
pub struct Authenticated(pub Arc<Caller>);

impl FromRequestParts<Api> for Authenticated {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, Refused> {
        match parts.extensions.get::<Arc<Caller>>() {
            Some(caller) => Ok(Self(Arc::clone(caller))),
            None => api.authenticator.caller(&parts.headers).await.map(Self),
        }
    }
}

/// The routes of the API and of the page.
pub fn routes(api: Api) -> Router {
    routes_with(api, MAX_REQUESTS)
}

/// The same, where so many requests are answered at a time.
fn routes_with(api: Api, requests: usize) -> Router {
    let gate = Gate {
        authenticator: Arc::clone(&api.authenticator),
        turns: Arc::new(Semaphore::new(requests)),
        running: Arc::default(),
    };
    Router::new()
        .route(Paths::STAT, json(handlers::stat))
        .route(Paths::EDGES, json(handlers::edges))
        .route(Paths::ROUTES, json(handlers::routes))
        .route(Paths::TIMELINE, json(handlers::timeline))
        .route(Paths::SIDECARS, json(handlers::sidecars))
        .route(Paths::RESOURCES, json(resources::resources))
        .route(Paths::HEALTH, json(handlers::health))
        .route(Paths::EXPLAIN, json(handlers::explain))
        .route(Paths::ACCESS, json(handlers::access))
        .route(Paths::DENIALS, json(handlers::denials))
        .route(Paths::EVIDENCE, json(handlers::evidence))
        .route(Paths::DIFF, post(handlers::diff))
        .route(Paths::TAP, get(tap::tap))
        .route("/api/{*path}", any(unknown_path))
        .method_not_allowed_fallback(wrong_method)
        .with_state(api.clone())
        .merge(grpc::routes(api.clone()))
        .merge(crate::dashboard::routes(api))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(from_fn_with_state(gate, bounded))
}

async fn unknown_path() -> Refused {
    Refused::new(
        StatusCode::NOT_FOUND,
        "unknown path; this operator answers /api/v1/stat, edges, routes, timeline, sidecars, resources, health, explain, access, denials, evidence, diff and tap",
    )
    .with_hint("a newer `tulle` asks an older operator? `tulle version` shows both")
}

async fn wrong_method() -> Refused {
    Refused::new(
        StatusCode::METHOD_NOT_ALLOWED,
        format!("wrong method: POST for {}, GET for the others", Paths::DIFF),
    )
}

/// What stands before the handlers.
#[derive(Clone)]
struct Gate {
    authenticator: Arc<Authenticator>,
    turns: Arc<Semaphore>,
    running: Arc<Running>,
}

/// Bounds what a request costs, and keeps answers of the API out of caches.
async fn bounded(State(gate): State<Gate>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let (of_api, of_grpc) = (path.starts_with("/api/"), grpc::has_path(path));
    let answer = timeout(ANSWER_WITHIN, admitted(&gate, request, next)).await;
    let mut response = match answer.unwrap_or_else(|_| Err(too_late())) {
        Ok(response) => response,
        Err(refused) if of_api => refused.into_response(),
        Err(refused) if of_grpc => grpc::refused(refused),
        Err(refused) => crate::dashboard::refused(refused),
    };
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if of_api {
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
    response
}

/// Who asks comes first: nobody without a token takes a turn, and nobody with one takes those of others.
async fn admitted(gate: &Gate, mut request: Request, next: Next) -> Result<Response, Refused> {
    if request.uri().query().map_or(0, str::len) > MAX_QUERY {
        return Err(Refused::bad_request(format!("the URL's query is longer than {MAX_QUERY} bytes")));
    }
    // The style sheet and the script are the same for everybody, and cost nothing.
    if request.uri().path().starts_with("/assets/") {
        return Ok(next.run(request).await);
    }
    let headers = request.headers().clone();
    let caller = gate.authenticator.caller(&headers).await?;
    let _running = gate.running.begin(caller.name())?;
    request.extensions_mut().insert(caller);
    let _turn = gate.turns.acquire().await;
    Ok(next.run(request).await)
}

fn too_late() -> Refused {
    let error = format!("no answer within {} s", ANSWER_WITHIN.as_secs());
    Refused::new(StatusCode::SERVICE_UNAVAILABLE, error)
        .with_hint("ask for a shorter window or one namespace, or try again")
}
