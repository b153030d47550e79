//! Decides which routes are looked at, and queues their statuses and events.
//!
//! In: keys of routes that a change may concern, the model's decision for each of their parents, and what sidecars have
//! acknowledged. Out: statuses in the writer's queue, events on routes that are not accepted, and the time that each
//! change took. Never waits.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use serde::Deserialize as _;
use serde_json::Value;
use tokio::sync::mpsc;
use tulle_mesh::event_reason::EventReason;

use super::events::Rejection;
use super::times::AcknowledgeTimes;
use super::{ACCEPTED, ACKNOWLEDGED, Decided, PARTIALLY_INVALID, Parent, RESOLVED_REFS, Truth};
use super::{acknowledged, entries, found, list, text};
use crate::discovery::{AckTracker, RouteAcknowledgement};
use crate::model::gateway::{ParentRef, ParentStatus, RouteCondition, RouteKey, RouteKind, Standings};
use crate::model::{Key, Model};
use crate::status::writer::{Target, Write, Writer};
use crate::watch::{RouteRecord, RouteRecords};

/// Time until every sidecar that has subscribed to what a new route is about was sent it. The time of a change is counted
/// after this, and not at all if no sidecar uses the route by then.
const SETTLED: Duration = Duration::from_secs(2);

/// What a look reads and fills.
#[derive(Clone, Copy)]
pub struct Sources<'a> {
    /// The model.
    pub model: &'a Model,
    /// Routes as the API server has them.
    pub records: &'a RouteRecords,
    /// What sidecars have said.
    pub acks: &'a AckTracker,
    /// Takes statuses.
    pub writer: &'a Writer,
    /// Takes events.
    pub rejected: &'a mpsc::Sender<Rejection>,
    /// Takes the time of each change.
    pub times: &'a AcknowledgeTimes,
}

/// What is kept between two looks.
#[derive(Debug, Default)]
pub struct RouteDecider {
    /// Routes that sidecars have not acknowledged, or of which the time has yet to be counted.
    pending: HashSet<RouteKey>,
    /// What was said of routes that are not accepted.
    rejected: HashMap<RouteKey, Vec<Said>>,
    /// The uid and generation of which the time was counted.
    counted: HashMap<RouteKey, (Arc<str>, i64)>,
    /// Routes whose status has no room for an entry of ours.
    full: HashSet<RouteKey>,
}

/// Why a parent does not accept a route.
#[derive(Clone, Debug, PartialEq)]
struct Said {
    parent: Value,
    reason: String,
    message: String,
}

impl RouteDecider {
    /// Looks at these routes, and at all others that something is awaited of or reported about.
    pub fn look(&mut self, from: &Sources<'_>, all: bool, mut keys: HashSet<RouteKey>) {
        keys.extend(self.pending.iter().cloned());
        keys.extend(from.writer.queue().routes().cloned());
        keys.extend(from.records.take_changed());
        keys.extend(from.acks.take_changed_routes().iter().filter_map(route_of));
        if all {
            keys.extend(from.records.keys());
        }
        let mut standings = Standings::default();
        for key in keys {
            self.route(from, &key, &mut standings);
        }
    }

