//! A Warning on each route that is not accepted: one event per transition, with the reason and message of the condition.

use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::model::gateway::RouteKey;
use crate::watch::gateway::resource;

/// Events that wait. Beyond that they are dropped: the condition says the same.
const WAITING: usize = 256;
/// Timeout of one write.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of a note that the API server accepts are 1024.
const LONGEST: usize = 1000;

/// A route that a parent does not accept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// The route.
    pub key: RouteKey,
    /// Its uid.
    pub uid: String,
    /// The version of its kind.
    pub version: &'static str,
    /// Reason of condition Accepted.
    pub reason: String,
    /// Message of condition Accepted.
    pub message: String,
}

/// A queue of events, and its other end for [`run`].
pub fn queue() -> (mpsc::Sender<Rejection>, mpsc::Receiver<Rejection>) {
    mpsc::channel(WAITING)
}

/// Publishes what is queued. Never returns.
pub async fn run(client: Client, mut queued: mpsc::Receiver<Rejection>) {
    while let Some(rejection) = queued.recv().await {
        let Rejection { key, reason, message, .. } = &rejection;
        tracing::warn!(route = %key, reason, message);
        // One recorder per event: it would merge those of the same reason, and show the first message only.
        let reporter = Reporter { controller: "tulle-operator".to_owned(), instance: None };
        let recorder = Recorder::new(client.clone(), reporter);
        match timeout(WRITE_TIMEOUT, recorder.publish(&event(&rejection), &about(&rejection))).await {
            Ok(Ok(())) => {}
            failed => tracing::debug!(route = %key, ?failed, "cannot write the event"),
        }
    }
    std::future::pending().await
}

fn event(rejection: &Rejection) -> Event {
    Event {
        type_: EventType::Warning,
        reason: rejection.reason.clone(),
        note: Some(shorten(&rejection.message)),
        action: "Accept".to_owned(),
        secondary: None,
    }
}

fn about(rejection: &Rejection) -> ObjectReference {
    let resource = resource(rejection.key.kind, rejection.version);
    ObjectReference {
        api_version: Some(resource.api_version),
        kind: Some(resource.kind),
        namespace: Some(rejection.key.namespace.to_string()),
        name: Some(rejection.key.name.to_string()),
        uid: Some(rejection.uid.clone()),
        ..ObjectReference::default()
    }
}

fn shorten(note: &str) -> String {
    note.get(..note.floor_char_boundary(LONGEST)).unwrap_or(note).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::gateway::RouteKind;

    #[test]
    fn an_event_is_about_the_route_in_the_version_that_is_served_and_says_what_the_condition_says() {
        let rejection = Rejection {
            key: RouteKey { kind: RouteKind::Tcp, namespace: "shop".into(), name: "web".into() },
            uid: "u".to_owned(),
            version: "v1alpha2",
            reason: "UnsupportedValue".to_owned(),
            message: "…".repeat(LONGEST),
        };
        let about = about(&rejection);
        assert_eq!(about.api_version.as_deref(), Some("gateway.networking.k8s.io/v1alpha2"));
        assert_eq!((about.kind.as_deref(), about.uid.as_deref()), (Some("TCPRoute"), Some("u")));
        let event = event(&rejection);
        assert_eq!(event.reason, "UnsupportedValue");
        assert_eq!(event.note.unwrap().len(), 999, "cut between two characters");
    }
}
