//! Applies the events of one watch to the model.
//!
//! In: events as kube's watcher yields them. Out: changes of the model behind a [`Hub`]. Decides whether a list is
//! complete enough to delete the objects that it does not contain, and when a kind that this account may not read is gone
//! on without. Never opens a connection.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt as _};
use kube::runtime::watcher::{self, Event};

use super::Hub;
use crate::model::Model;

/// A list that comes back less than half as long as at least this many known objects is requested again
/// before anything is deleted, because an API server that is still starting answers with fewer objects than
/// exist.
const SUSPICIOUS: usize = 10;

/// How long a kind must have been forbidden before the operator goes on without it. An API server that has just started
/// forbids everything until it has read its roles.
const FORBIDDEN_FOR: Duration = Duration::from_secs(10);

/// Functions that apply the objects of one kind to the model.
pub(super) struct Handlers<I, A, D> {
    /// Name of the kind, for the log.
    pub(super) kind: String,
    /// What is lacking where this account may not read the kind: an upgrade in which the ClusterRole comes last, or never.
    /// `None`: nothing can be served without it.
    pub(super) without: Option<&'static str>,
    /// Identifies an object.
    pub(super) id: I,
    /// Puts an object into the model.
    pub(super) apply: A,
    /// Removes an object from the model.
    pub(super) delete: D,
}

/// The objects of one kind that its watches have returned. Outlives each watch.
#[derive(Debug)]
pub(super) struct Known<Id> {
    ids: HashSet<Id>,
    /// Objects of the list in progress.
    listed: HashSet<Id>,
    /// The last list was suspect. The next one is accepted however short it is.
    suspected: bool,
    /// A list has been accepted, or the kind is gone on without: it counts as synced.
    synced: bool,
    /// Since when every list has been forbidden.
    forbidden_since: Option<Instant>,
}

impl<Id> Default for Known<Id> {
    fn default() -> Self {
        Self {
            ids: HashSet::new(),
            listed: HashSet::new(),
            suspected: false,
            synced: false,
            forbidden_since: None,
        }
    }
}

/// The verdict on a list that has ended.
#[derive(Debug, PartialEq, Eq)]
enum Relist<Id> {
    /// List again before anything is deleted.
    Suspect,
    /// The list is complete: these objects are gone.
    Accepted { gone: Vec<Id> },
}

impl<Id: Hash + Eq + Clone> Known<Id> {
    fn end_of_list(&mut self) -> Relist<Id> {
        let listed = std::mem::take(&mut self.listed);
        self.forbidden_since = None;
        if !self.suspected && self.ids.len() >= SUSPICIOUS && listed.len() < self.ids.len() / 2 {
            self.suspected = true;
            // They are in the model by now. Those that are missing in the next list are deleted then.
            self.ids.extend(listed);
            return Relist::Suspect;
        }
        self.suspected = false;
        let gone = self.ids.difference(&listed).cloned().collect();
        self.ids = listed;
        Relist::Accepted { gone }
    }

    /// Counts the kind as synced, once.
    pub(super) fn count(&mut self, hub: &Hub) {
        if !std::mem::replace(&mut self.synced, true) {
            hub.synced.fetch_add(1, Ordering::Release);
            hub.change(|_| {});
        }
    }

