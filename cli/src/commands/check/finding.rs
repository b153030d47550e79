//! Findings about what could not be read.

use tulle_mesh::check::{Check, Finding};

use crate::objects::{Kind, Unread};

/// Findings about requests to the API server.
pub trait UnreadCheck {
    /// It could not be checked, because a request to the API server failed.
    fn unread(&self, what: &str, why: &Unread, request: &ReadRequest) -> Finding;
}

impl UnreadCheck for Check {
    fn unread(&self, what: &str, why: &Unread, request: &ReadRequest) -> Finding {
        let unknown = self.unknown(what, why);
        match why {
            Unread::Forbidden(_) => unknown
                .hint("this check needs the right that the command asks for: let an administrator grant it")
                .fix(request.right()),
            Unread::NotServed | Unread::Failed(_) => unknown.hint(REPEATS).fix(request.command()),
        }
    }
}

/// The hint of a finding whose command sends a failed request again.
pub const REPEATS: &str =
    "the other checks are not affected; the command repeats the request, and shows the API server's answer";

/// A read request to the API server, as kubectl takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadRequest {
    verb: &'static str,
    /// Kind, name and namespace, or a path that is not of an object.
    target: String,
}

impl ReadRequest {
    /// Lists the objects of a kind in a namespace, or in all.
    pub fn list(kind: Kind, namespace: Option<&str>) -> Self {
        let place = match namespace {
            _ if !kind.namespaced => String::new(),
            Some(namespace) => format!(" -n {namespace}"),
            None => " -A".to_owned(),
        };
        Self { verb: "list", target: format!("{}{place}", kind.resource()) }
    }

    /// Reads an object.
    pub fn object(kind: Kind, namespace: Option<&str>, name: &str) -> Self {
        let place = namespace.map(|namespace| format!(" -n {namespace}")).unwrap_or_default();
        Self { verb: "get", target: format!("{}/{name}{place}", kind.resource()) }
    }

    /// Reads an object that is written as `Kind/namespace/name` or `Kind/name`.
    pub fn titled(title: &str) -> Self {
        let (kind, full_name) = title.split_once('/').unwrap_or((title, ""));
        let kind = kind.to_lowercase();
        let target = match full_name.split_once('/') {
            Some((namespace, name)) => format!("{kind}/{name} -n {namespace}"),
            None => format!("{kind}/{full_name}"),
        };
        Self { verb: "get", target }
    }

    /// Reads a path that is not of an object, such as `/version`.
    pub fn path(path: &str) -> Self {
        Self { verb: "get", target: path.to_owned() }
    }

    /// The command that says whether the user may send it.
    fn right(&self) -> String {
        format!("kubectl auth can-i {} {}", self.verb, self.target)
    }

    /// The command that sends it.
    fn command(&self) -> String {
        let raw = if self.target.starts_with('/') { "--raw " } else { "" };
        format!("kubectl get {raw}{}", self.target)
    }
}
