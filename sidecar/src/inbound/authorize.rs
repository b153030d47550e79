//! May this client do this? One place for requests and opaque connections, plain and encrypted.

use std::borrow::Cow;

use bytes::Bytes;
use tulle_mesh::canonical;
use tulle_mesh::policy::Subject;

use super::Client;
use crate::config::{InboundAccess, Mtls};
use crate::error::Failure;
use crate::http1::{Head, Start};
use crate::worker::Worker;

/// Whether plain text may come in at all.
///
/// # Errors
/// [`Failure::PolicyPlaintext`].
pub(super) fn plaintext(worker: &Worker) -> Result<(), Failure> {
    match worker.config.inbound() {
        Some(inbound) if inbound.mtls == Mtls::Strict => Err(Failure::PolicyPlaintext),
        Some(inbound) => {
            if inbound.shadow_strict {
                worker.telemetry.event("policy_would_deny", "Plaintext");
            }
            Ok(())
        }
        None => Err(Failure::PolicyDenied),
    }
}

/// Where a rule looks at paths, the application gets the path that was looked at: two readings of one
/// path are how policies are bypassed.
pub(super) fn canonicalise(worker: &Worker, head: &mut Head) {
    let needs =
        worker.config.inbound().is_some_and(|i| i.access.as_ref().is_some_and(|a| a.rules.needs_path()));
    let Start::Request { target, .. } = &mut head.start else { return };
    let Ok(raw) = std::str::from_utf8(target) else { return };
    if let (true, Ok(Cow::Owned(path))) = (needs, canonical::path(raw)) {
        let query = raw.find('?').and_then(|at| raw.get(at..)).unwrap_or("");
        *target = Bytes::from(path + query);
    }
}

/// Whether a request (`http`: method and target) or an opaque connection is allowed.
///
/// # Errors
/// [`Failure::PolicyDenied`].
pub(super) fn check(worker: &Worker, client: &Client, http: Option<(&str, &str)>) -> Result<(), Failure> {
    let inbound = worker.config.inbound().ok_or(Failure::PolicyDenied)?;
    let subject = Subject {
        identity: client.identity.as_ref(),
        address: client.address.ip(),
        port: client.destination.port(),
        http,
    };
    let denied = |access: &InboundAccess, shadow: bool| {
        let decision = access.rules.decide(&subject);
        if decision.allowed {
            return false;
        }
        let kind = if shadow { "policy_would_deny" } else { "policy_denied" };
        worker.telemetry.event(kind, decision.reason.name());
        let who =
            client.identity.as_ref().map_or_else(|| client.address.ip().to_string(), ToString::to_string);
        let (method, target) = http.unwrap_or(("", ""));
        tracing::info!(
            policy = access.policy, rule = ?decision.reason, client = who, method, target, shadow,
            port = client.destination.port(), "refused by policy"
        );
        true
    };
    if inbound.access.as_ref().is_some_and(|access| denied(access, false)) {
        return Err(Failure::PolicyDenied);
    }
    if let Some(access) = &inbound.shadow {
        denied(access, true);
    }
    Ok(())
}
