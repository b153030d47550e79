//! May this client do this? One place for requests and for connections whose content is opaque, of clients with a
//! sidecar and without.
//!
//! In: who connects ([`Client`]), a [`Call`], and the rules that the operator sent. Out: a [`Permit`], or [`Denied`],
//! which has been counted and logged. The order is mTLS, access, limits. Paths are matched in every reading that an
//! application may have, and never changed. Nothing here opens a connection or answers a client.

mod client;
mod deadline;
mod limits;
#[cfg(test)]
mod tests;

pub use client::Client;
pub use deadline::{deadline_of, has_passed};
pub use limits::{admit_client, would_admit_client};

use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use tulle_mesh::canonical::{Readings, readings};
use tulle_mesh::counted_event::PolicyDenied;
use tulle_mesh::denial::DenialId;
use tulle_mesh::policy::{Http, Reason, Subject};
use tulle_mesh::query::Denial;

use crate::call::Call;
use crate::config::{Inbound, InboundAccess, Mtls};
use crate::error::Failure;
use crate::gate::Slot;
use crate::http1::{Head, logged_path};
use crate::telemetry::Limited;
use crate::worker::Worker;

/// A client that is refused again and again must not fill the log, nor keep the data thread writing it.
static LIMIT: Limited = Limited::new(10);

/// Leave to use the application; a request's counts in the pod's load until it is dropped.
pub struct Permit {
    worker: Rc<Worker>,
    /// The rules that allowed it.
    rules: Arc<Inbound>,
    is_request: bool,
    /// The place that a limit grants it.
    _slot: Option<Slot>,
}

