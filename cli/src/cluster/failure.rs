//! Errors of the API server, as sentences that say what to do.

use std::error::Error;

use kube::client::UpgradeConnectionError;

use super::Located;
use crate::exit::CliError;
use crate::objects::Unread;

impl From<kube::Error> for CliError {
    fn from(error: kube::Error) -> Self {
        of(&error)
    }
}

/// What an error of the API server means.
pub fn of(error: &kube::Error) -> CliError {
    match error {
        kube::Error::Api(status) => match status.code {
            401 => CliError::failed(format!("the API server refuses the credentials: {}", status.message))
                .hint("log in again; `kubectl auth whoami` shows whether the kubeconfig works"),
            403 => {
                let forbidden = CliError::failed(&status.message);
                match right(&status.message) {
                    Some(right) => forbidden.hint(format!("ask for this right: {right}")),
                    None => forbidden,
                }
            }
            _ if status.message.is_empty() => {
                CliError::failed(format!("the API server answers {} {}", status.code, status.reason))
            }
            _ => CliError::failed(&status.message),
        },
        kube::Error::Service(_) | kube::Error::HyperError(_) => {
            CliError::failed(format!("the API server cannot be reached: {}", chain(error)))
                .hint("`kubectl cluster-info` shows its address; --context chooses another cluster")
        }
        kube::Error::Auth(_) => CliError::failed(format!("cannot authenticate: {}", chain(error))),
        _ => CliError::failed(chain(error)),
    }
}

/// The same, after what was tried: `cannot list Canaries: …`.
pub fn doing(what: &str, error: &kube::Error) -> CliError {
    after(what, of(error))
}

/// The same for something that could not be done: `cannot read pod shop/web: …`.
pub fn cannot(what: &str, error: &kube::Error) -> CliError {
    doing(&format!("cannot {what}"), error)
}

/// The same for an object of Tulle's kinds that was listed, created, or read without being looked for by name.
/// "Not found" then means the kind.
pub fn doing_tulle(what: &str, error: &kube::Error) -> CliError {
    match error {
        kube::Error::Api(status) if status.code == 404 && !names_object(status) => not_installed(),
        other => doing(what, other),
    }
}

/// Whether the API server has looked for an object: the kind is served, and the object does not exist.
pub fn names_object(status: &kube::core::Status) -> bool {
    status.details.as_ref().is_some_and(|details| !details.name.is_empty())
}

/// The cluster does not have the kinds of the group tulle.dev.
fn not_installed() -> CliError {
    CliError::failed("Tulle is not installed: the cluster does not have the kinds of tulle.dev")
        .hint("tulle install; `tulle check` shows what is there")
}

/// What could not be read, after what was tried.
pub fn of_unread(what: &str, why: &Unread) -> CliError {
    let failed = CliError::failed(format!("{what}: {why}"));
    match why {
        Unread::Forbidden(message) => match right(message) {
            Some(right) => failed.hint(format!("ask for this right: {right}")),
            None => failed,
        },
        Unread::NotServed | Unread::Failed(_) => failed,
    }
}

fn after(what: &str, error: CliError) -> CliError {
    match error {
        CliError::Failed { what: why, hint } => CliError::Failed { what: format!("{what}: {why}"), hint },
        other => other,
    }
}

/// Why a token for a service account could not be had.
pub fn of_token(error: &kube::Error, namespace: &str, account: &str) -> CliError {
    match error {
        kube::Error::Api(status) if status.code == 403 => {
            let what = format!("you may not look at this namespace: {}", status.message);
            CliError::failed(what).hint(format!(
                "ask for this right in namespace {namespace}: \
                 {{apiGroups: [\"\"], resources: [serviceaccounts/token], resourceNames: [{account}], verbs: [create]}}"
            ))
        }
        kube::Error::Api(status) if status.code == 404 && account == tulle_mesh::query::VIEWER => {
            let what =
                format!("{namespace} has no ServiceAccount {account}: its Tulle is older than this program");
            CliError::failed(what).hint("tulle upgrade; or choose one namespace with -n")
        }
        kube::Error::Api(status) if status.code == 404 => CliError::failed(format!(
            "no ServiceAccount {account} in namespace {namespace}: {}",
            status.message
        ))
        .hint("check the namespace: `kubectl get namespaces`"),
        other => of(other),
    }
}

/// Why a port of a pod could not be forwarded. `if_gone` is what to do when the pod does not exist any more.
pub fn of_forward(error: &kube::Error, namespace: &str, pod: &str, if_gone: &str) -> CliError {
    let refused = match error {
        kube::Error::UpgradeConnection(UpgradeConnectionError::ProtocolSwitch(status)) => status.as_u16(),
        kube::Error::Api(status) => status.code,
        _ => 0,
    };
    match refused {
        403 => {
            let what = format!("you may not forward ports of pods in namespace {namespace}");
            CliError::failed(what).hint(format!(
                "ask for this right in namespace {namespace}: \
                 {{apiGroups: [\"\"], resources: [pods/portforward], verbs: [get, create]}}"
            ))
        }
        404 => CliError::failed(format!("pod {namespace}/{pod} is gone")).hint(if_gone),
        0 => of(error),
        status => refused_by(namespace, pod, &format!("the API server answers {status}")),
    }
}

/// A port-forward to the operator that the pod's node or the pod has refused.
pub fn refusal(at: &Located, why: &str) -> CliError {
    refused_by(&at.namespace, &at.pod, why)
}

