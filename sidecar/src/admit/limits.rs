//! How many requests and connections the application has at once.
//!
//! Requests beyond the limit wait for a moment, and are then refused; connections beyond it are refused at once. What is
//! only tried is counted, and let through.

use tulle_mesh::counted_event::{ExpiredRequest, Limited};

use super::deadline::has_passed;
use super::{Denied, LIMIT};
use crate::call::Call;
use crate::config::limits::{InboundLimits, Limit};
use crate::error::Failure;
use crate::gate::Slot;
use crate::worker::Worker;

/// The limit of the requests in the application, all places of which are taken.
pub(super) struct Full<'a>(&'a Limit);

/// Takes a place among the requests in the application; none where nothing limits them.
///
/// # Errors
/// [`Full`], for [`wait`].
pub(super) fn enter<'a>(worker: &Worker, limits: &'a InboundLimits) -> Result<Option<Slot>, Full<'a>> {
    let gate = &limits.in_use.requests;
    let tried = limits.section.shadow.concurrency.as_ref();
    if let Some(tried) = tried.filter(|tried| gate.taken() >= tried.max) {
        // It would wait or be refused.
        report(worker, Limited::Concurrency, tried, true);
    }
    let Some(limit) = &limits.section.enforced.concurrency else { return Ok(tried.map(|_| gate.count())) };
    gate.enter(limit.max).map(Some).ok_or(Full(limit))
}

/// Waits for a place among the requests in the application. A client that leaves ends the wait: its request would only
/// add to the overload.
///
/// # Errors
/// [`Denied`] with [`Failure::OursOverloaded`], or [`Failure::ClientGaveUp`] or [`Failure::DeadlineExceeded`] where
/// that came first.
pub(super) async fn wait(
    worker: &Worker,
    limits: &InboundLimits,
    Full(limit): Full<'_>,
    call: &mut Call<'_>,
) -> Result<Slot, Denied> {
    let deadline = call.deadline;
    let slot = tokio::select! {
        biased;
        () = call.answer.gone() => return Err(Denied(Failure::ClientGaveUp)),
        slot = limits.in_use.requests.wait(limit.max, deadline) => slot,
    };
    if let Some(slot) = slot {
        return Ok(slot);
    }
    if has_passed(deadline) {
        worker.telemetry.event(ExpiredRequest::Queue);
        return Err(Denied(Failure::DeadlineExceeded));
    }
    report(worker, Limited::Concurrency, limit, false);
    Err(Denied(Failure::OursOverloaded))
}

/// Takes a place among the connections of clients; none where nothing limits them.
///
/// # Errors
/// [`Denied`] with [`Failure::OursOverloaded`].
pub fn admit_client(worker: &Worker) -> Result<Option<Slot>, Denied> {
    let rules = worker.config.inbound();
    let Some(limits) = rules.as_ref().and_then(|rules| rules.limits.as_ref()) else { return Ok(None) };
    let gate = &limits.in_use.connections;
    let tried = limits.section.shadow.connections.as_ref();
    if let Some(tried) = tried.filter(|tried| gate.taken() >= tried.max) {
        report(worker, Limited::Connections, tried, true);
    }
    let Some(limit) = &limits.section.enforced.connections else { return Ok(tried.map(|_| gate.count())) };
    match gate.enter(limit.max) {
        Some(slot) => Ok(Some(slot)),
        None => {
            report(worker, Limited::Connections, limit, false);
            Err(Denied(Failure::OursOverloaded))
        }
    }
}

/// Whether [`admit_client`] would find a place. Counts nothing.
pub fn would_admit_client(worker: &Worker) -> bool {
    let rules = worker.config.inbound();
    let Some(limits) = rules.as_ref().and_then(|rules| rules.limits.as_ref()) else { return true };
    let limit = limits.section.enforced.connections.as_ref();
    limit.is_none_or(|limit| limits.in_use.connections.taken() < limit.max)
}

fn report(worker: &Worker, what: Limited, limit: &Limit, shadow: bool) {
    worker.telemetry.event(if shadow { what.would() } else { what.into() });
    if let Some(suppressed) = LIMIT.allow() {
        let Limit { max, policy } = limit;
        tracing::info!(%policy, max, limit = what.name(), shadow, suppressed, "beyond a limit of the policy");
    }
}
