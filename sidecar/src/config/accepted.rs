//! The resources that are in force, as the operator sent them. Nothing is decided by these: they are compared with what
//! the operator would send now.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use prost::Message as _;
use tulle_mesh::proto::{Resource, ResourceName};
use tulle_mesh::resources::{Described, MAX_CONTENT_BYTES};

/// The last good version of each resource.
#[derive(Debug, Default)]
pub struct AcceptedResources {
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    by_name: BTreeMap<Name, Accepted>,
    /// Of all contents.
    bytes: usize,
}

/// Type and name of a resource.
type Name = (i32, String);

#[derive(Debug)]
struct Accepted {
    version: String,
    /// The resource on the wire. `None`: there was no room.
    content: Option<Box<[u8]>>,
}

impl AcceptedResources {
    /// A resource is in force, in place of its last version.
    pub fn accept(&self, resource: &Resource) {
        self.accept_within(resource, MAX_CONTENT_BYTES);
    }

    fn accept_within(&self, resource: &Resource, max: usize) {
        let Some(name) = &resource.name else { return };
        let mut kept = self.lock();
        kept.forget(name);
        let length = resource.encoded_len();
        let content = (kept.bytes.saturating_add(length) <= max).then(|| resource.encode_to_vec().into());
        if content.is_some() {
            kept.bytes += length;
        }
        let accepted = Accepted { version: resource.version.clone(), content };
        kept.by_name.insert((name.r#type, name.name.clone()), accepted);
    }

    /// A resource is used no more.
    pub fn forget(&self, name: &ResourceName) {
        self.lock().forget(name);
    }

    /// All resources, as they are shown.
    pub fn described(&self) -> Vec<Described> {
        let kept = self.lock();
        let described = kept.by_name.iter().filter_map(|((kind, name), accepted)| {
            let decoded = accepted.content.as_deref().and_then(|content| Resource::decode(content).ok());
            match decoded {
                Some(resource) => Described::of(&resource, true),
                None => {
                    let name =
                        Some(ResourceName { r#type: *kind, cluster: String::new(), name: name.clone() });
                    let resource =
                        Resource { name, version: accepted.version.clone(), ..Resource::default() };
                    Described::of(&resource, false)
                }
            }
        });
        described.collect()
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn forget(&mut self, name: &ResourceName) {
        let forgotten = self.by_name.remove(&(name.r#type, name.name.clone()));
        let length = forgotten.and_then(|accepted| accepted.content).map_or(0, |content| content.len());
        self.bytes = self.bytes.saturating_sub(length);
    }
}

#[cfg(test)]
mod tests {
    use tulle_mesh::proto::resource::Body;
    use tulle_mesh::proto::{Endpoints, ResourceType};

    use super::*;

    fn name(text: &str) -> ResourceName {
        ResourceName { r#type: ResourceType::Endpoints.into(), cluster: String::new(), name: text.to_owned() }
    }

    fn resource(text: &str, version: &str) -> Resource {
        let body = Some(Body::Endpoints(Endpoints::default()));
        Resource { name: Some(name(text)), version: version.to_owned(), body, ..Resource::default() }
    }

    fn versions(accepted: &AcceptedResources) -> Vec<(String, String, bool)> {
        let described = accepted.described().into_iter();
        described.map(|found| (found.key(), found.version, found.content.is_some())).collect()
    }

    fn row(key: &str, version: &str, has_content: bool) -> (String, String, bool) {
        (key.to_owned(), version.to_owned(), has_content)
    }

    #[test]
    fn a_version_takes_the_place_of_the_last_one_until_it_is_forgotten() {
        let accepted = AcceptedResources::default();
        accepted.accept(&resource("shop/web:80", "v1"));
        accepted.accept(&resource("shop/web:80", "v2"));
        assert_eq!(versions(&accepted), [row("endpoints/shop/web:80", "v2", true)]);
        accepted.forget(&name("shop/web:80"));
        assert!(versions(&accepted).is_empty());
        assert_eq!(accepted.lock().bytes, 0);
    }

    #[test]
    fn beyond_the_bound_only_versions_are_kept_and_what_is_forgotten_makes_room() {
        let accepted = AcceptedResources::default();
        let max = resource("a/a:1", "v1").encoded_len();
        accepted.accept_within(&resource("a/a:1", "v1"), max);
        accepted.accept_within(&resource("b/b:1", "v1"), max);
        assert_eq!(
            versions(&accepted),
            [row("endpoints/a/a:1", "v1", true), row("endpoints/b/b:1", "v1", false)]
        );
        accepted.forget(&name("a/a:1"));
        accepted.accept_within(&resource("b/b:1", "v2"), max);
        assert_eq!(versions(&accepted), [row("endpoints/b/b:1", "v2", true)]);
    }
}
