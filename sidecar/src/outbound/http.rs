//! Requests of the pod's application: where each goes, and what is done to it on the way there. An endpoint is chosen,
//! and chosen again, by [`attempts`].

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::net::TcpStream;
use tulle_mesh::counted_event::RefusedRequest;
use tulle_mesh::wire::head::Protocol as Travels;

use super::attempts::attempts;
use super::mirror::{self, Target};
use super::opaque::Opened;
use super::unserved;
use crate::attempt::answer::Answer;
use crate::backend::steer::steer;
use crate::backend::{Ask, Backend, Cohort};
use crate::call::{Call, Ended};
use crate::config::TrialShare;
use crate::error::Failure;
use crate::http1::conn::{close, split};
use crate::http1::{Head, Start};
use crate::http2;
use crate::io::Prefixed;
use crate::route::{
    CopyTo, Forward, Found, Plan, Port, ResponseEdits, RouteTarget, hash_of_request, spoken_to,
};
use crate::task::{boxed, spawn_boxed};
use crate::telemetry::Series;
use crate::worker::Worker;

/// Serves an HTTP/1 connection until either side closes it. `opened`: a connection to an endpoint that was opened
/// while the client was silent, for its first request.
pub(super) async fn serve_http1(
    worker: &Rc<Worker>,
    port: &Rc<Port>,
    stream: TcpStream,
    read: BytesMut,
    mut opened: Option<Box<Opened>>,
) -> Result<(), Failure> {
    let (mut reader, mut writer) = split(stream, read);
    loop {
        let head = match reader.request().await {
            Ok(Some(head)) => head,
            Ok(None) => return Ok(()),
            Err(failure) => {
                worker.telemetry.event(RefusedRequest(failure.reason()));
                Box::pin(Answer::Http1(&mut writer).fail(&failure)).await;
                Box::pin(close(reader, writer)).await;
                return Err(failure);
            }
        };
        // In a place of its own, which is free again when the request has ended: a connection that waits for its next
        // request occupies a tenth of one that serves it. The allocator hands the same place to one after another.
        let call = || Call::http1(head, &mut reader, &mut writer);
        if !boxed(|| serve(worker, port, call(), opened.take())).await {
            Box::pin(close(reader, writer)).await;
            return Ok(());
        }
    }
}

/// Serves an HTTP/2 connection until either side closes it.
pub(super) async fn serve_http2(
    worker: &Rc<Worker>,
    port: &Rc<Port>,
    stream: TcpStream,
    read: BytesMut,
) -> Result<(), Failure> {
    let handshake = http2::server().handshake::<_, Bytes>(Prefixed::new(stream, read)).await;
    let mut connection = handshake.map_err(|_| Failure::ClientBadRequest("no HTTP/2 handshake"))?;
    while let Some(accepted) = connection.accept().await {
        let Ok((request, respond)) = accepted else { return Err(Failure::ClientGone) };
        let (worker, port) = (Rc::clone(worker), Rc::clone(port));
        spawn_boxed(|| serve_stream(worker, port, request, respond));
    }
    Ok(())
}

async fn serve_stream(
    worker: Rc<Worker>,
    port: Rc<Port>,
    request: ::http::Request<h2::RecvStream>,
    mut respond: h2::server::SendResponse<Bytes>,
) {
    let (parts, mut body) = request.into_parts();
    match http2::request_head(&parts, body.is_end_stream()) {
        Ok(head) => {
            serve(&worker, &port, Call::http2(head, &mut body, &mut respond), None).await;
        }
        Err(failure) => {
            worker.telemetry.event(RefusedRequest(failure.reason()));
            Answer::Http2(&mut respond, None).fail(&failure).await;
        }
    }
}

/// Serves one request; whether the client's connection may carry another.
async fn serve(
    worker: &Rc<Worker>,
    port: &Rc<Port>,
    mut call: Call<'_>,
    opened: Option<Box<Opened>>,
) -> bool {
    let plan = if port.is_gone() {
        // The connection has outlived what was known of its address.
        Box::pin(worker.port(port.address())).await.plan(worker)
    } else {
        port.plan(worker)
    };
    let prepared = call.prepare().await;
    let (ended, series) = match (prepared, &plan) {
        (Ok(()), Some(plan)) => forward(worker, plan, port.address(), &mut call, opened).await,
        (prepared, plan) => {
            let failure = prepared.err().unwrap_or(Failure::UpstreamNone);
            let backend = plan.as_ref().map(|plan| &*plan.default.backend);
            let is_meshed = backend.is_some_and(Backend::is_meshed);
            (Ended::failed(failure), unserved(worker, backend, call.protocol(), None, is_meshed))
        }
    };
    call.finish(worker, &series, ended).await
}

/// Where a request goes.
struct ForwardTo<'p> {
    way: &'p Rc<RouteTarget>,
    ask: Ask,
    copies: Vec<Target>,
}

/// The version on trial that is to get a copy of a request.
struct Trial {
    revision: Arc<str>,
    /// It gets requests by its share too.
    has_share: bool,
}

impl Trial {
    /// Whether the request itself goes to another version: who serves a request is not sent a copy of it, which would
    /// carry it out twice there. The endpoint is chosen here where that depends on the shares, and the first attempt goes
    /// to it.
    fn is_other(&self, backend: &Backend, ask: &mut Ask) -> bool {
        if !self.has_share {
            return true;
        }
        let Some(chosen) = backend.pick(&Ask { no_probe: true, ..ask.clone() }) else { return true };
        ask.stay = Some(chosen.endpoint.address);
        chosen.endpoint.revision != self.revision
    }
}

