//! Events that stay readable. The usual recorder merges events with the same reason and shows the message of the first
//! one only, so a second rollout would read like the first.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use tokio::time::Instant;
use tulle_crds::CanaryStatus;
use tulle_mesh::event_reason::EventReason;

/// Who reports, in every event.
const REPORTER: &str = "tulle-operator";
/// The same sentence about the same state of an object is not repeated within this time.
const SAME: Duration = Duration::from_secs(600);
/// Sentences that are remembered.
const MOST: usize = 10_000;
/// Longest note that the API server accepts is 1024 bytes.
const LONGEST: usize = 1000;

/// What was published a moment ago.
#[derive(Debug, Default)]
pub(super) struct Published(HashMap<u64, Instant>);

impl Published {
    /// Whether this sentence is new.
    pub(super) fn is_new(&self, hash: u64) -> bool {
        self.0.get(&hash).is_none_or(|at| at.elapsed() >= SAME)
    }

    /// It was published.
    pub(super) fn remember(&mut self, hash: u64) {
        self.0.retain(|_, at| at.elapsed() < SAME);
        if self.0.len() < MOST {
            self.0.insert(hash, Instant::now());
        }
    }
}

/// Identifies a sentence about a Canary in the state that a transition has led to: what a user does a second time reads
/// as the first time.
pub(super) fn hash(
    regarding: &ObjectReference,
    status: &CanaryStatus,
    reason: EventReason,
    note: &str,
) -> u64 {
    let mut hasher = DefaultHasher::new();
    (&regarding.uid, &regarding.namespace, &regarding.name, reason.name(), note).hash(&mut hasher);
    (status.epoch, status.step, &status.last_action).hash(&mut hasher);
    hasher.finish()
}

/// An event of its own for each sentence, which its `hash` identifies.
pub(super) fn event(
    regarding: ObjectReference,
    hash: u64,
    reason: EventReason,
    note: &str,
    now: Timestamp,
) -> Event {
    // A name has at most 253 characters.
    let object: String = regarding.name.as_deref().unwrap_or(REPORTER).chars().take(200).collect();
    let object = object.trim_end_matches(['.', '-']);
    // The time comes first: `kubectl describe` shows events of this API in the order of their names.
    let name = format!("{object}.{:012x}{hash:016x}", now.as_millisecond());
    Event {
        metadata: ObjectMeta {
            name: Some(name),
            namespace: regarding.namespace.clone(),
            ..ObjectMeta::default()
        },
        action: Some("Rollout".to_owned()),
        reason: Some(reason.name().to_owned()),
        note: Some(shorten(note)),
        event_time: Some(MicroTime(now)),
        regarding: Some(regarding),
        reporting_controller: Some(REPORTER.to_owned()),
        reporting_instance: Some(REPORTER.to_owned()),
        type_: Some(reason.event_type().name().to_owned()),
        ..Event::default()
    }
}

fn shorten(note: &str) -> String {
    let mut end = note.len().min(LONGEST);
    while !note.is_char_boundary(end) {
        end -= 1;
    }
    note.get(..end).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_events_are_in_the_order_of_time() {
        let web = ObjectReference { name: Some("web".to_owned()), ..ObjectReference::default() };
        let at = |second, hash| {
            let now = Timestamp::from_second(second).unwrap();
            event(web.clone(), hash, EventReason::Started, "note", now).metadata.name
        };
        assert!(at(1_700_000_000, u64::MAX) < at(1_700_000_001, 0));
    }

    #[test]
    fn two_sentences_with_the_same_reason_are_two_events() {
        let web = ObjectReference { name: Some("web".to_owned()), ..ObjectReference::default() };
        let of = |note| {
            let hash = hash(&web, &CanaryStatus::default(), EventReason::Started, note);
            event(web.clone(), hash, EventReason::Started, note, Timestamp::UNIX_EPOCH)
        };
        assert_ne!(of("revision a").metadata.name, of("revision b").metadata.name);
        assert_eq!(of("revision a").note.as_deref(), Some("revision a"));
    }

    #[test]
    fn what_a_user_does_a_second_time_is_a_second_event() {
        let web = ObjectReference { name: Some("web".to_owned()), ..ObjectReference::default() };
        let of = |status: &CanaryStatus| hash(&web, status, EventReason::Failed, "aborted by hand");
        let first = CanaryStatus { epoch: 4, last_action: "1".to_owned(), ..CanaryStatus::default() };
        assert_eq!(of(&first), of(&CanaryStatus { weight: 5, ..first.clone() }), "the same look again");
        assert_ne!(of(&first), of(&CanaryStatus { epoch: 8, ..first.clone() }));
        assert_ne!(of(&first), of(&CanaryStatus { last_action: "3".to_owned(), ..first.clone() }));
    }

    #[test]
    fn the_same_sentence_is_not_repeated() {
        let mut published = Published::default();
        assert!(published.is_new(1));
        published.remember(1);
        assert!(!published.is_new(1) && published.is_new(2));
    }

    #[test]
    fn a_long_sentence_is_cut_between_two_characters() {
        let long = "…".repeat(500);
        assert_eq!(shorten(&long).len(), 999);
    }
}
