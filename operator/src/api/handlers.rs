//! One function per path of the API and method of its service: parameters are checked, then the right to see the
//! namespace, and only then is anything looked up. The answers are computed by pure functions, off the threads that serve
//! sidecars.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::{HeaderMap, Method, StatusCode};
use axum::routing::{MethodRouter, get};
use serde::Serialize;
use tokio::sync::Semaphore;
use tulle_mesh::query::{
    Access, Denials, Diff, Edges, Evidence, Explanation, Health, Routes, Sidecars, Stat, Timeline,
};

use super::parameters::{MAX_WINDOW, namespaced};
use super::{Api, Authenticated, Caller, Parameters, Refused, posted, sidecars, turn};
use crate::explain::{self, AccessDirection, Address, Question};
use crate::model::Key;
use crate::telemetry::history::{MAX_SERIES, Reporter};
use crate::telemetry::query::{self, StatQuery};

/// Seconds that are summed unless a request says otherwise.
const WINDOW: u64 = 60;
/// Seconds of a timeline, and of the traffic that policies are compared with, unless a request says otherwise.
const HOUR: u64 = 3600;

/// What is answered: as JSON by [`json`], as a message by `grpc`.
type Answer<T> = Result<T, Refused>;

/// Serves a function as a path whose answer is JSON.
pub fn json<T, F>(
    handler: impl Fn(Api, Arc<Caller>, Parameters) -> F + Clone + Send + Sync + 'static,
) -> MethodRouter<Api>
where
    T: Serialize + 'static,
    F: Future<Output = Answer<T>> + Send + 'static,
{
    get(
        move |State(api): State<Api>, Authenticated(caller): Authenticated, parameters: Parameters| async move {
            handler(api, caller, parameters).await.map(Json)
        },
    )
}

pub async fn stat(api: Api, caller: Arc<Caller>, parameters: Parameters) -> Answer<Stat> {
    let parameters = parameters.only(&["by", "namespace", "name", "from", "to", "window"])?;
    let party = |parameter| {
        let party = parameters.namespaced(parameter)?;
        Ok::<_, Refused>(party.map(|(namespace, name)| format!("{namespace}/{name}")))
    };
    let wanted = StatQuery {
        by: parameters.by()?,
        namespace: parameters.name("namespace")?,
        name: parameters.name("name")?,
        from: party("from")?,
        to: party("to")?,
    };
    let window = parameters.window(WINDOW)?;
    api.sees(&caller, wanted.namespace.as_deref()).await?;
    compute(&Arc::clone(&api.turns), move || {
        let namespace = wanted.namespace.as_deref();
        let sum = api.aggregates.sum(window, now(), |id| query::concerns(id, namespace));
        Ok(query::stat(&sum, &api.hub.model(), &wanted))
    })
    .await
}

pub async fn edges(api: Api, caller: Arc<Caller>, parameters: Parameters) -> Answer<Edges> {
    let parameters = parameters.only(&["namespace", "window"])?;
    let (namespace, window) = (parameters.name("namespace")?, parameters.window(WINDOW)?);
    api.sees(&caller, namespace.as_deref()).await?;
    compute(&Arc::clone(&api.turns), move || {
        let sum = api.aggregates.sum(window, now(), |id| query::concerns(id, namespace.as_deref()));
        Ok(query::edges(&sum, &api.hub.model(), namespace.as_deref()))
    })
    .await
}

/// Of all namespaces the series of routes are summed: a route of this one may lead to another, for clients of a third.
pub async fn routes(api: Api, caller: Arc<Caller>, parameters: Parameters) -> Answer<Routes> {
    let parameters = parameters.only(&["namespace", "window"])?;
    let (namespace, window) = (parameters.name("namespace")?, parameters.window(WINDOW)?);
    api.sees(&caller, namespace.as_deref()).await?;
    compute(&Arc::clone(&api.turns), move || {
        let sum = api.aggregates.sum(window, now(), query::is_routed);
        let seen = api.aggregates.history().last_seen(query::is_routed);
        Ok(query::routes(&sum, &seen, &api.hub.model(), namespace.as_deref()))
    })
    .await
}

pub async fn timeline(api: Api, caller: Arc<Caller>, parameters: Parameters) -> Answer<Timeline> {
    let parameters = parameters.only(&["namespace", "name", "window"])?;
    let namespace = parameters.required_name("namespace", "shop")?;
    let (name, window) = (parameters.required_name("name", "web")?, parameters.window(HOUR)?);
    api.sees(&caller, Some(&namespace)).await?;
    compute(&Arc::clone(&api.turns), move || {
        Ok(query::timeline(&api.aggregates.history(), &namespace, &name, window, now()))
    })
    .await
}

