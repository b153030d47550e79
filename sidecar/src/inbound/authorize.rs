//! May this client do this? One place for requests and opaque connections, plain and encrypted.

use tulle_mesh::policy::Subject;

use super::Client;
use crate::config::Mtls;
use crate::error::Failure;
use crate::worker::Worker;

/// Whether plain text may come in at all.
///
/// # Errors
/// [`Failure::PolicyPlaintext`].
pub(super) fn plaintext(worker: &Worker) -> Result<(), Failure> {
    match worker.config.inbound() {
        Some(inbound) if inbound.mtls == Mtls::Strict => Err(Failure::PolicyPlaintext),
        Some(_) => Ok(()),
        None => Err(Failure::PolicyDenied),
    }
}

/// Whether a request (`http`: method and target) or an opaque connection is allowed.
///
/// # Errors
/// [`Failure::PolicyDenied`].
pub(super) fn check(worker: &Worker, client: &Client, http: Option<(&str, &str)>) -> Result<(), Failure> {
    let inbound = worker.config.inbound().ok_or(Failure::PolicyDenied)?;
    let Some(access) = &inbound.access else { return Ok(()) };
    let subject = Subject {
        identity: client.identity.as_ref(),
        address: client.address.ip(),
        port: client.destination.port(),
        http,
    };
    let decision = access.rules.decide(&subject);
    if decision.allowed {
        return Ok(());
    }
    let kind = if access.shadow { "policy_would_deny" } else { "policy_denied" };
    worker.telemetry.event(kind, decision.reason.name());
    let who = client.identity.as_ref().map_or_else(|| client.address.ip().to_string(), ToString::to_string);
    let (method, target) = http.unwrap_or(("", ""));
    tracing::info!(
        policy = access.policy, rule = ?decision.reason, client = who, method, target, shadow = access.shadow,
        port = client.destination.port(), "refused by policy"
    );
    if access.shadow { Ok(()) } else { Err(Failure::PolicyDenied) }
}
