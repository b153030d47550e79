//! Names that injection gives to its containers and volumes.
//!
//! In: a pod. Out: which of its containers are Tulle's, of whichever version, and the container or volume of its own
//! that has one of their names. A name alone is no evidence: an author may have chosen it too.

use serde_json::Value;

use super::{INIT, PROXY, containers, containers_at, name_of};

/// Whether a container is the sidecar. Every version has injected these fields. Another webhook may have changed them: it may
/// have put its own program before the sidecar's, or dropped `restartPolicy`, which its libraries do not know. Such a
/// container still has the variables that only the sidecar reads.
pub(super) fn is_proxy(container: &Value) -> bool {
    name_of(container) == PROXY
        && ((restarts(container) && runs_proxy(container)) || !containers::variables(container).is_empty())
}

/// Whether a container runs beside the application, and does not end before it.
pub(super) fn restarts(container: &Value) -> bool {
    container.get("restartPolicy").and_then(Value::as_str) == Some("Always")
}

/// Whether a container runs the sidecar's proxy, possibly by another program or by a shell.
fn runs_proxy(container: &Value) -> bool {
    let mut words = ["/command", "/args"].into_iter().flat_map(|list| containers_at(container, list));
    words.any(|text| text.as_str().is_some_and(|text| text.split_whitespace().any(|word| word == "proxy")))
}

/// Whether a container sets the redirect rules.
fn is_init(container: &Value) -> bool {
    let mut added = containers_at(container, "/securityContext/capabilities/add");
    name_of(container) == INIT
        && has_argument(container, "init")
        && added.any(|name| name.as_str() == Some("NET_ADMIN"))
}

fn has_argument(container: &Value, wanted: &str) -> bool {
    containers_at(container, "/args").any(|argument| argument.as_str() == Some(wanted))
}

/// The container or volume of a pod without a sidecar that has a name of the injected ones. What a copied pod still has
/// of its injection is not one.
pub(super) fn name_taken(pod: &Value) -> Option<String> {
    let is_named = |container: &&Value| [INIT, PROXY].contains(&name_of(container));
    let init = containers_at(pod, "/spec/initContainers").filter(|container| !is_init(container));
    let mut containers = containers_at(pod, "/spec/containers").chain(init).filter(is_named);
    if let Some(container) = containers.next() {
        return Some(format!("container {}", name_of(container)));
    }
    let ours = containers::volumes();
    let is_taken = |volume: &&Value| {
        let same = ours.iter().find(|our| name_of(our) == name_of(volume));
        same.is_some_and(|our| containers::volume_source(our) != containers::volume_source(volume))
    };
    let volume = containers_at(pod, "/spec/volumes").find(is_taken)?;
    Some(format!("volume {}", name_of(volume)))
}

#[cfg(test)]
mod tests {
    use json_patch::patch;
    use serde_json::json;

    use super::super::tests::context;
    use super::super::{Mode, Outcome, inject};
    use super::*;

    fn pod(spec: &Value) -> Value {
        let mut pod = json!({"metadata": {}, "spec": {"containers": [{"name": "app"}]}});
        for (field, value) in spec.as_object().unwrap() {
            pod["spec"][field] = value.clone();
        }
        pod
    }

    fn injected(plain: &Value) -> Value {
        let (Outcome::Inject(operations), _) = inject(plain, &context(Mode::Enabled)) else {
            panic!("{plain}")
        };
        let mut pod = plain.clone();
        patch(&mut pod, &operations).unwrap();
        pod
    }

