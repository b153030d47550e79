//! The version of each resource that is in force, as a new stream begins with it, and the contents of as many as fit
//! into `MAX_CONTENT`. Nothing is decided by contents: they are compared with what the operator would send now.
//!
//! Contents of endpoints are not kept, because a second copy of the endpoints in use would be most of the memory. They
//! are made from those in use when somebody asks.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use prost::Message as _;
use tulle_mesh::proto::resource::Body;
use tulle_mesh::proto::{self, Held, Resource, ResourceName, ResourceType};
use tulle_mesh::resources::{Described, content};

/// Bytes of contents that are kept; beyond them, versions alone. A route without rules takes about 150 bytes, one with
/// five sections of policies about 500.
const MAX_CONTENT: usize = 64 << 10;
/// Bytes of contents in one answer, which takes about five times as many while it is written; beyond them, versions
/// alone. An endpoint takes about 200 bytes.
const MAX_ANSWER: usize = 256 << 10;

/// The last good version of each resource.
#[derive(Debug, Default)]
pub struct AcceptedResources {
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    by_key: BTreeMap<Key, Accepted>,
    /// Of all contents.
    bytes: usize,
}

/// What the operator calls a resource.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    pub(super) kind: i32,
    pub(super) name: String,
}

#[derive(Debug)]
struct Accepted {
    version: String,
    /// What is shown of it. `None`: there was no room, or it is of endpoints.
    content: Option<Box<[u8]>>,
}