    fn route<'a>(&mut self, from: &Sources<'a>, key: &RouteKey, standings: &mut Standings<'a>) {
        let target = Target::Route(key.clone());
        let Some(record) = from.records.get(key) else {
            self.forget(key);
            return from.writer.queue().withdraw(&target);
        };
        let stamped: Key = (Arc::clone(&key.namespace), key.stamped().into());
        let addresses = from.model.route_addresses(key, standings);
        let seen = from.acks.route(from.model, (&stamped, &record.uid, record.generation), &addresses);
        let parents = parents((from.model, standings), key, &record, &seen);
        let current = list(&record.status, "parents");
        self.reject(from.rejected, (key, &record), current, &parents);
        // Nothing is awaited of sidecars for a generation that cannot be sent.
        let is_settled = self.count(from.times, (key, &record), &seen) && seen.behind.is_empty();
        if is_settled || record.unreadable.is_some() {
            self.pending.remove(key);
        } else {
            self.pending.insert(key.clone());
        }
        let next = entries(current, &parents, record.generation, &Time(Timestamp::now()));
        self.note_room(key, next.left_out);
        if next.parents == current {
            return from.writer.queue().withdraw(&target);
        }
        let mut status = record.status.as_object().cloned().unwrap_or_default();
        status.insert("parents".to_owned(), Value::Array(next.parents));
        let write = Write {
            version: record.resource_version.clone(),
            status: Value::Object(status),
            kind_version: Some(record.version),
        };
        from.writer.queue().offer(target, write, Instant::now());
    }

    fn forget(&mut self, key: &RouteKey) {
        self.pending.remove(key);
        self.rejected.remove(key);
        self.counted.remove(key);
        self.full.remove(key);
    }

    /// Queues an event for each reason and message that neither this replica nor the object's status has told yet.
    fn reject(
        &mut self,
        events: &mpsc::Sender<Rejection>,
        (key, record): (&RouteKey, &RouteRecord),
        current: &[Value],
        parents: &[Parent],
    ) {
        let known = self.rejected.remove(key).unwrap_or_default();
        let mut all: Vec<Said> = Vec::new();
        for parent in parents {
            let Some(accepted) = condition(parent, ACCEPTED).filter(|it| it.status == Truth::False) else {
                continue;
            };
            let (reason, message) = (accepted.reason.to_string(), accepted.message.clone());
            let is_written = found(current, &parent.reference, ACCEPTED).is_some_and(|written| {
                text(written, "status") == "False"
                    && text(written, "reason") == reason
                    && text(written, "message") == message
            });
            // Two parents that refuse it for one reason are one event.
            let is_told = all.iter().any(|said| said.reason == reason && said.message == message);
            let said = Said { parent: parent.reference.clone(), reason, message };
            if !is_written
                && !is_told
                && !known.contains(&said)
                && let Some(reason) = EventReason::from_name(&said.reason)
            {
                // Full: the condition says the same.
                let _ = events.try_send(Rejection {
                    key: key.clone(),
                    uid: record.uid.to_string(),
                    version: record.version,
                    parent: said.parent.to_string(),
                    reason,
                    message: said.message.clone(),
                });
            }
            all.push(said);
        }
        if !all.is_empty() {
            self.rejected.insert(key.clone(), all);
        }
    }

    /// Counts how long a change took, once. Returns whether nothing is left to count.
    fn count(
        &mut self,
        times: &AcknowledgeTimes,
        (key, record): (&RouteKey, &RouteRecord),
        seen: &RouteAcknowledgement,
    ) -> bool {
        let Some(since) = record.seen else { return true };
        let of = (Arc::clone(&record.uid), record.generation);
        if self.counted.get(key) == Some(&of) {
            return true;
        }
        if since.elapsed() < SETTLED || !seen.behind.is_empty() {
            return false;
        }
        if let Some(took) = seen.last.and_then(|last| last.checked_duration_since(since)) {
            times.observe(took);
        }
        self.counted.insert(key.clone(), of);
        true
    }

    fn note_room(&mut self, key: &RouteKey, left_out: usize) {
        if left_out == 0 {
            self.full.remove(key);
        } else if self.full.insert(key.clone()) {
            tracing::warn!(route = %key, left_out, "the status of this route has no room for some of its parents: it has 32 entries");
        }
    }
}

/// The route that a stamp names.
fn route_of((namespace, stamped): &Key) -> Option<RouteKey> {
    let (kind, name) = stamped.split_once('/')?;
    let kind = RouteKind::ALL.into_iter().find(|known| known.name() == kind)?;
    Some(RouteKey { kind, namespace: Arc::clone(namespace), name: name.into() })
}

fn condition<'a>(parent: &'a Parent, type_: &str) -> Option<&'a Decided> {
    parent.conditions.iter().find(|condition| condition.type_ == type_)
}

/// The parents of a route that are ours, with their conditions.
fn parents<'a>(
    (model, standings): (&'a Model, &mut Standings<'a>),
    key: &RouteKey,
    record: &RouteRecord,
    seen: &RouteAcknowledgement,
) -> Vec<Parent> {
    let written = || record.parent_refs.iter();
    if let Some(error) = &record.unreadable {
        let is_service = |reference: &&Value| {
            reference.get("group").and_then(Value::as_str) == Some("") && text(reference, "kind") == "Service"
        };
        let parent =
            |reference: &Value| Parent { reference: reference.clone(), conditions: unreadable(error) };
        return written().filter(is_service).map(parent).collect();
    }
    let read: Vec<(ParentRef, &Value)> =
        written().filter_map(|written| Some((ParentRef::deserialize(written).ok()?, written))).collect();
    let parent = |status: ParentStatus| {
        // As it is written: there may be fields that this build does not know.
        let (_, reference) = read.iter().find(|(parent, _)| *parent == status.parent)?;
        Some(Parent { reference: (*reference).clone(), conditions: decided(status, seen) })
    };
    model.route_status_among(key, standings).into_iter().filter_map(parent).collect()
}