    /// Notes a failure. A kind that has been forbidden for a while, and that the rest can do without, counts as synced:
    /// its objects come when the right does.
    fn failed(
        &mut self,
        hub: &Hub,
        (kind, without): (&str, Option<&'static str>),
        error: &watcher::Error,
        now: Instant,
    ) {
        if !is_forbidden(error) {
            self.forbidden_since = None;
            tracing::warn!(kind, %error, "watch failed; retrying");
            return;
        }
        let lacking = without.unwrap_or("no sidecar is served");
        tracing::error!(
            kind,
            lacking,
            %error,
            "this account may not read this kind; apply the ClusterRole tulle-operator of this operator's version"
        );
        let since = *self.forbidden_since.get_or_insert(now);
        if without.is_some() && now.saturating_duration_since(since) >= FORBIDDEN_FOR {
            self.count(hub);
        }
    }

    /// Forgets all objects, of a kind that is not served any more. Returns those that there were.
    pub(super) fn forget(&mut self) -> HashSet<Id> {
        self.listed.clear();
        self.suspected = false;
        std::mem::take(&mut self.ids)
    }
}

/// Applies the events of one watch until it ends or a list is suspect. The caller then starts another watch.
pub(super) async fn follow<K, Id>(
    events: impl Stream<Item = Result<Event<K>, watcher::Error>>,
    hub: &Hub,
    known: &mut Known<Id>,
    handlers: &Handlers<impl Fn(&K) -> Id, impl Fn(&mut Model, K), impl Fn(&mut Model, &Id)>,
) where
    Id: Hash + Eq + Clone,
{
    let Handlers { kind, without, id, apply, delete } = handlers;
    let mut events = std::pin::pin!(events);
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Init) => known.listed.clear(),
            Ok(Event::InitApply(object)) => {
                known.listed.insert(id(&object));
                hub.change(|model| apply(model, object));
            }
            Ok(Event::InitDone) => {
                let (before, listed) = (known.ids.len(), known.listed.len());
                match known.end_of_list() {
                    Relist::Suspect => {
                        tracing::warn!(
                            kind,
                            known = before,
                            listed,
                            "list is less than half as long as the known objects; listing again before deleting any"
                        );
                        return;
                    }
                    Relist::Accepted { gone } => {
                        for gone in &gone {
                            hub.change(|model| delete(model, gone));
                        }
                        known.count(hub);
                    }
                }
            }
            Ok(Event::Apply(object)) => {
                known.ids.insert(id(&object));
                hub.change(|model| apply(model, object));
            }
            Ok(Event::Delete(object)) => {
                let gone = id(&object);
                known.ids.remove(&gone);
                hub.change(|model| delete(model, &gone));
            }
            Err(error) => known.failed(hub, (kind.as_str(), *without), &error, Instant::now()),
        }
    }
}

