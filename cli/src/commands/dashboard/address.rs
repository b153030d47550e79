//! Addresses of the page that are about a Canary: `/canary/{namespace}/{name}`, and one more segment for an action.

use crate::commands::canary::action::Verb;

/// The page of a Canary, or one below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address<'a> {
    pub namespace: &'a str,
    pub name: &'a str,
    pub verb: Option<Verb>,
}

impl<'a> Address<'a> {
    /// Reads a path. `None`: it is about something else.
    pub fn parse(path: &'a str) -> Option<Self> {
        let mut segments = path.strip_prefix("/canary/")?.split('/');
        let (namespace, name) = (segments.next()?, segments.next()?);
        let verb = match segments.next() {
            Some(verb) => Some(Verb::named(verb)?),
            None => None,
        };
        let is_whole = segments.next().is_none() && is_name(namespace) && is_name(name);
        is_whole.then_some(Self { namespace, name, verb })
    }
}

/// A name of Kubernetes. It is the same in an address and in a command, and needs no escape in either.
fn is_name(text: &str) -> bool {
    let known = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte);
    text.len() <= 253
        && text.starts_with(|first: char| first.is_ascii_alphanumeric())
        && text.bytes().all(known)
}

/// An action that a form asks for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Asked {
    pub namespace: String,
    pub name: String,
    pub verb: Verb,
}

impl Asked {
    /// The action that forms at this path ask for.
    pub fn at(path: &str) -> Option<Self> {
        let Address { namespace, name, verb } = Address::parse(path)?;
        Some(Self { namespace: namespace.to_owned(), name: name.to_owned(), verb: verb? })
    }

    /// The page of the Canary.
    pub fn page(&self) -> String {
        format!("/canary/{}/{}", self.namespace, self.name)
    }

    /// The command that does the same.
    pub fn command(&self) -> String {
        format!("tulle canary {} {} -n {}", self.verb.name(), self.name, self.namespace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_of_a_canary_and_those_of_its_actions_are_known() {
        let page = Address { namespace: "shop", name: "web", verb: None };
        assert_eq!(Address::parse("/canary/shop/web"), Some(page));
        assert_eq!(Asked::at("/canary/shop/web"), None);
        let asked = Asked::at("/canary/shop/web/abort").unwrap();
        assert_eq!(asked.verb, Verb::Abort);
        assert_eq!(asked.page(), "/canary/shop/web");
        assert_eq!(asked.command(), "tulle canary abort web -n shop");
    }

    #[test]
    fn other_addresses_are_about_no_canary() {
        for path in [
            "/canaries",
            "/canary/shop",
            "/canary/shop/",
            "/canary//web",
            "/canary/shop/web/",
            "/canary/shop/web/undo",
            "/canary/shop/web/pause/now",
            "/canary/../web",
            "/canary/shop/-A",
            "/canary/shop/%77eb/pause",
            "/workload/shop/web",
        ] {
            assert_eq!(Address::parse(path), None, "{path}");
        }
    }
}