/// What becomes of a request that goes nowhere.
enum LocalReply {
    Answer { head: Box<Head>, route: Arc<str> },
    Fail { failure: Failure, edits: Option<Rc<ResponseEdits>>, route: Option<Arc<str>> },
}

/// Serves a request at a port that leads somewhere.
async fn forward(
    worker: &Rc<Worker>,
    plan: &Plan,
    dialled: SocketAddr,
    call: &mut Call<'_>,
    opened: Option<Box<Opened>>,
) -> (Ended, Arc<Series>) {
    let protocol = call.protocol();
    // Counted as a request to the Service that was dialled: it has reached no other.
    let answered = |ended, route: Option<&Arc<str>>| {
        let backend = &*plan.default.backend;
        (ended, unserved(worker, Some(backend), protocol, route, backend.is_meshed()))
    };
    let ForwardTo { way, mut ask, copies } = match decide(worker, plan, dialled, call) {
        Ok(onward) => onward,
        Err(LocalReply::Answer { head, route }) => {
            let ended = Box::pin(call.reply(&head)).await;
            return answered(ended, Some(&route));
        }
        Err(LocalReply::Fail { failure, edits, route }) => {
            call.edits = edits;
            return answered(Ended::failed(failure), route.as_ref());
        }
    };
    // Few requests are copied: not a part of every request's future.
    if !copies.is_empty()
        && let Err(failure) = Box::pin(mirror::send(worker, call, copies)).await
    {
        return answered(Ended::failed(failure), way.route.as_ref());
    }
    call.travels = spoken_to(way.protocol, &call.head, call.travels);
    let opened = opened.filter(|opened| call.travels == Travels::Http1 && suits(opened, way, &ask));
    attempts(worker, way, &mut ask, call, opened.map(|opened| *opened)).await
}

/// Finds where a request goes, and does to its head what its rule wants.
fn decide<'p>(
    worker: &Worker,
    plan: &'p Plan,
    dialled: SocketAddr,
    call: &mut Call<'_>,
) -> Result<ForwardTo<'p>, LocalReply> {
    let found = match plan.rules.as_ref().map(|rules| rules.find(&call.head, dialled.port())) {
        None => None,
        Some(Found::Forward(found)) => Some(found),
        Some(Found::Answer { head, route }) => return Err(LocalReply::Answer { head, route }),
        Some(Found::Fail { failure, edits, route }) => {
            return Err(LocalReply::Fail { failure, edits, route });
        }
    };
    let way = found.as_ref().map_or(&plan.default, |found| found.way);
    let (mut ask, trial) = ask(worker, &way.backend, call);
    let mut copies = Vec::new();
    if let Some(found) = &found {
        call.edits = found.settle(&call.head, &mut ask);
        copies = edited(found, call);
    }
    if let Some(trial) = trial.filter(|trial| trial.is_other(&way.backend, &mut ask)) {
        let to = CopyTo { backend: &way.backend, protocol: way.protocol };
        copies.push(Target { on_trial: Some(trial.revision), ..Target::of(to) });
    }
    Ok(ForwardTo { way, ask, copies })
}

/// Changes a request as its rule and its backend want it, and returns where copies of it go.
fn edited(found: &Forward<'_>, call: &mut Call<'_>) -> Vec<Target> {
    let (rule, backend) = (found.of_rule(), found.of_backend());
    let sent = found.path_for_backend(&call.head);
    rule.edit(&mut call.head);
    let mut copies: Vec<Target> = rule.copies().map(Target::of).collect();
    // What is done for one backend (a token that is added, for example) is not for those that get copies.
    if !copies.is_empty() && backend.change_requests() {
        let head = Rc::new(call.head.clone());
        copies.iter_mut().for_each(|copy| copy.head = Some(Rc::clone(&head)));
    }
    if let (Some(sent), Start::Request { target, .. }) = (sent, &mut call.head.start) {
        *target = sent;
    }
    backend.edit(&mut call.head);
    copies.extend(backend.copies().map(Target::of));
    copies
}

/// What the choice of an endpoint is to take into account for this request. Also the version on trial that gets a copy
/// of it, if one does.
fn ask(worker: &Worker, backend: &Backend, call: &mut Call<'_>) -> (Ask, Option<Trial>) {
    let mut ask = Ask::default();
    if let Some(key) = backend.hash_key() {
        ask.hash = hash_of_request(&key, &call.head, &worker.settings.pod_uid);
    }
    let endpoints = backend.steering();
    let Some(steering) = endpoints.as_ref().and_then(|endpoints| endpoints.steering.as_ref()) else {
        return (ask, None);
    };
    let steered = steer(steering, &call.head);
    ask.cohort = steered.cohort;
    call.set_cookie = steered.set_cookie;
    call.compared = steered.compared;
    let trial =
        || Trial { revision: Arc::clone(&steering.revision), has_share: steering.share != TrialShare::None };
    (ask, steered.mirror.then(trial))
}

/// Whether a connection that was opened while the client was silent goes where its first request goes.
fn suits(opened: &Opened, way: &RouteTarget, ask: &Ask) -> bool {
    let anywhere = ask.hash.is_none() && ask.stay.is_none() && matches!(ask.cohort, Cohort::ByShare);
    anywhere && opened.is_to(&way.backend)
}
