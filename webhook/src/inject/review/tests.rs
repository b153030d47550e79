//! Pods that another webhook has changed after the injection.

use json_patch::patch;

use super::super::tests::context;
use super::super::{inject, is_injected};
use super::*;

fn injected(mode: Mode, annotations: Value) -> Value {
    let own = json!([{"name": "own"}]);
    let mut pod = json!({"metadata": {"annotations": annotations},
        "spec": {"containers": [{"name": "app"}], "initContainers": own}});
    let (Outcome::Inject(operations), _) = inject(&pod, &context(mode)) else { panic!("not injected") };
    patch(&mut pod, &operations).unwrap();
    pod
}

fn containers_of(pod: &mut Value) -> &mut Vec<Value> {
    pod.pointer_mut("/spec/initContainers").unwrap().as_array_mut().unwrap()
}

fn names(pod: &Value) -> Vec<&str> {
    containers_at(pod, "/spec/initContainers").map(name_of).collect()
}

fn named<'a>(pod: &'a mut Value, name: &str) -> &'a mut Value {
    containers_of(pod).iter_mut().find(|container| container["name"] == name).unwrap()
}

fn warnings(pod: &Value, mode: Mode) -> Vec<String> {
    let (outcome, warnings) = inject(pod, &context(mode));
    assert_eq!(outcome, Outcome::Skip, "{pod}");
    warnings
}

/// A native sidecar with a probe, and an init container that ends.
fn added_by_others() -> [Value; 2] {
    let probe = json!({"httpGet": {"path": "/ready", "port": 9000}});
    [json!({"name": "agent", "restartPolicy": "Always", "readinessProbe": probe}), json!({"name": "setup"})]
}

#[test]
fn what_another_webhook_puts_before_the_sidecar_comes_after_it_again() {
    for before in [
        vec!["agent", INIT, PROXY, "own"],
        vec!["setup", INIT, PROXY, "own"],
        vec!["setup", "agent", INIT, PROXY, "own"],
        vec![INIT, "agent", PROXY, "own"],
        vec!["setup", INIT, "agent", PROXY, "own"],
        vec![PROXY, INIT, "own"],
        vec![PROXY, "agent", INIT, "own"],
        vec!["own", "agent", PROXY, "setup", INIT],
    ] {
        for mode in [Mode::Enabled, Mode::Required] {
            let mut pod = injected(mode, json!({}));
            let mut all = containers_of(&mut pod).clone();
            all.extend(added_by_others());
            *containers_of(&mut pod) = before
                .iter()
                .map(|name| all.iter().find(|container| container["name"] == *name).unwrap().clone())
                .collect();
            let (Outcome::Inject(operations), warnings) = inject(&pod, &context(mode)) else {
                panic!("{before:?} stays")
            };
            patch(&mut pod, &operations).unwrap();
            let others = before.iter().copied().filter(|name| ![INIT, PROXY].contains(name));
            let wanted: Vec<&str> = [INIT, PROXY].into_iter().chain(others).collect();
            assert_eq!(names(&pod), wanted, "{before:?}");
            assert_eq!(warnings, Vec::<String>::new());
            assert_eq!(inject(&pod, &context(mode)).0, Outcome::Skip, "once more changes nothing");
            if before.contains(&"agent") {
                let checks = probes::checks_of(named(&mut pod, PROXY));
                assert_eq!(checks.len(), 1, "the probe that came with it: {checks:?}");
                let path = &named(&mut pod, "agent")["readinessProbe"]["httpGet"]["path"];
                assert_eq!(*path, "/agent/readinessProbe");
            }
        }
    }
}

#[test]
fn what_another_webhook_puts_after_the_sidecar_stays_there() {
    let mut pod = injected(Mode::Enabled, json!({}));
    containers_of(&mut pod).insert(2, json!({"name": "agent", "restartPolicy": "Always"}));
    assert_eq!(warnings(&pod, Mode::Enabled), Vec::<String>::new());
}

