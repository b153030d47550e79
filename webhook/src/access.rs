//! Warnings about access rules that match nothing in the cluster as it is.
//!
//! In: the rules, the namespaces that do not exist, and the Services of the policy's namespace. Out: warnings for the
//! policy's author. Never rejects a policy, because what is missing may be created later.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{Service, ServicePort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use tulle_crds::{AccessRule, AccessSpec, MeshPolicySpec, TargetKind};

/// The namespaces that callers name.
pub fn namespaces(access: &AccessSpec) -> BTreeSet<&str> {
    let callers = rules(access).flat_map(|(_, rule)| &rule.from);
    callers.filter_map(|caller| caller.namespace.as_deref()).collect()
}

/// Warns about callers from `absent` namespaces, and about ports of a Service where the pods have others.
pub fn warnings(spec: &MeshPolicySpec, absent: &BTreeSet<&str>, services: &[Service]) -> Vec<String> {
    let Some(access) = &spec.access else { return Vec::new() };
    let targeted = |service: &&Service| {
        spec.target.kind != TargetKind::Service || spec.target.name == service.metadata.name
    };
    let services: Vec<&Service> = services.iter().filter(targeted).collect();
    let mut warnings = Vec::new();
    for (at, rule) in rules(access) {
        let named: BTreeSet<&str> =
            rule.from.iter().filter_map(|caller| caller.namespace.as_deref()).collect();
        for namespace in named.intersection(absent) {
            warnings.push(format!(
                "{at}.from: namespace {namespace} does not exist, so the rule matches no caller from it; correct the name, or create the namespace"
            ));
        }
        let ports: BTreeSet<u16> =
            rule.to.iter().flat_map(|operation| operation.ports.iter().flatten().copied()).collect();
        for port in ports {
            if let Some((service, listens)) = instead_of(port, &services) {
                warnings.push(format!(
                    "{at}.to: port {port} is a port of Service {service}, whose pods listen on {listens}, and the rule compares the port of the pod; write {listens}"
                ));
            }
        }
    }
    warnings
}

/// Each rule with its path.
fn rules(access: &AccessSpec) -> impl Iterator<Item = (String, &AccessRule)> {
    [("allow", &access.allow), ("deny", &access.deny)].into_iter().flat_map(|(list, rules)| {
        let rules = rules.iter().flatten().enumerate();
        rules.map(move |(index, rule)| (format!("spec.access.{list}[{index}]"), rule))
    })
}

/// The Service that has this port, and the port on which its pods listen instead; `None` where a pod may listen on it.
fn instead_of<'a>(port: u16, services: &[&'a Service]) -> Option<(&'a str, i32)> {
    let port = i32::from(port);
    let mut found = None;
    for service in services {
        let Some(spec) = &service.spec else { continue };
        for declared in spec.ports.iter().flatten() {
            // A named port may be any.
            let listens = pod_port(declared)?;
            if listens == port {
                return None;
            }
            if declared.port == port {
                found = found.or(Some((service.metadata.name.as_deref().unwrap_or(""), listens)));
            }
        }
    }
    found
}

/// The port of the pods; `None` if it is a name, which only the pods resolve.
fn pod_port(declared: &ServicePort) -> Option<i32> {
    match &declared.target_port {
        None | Some(IntOrString::Int(0)) => Some(declared.port),
        Some(IntOrString::Int(port)) => Some(*port),
        Some(IntOrString::String(_)) => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(target: Value, allow: Value) -> MeshPolicySpec {
        serde_json::from_value(json!({"target": target, "access": {"allow": [allow]}})).unwrap()
    }

    fn service(name: &str, ports: Value) -> Service {
        serde_json::from_value(json!({"metadata": {"name": name}, "spec": {"ports": ports}})).unwrap()
    }

    fn of(spec: &MeshPolicySpec, services: &[Service]) -> Vec<String> {
        warnings(spec, &BTreeSet::new(), services)
    }

    #[test]
    fn the_port_of_a_service_in_place_of_the_pods_is_named() {
        let services = [service("web", json!([{"port": 80, "targetPort": 8080}]))];
        let namespace = || json!({"kind": "Namespace"});
        assert_eq!(
            of(&spec(namespace(), json!({"to": [{"ports": [80, 8080]}]})), &services),
            [
                "spec.access.allow[0].to: port 80 is a port of Service web, whose pods listen on 8080, and the rule compares the port of the pod; write 8080"
            ]
        );
        let rule = || json!({"to": [{"ports": [80]}]});
        for ports in [
            json!([{"port": 80}]),
            json!([{"port": 80, "targetPort": "http"}]),
            json!([{"port": 81, "targetPort": 8080}]),
            json!([{"port": 80, "targetPort": 8080}, {"port": 81, "targetPort": 80}]),
        ] {
            let none: [&str; 0] = [];
            assert_eq!(of(&spec(namespace(), rule()), &[service("web", ports.clone())]), none, "{ports}");
        }
        let target = |name: &str| spec(json!({"kind": "Service", "name": name}), rule());
        assert_eq!(of(&target("web"), &services).len(), 1);
        assert!(of(&target("other"), &services).is_empty(), "ports of other Services do not count");
    }

    #[test]
    fn a_namespace_that_does_not_exist_is_named_once_per_rule() {
        let callers = json!([{"namespace": "shpo", "serviceAccount": "a"}, {"namespace": "shpo"}, {"namespace": "shop"}]);
        let spec = spec(json!({"kind": "Namespace"}), json!({"from": callers}));
        assert_eq!(namespaces(spec.access.as_ref().unwrap()), BTreeSet::from(["shop", "shpo"]));
        let found = warnings(&spec, &BTreeSet::from(["shpo"]), &[]);
        let [warning] = found.as_slice() else { panic!("{found:?}") };
        assert!(warning.starts_with("spec.access.allow[0].from: namespace shpo does not exist"), "{warning}");
    }
}