/// Conditions of a parent, from the model's decision and what sidecars have said.
fn decided(status: ParentStatus, seen: &RouteAcknowledgement) -> Vec<Decided> {
    // The sidecars that hold the route got it for another parent.
    let elsewhere = RouteAcknowledgement::default();
    let seen = if takes_no_part(&status.accepted) { &elsewhere } else { seen };
    let acknowledged = acknowledged(status.accepted.status, seen);
    let of = |type_, condition: RouteCondition| Decided {
        type_,
        status: condition.status.into(),
        reason: condition.reason.into(),
        message: condition.message,
    };
    let partially = status.partially_invalid.map(|message| Decided {
        type_: PARTIALLY_INVALID,
        status: Truth::True,
        reason: EventReason::UnsupportedValue.name().into(),
        message,
    });
    let mut conditions = vec![of(ACCEPTED, status.accepted), of(RESOLVED_REFS, status.resolved)];
    conditions.extend(partially);
    conditions.push(acknowledged);
    conditions
}

/// Whether nothing of a route is in force at a parent that does not accept it. Where values are unsupported or filters
/// exclude each other, its rules may still answer requests with an error.
fn takes_no_part(accepted: &RouteCondition) -> bool {
    let none = [
        EventReason::NoMatchingParent.name(),
        EventReason::RouteReasonConflicted.name(),
        EventReason::TooManyRules.name(),
    ];
    !accepted.status && none.contains(&accepted.reason)
}

