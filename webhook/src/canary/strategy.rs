//! Steps that choose requests: matches, copies, and users that stay with a version.
//!
//! In: the spec of a Canary and the Services of its target. Out: what can never work is an error, what works for nobody a
//! warning.

use k8s_openapi::api::core::v1::{Service, ServicePort};
use serde_json::Value;
use tulle_crds::{CanarySpec, Step};

use super::{name_of, selects};
use crate::validate::Validation;

/// The largest sum of a weight in force and the copies that come on top of it, in percent; `None`: nothing is copied.
pub(super) fn most_with_copies(steps: &[Step]) -> Option<u32> {
    let mut weight = 0;
    let mut most = None;
    for step in steps {
        weight = step.weight.map_or(weight, u32::from);
        if let Some(mirror) = step.mirror {
            most = most.max(Some(weight + u32::from(mirror)));
        }
    }
    most
}

/// What the schema says too. It is repeated because the schema in the cluster may be older than this webhook.
pub(super) fn check(spec: &CanarySpec, validation: &mut Validation) {
    for (index, step) in spec.steps.iter().enumerate() {
        for (at, entry) in step.match_.iter().enumerate() {
            let field = format!("spec.steps[{index}].match[{at}]");
            let name = match (&entry.header, &entry.cookie) {
                (Some(header), None) => &header.name,
                (None, Some(cookie)) => &cookie.name,
                _ => {
                    validation.error(format!(
                        "{field}: write either header or cookie, for example {{header: {{name: x-group, exact: insider}}}}"
                    ));
                    continue;
                }
            };
            if !is_token(name) {
                validation.error(format!("{field}: {name:?} cannot be a name of a header or cookie"));
            }
        }
        if step.mirror.is_some_and(|mirror| mirror == 0 || mirror > 100) {
            validation.error(format!("spec.steps[{index}].mirror: must be from 1 to 100"));
        }
    }
    let Some(sticky) = &spec.sticky else { return };
    if !is_token(&sticky.cookie) {
        validation.error(format!(
            "spec.sticky.cookie: {:?} cannot be the name of a cookie; write for example tulle-version",
            sticky.cookie
        ));
    }
    let mut cookies =
        spec.steps.iter().flat_map(|step| &step.match_).filter_map(|entry| entry.cookie.as_ref());
    if cookies.any(|cookie| cookie.name == sticky.cookie) {
        validation.error(format!(
            "spec.sticky.cookie: a match uses the cookie {} too, which sticky would overwrite; choose another name",
            sticky.cookie
        ));
    }
}

/// A name as HTTP allows it for headers and cookies (RFC 9110 §5.6.2).
fn is_token(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
    !name.is_empty() && name.chars().all(allowed)
}

/// Connections that are not HTTP have neither headers nor cookies, and are not copied. Nor are calls of gRPC.
pub(super) fn check_services(
    spec: &CanarySpec,
    target: &Value,
    services: &[Service],
    validation: &mut Validation,
) {
    if spec.steps.iter().any(|step| step.mirror.is_some()) {
        let names = only_with(services, target, is_grpc);
        if !names.is_empty() {
            validation.warn(format!(
                "a mirror step of {} copies GET, HEAD and OPTIONS requests only, and every gRPC call is a POST: nothing is copied for Services that declare grpc or h2c on every port ({}); use a match or a small weight for them",
                name_of(spec),
                names.join(", ")
            ));
        }
    }
    let steering: Vec<&str> = [
        (spec.steps.iter().any(|step| !step.match_.is_empty()), "match"),
        (spec.steps.iter().any(|step| step.mirror.is_some()), "mirror"),
        (spec.sticky.is_some(), "sticky"),
    ]
    .into_iter()
    .filter_map(|(is_used, name)| is_used.then_some(name))
    .collect();
    if steering.is_empty() {
        return;
    }
    let names = only_with(services, target, is_opaque);
    if !names.is_empty() {
        validation.warn(format!(
            "{} is selected by Services without a port for HTTP ({}), and {} looks at HTTP requests only: no connection to them matches, is copied or gets a cookie; use steps with a weight for them",
            name_of(spec),
            names.join(", "),
            steering.join(", ")
        ));
    }
}

/// Names of the Services of a target that have ports of this kind and no others.
fn only_with<'a>(
    services: &'a [Service],
    target: &Value,
    is_of_kind: fn(&ServicePort) -> bool,
) -> Vec<&'a str> {
    let has_only = |service: &&Service| {
        let ports = service.spec.as_ref().and_then(|spec| spec.ports.as_deref()).unwrap_or_default();
        !ports.is_empty() && ports.iter().all(is_of_kind)
    };
    let found = services.iter().filter(|service| selects(service, target)).filter(has_only);
    found.filter_map(|service| service.metadata.name.as_deref()).collect()
}

/// Whether a port declares gRPC, or HTTP/2 without TLS, which is hardly spoken but by gRPC.
fn is_grpc(port: &ServicePort) -> bool {
    matches!(port.app_protocol.as_deref(), Some("grpc" | "kubernetes.io/h2c"))
}

/// Whether sidecars pass connections to this port on without reading them, as it is declared.
fn is_opaque(port: &ServicePort) -> bool {
    let declared = port.app_protocol.as_deref();
    let protocol = port.protocol.as_deref().unwrap_or("TCP");
    protocol != "TCP"
        || matches!(
            declared,
            Some("tcp" | "opaque" | "tls" | "https" | "kubernetes.io/wss" | "mysql" | "redis" | "postgresql")
        )
}
