//! Requests of the pod's application: where each goes, and what is done to it on the way there. An endpoint is chosen,
//! and chosen again, by [`attempts`].

use std::cell::{Cell, RefCell};
use std::future::{pending, poll_fn};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::BytesMut;
use tokio::net::TcpStream;
use tokio::task::{AbortHandle, spawn_local};
use tokio::time::{Instant, sleep_until};
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
use crate::config::{Destination, TrialShare};
use crate::error::Failure;
use crate::http1::conn::{close, split};
use crate::http1::{Head, Start};
use crate::http2::{self, Incoming, RecvStream, SendStream};
use crate::route::{
    CopyTo, Forward, Found, Plan, Port, ResponseEdits, RouteTarget, hash_of_request, spoken_to,
};
use crate::task::{boxed, spawn_boxed};
use crate::telemetry::Series;
use crate::worker::Worker;

/// How long connections to a Service that has gone are served. Its endpoints are not kept current, so the address of a
/// pod that has ended may be another's by then.
pub(super) const KEPT_FOR: Duration = Duration::from_secs(600);
/// An HTTP/2 client stays for so long at least, although its requests reach nobody: it would connect again at once, and
/// again, while the pod restarts. Without a sidecar its connection would be refused, and clients pause after that.
pub(super) const MIN_STAY: Duration = Duration::from_secs(1);

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
    let kept = KeptPlan::default();
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
        if !boxed(|| serve(worker, port, &kept, call(), opened.take())).await.reusable {
            Box::pin(close(reader, writer)).await;
            return Ok(());
        }
    }
}

/// Serves an HTTP/2 connection until either side closes it. One to a pod's own address is to end with the pod, for its
/// client would otherwise never look for another: it is told to open no more requests here.
pub(super) async fn serve_http2(
    worker: &Rc<Worker>,
    port: &Rc<Port>,
    stream: TcpStream,
    read: BytesMut,
) -> Result<(), Failure> {
    let mut connection = http2::Server::new(stream, read);
    let client = Rc::new(Client {
        port: Rc::clone(port),
        kept: KeptPlan::default(),
        leave: Leave::default(),
        begun: Instant::now(),
    });
    let _watch = Watch::begin(&client);
    let mut is_leaving = false;
    loop {
        let accepted = tokio::select! {
            biased;
            () = poll_fn(|cx| client.leave.poll(cx)), if !is_leaving => {
                is_leaving = true;
                connection.leave();
                continue;
            }
            accepted = connection.accept() => accepted,
        };
        let Some(accepted) = accepted else { return Ok(()) };
        let Ok((request, respond, body)) = accepted else { return Err(Failure::ClientGone) };
        let (worker, client) = (Rc::clone(worker), Rc::clone(&client));
        spawn_boxed(|| serve_stream(worker, client, request, respond, body));
    }
}

async fn serve_stream(
    worker: Rc<Worker>,
    client: Rc<Client>,
    mut request: Incoming,
    mut respond: SendStream,
    mut body: RecvStream,
) {
    match http2::request_head(&mut request.block, request.end) {
        Ok(head) => {
            let call = Call::http2(head, &mut body, &mut respond);
            let served = serve(&worker, &client.port, &client.kept, call, None).await;
            if served.is_unreached && !leads_to_service(&worker, &client.port) {
                client.leave_soon();
            }
        }
        Err(failure) => {
            worker.telemetry.event(RefusedRequest(failure.reason()));
            let content = request.block.content_type();
            Box::pin(Answer::Http2(&mut respond).fail_with(&failure, content)).await;
        }
    }
}

/// An HTTP/2 client's connection, as its requests share it.
struct Client {
    port: Rc<Port>,
    kept: KeptPlan,
    leave: Leave,
    begun: Instant,
}

impl Client {
    /// Makes the client leave, once it has stayed for [`MIN_STAY`].
    fn leave_soon(self: Rc<Self>) {
        if self.leave.is_called.replace(true) {
            return;
        }
        spawn_local(async move {
            sleep_until(self.begun + MIN_STAY).await;
            self.leave.call();
        });
    }
}

/// The way to a Service that the last request of a connection went. A Service that is deleted, or gets another port
/// number, takes no new connections at this address; without a mesh those that are there go on.
#[derive(Default)]
pub(super) struct KeptPlan(Cell<Option<LastPlan>>);