/// Whether the API server refused a list or watch to this account.
fn is_forbidden(error: &watcher::Error) -> bool {
    use watcher::Error::{InitialListFailed, WatchFailed, WatchStartFailed};
    match error {
        InitialListFailed(kube::Error::Api(status))
        | WatchStartFailed(kube::Error::Api(status))
        | WatchFailed(kube::Error::Api(status)) => status.is_forbidden(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
    use kube::ResourceExt as _;
    use tulle_crds::keys;

    use super::super::{convert, wire};
    use super::*;

    /// A hub that follows namespaces `n0`, `n1`, …, all of them meshed.
    #[derive(Default)]
    struct Watch {
        hub: Hub,
        known: Known<String>,
    }

    impl Watch {
        async fn events(&mut self, events: Vec<Event<wire::Namespace>>) {
            self.results(None, events.into_iter().map(Ok).collect()).await;
        }

        async fn fails(&mut self, without: Option<&'static str>, error: watcher::Error) {
            self.results(without, vec![Ok(Event::Init), Err(error)]).await;
        }

        async fn results(
            &mut self,
            without: Option<&'static str>,
            results: Vec<Result<Event<wire::Namespace>, watcher::Error>>,
        ) {
            let handlers = Handlers {
                kind: "Namespace".to_owned(),
                without,
                id: |object: &wire::Namespace| object.name_any(),
                apply: |model: &mut Model, object: wire::Namespace| {
                    model.apply_namespace(object.name_any().into(), convert::namespace(&object));
                },
                delete: |model: &mut Model, name: &String| model.delete_namespace(name),
            };
            follow(futures::stream::iter(results), &self.hub, &mut self.known, &handlers).await;
        }

        async fn list(&mut self, numbers: Range<u32>) {
            let objects = numbers.map(|number| Event::InitApply(namespace(number)));
            self.events([Event::Init].into_iter().chain(objects).chain([Event::InitDone]).collect()).await;
        }

        fn in_model(&self) -> usize {
            self.hub.model().trusting_namespaces().len()
        }

        fn kinds_synced(&self) -> usize {
            self.hub.synced.load(Ordering::Acquire)
        }
    }

    fn namespace(number: u32) -> wire::Namespace {
        let metadata = ObjectMeta {
            name: Some(format!("n{number}")),
            labels: Some([(keys::INJECT.to_owned(), "enabled".to_owned())].into()),
            ..ObjectMeta::default()
        };
        wire::Namespace { metadata, ..wire::Namespace::default() }
    }

    #[tokio::test]
    async fn a_list_that_shrinks_by_more_than_half_is_accepted_only_when_it_comes_twice() {
        let mut watch = Watch::default();
        watch.list(0..20).await;
        watch.list(0..3).await;
        assert_eq!(watch.in_model(), 20, "nothing is deleted after a suspect list");
        watch.list(0..3).await;
        assert_eq!(watch.in_model(), 3);
    }

    #[tokio::test]
    async fn a_kind_counts_as_synced_once_however_often_it_is_listed() {
        let mut watch = Watch::default();
        watch.list(0..20).await;
        assert_eq!(watch.kinds_synced(), 1);
        watch.list(0..3).await;
        watch.list(0..3).await;
        watch.list(0..20).await;
        assert_eq!(watch.kinds_synced(), 1, "a suspect list and its repetition are the same kind");
    }

    #[tokio::test]
    async fn after_a_suspect_list_was_repeated_the_next_short_one_is_suspect_again() {
        let mut watch = Watch::default();
        watch.list(0..20).await;
        watch.list(0..3).await;
        watch.list(0..20).await;
        watch.list(0..3).await;
        assert_eq!(watch.in_model(), 20);
    }

    #[tokio::test]
    async fn an_object_that_only_the_suspect_list_held_is_deleted() {
        let mut watch = Watch::default();
        watch.list(0..20).await;
        watch.list(30..31).await;
        assert_eq!(watch.in_model(), 21);
        watch.list(0..20).await;
        assert_eq!(watch.in_model(), 20);
    }

    fn forbidden() -> watcher::Error {
        let status = kube::core::Status::failure("not allowed", "Forbidden").with_code(403);
        watcher::Error::InitialListFailed(kube::Error::Api(Box::new(status)))
    }

    #[tokio::test]
    async fn a_kind_that_may_not_be_read_holds_up_the_rest_for_a_moment_only() {
        let mut watch = Watch::default();
        watch.fails(Some("nothing of it holds"), forbidden()).await;
        assert_eq!(watch.kinds_synced(), 0, "an API server that is starting");
        watch.known.forbidden_since = Instant::now().checked_sub(FORBIDDEN_FOR);
        watch.fails(Some("nothing of it holds"), watcher::Error::NoResourceVersion).await;
        watch.fails(Some("nothing of it holds"), forbidden()).await;
        assert_eq!(watch.kinds_synced(), 0, "the time begins anew");
        for _ in 0..2 {
            watch.known.forbidden_since = Instant::now().checked_sub(FORBIDDEN_FOR);
            watch.fails(Some("nothing of it holds"), forbidden()).await;
            assert_eq!(watch.kinds_synced(), 1);
        }
        watch.list(0..3).await;
        assert_eq!((watch.in_model(), watch.kinds_synced()), (3, 1), "it is read as soon as it may be");
    }

    #[tokio::test]
    async fn a_kind_without_which_nothing_can_be_served_is_waited_for_however_long_it_is_forbidden() {
        let mut watch = Watch::default();
        watch.known.forbidden_since = Instant::now().checked_sub(FORBIDDEN_FOR);
        watch.fails(None, forbidden()).await;
        assert_eq!(watch.kinds_synced(), 0);
    }

    #[tokio::test]
    async fn objects_come_and_go_between_lists() {
        let mut watch = Watch::default();
        watch.events(vec![Event::Init, Event::InitDone, Event::Apply(namespace(1))]).await;
        assert_eq!(watch.in_model(), 1);
        watch.events(vec![Event::Delete(namespace(1))]).await;
        assert_eq!(watch.in_model(), 0);
    }
}