/// A client was refused: counted and logged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(transparent)]
pub struct Denied(#[from] pub Failure);

/// Decides whether a request may go to the application. One that rules refuse is given an id.
///
/// # Errors
/// [`Denied`] with [`Failure::PolicyPlaintext`], [`Failure::PolicyDenied`], [`Failure::OursOverloaded`],
/// [`Failure::DeadlineExceeded`], or [`Failure::ClientGaveUp`] while it waited.
pub async fn admit(call: &mut Call<'_>, worker: &Rc<Worker>, client: &Client) -> Result<Permit, Denied> {
    let mut rules = enforced(worker)?;
    check_request(worker, &rules, client, call)?;
    try_request(worker, &rules, client, call);
    let (slot, has_waited) = match &rules.limits {
        None => (None, false),
        Some(limits) => match limits::enter(worker, limits) {
            Ok(slot) => (slot, false),
            // Rare: not a part of every request's future.
            Err(full) => (Some(Box::pin(limits::wait(worker, limits, full, call)).await?), true),
        },
    };
    if has_waited {
        let now = enforced(worker)?;
        // Nothing reaches the application that rules refuse which have come meanwhile.
        if !Arc::ptr_eq(&now, &rules) {
            check_request(worker, &now, client, call)?;
            rules = now;
        }
    }
    worker.load.set(worker.load.get() + 1);
    Ok(Permit { worker: Rc::clone(worker), rules, is_request: true, _slot: slot })
}

/// Decides whether a connection whose content is opaque may go to the application. [`Permit::begun`] asks the rules that
/// are only tried.
///
/// # Errors
/// As [`admit`].
pub fn admit_connection(worker: &Rc<Worker>, client: &Client) -> Result<Permit, Denied> {
    let rules = enforced(worker)?;
    check_mtls(worker, &rules, client)?;
    check_access(worker, &rules, client)?;
    Ok(Permit { worker: Rc::clone(worker), rules, is_request: false, _slot: None })
}

/// Refuses a plain connection that no rule could let in, before anything is known of its content.
///
/// # Errors
/// [`Denied`] with [`Failure::PolicyPlaintext`].
pub fn admit_plaintext(worker: &Worker, client: &Client) -> Result<(), Denied> {
    let rules = enforced(worker)?;
    if is_plaintext_refused(&rules, client) {
        return Err(refuse_plaintext(worker, client));
    }
    Ok(())
}

/// Whether [`admit_plaintext`] would let a connection in. Counts nothing.
pub fn would_admit_plaintext(worker: &Worker, client: &Client) -> bool {
    worker.config.inbound().is_some_and(|rules| !is_plaintext_refused(&rules, client))
}

/// Whether [`admit_connection`] would let a connection in. Counts nothing: what the connection carries is not known
/// yet, so nobody has been refused.
pub fn would_admit_connection(worker: &Worker, client: &Client) -> bool {
    worker.config.inbound().is_some_and(|rules| is_connection_allowed(&rules, client))
}

/// Whether the rules might let some HTTP request of a client in that [`admit_connection`] refuses.
pub fn might_admit_request(worker: &Worker, client: &Client) -> bool {
    worker.config.inbound().is_some_and(|rules| {
        !is_plaintext_refused(&rules, client)
            && rules.access.as_ref().is_none_or(|access| access.rules.may_allow_http(&subject(client, None)))
    })
}

/// Counts and logs the refusal of a connection whose content is opaque.
pub fn report_denied_connection(worker: &Worker, client: &Client) {
    if let Some(rules) = worker.config.inbound() {
        let _ = check_access(worker, &rules, client);
    }
}

impl Permit {
    /// The opaque connection that this permit is for carries something: rules that are only tried are asked now. One
    /// that is given up before that, because its client speaks HTTP, would have been refused nothing.
    pub fn begun(&self, client: &Client) {
        try_shadow(&self.worker, &self.rules, client, None, Described::default());
    }

    /// Resolves when the rules have changed, and no longer allow what this permit is for. `http`: method and target
    /// of the request; `None` for a connection whose content is opaque.
    pub async fn withdrawn(&self, client: &Client, http: Option<(Bytes, Bytes)>) {
        let forbids = |rules: &Inbound| {
            // Those that allowed it are not asked a second time.
            !std::ptr::eq(rules, &*self.rules)
                && match &http {
                    None => !is_connection_allowed(rules, client),
                    Some((method, target)) => !is_request_allowed(rules, client, method, target),
                }
        };
        self.worker.config.inbound_becomes(forbids).await;
        self.worker.telemetry.event(PolicyDenied::Withdrawn);
        if let Some(suppressed) = LIMIT.allow() {
            let port = client.destination.port();
            tracing::info!(client = %client.name(), port, suppressed, "ended by a new policy");
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if self.is_request {
            self.worker.load.set(self.worker.load.get().saturating_sub(1));
        }
    }
}

/// What a request asks, for the log.
#[derive(Clone, Copy, Default)]
struct Described<'a> {
    method: &'a str,
    target: &'a str,
    host: &'a str,
}

impl<'a> Described<'a> {
    fn of(head: &'a Head) -> Self {
        let (method, target) = head.request_line();
        let host = head.header("host").and_then(|host| std::str::from_utf8(host).ok());
        Self { method, target, host: host.unwrap_or_default() }
    }
}

/// Nothing is let in before the rules are known.
fn enforced(worker: &Worker) -> Result<Arc<Inbound>, Denied> {
    worker.config.inbound().ok_or(Denied(Failure::PolicyDenied))
}

fn is_plaintext_refused(rules: &Inbound, client: &Client) -> bool {
    client.identity.is_none() && rules.mtls == Mtls::Strict
}

fn check_mtls(worker: &Worker, rules: &Inbound, client: &Client) -> Result<(), Denied> {
    if is_plaintext_refused(rules, client) { Err(refuse_plaintext(worker, client)) } else { Ok(()) }
}

fn refuse_plaintext(worker: &Worker, client: &Client) -> Denied {
    report_plaintext(worker, client, Described::default());
    Denied(Failure::PolicyPlaintext)
}

/// Counts, remembers and logs that plain text was refused.
fn report_plaintext(worker: &Worker, client: &Client, request: Described<'_>) -> DenialId {
    worker.telemetry.event(PolicyDenied::Plaintext);
    let id = remember(worker, client, request, (String::new(), PolicyDenied::Plaintext.name().to_owned()));
    if let Some(suppressed) = LIMIT.allow() {
        let port = client.destination.port();
        tracing::info!(client = %client.address, port, denial = %id, suppressed, "refused plain text: mTLS is Strict");
    }
    id
}

fn check_request(
    worker: &Worker,
    rules: &Inbound,
    client: &Client,
    call: &mut Call<'_>,
) -> Result<(), Denied> {
    // A connection that was let in may have been there before the policy.
    if is_plaintext_refused(rules, client) {
        call.denial = Some(report_plaintext(worker, client, Described::of(&call.head)));
        return Err(Denied(Failure::PolicyPlaintext));
    }
    let request = Described::of(&call.head);
    let http = Http { method: request.method, readings: &|| call.readings() };
    let Some(id) = find_denial(worker, rules, client, Some(http), request) else { return Ok(()) };
    call.denial = Some(id);
    Err(Denied(Failure::PolicyDenied))
}

/// Asks the rules that are only tried about a request.
fn try_request(worker: &Worker, rules: &Inbound, client: &Client, call: &Call<'_>) {
    let request = Described::of(&call.head);
    let http = Http { method: request.method, readings: &|| call.readings() };
    try_shadow(worker, rules, client, Some(http), request);
}

/// Asks the rules about a connection whose content is opaque.
fn check_access(worker: &Worker, rules: &Inbound, client: &Client) -> Result<(), Denied> {
    match find_denial(worker, rules, client, None, Described::default()) {
        None => Ok(()),
        Some(_) => Err(Denied(Failure::PolicyDenied)),
    }
}

/// What the rules say. A refusal is counted, remembered and logged.
fn find_denial<'a>(
    worker: &Worker,
    rules: &Inbound,
    client: &'a Client,
    http: Option<Http<'a>>,
    request: Described<'_>,
) -> Option<DenialId> {
    let access = rules.access.as_ref()?;
    let decision = access.rules.decide(&subject(client, http));
    if decision.allowed {
        return None;
    }
    let rule = format!("{:?}", decision.reason);
    let id = remember(worker, client, request, (format!("MeshPolicy/{}", access.policy), rule));
    report(worker, client, request, (access, decision.reason), Some(id));
    Some(id)
}