/// A port-forward that the pod's node or the pod has refused.
pub fn refused_by(namespace: &str, pod: &str, why: &str) -> CliError {
    let what = format!("the port-forward to pod {namespace}/{pod} was refused: {}", why.trim());
    CliError::failed(what).hint(format!("kubectl -n {namespace} describe pod {pod}"))
}

/// The rule of RBAC that a refusal of the API server asks for. Its words are those of Kubernetes:
/// `pods is forbidden: User "jane" cannot list resource "pods" in API group "" in the namespace "shop"`.
pub fn right(message: &str) -> Option<String> {
    let (_, rest) = message.split_once(" cannot ")?;
    let (verb, rest) = rest.split_once(" resource \"")?;
    let (resource, rest) = rest.split_once("\" in API group \"")?;
    let (group, rest) = rest.split_once('"')?;
    let place = match rest.split_once(" in the namespace \"").and_then(|(_, rest)| rest.split_once('"')) {
        Some((namespace, _)) => format!("in namespace {namespace}"),
        None => "in the whole cluster".to_owned(),
    };
    Some(format!("{{apiGroups: [\"{group}\"], resources: [{resource}], verbs: [{verb}]}} {place}"))
}

/// The text of an error followed by its causes, without repetitions.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    const FORBIDDEN: &str = "leases.coordination.k8s.io \"tulle-operator\" is forbidden: User \"jane\" cannot get resource \
                             \"leases\" in API group \"coordination.k8s.io\" in the namespace \"tulle-system\"";

    fn api(code: u16, message: &str) -> kube::Error {
        let mut status = Status::failure(message, "");
        status.code = code;
        kube::Error::Api(Box::new(status))
    }

    fn hint(error: CliError) -> String {
        match error {
            CliError::Failed { hint, .. } => hint.unwrap_or_default(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_refusal_names_the_right_that_lacks() {
        let expected = "{apiGroups: [\"coordination.k8s.io\"], resources: [leases], verbs: [get]} \
                        in namespace tulle-system";
        assert_eq!(right(FORBIDDEN).as_deref(), Some(expected));
        assert_eq!(hint(of(&api(403, FORBIDDEN))), format!("ask for this right: {expected}"));
    }

    #[test]
    fn what_was_tried_comes_first_and_the_right_stays_in_the_hint() {
        let error = doing("cannot list Canaries", &api(403, FORBIDDEN));
        assert!(error.to_string().starts_with("cannot list Canaries: leases.coordination"), "{error}");
        assert!(hint(error).starts_with("ask for this right: "));
        let expired = doing("cannot list Canaries", &api(401, "Unauthorized"));
        assert!(hint(expired).starts_with("log in again"));
        let unread = of_unread("cannot list pods", &Unread::Forbidden(FORBIDDEN.to_owned()));
        assert!(hint(unread).starts_with("ask for this right: "));
    }

    #[test]
    fn a_kind_of_tulle_that_is_not_served_means_that_tulle_is_not_installed() {
        let error = doing_tulle("cannot list Canaries", &api(404, "404 page not found"));
        assert!(error.to_string().starts_with("Tulle is not installed"), "{error}");
        assert!(hint(error).starts_with("tulle install"));
        let mut status = Status::failure("canaries.tulle.dev \"web\" not found", "NotFound");
        status.code = 404;
        status.details = serde_json::from_value(serde_json::json!({"name": "web"})).ok();
        let error = doing_tulle("cannot read Canary shop/web", &kube::Error::Api(Box::new(status)));
        assert!(error.to_string().ends_with("not found"), "{error}");
    }

    #[test]
    fn a_refusal_for_the_whole_cluster_says_so() {
        let message = "deployments.apps is forbidden: User \"jane\" cannot list resource \"deployments\" in API group \
                       \"apps\" at the cluster scope";
        let expected =
            "{apiGroups: [\"apps\"], resources: [deployments], verbs: [list]} in the whole cluster";
        assert_eq!(right(message).as_deref(), Some(expected));
        assert_eq!(right("nobody may"), None);
    }

    #[test]
    fn a_token_that_may_not_be_requested_names_its_rule() {
        let refused = hint(of_token(&api(403, "no"), "shop", "default"));
        assert!(refused.contains("in namespace shop"), "{refused}");
        assert!(
            refused.contains("resources: [serviceaccounts/token], resourceNames: [default]"),
            "{refused}"
        );
    }

    #[test]
    fn an_installation_without_the_viewer_is_too_old() {
        let error = of_token(&api(404, "not found"), "tulle-system", tulle_mesh::query::VIEWER);
        assert!(error.to_string().contains("older than this program"), "{error}");
    }

    #[test]
    fn a_port_forward_that_is_forbidden_or_too_late_says_so() {
        let switch = |status: hyper::StatusCode| {
            let refused = UpgradeConnectionError::ProtocolSwitch(status);
            let error = kube::Error::UpgradeConnection(refused);
            of_forward(&error, "tulle-system", "tulle-operator-0", "try again")
        };
        assert!(hint(switch(hyper::StatusCode::FORBIDDEN)).contains("pods/portforward"));
        assert!(switch(hyper::StatusCode::NOT_FOUND).to_string().ends_with("is gone"));
        assert_eq!(hint(switch(hyper::StatusCode::NOT_FOUND)), "try again");
        assert!(switch(hyper::StatusCode::BAD_GATEWAY).to_string().contains("answers 502"));
    }
}
