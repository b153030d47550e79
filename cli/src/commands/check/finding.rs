//! The checks, with the numbers that never change, and what a check has found.

use std::fmt;

use serde::Serialize;

use crate::objects::{Kind, Unread};

/// How a check ended. In order: the worst last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    Ok,
    Warning,
    Error,
}

/// A check.
#[derive(Debug, PartialEq, Eq)]
pub struct Check {
    /// Its number: never given to another check, so that it can be searched for.
    pub id: &'static str,
    /// The heading below which it stands.
    pub category: &'static str,
    /// What holds if all is well.
    pub title: &'static str,
}

/// Declares the checks, and the list of them.
macro_rules! checks {
    ($($name:ident $id:literal $category:literal $title:literal;)+) => {
        $(pub const $name: Check = Check { id: $id, category: $category, title: $title };)+

        /// Every check, in the order in which they are reported.
        pub const ALL: &[&Check] = &[$(&$name),+];
    };
}

checks! {
    SERVER "T0101" "cluster" "the Kubernetes version is supported";
    KUBELETS "T0102" "cluster" "every node can run native sidecars";
    PERMISSIONS "T0103" "cluster" "you may install Tulle";
    POD_SECURITY "T0104" "cluster" "labelled namespaces admit the init container";
    DEFINITIONS "T0201" "definitions" "the CustomResourceDefinitions are installed";
    VERSIONS "T0202" "definitions" "the CustomResourceDefinitions serve v1alpha1";
    MANAGER "T0203" "definitions" "one tool manages the CustomResourceDefinitions";
    OBJECTS "T0204" "definitions" "every object of the installation exists";
    SCHEMAS "T0205" "definitions" "the CustomResourceDefinitions have the schemas of their version";
    DEPLOYMENT "T0301" "operator" "operator and webhook are available";
    REPLICAS "T0302" "operator" "one replica may fail";
    LEADER "T0303" "operator" "a replica leads";
    QUERY "T0304" "operator" "the operator answers";
    SKEW "T0305" "operator" "this program has the operator's version";
    SERIES "T0306" "operator" "the operator has room for all series";
    ROOT "T0401" "certificates" "the root certificate is valid for long enough";
    HOOKS "T0501" "webhook" "the webhook configurations are installed";
    BUNDLE "T0502" "webhook" "the API server can verify the webhook";
    FAILURE "T0503" "webhook" "the failure policies are those of Tulle";
    ENDPOINTS "T0504" "webhook" "the Services have endpoints";
    NAMESPACES "T0601" "namespaces" "labelled namespaces are known";
    INJECTED "T0602" "namespaces" "every pod of labelled namespaces has a sidecar";
    SIDECAR_SKEW "T0701" "sidecars" "every sidecar has a supported version";
    REFUSED "T0702" "sidecars" "no sidecar has refused its configuration";
    BEHIND "T0703" "sidecars" "every sidecar has the present configuration";
    CERTIFICATE "T0704" "sidecars" "every sidecar has a valid certificate";
    POLICIES "T0801" "policies" "every MeshPolicy is enforced";
    CANARIES "T0901" "canaries" "every Canary is valid, and none is stuck";
    DEADLINES "T0902" "canaries" "deadlines are longer than the steps";
    OWNERS "T0903" "canaries" "no other tool undoes a rollout";
    ROUTES "T0920" "routes" "every route is accepted";
    CILIUM "T0930" "network" "the network plugin leaves Services' addresses to the sidecar";
}

/// What a check has found about one thing, or that all is well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    pub id: &'static str,
    pub category: &'static str,
    /// What was checked.
    pub check: &'static str,
    pub result: Outcome,
    /// What was found.
    pub found: String,
    /// What it means, and what to do. Empty only where all is well.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub hint: String,
    /// The command that repairs it, or that shows more. Empty only where all is well.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub fix: String,
}

impl Check {
    fn finding(&self, result: Outcome, found: String) -> Finding {
        let (id, category, check) = (self.id, self.category, self.title);
        Finding { id, category, check, result, found, hint: String::new(), fix: String::new() }
    }

    /// All is well.
    pub fn ok(&self, found: impl Into<String>) -> Finding {
        self.finding(Outcome::Ok, found.into())
    }

    /// It works, and may not for long or not for all.
    pub fn warning(&self, found: impl Into<String>) -> Finding {
        self.finding(Outcome::Warning, found.into())
    }

    /// It does not work.
    pub fn error(&self, found: impl Into<String>) -> Finding {
        self.finding(Outcome::Error, found.into())
    }

    /// It could not be checked.
    pub fn unknown(&self, what: &str, why: impl fmt::Display) -> Finding {
        self.warning(format!("{what} could not be checked: {why}"))
    }

    /// It could not be checked, because a request to the API server failed.
    pub fn unread(&self, what: &str, why: &Unread, request: &ReadRequest) -> Finding {
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

impl Finding {
    /// The same with a hint.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// The same with a command.
    pub fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = fix.into();
        self
    }
}

/// The findings, or that all is well if there are none.
pub fn or_ok(findings: Vec<Finding>, well: impl FnOnce() -> Finding) -> Vec<Finding> {
    if findings.is_empty() { vec![well()] } else { findings }
}
