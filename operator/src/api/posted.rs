//! The MeshPolicy that is posted to be compared with the traffic. Nobody has admitted it yet, so that the limits of its
//! schema are applied here: they bound what the comparison costs.

use axum::http::{HeaderMap, StatusCode, header};
use tulle_crds::{AccessRule, Caller, MeshPolicy, Operation};

use super::Refused;
use super::parameters::valid_name;

/// Rules of a list, callers or operations of a rule, and values of a list, as the schema allows.
const MOST: usize = 64;
/// Callers of a policy.
const MOST_CALLERS: usize = 256;
/// Labels of a selector, and methods of an operation, as the schema allows.
const MOST_LABELS: usize = 16;
/// The longest path or name of a caller, in bytes.
const LONGEST: usize = 1024;

/// Refuses a body that does not say it is JSON. A form of a web page cannot say so.
///
/// # Errors
/// 415.
pub fn is_json(headers: &HeaderMap) -> Result<(), Refused> {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or("");
    let essence = kind.split(';').next().unwrap_or("").trim();
    match essence.eq_ignore_ascii_case("application/json") {
        true => Ok(()),
        false => Err(Refused::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "the body is not said to be JSON; send `content-type: application/json`",
        )),
    }
}

/// The MeshPolicy in a body, and its namespace.
///
/// # Errors
/// 400 where it is none, has no namespace, or exceeds the limits of its schema.
pub fn policy(body: &[u8]) -> Result<(MeshPolicy, String), Refused> {
    let refuse = |error: serde_json::Error| {
        Refused::bad_request(format!("the body is not a MeshPolicy as JSON: {error}"))
    };
    let object: serde_json::Value = serde_json::from_slice(body).map_err(refuse)?;
    let kind = object.get("kind").and_then(|kind| kind.as_str()).unwrap_or("");
    if kind != "MeshPolicy" {
        return Err(Refused::bad_request(format!("the body is of kind {kind:?}, expected a MeshPolicy")));
    }
    let policy: MeshPolicy = serde_json::from_value(object).map_err(refuse)?;
    let namespace = policy.metadata.namespace.as_deref().ok_or_else(|| {
        Refused::bad_request(
            "the MeshPolicy has no metadata.namespace; write the one that it is to be applied in",
        )
    })?;
    let namespace = valid_name("metadata.namespace", namespace)?.to_owned();
    within_limits(&policy)
        .map_err(|error| Refused::bad_request(format!("the API server would refuse this policy: {error}")))?;
    Ok((policy, namespace))
}

/// Whether a policy keeps to the limits of its schema that matter here.
fn within_limits(policy: &MeshPolicy) -> Result<(), String> {
    if let Some(selector) = &policy.spec.target.selector {
        labels("target.selector.matchLabels", selector.match_labels.len())?;
    }
    let Some(access) = &policy.spec.access else { return Ok(()) };
    let mut callers = 0;
    for (list, rules) in [("allow", &access.allow), ("deny", &access.deny)] {
        let Some(rules) = rules else { continue };
        at_most(&format!("access.{list}"), "rules", rules.len(), MOST)?;
        for (index, one) in rules.iter().enumerate() {
            rule(&format!("access.{list}[{index}]"), one)?;
            callers += one.from.len();
        }
    }
    at_most("access", "callers", callers, MOST_CALLERS)
}

fn rule(at: &str, rule: &AccessRule) -> Result<(), String> {
    at_most(&format!("{at}.from"), "callers", rule.from.len(), MOST)?;
    at_most(&format!("{at}.to"), "operations", rule.to.len(), MOST)?;
    for (index, one) in rule.from.iter().enumerate() {
        caller(&format!("{at}.from[{index}]"), one)?;
    }
    for (index, one) in rule.to.iter().enumerate() {
        operation(&format!("{at}.to[{index}]"), one)?;
    }
    Ok(())
}

fn caller(at: &str, caller: &Caller) -> Result<(), String> {
    if let Some(wanted) = &caller.namespace_labels {
        labels(&format!("{at}.namespaceLabels"), wanted.len())?;
    }
    let named = caller.service_account.is_some() || caller.namespace.is_some();
    if !named && caller.namespace_labels.is_none() && caller.cidr.is_none() {
        return Err(format!("{at} needs serviceAccount, namespace, namespaceLabels or cidr"));
    }
    for text in [&caller.service_account, &caller.namespace, &caller.cidr].into_iter().flatten() {
        at_most(at, "bytes", text.len(), LONGEST)?;
    }
    Ok(())
}