impl Key {
    pub(super) fn of(name: &ResourceName) -> Self {
        Self { kind: name.r#type, name: name.name.clone() }
    }

    pub(super) fn on_the_wire(&self) -> ResourceName {
        ResourceName { r#type: self.kind, cluster: String::new(), name: self.name.clone() }
    }

    fn is_of_endpoints(&self) -> bool {
        self.kind == i32::from(ResourceType::Endpoints)
    }
}

impl AcceptedResources {
    /// A resource is in force, in place of its last version.
    pub fn accept(&self, resource: &Resource) {
        self.accept_within(resource, MAX_CONTENT);
    }

    fn accept_within(&self, resource: &Resource, max: usize) {
        let Some(key) = resource.name.as_ref().map(Key::of) else { return };
        let mut kept = self.lock();
        kept.forget(&key);
        let fits = |bytes: usize| bytes.saturating_add(resource.encoded_len()) <= max;
        let is_kept = !key.is_of_endpoints() && fits(kept.bytes);
        let content: Option<Box<[u8]>> = is_kept.then(|| content(resource).into());
        kept.bytes += content.as_ref().map_or(0, |content| content.len());
        kept.by_key.insert(key, Accepted { version: resource.version.clone(), content });
    }

    /// A resource is no longer used.
    pub fn forget(&self, key: &Key) {
        self.lock().forget(key);
    }

    /// All resources, in order.
    pub fn keys(&self) -> Vec<Key> {
        self.lock().by_key.keys().cloned().collect()
    }

    /// All resources with their versions, as a stream begins with them.
    pub fn held(&self) -> Vec<Held> {
        let kept = self.lock();
        let held = kept.by_key.iter();
        held.map(|(key, accepted)| Held { name: Some(key.on_the_wire()), version: accepted.version.clone() })
            .collect()
    }

    /// All resources, as they are shown, and the contents of those that are `asked` for ([`Described::key`]). `in_use`
    /// makes the content of endpoints, which are not kept here.
    pub fn described(
        &self,
        asked: &HashSet<&str>,
        in_use: impl Fn(&str) -> Option<proto::Endpoints>,
    ) -> Vec<Described> {
        let mut left = MAX_ANSWER;
        let mut all = Vec::new();
        for Held { name, version } in self.held() {
            let bare = Resource { name, version, ..Resource::default() };
            let Some(mut described) = Described::of(&bare, false) else { continue };
            if asked.contains(described.key().as_str())
                && let Some(content) = self.content(bare, &in_use)
                && let Some(rest) = left.checked_sub(content.len())
            {
                described = described.with(&content);
                left = rest;
            }
            all.push(described);
        }
        all
    }

    /// What is shown of a resource. `None`: that is not kept, or the resource has been forgotten meanwhile.
    fn content(
        &self,
        bare: Resource,
        in_use: impl Fn(&str) -> Option<proto::Endpoints>,
    ) -> Option<Box<[u8]>> {
        let key = Key::of(bare.name.as_ref()?);
        if key.is_of_endpoints() {
            let body = Some(Body::Endpoints(in_use(&key.name)?));
            return Some(content(&Resource { body, ..bare }).into());
        }
        self.lock().by_key.get(&key)?.content.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn forget(&mut self, key: &Key) {
        let forgotten = self.by_key.remove(key);
        let length = forgotten.and_then(|accepted| accepted.content).map_or(0, |content| content.len());
        self.bytes = self.bytes.saturating_sub(length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(kind: ResourceType, text: &str) -> ResourceName {
        ResourceName { r#type: kind.into(), cluster: String::new(), name: text.to_owned() }
    }

    fn key(kind: ResourceType, text: &str) -> Key {
        Key::of(&name(kind, text))
    }

    fn route(text: &str, version: &str) -> Resource {
        let kind = Some(proto::route::Kind::Unknown(proto::Unknown {}));
        let body = Some(Body::Route(proto::Route { kind }));
        let name = Some(name(ResourceType::Route, text));
        Resource { name, version: version.to_owned(), body, ..Resource::default() }
    }

    fn endpoints(text: &str, version: &str) -> Resource {
        let body = Some(Body::Endpoints(proto::Endpoints::default()));
        let name = Some(name(ResourceType::Endpoints, text));
        Resource { name, version: version.to_owned(), body, ..Resource::default() }
    }

    /// Key, version, and whether there is a content, with all contents asked for.
    fn shown(accepted: &AcceptedResources) -> Vec<(String, String, bool)> {
        let none = |_: &str| None;
        let keys: Vec<String> =
            accepted.described(&HashSet::new(), none).iter().map(Described::key).collect();
        let asked: HashSet<&str> = keys.iter().map(String::as_str).collect();
        let described = accepted.described(&asked, none).into_iter();
        described.map(|found| (found.key(), found.version, found.content.is_some())).collect()
    }

    fn row(key: &str, version: &str, has_content: bool) -> (String, String, bool) {
        (key.to_owned(), version.to_owned(), has_content)
    }

    #[test]
    fn a_version_takes_the_place_of_the_last_one_until_it_is_forgotten() {
        let accepted = AcceptedResources::default();
        accepted.accept(&route("10.0.0.1:80", "v1"));
        accepted.accept(&route("10.0.0.1:80", "v2"));
        assert_eq!(shown(&accepted), [row("route/10.0.0.1:80", "v2", true)]);
        let held = Held { name: Some(name(ResourceType::Route, "10.0.0.1:80")), version: "v2".to_owned() };
        assert_eq!(accepted.held(), [held]);
        accepted.forget(&key(ResourceType::Route, "10.0.0.1:80"));
        assert!(shown(&accepted).is_empty() && accepted.keys().is_empty());
        assert_eq!(accepted.lock().bytes, 0);
    }

    #[test]
    fn beyond_the_bound_only_versions_are_kept_and_what_is_forgotten_makes_room() {
        let accepted = AcceptedResources::default();
        let max = route("10.0.0.1:80", "v1").encoded_len();
        accepted.accept_within(&route("10.0.0.1:80", "v1"), max);
        accepted.accept_within(&route("10.0.0.2:80", "v1"), max);
        let expected = [row("route/10.0.0.1:80", "v1", true), row("route/10.0.0.2:80", "v1", false)];
        assert_eq!(shown(&accepted), expected);
        accepted.forget(&key(ResourceType::Route, "10.0.0.1:80"));
        accepted.accept_within(&route("10.0.0.2:80", "v2"), max);
        assert_eq!(shown(&accepted), [row("route/10.0.0.2:80", "v2", true)]);
    }

    #[test]
    fn endpoints_take_no_memory_here_and_no_content_is_made_that_is_not_asked_for() {
        let accepted = AcceptedResources::default();
        accepted.accept(&endpoints("shop/web:80", "v1"));
        assert_eq!(accepted.lock().bytes, 0);
        let unasked = |name: &str| -> Option<proto::Endpoints> { panic!("{name}") };
        let described = accepted.described(&HashSet::from(["route/10.0.0.1:80"]), unasked);
        assert!(matches!(described.as_slice(), [only] if only.content.is_none() && only.version == "v1"));
        let made = |name: &str| (name == "shop/web:80").then(proto::Endpoints::default);
        let described = accepted.described(&HashSet::from(["endpoints/shop/web:80"]), made);
        assert!(matches!(described.as_slice(), [only] if only.content.is_some()), "{described:?}");
    }

    #[test]
    fn an_answer_has_a_bound_and_beyond_it_versions_alone() {
        let accepted = AcceptedResources::default();
        let names = ["shop/a:80", "shop/b:80"];
        names.iter().for_each(|name| accepted.accept(&endpoints(name, "v1")));
        accepted.accept(&route("10.0.0.1:80", "v1"));
        let endpoint = proto::Endpoint { node: "n".repeat(200), ..proto::Endpoint::default() };
        let many = |_: &str| {
            let endpoints = vec![endpoint.clone(); 1_000];
            Some(proto::Endpoints { endpoints, ..proto::Endpoints::default() })
        };
        let asked = HashSet::from(["endpoints/shop/a:80", "endpoints/shop/b:80", "route/10.0.0.1:80"]);
        let described = accepted.described(&asked, many);
        let contents: Vec<bool> = described.iter().map(|found| found.content.is_some()).collect();
        assert_eq!(contents, [true, false, true]);
    }
}