    fn own() -> Vec<(&'static str, Value)> {
        vec![
            ("container tulle-proxy", json!({"initContainers": [{"name": PROXY, "command": ["true"]}]})),
            (
                "container tulle-proxy",
                json!({"initContainers": [{"name": PROXY, "restartPolicy": "Always", "args": ["serve"]}]}),
            ),
            ("container tulle-proxy", json!({"initContainers": [{"name": PROXY, "args": ["proxy"]}]})),
            ("container tulle-init", json!({"initContainers": [{"name": INIT, "command": ["migrate"]}]})),
            ("container tulle-init", json!({"initContainers": [{"name": INIT, "args": ["init"]}]})),
            ("container tulle-proxy", json!({"containers": [{"name": PROXY}]})),
            ("container tulle-init", json!({"containers": [{"name": "app"}, {"name": INIT}]})),
            ("volume tulle-token", json!({"volumes": [{"name": "tulle-token", "emptyDir": {}}]})),
            (
                "volume tulle-trust",
                json!({"volumes": [{"name": "tulle-trust", "configMap": {"name": "mine"}}]}),
            ),
        ]
    }

    #[test]
    fn a_pods_own_container_or_volume_with_an_injected_name_is_rejected_and_named() {
        for (what, spec) in own() {
            for mode in [Mode::Enabled, Mode::Required] {
                let (outcome, _) = inject(&pod(&spec), &context(mode));
                let Outcome::Refuse(why) = outcome else { panic!("{what}: {outcome:?}") };
                assert!(why.starts_with(&format!("the name of {what} is reserved for the sidecar")), "{why}");
            }
        }
    }

    #[test]
    fn a_pod_that_is_left_out_may_have_such_names() {
        for (what, spec) in own() {
            let mut pod = pod(&spec);
            pod["metadata"]["labels"] = json!({"tulle.dev/inject": "disabled"});
            assert_eq!(inject(&pod, &context(Mode::Enabled)).0, Outcome::Skip, "{what}");
        }
    }

    #[test]
    fn what_a_copied_pod_has_of_its_injection_is_not_taken_for_its_own() {
        let mut copy = injected(&pod(&json!({})));
        assert!(containers_at(&copy, "/spec/initContainers").any(is_proxy));
        let containers = copy["spec"]["initContainers"].as_array_mut().unwrap();
        containers.retain(|container| name_of(container) == INIT);
        assert_eq!(name_taken(&copy), None);
        let again = injected(&copy);
        assert_eq!(containers_at(&again, "/spec/initContainers").count(), 2);
        assert_eq!(containers_at(&again, "/spec/volumes").count(), 2);
    }

    #[test]
    fn a_sidecar_whose_program_another_webhook_has_wrapped_is_still_one() {
        let mut wrapped = injected(&pod(&json!({})));
        let proxy = wrapped.pointer_mut("/spec/initContainers/1").unwrap();
        proxy["command"] = json!(["/vault/vault-env"]);
        proxy["args"] = json!(["/program", "proxy"]);
        assert_eq!(inject(&wrapped, &context(Mode::Enabled)).0, Outcome::Skip);
        let all = |command: Value, args: Value| {
            is_proxy(&json!({"name": PROXY, "restartPolicy": "Always", "command": command, "args": args}))
        };
        assert!(all(json!(["/bin/sh", "-c"]), json!(["exec /program proxy"])));
        assert!(all(json!(["/wrapper", "/program", "proxy"]), Value::Null));
        assert!(!all(json!(["/cloud-sql-proxy"]), json!(["--port=5432"])));
    }

    #[test]
    fn a_sidecar_that_another_webhook_has_changed_is_not_taken_for_a_container_of_the_pods_own() {
        let mut changed = injected(&pod(&json!({})));
        changed["spec"]["initContainers"][1].as_object_mut().unwrap().remove("restartPolicy");
        let (outcome, warnings) = inject(&changed, &context(Mode::Enabled));
        assert_eq!(outcome, Outcome::Skip);
        assert!(
            warnings.iter().any(|warning| warning.contains("has lost restartPolicy: Always")),
            "{warnings:?}"
        );
        let Outcome::Refuse(why) = inject(&changed, &context(Mode::Required)).0 else { panic!() };
        assert!(why.contains("restartPolicy") && why.contains("another webhook"), "{why}");
        let mut hidden = injected(&pod(&json!({})));
        hidden["spec"]["initContainers"][1]["args"] = json!(["--run-what-the-annotation-says"]);
        assert_eq!(inject(&hidden, &context(Mode::Enabled)), (Outcome::Skip, Vec::new()));
    }
}