struct LastPlan {
    plan: Rc<Plan>,
    /// When a request last found that its address leads there.
    current_at: Instant,
}

impl KeptPlan {
    /// The plan of a request that came `at` this time, where `now` is what its address leads to.
    pub(super) fn plan(&self, now: Option<Rc<Plan>>, at: Instant) -> Option<Rc<Plan>> {
        let last = self.0.take();
        let Some(now) = now else {
            let last = last.filter(|last| at.duration_since(last.current_at) < KEPT_FOR)?;
            let plan = Rc::clone(&last.plan);
            self.0.set(Some(last));
            return Some(plan);
        };
        let is_same = last.is_some_and(|last| Rc::ptr_eq(&last.plan, &now));
        // A pod that has gone takes nothing, and its address may be another's.
        if is_same || now.default.backend.service().is_some() {
            self.0.set(Some(LastPlan { plan: Rc::clone(&now), current_at: at }));
        }
        Some(now)
    }
}

/// Makes a client leave. Asked whenever something happens on its connection: without a lock.
#[derive(Default)]
struct Leave {
    /// Due, or soon.
    is_called: Cell<bool>,
    is_due: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Leave {
    fn call(&self) {
        self.is_due.set(true);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    fn poll(&self, cx: &Context<'_>) -> Poll<()> {
        if self.is_due.get() {
            return Poll::Ready(());
        }
        let mut waker = self.waker.borrow_mut();
        if !waker.as_ref().is_some_and(|known| known.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }
}

/// Watches over the pod that a client has dialled, for as long as this lives.
struct Watch(AbortHandle);

impl Watch {
    /// `None`: the client has dialled a Service.
    fn begin(client: &Rc<Client>) -> Option<Self> {
        if !matches!(client.port.entry().current().as_deref(), Some(Destination::Pod(_))) {
            return None;
        }
        let client = Rc::clone(client);
        let watching = spawn_local(async move {
            pod_ended(&client.port).await;
            client.leave.call();
        });
        Some(Self(watching.abort_handle()))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Resolves when the pod with this address begins to end, or has gone. Of one that was ending already when its client
/// came: when it has gone, because the client would come again at once.
async fn pod_ended(port: &Port) {
    let begun = port.entry().current();
    let Some(Destination::Pod(begun)) = begun.as_deref() else { return pending().await };
    loop {
        let changed = port.entry().changed();
        if port.is_gone() {
            // Nobody has asked there for a while, so what becomes of it is not known. The next request finds out.
            return pending().await;
        }
        let now = port.entry().current();
        let Some(Destination::Pod(now)) = now.as_deref() else { return };
        let is_ending = now.endpoint.terminating && !begun.endpoint.terminating;
        if is_ending || now.endpoint.pod_uid != begun.endpoint.pod_uid {
            return;
        }
        changed.await;
    }
}

/// Whether the address leads to a Service: to other pods, where one cannot be reached. Of a port that is not kept
/// current, nobody knows: the client's next connection finds out.
fn leads_to_service(worker: &Worker, port: &Port) -> bool {
    !port.is_gone() && port.plan(worker).is_some_and(|plan| plan.default.backend.service().is_some())
}

/// How a request leaves the connection of its client.
struct Served {
    /// It may carry another one.
    reusable: bool,
    /// Nobody was reached who could have served this one.
    is_unreached: bool,
}

/// Serves one request. `kept`: the way of the last one on its connection.
async fn serve(
    worker: &Rc<Worker>,
    port: &Rc<Port>,
    kept: &KeptPlan,
    mut call: Call<'_>,
    opened: Option<Box<Opened>>,
) -> Served {
    let plan = if port.is_gone() {
        // The connection has outlived what was known of its address.
        Box::pin(worker.port(port.address())).await.plan(worker)
    } else {
        port.plan(worker)
    };
    let plan = kept.plan(plan, call.since);
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
    let is_unreached = matches!(
        &ended.result,
        Err(Failure::UpstreamNone
            | Failure::UpstreamConnect
            | Failure::UpstreamIdentity
            | Failure::UpstreamNotProcessed)
    );
    Served { reusable: call.finish(worker, &series, ended).await, is_unreached }
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