pub async fn sidecars(api: Api, caller: Arc<Caller>, parameters: Parameters) -> Answer<Sidecars> {
    let namespace = parameters.only(&["namespace"])?.name("namespace")?;
    api.sees(&caller, namespace.as_deref()).await?;
    compute(&Arc::clone(&api.turns), move || {
        let states = api.acks.sidecars();
        let me = &api.settings.pod_name;
        Ok(sidecars::sidecars(&api.hub.model(), states, me, Instant::now(), namespace.as_deref()))
    })
    .await
}

pub async fn health(api: Api, _: Arc<Caller>, parameters: Parameters) -> Answer<Health> {
    parameters.only(&[])?;
    compute(&Arc::clone(&api.turns), move || Ok(health_of(&api))).await
}

/// The state of this replica.
pub fn health_of(api: &Api) -> Health {
    let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    let (history, series) = {
        let history = api.aggregates.history();
        (history.covered(now()), history.series())
    };
    // One after the other: nobody waits for the one while holding the other.
    let leader = api.leadership.borrow().mine;
    let trust_domain = api.hub.model().settings().trust_domain.clone();
    Health {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        leader,
        pod: api.settings.pod_name.clone(),
        trust_domain,
        root_not_after: tulle_mesh::svid::not_after(api.authority.root()).ok(),
        sidecars: count(api.acks.connected()),
        history,
        series: count(series),
        max_series: count(MAX_SERIES),
    }
}

/// What becomes of a request depends on the policies of both ends, so the caller must see both.
pub async fn explain(api: Api, caller: Arc<Caller>, parameters: Parameters) -> Answer<Explanation> {
    let parameters = parameters.only(&["source", "destination", "method", "path", "header"])?;
    let question = question(&parameters)?;
    let (source, _) = &question.source;
    api.sees(&caller, Some(source)).await?;
    // An address is explained where it belongs to a namespace that the token shows.
    let destination = match Address::parse(&question.destination) {
        Some(_) => source.clone(),
        None => destination(&question.destination)?.0,
    };
    if destination != *source {
        api.sees(&caller, Some(&destination)).await?;
    }
    // Routes and endpoints may lead on to namespaces that were not asked about.
    let shows_all = api.sees(&caller, None).await.is_ok();
    compute(&Arc::clone(&api.turns), move || {
        let shown = |namespace: &str| shows_all || namespace == question.source.0 || namespace == destination;
        let explained = explain::explain(&api.hub.model(), &api.acks, &question, &shown);
        explained.map_err(Refused::bad_request)
    })
    .await
}

/// The request that is asked about.
fn question(parameters: &Parameters) -> Result<Question, Refused> {
    let source = namespaced("source", parameters.required("source", "shop/web")?)?;
    let to = parameters.required("destination", "payments/checkout:80")?;
    if Address::parse(to).is_none() {
        destination(to)?;
    }
    let method = parameters.one("method")?.unwrap_or("GET");
    if Method::from_bytes(method.as_bytes()).is_err() {
        return Err(Refused::bad_request(format!("method is {method:?}; write one such as GET")));
    }
    let path = parameters.one("path")?.unwrap_or("/");
    if !path.starts_with('/') {
        return Err(Refused::bad_request(format!("path is {path:?}; write one that begins with /")));
    }
    Ok(Question {
        source,
        destination: to.to_owned(),
        method: method.to_ascii_uppercase(),
        path: path.to_owned(),
        headers: parameters.headers()?,
    })
}

/// Namespace and name in `namespace/name` or `namespace/name:port`.
fn destination(text: &str) -> Result<(String, String), Refused> {
    let (party, port) = text.split_once(':').map_or((text, None), |(party, port)| (party, Some(port)));
    if port.is_some_and(|port| port.parse::<u16>().is_err()) {
        return Err(Refused::bad_request(format!(
            "destination is {text:?}, whose port is not a number; write NAMESPACE/SERVICE:PORT"
        )));
    }
    namespaced("destination", party)
}

