//! A Warning on each route that is not accepted: one event per transition, with the reason and message of the condition,
//! and at most one per route, parent and reason in [`QUIET`]. The condition says what holds now.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::Event;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tulle_mesh::event_reason::EventReason;

use crate::model::gateway::RouteKey;
use crate::status::{self, recorder};
use crate::watch::gateway::resource;

/// Events that wait. Beyond that they are dropped: the condition says the same.
const WAITING: usize = 256;
/// Least time between two events of one route with the same reason for the same parent: one that is accepted and refused in turn, or whose
/// message changes all the time, must not fill the API server with events.
const QUIET: Duration = Duration::from_secs(300);
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
    /// The reference to the parent, of several with one message the first.
    pub parent: String,
    /// Reason of condition Accepted.
    pub reason: EventReason,
    /// Message of condition Accepted.
    pub message: String,
}

/// What was published within the last [`QUIET`], by the uid of the route, the reason and the parent.
#[derive(Debug, Default)]
struct Recent(HashMap<(String, EventReason, String), Instant>);

impl Recent {
    /// Whether an event may be published now. If so, it counts as published.
    fn admit(&mut self, rejection: &Rejection, now: Instant) -> bool {
        self.0.retain(|_, at| now.saturating_duration_since(*at) < QUIET);
        match self.0.entry((rejection.uid.clone(), rejection.reason, rejection.parent.clone())) {
            Entry::Occupied(_) => false,
            Entry::Vacant(entry) => {
                entry.insert(now);
                true
            }
        }
    }
}

/// A queue of events, and its other end for [`run`].
pub fn queue() -> (mpsc::Sender<Rejection>, mpsc::Receiver<Rejection>) {
    mpsc::channel(WAITING)
}

/// Publishes what is queued. Never returns.
pub async fn run(client: Client, mut queued: mpsc::Receiver<Rejection>) {
    let mut recent = Recent::default();
    while let Some(rejection) = queued.recv().await {
        if !recent.admit(&rejection, Instant::now()) {
            continue;
        }
        let Rejection { key, reason, message, .. } = &rejection;
        tracing::warn!(route = %key, reason = reason.name(), message);
        // One recorder per event: it would merge those of the same reason, and show the first message only.
        let recorder = recorder(client.clone());
        match timeout(WRITE_TIMEOUT, recorder.publish(&event(&rejection), &about(&rejection))).await {
            Ok(Ok(())) => {}
            failed => tracing::debug!(route = %key, ?failed, "cannot write the event"),
        }
    }
    std::future::pending().await
}

fn event(rejection: &Rejection) -> Event {
    status::event(rejection.reason, "Accept", shorten(&rejection.message))
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
    fn a_flapping_route_gets_one_event_per_reason_in_five_minutes() {
        let (mut recent, start) = (Recent::default(), Instant::now());
        let of = |uid: &str, reason: EventReason, message: &str| Rejection {
            key: RouteKey { kind: RouteKind::Http, namespace: "shop".into(), name: "web".into() },
            uid: uid.to_owned(),
            version: "v1",
            parent: "a".to_owned(),
            reason,
            message: message.to_owned(),
        };
        assert!(recent.admit(&of("u", EventReason::NoMatchingParent, "one"), start));
        for second in 1..300 {
            let now = start + Duration::from_secs(second);
            assert!(!recent.admit(&of("u", EventReason::NoMatchingParent, &second.to_string()), now));
        }
        let now = start + Duration::from_secs(299);
        assert!(recent.admit(&of("u", EventReason::UnsupportedValue, "other"), now), "another reason");
        assert!(recent.admit(&of("v", EventReason::NoMatchingParent, "one"), now), "another route");
        let second = Rejection { parent: "b".to_owned(), ..of("u", EventReason::NoMatchingParent, "two") };
        assert!(recent.admit(&second, now), "another parent");
        assert!(!recent.admit(&second, now));
        assert!(recent.admit(&of("u", EventReason::NoMatchingParent, "one"), start + QUIET));
        assert_eq!(recent.0.len(), 4, "nothing else is kept");
    }

    #[test]
    fn an_event_is_about_the_route_in_the_version_that_is_served_and_says_what_the_condition_says() {
        let rejection = Rejection {
            key: RouteKey { kind: RouteKind::Tcp, namespace: "shop".into(), name: "web".into() },
            uid: "u".to_owned(),
            version: "v1alpha2",
            parent: String::new(),
            reason: EventReason::UnsupportedValue,
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