fn operation(at: &str, operation: &Operation) -> Result<(), String> {
    let (methods, paths) = (operation.methods.as_deref(), operation.paths.as_deref());
    at_most(&format!("{at}.methods"), "methods", methods.map_or(0, <[String]>::len), MOST_LABELS)?;
    at_most(&format!("{at}.paths"), "paths", paths.map_or(0, <[String]>::len), MOST)?;
    at_most(&format!("{at}.ports"), "ports", operation.ports.as_ref().map_or(0, Vec::len), MOST)?;
    for path in paths.unwrap_or_default() {
        at_most(&format!("{at}.paths"), "bytes in a path", path.len(), LONGEST)?;
    }
    Ok(())
}

/// Labels select nothing in particular where there are none.
fn labels(at: &str, count: usize) -> Result<(), String> {
    if count == 0 {
        return Err(format!("{at} is empty; write at least one label"));
    }
    at_most(at, "labels", count, MOST_LABELS)
}

fn at_most(at: &str, what: &str, count: usize, most: usize) -> Result<(), String> {
    match count <= most {
        true => Ok(()),
        false => Err(format!("{at} has {count} {what}; at most {most} are allowed")),
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;
    use serde_json::{Value, json};

    use super::*;

    fn posted(spec: &Value) -> Result<(MeshPolicy, String), Refused> {
        let object = json!({
            "apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy", "spec": spec,
            "metadata": {"name": "web", "namespace": "shop"},
        });
        policy(object.to_string().as_bytes())
    }

    fn with_access(access: &Value) -> Result<(MeshPolicy, String), Refused> {
        posted(&json!({"target": {"kind": "Namespace"}, "access": access}))
    }

    fn rules(count: usize, callers: usize) -> Value {
        let from = vec![json!({"serviceAccount": "cart"}); callers];
        json!(vec![json!({"from": from}); count])
    }

    #[test]
    fn a_policy_beyond_the_limits_of_its_schema_is_refused_with_the_limit() {
        let labels: serde_json::Map<String, Value> =
            (0..17).map(|number| (format!("l{number}"), json!("x"))).collect();
        for (access, wanted) in [
            (json!({"allow": rules(65, 0)}), "access.allow has 65 rules; at most 64"),
            (json!({"deny": rules(65, 0)}), "access.deny has 65 rules; at most 64"),
            (json!({"allow": rules(1, 65)}), "access.allow[0].from has 65 callers; at most 64"),
            (json!({"allow": rules(4, 60), "deny": rules(1, 17)}), "access has 257 callers; at most 256"),
            (json!({"deny": [{"from": [{"namespaceLabels": {}}]}]}), "namespaceLabels is empty"),
            (json!({"deny": [{"from": [{"namespaceLabels": labels}]}]}), "has 17 labels; at most 16"),
            (json!({"deny": [{"from": [{}]}]}), "needs serviceAccount"),
            (json!({"deny": [{"to": [{"paths": vec!["/"; 65]}]}]}), "has 65 paths; at most 64"),
        ] {
            let refused = with_access(&access).unwrap_err();
            assert_eq!(refused.status, StatusCode::BAD_REQUEST, "{wanted}");
            assert!(refused.refusal.error.contains(wanted), "{}", refused.refusal.error);
        }
        let selector = json!({"target": {"kind": "Workload", "selector": {"matchLabels": {}}}});
        assert!(posted(&selector).unwrap_err().refusal.error.contains("matchLabels is empty"));
    }

    #[test]
    fn a_policy_at_the_limits_is_taken() {
        assert!(with_access(&json!({"allow": rules(4, 60), "deny": rules(1, 16)})).is_ok());
        assert!(with_access(&json!({"allow": rules(64, 0), "deny": rules(64, 0)})).is_ok());
    }

    #[test]
    fn a_body_has_to_be_said_to_be_json() {
        let said = |kind: &'static str| {
            is_json(&HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static(kind))]))
        };
        assert!(said("application/json").is_ok());
        assert!(said("Application/JSON; charset=utf-8").is_ok());
        for kind in ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", ""] {
            assert_eq!(said(kind).unwrap_err().status, StatusCode::UNSUPPORTED_MEDIA_TYPE, "{kind}");
        }
        assert!(is_json(&HeaderMap::new()).is_err());
    }
}