/// What a workload may reach is decided by policies of every namespace, so that `what` needs the right to see all.
///
/// Who asks without a name wants the suggested policies. By default they are made of the whole history, because a policy
/// that is made of an hour denies a client that calls every two hours.
pub async fn access(api: Api, caller: Arc<Caller>, parameters: Parameters) -> Answer<Access> {
    let parameters = parameters.only(&["namespace", "name", "who", "what", "window"])?;
    // Who may reach all workloads of a namespace, or of the mesh, is a question too.
    let namespace = parameters.name("namespace")?.unwrap_or_default();
    let name = parameters.name("name")?.unwrap_or_default();
    let window = parameters.window(if name.is_empty() { MAX_WINDOW } else { HOUR })?;
    let of_one = Some(namespace.as_str()).filter(|namespace| !namespace.is_empty());
    let (direction, needed) = match (parameters.has("who"), parameters.has("what")) {
        (true, false) => (AccessDirection::WhoCan, of_one),
        (false, true) => (AccessDirection::WhatCan, None),
        _ => {
            return Err(Refused::bad_request(
                "write who=can for the clients of a workload, or what=can for what it may reach",
            ));
        }
    };
    api.sees(&caller, needed).await?;
    compute(&Arc::clone(&api.turns), move || {
        let sum = api.aggregates.sum(window, now(), |_| true);
        let found = explain::access(&api.hub.model(), &sum, &namespace, &name, direction);
        let found = found.map_err(Refused::bad_request)?;
        Ok(Access { window: sum.window, lost: sum.lost, ..found })
    })
    .await
}

/// Callers of other namespaces are hidden from whoever may not see all, as on the page of a workload.
pub async fn denials(api: Api, caller: Arc<Caller>, parameters: Parameters) -> Answer<Denials> {
    let parameters = parameters.only(&["namespace", "name"])?;
    let (namespace, name) = (parameters.name("namespace")?, parameters.name("name")?);
    api.sees(&caller, namespace.as_deref()).await?;
    let shows_all = namespace.is_none() || api.sees(&caller, None).await.is_ok();
    compute(&Arc::clone(&api.turns), move || {
        let (namespace, name) = (namespace.as_deref(), name.as_deref());
        let wanted = |by: &Reporter| {
            namespace.is_none_or(|namespace| *namespace == *by.namespace)
                && name.is_none_or(|name| *name == *by.workload)
        };
        Ok(api.denials(wanted, namespace.filter(|_| !shows_all)))
    })
    .await
}

pub async fn evidence(api: Api, caller: Arc<Caller>, parameters: Parameters) -> Answer<Evidence> {
    let parameters = parameters.only(&["namespace", "canary"])?;
    let namespace = parameters.required_name("namespace", "shop")?;
    let canary = parameters.required_name("canary", "web")?;
    api.sees(&caller, Some(&namespace)).await?;
    compute(&Arc::clone(&api.turns), move || {
        let key: Key = (namespace.as_str().into(), canary.as_str().into());
        let found = api.evidence(&key).map(|(_, evidence)| evidence);
        found.ok_or_else(|| {
            let error = format!("there is no Canary {namespace}/{canary}");
            Refused::new(StatusCode::NOT_FOUND, error)
        })
    })
    .await
}

pub async fn diff(
    State(api): State<Api>,
    Authenticated(caller): Authenticated,
    parameters: Parameters,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Diff>, Refused> {
    posted::is_json(&headers)?;
    let body = body.map_err(|error| Refused::new(error.status(), error.body_text()))?;
    diff_of(api, caller, parameters, &body).await.map(Json)
}

/// What the MeshPolicy in a body would deny.
pub async fn diff_of(api: Api, caller: Arc<Caller>, parameters: Parameters, body: &[u8]) -> Answer<Diff> {
    let window = parameters.only(&["window"])?.window(HOUR)?;
    let (policy, namespace) = posted::policy(body)?;
    api.sees(&caller, Some(&namespace)).await?;
    compute(&Arc::clone(&api.turns), move || {
        let sum = api.aggregates.sum(window, now(), |_| true);
        let found = explain::diff(&api.hub.model(), &sum, &policy);
        Ok(Diff { window: sum.window, lost: sum.lost, ..found })
    })
    .await
}

/// Runs work that may take a while off the threads that serve sidecars, when its turn has come.
async fn compute<T: Send + 'static>(
    turns: &Arc<Semaphore>,
    work: impl FnOnce() -> Result<T, Refused> + Send + 'static,
) -> Answer<T> {
    turn::compute(turns, work).await?
}

/// Unix seconds.
fn now() -> i64 {
    crate::telemetry::now()
}