/// Conditions of a route that this build cannot decode.
fn unreadable(error: &str) -> Vec<Decided> {
    let version = env!("CARGO_PKG_VERSION");
    let accepted = Decided {
        type_: ACCEPTED,
        status: Truth::False,
        reason: EventReason::UnsupportedValue.name().into(),
        message: format!(
            "this operator ({version}) cannot read this route: {error}; upgrade the operator, or correct the field. The last readable version stays in force"
        ),
    };
    let acknowledged = Decided {
        type_: ACKNOWLEDGED,
        status: Truth::Unknown,
        reason: "Unreadable".into(),
        message: "the last readable version stays in force".to_owned(),
    };
    vec![accepted, acknowledged]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::watch::Hub;
    use crate::watch::gateway::see;

    /// A route that no build can read.
    fn unreadable(generation: i64, status: Value) -> Value {
        json!({
            "metadata": {"namespace": "shop", "name": "web", "uid": "u", "generation": generation},
            "spec": {"rules": "none", "parentRefs": [
                {"group": "", "kind": "Service", "name": "web"},
                {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "edge"},
            ]},
            "status": status,
        })
    }

    struct Desk {
        hub: Hub,
        acks: AckTracker,
        writer: Writer,
        times: AcknowledgeTimes,
        decider: RouteDecider,
        rejected: mpsc::Sender<Rejection>,
        rejections: mpsc::Receiver<Rejection>,
    }

    impl Desk {
        fn new() -> Self {
            let (rejected, rejections) = super::super::events::queue();
            Self {
                hub: Hub::complete(Model::default()),
                acks: AckTracker::default(),
                writer: Writer::default(),
                times: AcknowledgeTimes::default(),
                decider: RouteDecider::default(),
                rejected,
                rejections,
            }
        }

        /// Looks at whatever has changed. Returns the status that waits.
        fn look(&mut self) -> Option<Value> {
            let model = self.hub.model();
            let from = Sources {
                model: &model,
                records: self.hub.routes(),
                acks: &self.acks,
                writer: &self.writer,
                rejected: &self.rejected,
                times: &self.times,
            };
            self.decider.look(&from, false, HashSet::new());
            self.writer.queue().next(Instant::now()).map(|(target, write)| {
                assert!(matches!(target, Target::Route(_)));
                write.status
            })
        }

        fn events(&mut self) -> usize {
            std::iter::from_fn(|| self.rejections.try_recv().ok()).count()
        }
    }

    fn key() -> RouteKey {
        RouteKey { kind: RouteKind::Http, namespace: "shop".into(), name: "web".into() }
    }

    #[test]
    fn a_route_that_cannot_be_read_is_reported_to_its_services_once() {
        let mut desk = Desk::new();
        see(&desk.hub, RouteKind::Http, unreadable(1, json!({})));
        let status = desk.look().unwrap();
        let parents = list(&status, "parents");
        assert_eq!(parents.len(), 1, "a Gateway is not ours");
        assert_eq!(parents[0]["parentRef"], json!({"group": "", "kind": "Service", "name": "web"}));
        let message = text(&parents[0]["conditions"][0], "message");
        assert!(
            message.contains("cannot read this route") && message.contains("stays in force"),
            "{message}"
        );
        assert_eq!(desk.events(), 1);
        assert_eq!(desk.look().as_ref(), Some(&status), "it waits until it is written");
        assert_eq!(desk.events(), 0);
        see(&desk.hub, RouteKind::Http, unreadable(1, status));
        assert_eq!(desk.look(), None, "the object has it");
        assert_eq!(desk.events(), 0);
    }

    #[test]
    fn a_new_leader_does_not_repeat_the_event_that_the_status_tells_of() {
        let mut desk = Desk::new();
        see(&desk.hub, RouteKind::Http, unreadable(1, json!({})));
        let status = desk.look().unwrap();
        let mut next = Desk::new();
        see(&next.hub, RouteKind::Http, unreadable(1, status));
        assert_eq!(next.look(), None);
        assert_eq!(next.events(), 0);
    }

    #[test]
    fn entries_of_a_parent_that_is_gone_are_removed_and_those_of_others_stay() {
        let mut desk = Desk::new();
        let entry = |controller: &str| json!({"controllerName": controller, "parentRef": {"name": "old"}});
        let status = json!({"parents": [entry("example.com/other"), entry(super::super::CONTROLLER)]});
        let mut route = unreadable(1, status);
        route["spec"] = json!({});
        see(&desk.hub, RouteKind::Http, route);
        assert_eq!(desk.look(), Some(json!({"parents": [entry("example.com/other")]})));
    }

    #[test]
    fn the_time_of_a_change_is_counted_once_all_have_acknowledged_it() {
        let mut desk = Desk::new();
        let seen_at = Instant::now().checked_sub(Duration::from_secs(10)).unwrap();
        let record =
            RouteRecord { uid: "u".into(), generation: 2, seen: Some(seen_at), ..RouteRecord::default() };
        let behind = RouteAcknowledgement {
            holding: 2,
            behind: ["shop/a".to_owned()].into(),
            ..RouteAcknowledgement::default()
        };
        let all = RouteAcknowledgement {
            holding: 2,
            last: Some(seen_at + Duration::from_millis(150)),
            ..RouteAcknowledgement::default()
        };
        assert!(!desk.decider.count(&desk.times, (&key(), &record), &behind));
        assert!(desk.decider.count(&desk.times, (&key(), &record), &all));
        assert!(desk.decider.count(&desk.times, (&key(), &record), &all));
        let times = desk.times.snapshot();
        assert_eq!(times.count, 1);
        assert!((times.sum - 0.15).abs() < 1e-9);
        let unused = RouteRecord { generation: 3, ..record };
        assert!(desk.decider.count(&desk.times, (&key(), &unused), &RouteAcknowledgement::default()));
        assert_eq!(desk.times.snapshot().count, 1, "nobody uses generation 3");
    }

    #[test]
    fn a_parent_that_does_not_take_the_route_is_not_acknowledged_through_another_one() {
        let seen = RouteAcknowledgement { holding: 2, ..RouteAcknowledgement::default() };
        let of = |status, reason| {
            let condition = |status, reason| RouteCondition { status, reason, message: String::new() };
            let status = ParentStatus {
                parent: ParentRef::default(),
                accepted: condition(status, reason),
                resolved: condition(true, "ResolvedRefs"),
                partially_invalid: None,
            };
            let conditions = decided(status, &seen);
            let found = conditions.into_iter().find(|condition| condition.type_ == ACKNOWLEDGED).unwrap();
            (found.status, found.reason.into_owned())
        };
        for reason in ["NoMatchingParent", "RouteReasonConflicted", "TooManyRules"] {
            assert_eq!(of(false, reason), (Truth::Unknown, "NotAccepted".to_owned()), "{reason}");
        }
        let acknowledged = (Truth::True, "Acknowledged".to_owned());
        assert_eq!(of(true, "Accepted"), acknowledged);
        assert_eq!(of(false, "UnsupportedValue"), acknowledged, "its rules answer with an error");
    }

    #[test]
    fn a_stamp_names_a_route_by_kind_and_name() {
        assert_eq!(route_of(&("shop".into(), "HTTPRoute/web".into())), Some(key()));
        assert_eq!(route_of(&("shop".into(), "Service/web".into())), None);
    }
}