#[test]
fn a_sidecar_without_its_init_container_comes_first_and_the_lack_is_named() {
    let mut pod = injected(Mode::Enabled, json!({}));
    containers_of(&mut pod)[0] = json!({"name": "agent", "restartPolicy": "Always"});
    let (Outcome::Inject(operations), warnings) = inject(&pod, &context(Mode::Enabled)) else { panic!() };
    patch(&mut pod, &operations).unwrap();
    assert_eq!(names(&pod), [PROXY, "agent", "own"]);
    assert!(is_injected(&pod));
    let [warning] = warnings.as_slice() else { panic!("{warnings:?}") };
    assert!(warning.starts_with("container tulle-init is missing"), "{warning}");
}

#[test]
fn a_right_that_another_webhook_takes_away_is_named() {
    let annotations = json!({"tulle.dev/source-address": "preserve"});
    let dropped = json!({"drop": ["ALL"]});
    let by_name = json!({"drop": ["NET_ADMIN"], "add": ["NET_ADMIN"]});
    for (name, field, value, lost) in [
        (INIT, "capabilities", dropped.clone(), "has no capability NET_ADMIN"),
        (INIT, "capabilities", by_name, "has no capability NET_ADMIN"),
        (INIT, "runAsUser", json!(1000), "has runAsUser 1000 instead of 0"),
        (INIT, "runAsNonRoot", json!(true), "has runAsNonRoot: true"),
        (PROXY, "runAsUser", json!(1000), "has runAsUser 1000 instead of 4150"),
        (PROXY, "capabilities", dropped.clone(), "has no capability NET_RAW"),
        (PROXY, "allowPrivilegeEscalation", json!(false), "has allowPrivilegeEscalation: false"),
    ] {
        let mut pod = injected(Mode::Enabled, annotations.clone());
        assert_eq!(warnings(&pod, Mode::Enabled), Vec::<String>::new());
        named(&mut pod, name)["securityContext"][field] = value;
        let warnings = warnings(&pod, Mode::Enabled);
        let [warning] = warnings.as_slice() else { panic!("{lost}: {warnings:?}") };
        assert!(
            warning.starts_with(&format!("container {name} {lost}, so the pod stays in Init")),
            "{warning}"
        );
        assert!(warning.ends_with("exclude tulle-init and tulle-proxy there"), "{warning}");
    }
    let mut required = injected(Mode::Required, json!({}));
    named(&mut required, INIT)["securityContext"]["capabilities"] = dropped;
    let warnings = warnings(&required, Mode::Required);
    assert!(warnings.len() == 1 && warnings[0].contains("NET_ADMIN"), "{warnings:?}");
}

#[test]
fn a_webhook_that_hardens_every_container_is_named_once_for_each_of_ours() {
    let mut pod = injected(Mode::Enabled, json!({}));
    for container in containers_of(&mut pod).iter_mut() {
        container["securityContext"] = json!({"capabilities": {"drop": ["ALL"]}});
    }
    pod["spec"]["securityContext"] = json!({"runAsUser": 1000, "runAsNonRoot": true});
    let warnings = warnings(&pod, Mode::Enabled);
    let [init, proxy] = warnings.as_slice() else { panic!("{warnings:?}") };
    let lost = "has runAsUser 1000 instead of 0 and has runAsNonRoot: true and has no capability NET_ADMIN";
    assert!(init.starts_with(&format!("container {INIT} {lost},")), "{init}");
    assert!(proxy.starts_with(&format!("container {PROXY} has runAsUser 1000 instead of 4150,")), "{proxy}");
}

#[test]
fn rights_that_the_sidecar_does_not_need_are_not_named() {
    let mut pod = injected(Mode::Enabled, json!({}));
    named(&mut pod, PROXY)["securityContext"]["capabilities"] = json!({"drop": ["ALL", "NET_RAW"]});
    named(&mut pod, INIT)["securityContext"]["seccompProfile"] = json!({"type": "Unconfined"});
    named(&mut pod, INIT)["securityContext"]["capabilities"]["drop"] = json!(["ALL", "SYS_ADMIN"]);
    pod["spec"]["securityContext"] = json!({"runAsUser": 1000, "runAsNonRoot": true});
    assert_eq!(warnings(&pod, Mode::Enabled), Vec::<String>::new());
}