/// Keeps what whoever asks about a refusal has to know.
fn remember(
    worker: &Worker,
    client: &Client,
    request: Described<'_>,
    (policy, rule): (String, String),
) -> DenialId {
    let denial = Denial {
        policy,
        rule,
        client: client.identity_text().unwrap_or_default().to_owned(),
        address: client.address.to_string(),
        port: client.destination.port(),
        method: request.method.to_owned(),
        host: request.host.to_owned(),
        path: logged_path(request.target).unwrap_or_default().to_owned(),
        ..Denial::default()
    };
    worker.telemetry.denials.remember(&worker.settings.pod_uid, denial)
}

/// Counts and logs what rules that are only tried would refuse.
fn try_shadow<'a>(
    worker: &Worker,
    rules: &Inbound,
    client: &'a Client,
    http: Option<Http<'a>>,
    request: Described<'_>,
) {
    if client.identity.is_none() && rules.shadow_strict {
        worker.telemetry.event(PolicyDenied::Plaintext.would());
    }
    let Some(shadow) = &rules.shadow else { return };
    let decision = shadow.rules.decide(&subject(client, http));
    if !decision.allowed {
        report(worker, client, request, (shadow, decision.reason), None);
    }
}

fn report(
    worker: &Worker,
    client: &Client,
    Described { method, target, .. }: Described<'_>,
    (access, reason): (&InboundAccess, Reason),
    denial: Option<DenialId>,
) {
    // Rules that are only tried refuse nothing.
    let shadow = denial.is_none();
    access.counts.count(&worker.telemetry.rules, reason, shadow);
    let Some(denied) = PolicyDenied::of(reason) else { return };
    worker.telemetry.event(if shadow { denied.would() } else { denied.into() });
    let Some(suppressed) = LIMIT.allow() else { return };
    let denial = denial.map(|id| id.to_string());
    tracing::info!(
        policy = access.policy, rule = ?reason, client = %client.name(), method, path = logged_path(target), shadow,
        port = client.destination.port(), denial, suppressed, "refused by policy"
    );
}

fn subject<'a>(client: &'a Client, http: Option<Http<'a>>) -> Subject<'a> {
    Subject {
        identity: client.identity.as_ref(),
        address: client.address.ip(),
        port: client.destination.port(),
        http,
    }
}

fn allows(rules: &Inbound, subject: &Subject<'_>) -> bool {
    rules.access.as_ref().is_none_or(|access| access.rules.decide(subject).allowed)
}

fn is_connection_allowed(rules: &Inbound, client: &Client) -> bool {
    !is_plaintext_refused(rules, client) && allows(rules, &subject(client, None))
}

fn is_request_allowed(rules: &Inbound, client: &Client, method: &[u8], target: &[u8]) -> bool {
    let text = |bytes| std::str::from_utf8(bytes).unwrap_or("");
    // The request is under way already, and its own readings with it.
    let seen: std::cell::OnceCell<Readings> = std::cell::OnceCell::new();
    let http = Http { method: text(method), readings: &|| seen.get_or_init(|| readings(text(target))) };
    !is_plaintext_refused(rules, client) && allows(rules, &subject(client, Some(http)))
}
