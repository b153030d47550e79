use super::*;
use serde_json::json;

fn canary_of(spec: Value) -> Canary {
    serde_json::from_value(json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "Canary", "metadata": {"name": "web"}, "spec": spec})).unwrap()
}

/// A Canary of Deployment web with further fields.
fn web(fields: Value) -> Canary {
    let mut spec = json!({"target": {"kind": "Deployment", "name": "web"}});
    spec.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    canary_of(spec)
}

/// What is found when the target is this.
fn with_target(canary: &Canary, target: &Value) -> Validation {
    validate(canary, &Facts { target: Target::Found(target), ..Facts::default() })
}

fn errors(canary: &Canary) -> Vec<String> {
    validate(canary, &Facts::default()).errors
}

/// The warnings that contain the text.
fn about(validation: &Validation, text: &str) -> Vec<String> {
    validation.warnings.iter().filter(|warning| warning.contains(text)).cloned().collect()
}

#[test]
fn a_tool_that_would_not_wait_for_the_steps_is_named_with_what_to_do() {
    for (metadata, expected) in [
        (json!({"labels": {"app.kubernetes.io/managed-by": "Helm"}}), Some("set helm --timeout")),
        (json!({"annotations": {"meta.helm.sh/release-name": "web"}}), Some("set helm --timeout")),
        (json!({"labels": {"kustomize.toolkit.fluxcd.io/name": "apps"}}), Some("managed by Flux")),
        (
            json!({"labels": {"helm.toolkit.fluxcd.io/name": "apps", "app.kubernetes.io/managed-by": "Helm"}}),
            Some("managed by Flux"),
        ),
        (json!({"labels": {"argocd.argoproj.io/instance": "apps"}}), Some("managed by Argo CD")),
        (json!({"annotations": {"argocd.argoproj.io/tracking-id": "a"}}), Some("managed by Argo CD")),
        (json!({"labels": {"app.kubernetes.io/managed-by": "me"}}), None),
    ] {
        let target = json!({"metadata": metadata, "spec": {}});
        let warnings = about(&with_target(&web(json!({})), &target), "more than 5 minutes");
        assert_eq!(warnings.len(), usize::from(expected.is_some()), "{metadata}: {warnings:?}");
        assert!(warnings.iter().all(|warning| warning.contains(expected.unwrap())), "{warnings:?}");
        let short = web(json!({"steps": [{"weight": 5, "hold": "5m"}]}));
        assert!(about(&with_target(&short, &target), "more than 5 minutes").is_empty(), "{metadata}");
    }
    let flux = json!({"metadata": {"labels": {"kustomize.toolkit.fluxcd.io/name": "apps"}}, "spec": {}});
    let undone = web(json!({"onFailure": "Undo"}));
    assert_eq!(about(&with_target(&undone, &flux), "re-applies").len(), 1);
}

#[test]
fn a_target_whose_pods_get_no_sidecar_is_warned_about_because_nothing_holds_them_back() {
    let warned = |template: Value| {
        let target = json!({"spec": {"template": template}});
        about(&with_target(&web(json!({})), &target), "no readiness gate")
    };
    let found = warned(json!({"metadata": {"labels": {"tulle.dev/inject": "disabled"}}}));
    assert_eq!(found.len(), 1);
    assert!(found[0].contains("label tulle.dev/inject: disabled") && found[0].contains("remove the label"));
    assert_eq!(warned(json!({"spec": {"hostNetwork": true}})).len(), 1);
    for template in [
        json!({}),
        json!({"metadata": {"labels": {"tulle.dev/inject": "enabled"}}, "spec": {"hostNetwork": false}}),
    ] {
        assert_eq!(warned(template), Vec::<String>::new());
    }
}

#[test]
fn a_target_that_only_headless_services_select_cannot_be_split() {
    let target = json!({"spec": {"template": {"metadata": {"labels": {"app": "web", "tier": "front"}}}}});
    let service = |name: &str, address: &str, selector: Value| -> Service {
        serde_json::from_value(
            json!({"metadata": {"name": name}, "spec": {"clusterIP": address, "selector": selector}}),
        )
        .unwrap()
    };
    let headless = service("pods", "None", json!({"app": "web"}));
    let usual = service("web", "10.96.0.7", json!({"app": "web", "tier": "front"}));
    let other = service("other", "10.96.0.8", json!({"app": "other"}));
    let without_selector = service("manual", "10.96.0.9", json!({}));
    let warned = |services: &[&Service]| {
        let services: Vec<Service> = services.iter().copied().cloned().collect();
        let facts = Facts { target: Target::Found(&target), services: &services, ..Facts::default() };
        about(&validate(&web(json!({})), &facts), "headless")
    };
    let warnings = warned(&[&headless, &other, &without_selector]);
    assert_eq!(
        warnings,
        [
            "Deployment web is selected by headless Services only (pods), so clients dial pods by address: the weight cannot be applied and the rollout holds at its first step; add a Service with a cluster address for the clients"
        ]
    );
    assert!(warned(&[&headless, &usual]).is_empty());
    assert!(warned(&[&other, &without_selector]).is_empty());
    assert!(warned(&[]).is_empty());
}

#[test]
fn undo_is_accepted_with_a_warning_about_the_right_that_it_needs() {
    let validation = validate(&web(json!({"onFailure": "Undo"})), &Facts::default());
    assert!(validation.errors.is_empty(), "{:?}", validation.errors);
    assert_eq!(about(&validation, "config/overlays/undo").len(), 1);
    let held = validate(&web(json!({})), &Facts::default());
    assert!(about(&held, "config/overlays/undo").is_empty());
}

#[test]
fn a_warm_up_longer_than_the_shortest_hold_is_warned_about() {
    for (fields, warned) in [
        (json!({"judge": {"warmUp": "3m"}}), true),
        (json!({"judge": {"warmUp": "2m"}}), false),
        (json!({"judge": {"warmUp": "30s"}, "steps": [{"weight": 5}, {"weight": 9, "hold": "20s"}]}), true),
        (json!({"steps": [{"weight": 5, "hold": "10s"}]}), false),
        (json!({"judge": {"warmUp": "3m"}, "steps": [{"pause": {}}]}), false),
    ] {
        let validation = validate(&web(fields.clone()), &Facts::default());
        assert!(validation.errors.is_empty(), "{fields}: {:?}", validation.errors);
        assert_eq!(about(&validation, "spec.judge.warmUp").len(), usize::from(warned), "{fields}");
    }
}

#[test]
fn the_shortest_hold_is_shown_in_the_units_that_it_has() {
    for (steps, expected) in [
        (json!([{"weight": 5, "hold": "1ms"}]), "shortest hold (1ms)"),
        (json!([{"weight": 5, "hold": "90s"}, {"weight": 9}]), "shortest hold (1m30s)"),
        (json!([{"weight": 5, "hold": "0s"}]), "shortest hold (0s)"),
    ] {
        let found = validate(&web(json!({"judge": {"warmUp": "1h"}, "steps": steps})), &Facts::default());
        assert_eq!(about(&found, expected).len(), 1, "{expected}: {found:?}");
    }
}

#[test]
fn holds_that_are_longer_than_the_deadline_are_warned_about() {
    let hour = json!({"weight": 50, "hold": "1h"});
    for (fields, sum) in [
        (json!({"deadline": "59m", "steps": [hour]}), Some("1h")),
        (
            json!({"deadline": "90m", "steps": [{"weight": 5, "hold": "30m"}, {"pause": {}}, hour]}),
            Some("1h30m"),
        ),
        (json!({"deadline": "5m"}), Some("10m")),
        (json!({"deadline": "11m"}), None),
        (json!({"deadline": "61m", "steps": [hour, {"pause": {}}]}), None),
        (json!({}), None),
    ] {
        let found = validate(&web(fields.clone()), &Facts::default());
        assert!(found.errors.is_empty(), "{fields}: {:?}", found.errors);
        let warnings = about(&found, "spec.deadline");
        assert_eq!(warnings.len(), usize::from(sum.is_some()), "{fields}: {warnings:?}");
        if let Some(sum) = sum {
            assert!(warnings[0].contains(&format!("add up to {sum}, and")), "{fields}: {warnings:?}");
        }
    }
    let never = validate(&web(json!({"deadline": "0s"})), &Facts::default());
    assert!(about(&never, "spec.deadline").is_empty(), "it is an error: {never:?}");
}

#[test]
fn a_deletion_is_warned_about_while_a_version_is_not_approved_and_never_refused() {
    let deleted = |phase: &str, kind: &str| {
        deletion(&json!({"metadata": {"name": "web", "namespace": "shop"},
            "spec": {"target": {"kind": kind, "name": "front"}}, "status": {"phase": phase, "canaryRevision": "5d4f"}}))
    };
    assert_eq!(
        deleted("Paused", "Deployment"),
        Validation {
            errors: Vec::new(),
            warnings: vec![
                "revision 5d4f of Deployment front was on trial, and without Canary web nothing holds its pods back: it gets all traffic unjudged; kubectl -n shop rollout undo deployment/front restores the version before it".to_owned()
            ]
        }
    );
    assert_eq!(deleted("Progressing", "StatefulSet").warnings.len(), 1);
    assert_eq!(about(&deleted("Failed", "Deployment"), "has failed").len(), 1);
    for phase in ["", "Waiting", "Stable", "Promoting"] {
        assert_eq!(deleted(phase, "Deployment"), Validation::default(), "{phase}");
    }
    assert_eq!(deletion(&json!({})), Validation::default(), "no operator has seen it yet");
}

#[test]
fn the_webhook_of_deletions_refuses_and_delays_none() {
    let path = format!("{}/../config/base/admission.yaml", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(path).unwrap();
    let validating = text.split("\n---\n").nth(1).unwrap();
    let configuration: Value = serde_yaml::from_str(validating).unwrap();
    let hooks = configuration["webhooks"].as_array().unwrap();
    let deletes = |hook: &&Value| hook["rules"].to_string().contains("DELETE");
    let deleting: Vec<&Value> = hooks.iter().filter(deletes).collect();
    let [hook] = deleting[..] else { panic!("{hooks:?}") };
    assert_eq!((&hook["failurePolicy"], &hook["timeoutSeconds"]), (&json!("Ignore"), &json!(1)));
    assert_eq!(hook["rules"][0]["operations"], json!(["DELETE"]));
    assert_eq!(hook["rules"][0]["resources"], json!(["canaries"]));
    assert_eq!(hook["clientConfig"]["service"]["path"], "/validate");
    let conditions = hook["matchConditions"].to_string();
    assert!(
        ["Progressing", "Paused", "Failed"].iter().all(|phase| conditions.contains(phase)),
        "{conditions}"
    );
}

#[test]
fn times_and_limits_that_cannot_work_are_rejected_with_what_to_write() {
    for (field, spec, expected) in [
        ("spec.deadline", json!({"deadline": "0s"}), "write for example 24h"),
        ("spec.deadline", json!({"deadline": "0h0m"}), "write for example 24h"),
        ("spec.deadline", json!({"deadline": "30m1h"}), "for example 90s, 5m or 1h30m"),
        ("spec.judge.confidence", json!({"judge": {"confidence": "0%"}}), "write for example 99%"),
        ("spec.judge.confidence", json!({"judge": {"confidence": "100%"}}), "write for example 99%"),
        ("spec.judge.confidence", json!({"judge": {"confidence": "101%"}}), "for example 99% or 99.5%"),
        ("spec.steps[0].weight", json!({"steps": [{"weight": 0}]}), "from 1 to 100"),
        ("spec.steps[0].hold", json!({"steps": [{"weight": 5, "hold": "5 minutes"}]}), "1h30m"),
        ("spec.judge.objectives.p99", json!({"judge": {"objectives": {"p99": "fast"}}}), "1h30m"),
        ("spec.judge.objectives.p99", json!({"judge": {"objectives": {"p99": "0ms"}}}), "for example 300ms"),
        ("spec.judge.warmUp", json!({"judge": {"warmUp": "soon"}}), "1h30m"),
        ("spec.judge.latency.worseBy", json!({"judge": {"latency": {"worseBy": 0.5}}}), "for example 3"),
    ] {
        let errors = errors(&web(spec.clone()));
        assert_eq!(errors.len(), 1, "{spec}: {errors:?}");
        assert!(errors[0].starts_with(field) && errors[0].contains(expected), "{spec}: {errors:?}");
    }
    let accepted = json!({"deadline": "1h30m", "judge": {"confidence": "99.9%",
        "objectives": {"successRate": 99.5, "p99": "300ms"}, "latency": {"worseBy": 0.0}},
        "steps": [{"weight": 1, "hold": "0s"}, {"weight": 100, "hold": "1d12h"}]});
    assert_eq!(errors(&web(accepted)), Vec::<String>::new());
}

#[test]
fn a_deployment_with_strategy_recreate_cannot_have_a_canary() {
    let validation = with_target(&web(json!({})), &json!({"spec": {"strategy": {"type": "Recreate"}}}));
    assert!(validation.errors[0].contains("RollingUpdate"), "{:?}", validation.errors);
}

#[test]
fn a_deployment_that_may_lose_all_pods_whatever_their_number_cannot_have_a_canary() {
    let target = |unavailable: Value| json!({"spec": {"replicas": 3, "strategy": {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": unavailable}}}});
    let always = with_target(&web(json!({})), &target(json!("100%"))).errors;
    assert!(always[0].contains("set maxUnavailable to 0"), "{always:?}");
    // An autoscaler may add pods.
    let at_present = with_target(&web(json!({})), &target(json!(3)));
    assert_eq!(at_present.errors, Vec::<String>::new());
    assert!(at_present.warnings[0].contains("(replicas 3, maxUnavailable 3"), "{:?}", at_present.warnings);
    assert_eq!(with_target(&web(json!({})), &target(json!(2))).errors, Vec::<String>::new());
    // A cluster may get nodes.
    let agent = canary_of(json!({"target": {"kind": "DaemonSet", "name": "agent"}}));
    let set = json!({"spec": {"updateStrategy": {"rollingUpdate": {"maxUnavailable": 2}}},
        "status": {"desiredNumberScheduled": 2}});
    let at_present = with_target(&agent, &set);
    assert_eq!(at_present.errors, Vec::<String>::new());
    assert!(at_present.warnings[0].contains("(pods 2, maxUnavailable 2"), "{:?}", at_present.warnings);
}

#[test]
fn a_workload_with_a_canary_is_warned_about_when_it_is_applied_after_it_or_changed() {
    let of = |strategy: &Value, image: &str| {
        json!({"metadata": {"name": "web"}, "spec": {"replicas": 3, "strategy": strategy,
            "template": {"spec": {"containers": [{"name": "web", "image": image}]}}}})
    };
    let (recreate, rolling) = (json!({"type": "Recreate"}), json!({"type": "RollingUpdate"}));
    let costly = json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}});
    let warned = |new: &Value, old: Option<&Value>| workload(WorkloadKind::Deployment, new, old).len();
    let created = workload(WorkloadKind::Deployment, &of(&recreate, "a"), None);
    assert!(created[0].starts_with("Deployment web has a Canary, and has strategy Recreate"), "{created:?}");
    assert_eq!(warned(&of(&rolling, "a"), None), 0);
    assert_eq!(warned(&of(&recreate, "a"), Some(&of(&rolling, "a"))), 1, "the strategy was changed");
    assert_eq!(warned(&of(&recreate, "b"), Some(&of(&recreate, "a"))), 1, "a new version");
    assert_eq!(warned(&of(&recreate, "a"), Some(&of(&recreate, "a"))), 0, "nothing has changed");
    assert_eq!(warned(&of(&costly, "a"), None), 2);
    assert_eq!(warned(&of(&costly, "b"), Some(&of(&costly, "a"))), 0, "it was said when it was applied");
}

#[test]
fn a_stateful_set_without_replicas_is_not_said_to_have_one() {
    let set = canary_of(json!({"target": {"kind": "StatefulSet", "name": "db"}}));
    let warnings = with_target(&set, &json!({"spec": {"replicas": 0}})).warnings;
    assert!(!warnings.iter().any(|warning| warning.contains("has one replica")), "{warnings:?}");
    assert!(warnings[0].starts_with("StatefulSet db has no replicas at the moment"), "{warnings:?}");
}

#[test]
fn a_second_canary_for_a_workload_is_rejected() {
    let siblings = ["other".to_owned()];
    let validation = validate(&web(json!({})), &Facts { siblings: &siblings, ..Facts::default() });
    assert_eq!(
        validation.errors,
        [
            "Canary other already has this target, and a workload can have only one Canary; delete one of the two"
        ]
    );
}

#[test]
fn a_canary_whose_target_hinders_it_is_accepted_with_a_warning() {
    let set = canary_of(json!({"target": {"kind": "StatefulSet", "name": "db"}}));
    let warnings = with_target(&set, &json!({"spec": {"replicas": 1}})).warnings;
    assert!(warnings.iter().any(|warning| warning.contains("has one replica")), "{warnings:?}");
    let kept = json!({"capacity": {"keepStable": true},
        "steps": [{"weight": 20}, {"weight": 50}]});
    for (surge, warned) in [(json!(2), true), (json!("25%"), true), (json!(5), false), (json!("50%"), false)]
    {
        let target = json!({"spec": {"replicas": 10, "strategy": {"rollingUpdate": {"maxSurge": surge}}}});
        let warnings = with_target(&web(kept.clone()), &target).warnings;
        assert_eq!(
            warnings.iter().any(|warning| warning.contains("surge pods of")),
            warned,
            "{surge}: {warnings:?}"
        );
    }
}

#[test]
fn a_target_that_does_not_exist_is_warned_about_and_one_that_was_not_read_is_not() {
    let absent = Facts { target: Target::Absent, ..Facts::default() };
    assert_eq!(about(&validate(&web(json!({})), &absent), "there is no Deployment web yet").len(), 1);
    assert_eq!(validate(&web(json!({})), &Facts::default()), Validation::default());
}

#[test]
fn an_invalid_action_is_warned_about() {
    for (text, warned) in [
        ("promote@7", false),
        ("promote:59d8@7", false),
        ("promote", true),
        ("promotes@7", true),
        ("retry@", true),
    ] {
        let object = json!({"metadata": {"annotations": {"tulle.dev/action": text}}});
        assert_eq!(action(&object).warnings.len(), usize::from(warned), "{text}");
    }
}

#[test]
fn what_a_step_matches_must_be_one_header_or_one_cookie_with_a_possible_name() {
    let of = |entry: Value| errors(&web(json!({"steps": [{"match": [entry], "hold": "1m"}]})));
    let pair = |name: &str| json!({"name": name, "exact": "insider"});
    assert_eq!(of(json!({"header": pair("x-group")})), Vec::<String>::new());
    assert_eq!(of(json!({"cookie": pair("group")})), Vec::<String>::new());
    for (entry, expected) in [
        (json!({}), "either header or cookie"),
        (json!({"header": pair("a"), "cookie": pair("b")}), "either header or cookie"),
        (json!({"cookie": pair("a=b")}), "cannot be a name"),
        (json!({"header": pair("")}), "cannot be a name"),
    ] {
        let errors = of(entry.clone());
        assert_eq!(errors.len(), 1, "{entry}: {errors:?}");
        assert!(
            errors[0].starts_with("spec.steps[0].match[0]") && errors[0].contains(expected),
            "{errors:?}"
        );
    }
}

#[test]
fn the_cookie_of_users_is_a_cookie_of_its_own() {
    let of = |cookie: &str| {
        errors(&web(json!({"sticky": {"cookie": cookie}, "steps": [
            {"match": [{"cookie": {"name": "group", "exact": "insider"}}]}, {"weight": 5},
        ]})))
    };
    assert_eq!(of("tulle-version"), Vec::<String>::new());
    assert!(of("group")[0].contains("choose another name"));
    assert!(of("a b")[0].contains("cannot be the name of a cookie"));
}

#[test]
fn a_weight_of_nothing_is_accepted_after_a_match_only() {
    let matching = json!({"match": [{"header": {"name": "x-group", "exact": "insider"}}]});
    let nothing = json!({"weight": 0});
    let after = web(json!({"steps": [matching, {"mirror": 5}, nothing, {"weight": 5}]}));
    assert_eq!(validate(&after, &Facts::default()), Validation::default());
    let before = errors(&web(json!({"steps": [nothing, matching]})));
    assert_eq!(before.len(), 1, "{before:?}");
    assert!(before[0].starts_with("spec.steps[0].weight"), "{before:?}");
}

#[test]
fn steps_beyond_the_surge_are_warned_about_with_what_becomes_of_the_old_pods() {
    let target =
        |surge: Value| json!({"spec": {"replicas": 4, "strategy": {"rollingUpdate": {"maxSurge": surge}}}});
    let switch = |keep: bool| web(json!({"steps": [{"weight": 100}], "capacity": {"keepStable": keep}}));
    assert!(with_target(&switch(true), &target(json!("100%"))).warnings.is_empty());
    assert!(with_target(&switch(false), &target(json!(4))).warnings.is_empty());
    let kept = with_target(&switch(true), &target(json!("50%"))).warnings;
    assert_eq!(kept.len(), 1, "{kept:?}");
    assert!(kept[0].contains("can carry 50%") && kept[0].contains("will not be set"), "{kept:?}");
    let replaced = with_target(&switch(false), &target(json!(1))).warnings;
    assert_eq!(replaced.len(), 1, "{replaced:?}");
    assert!(replaced[0].contains("all stable pods of Deployment web but one are replaced"), "{replaced:?}");
    for (surge, warned) in [(1, 1), (2, 0)] {
        let copies = web(json!({"steps": [{"weight": 5}, {"mirror": 40}]}));
        let warnings = about(&with_target(&copies, &target(json!(surge))), "pods for 45% of the traffic");
        assert_eq!(warnings.len(), warned, "{surge}: {warnings:?}");
    }
}

#[test]
fn steps_that_look_at_http_are_warned_about_where_a_service_has_no_port_for_it() {
    let target = json!({"spec": {"template": {"metadata": {"labels": {"app": "web"}}}}});
    let service = |protocols: &[Option<&str>]| -> Service {
        let ports: Vec<Value> = protocols.iter().map(|app| json!({"port": 80, "appProtocol": app})).collect();
        serde_json::from_value(json!({"metadata": {"name": "web"},
            "spec": {"clusterIP": "10.96.0.7", "selector": {"app": "web"}, "ports": ports}}))
        .unwrap()
    };
    let warned = |spec: Value, service: Service| {
        let services = [service];
        let facts = Facts { target: Target::Found(&target), services: &services, ..Facts::default() };
        about(&validate(&web(spec), &facts), "without a port for HTTP")
    };
    let insiders = json!([{"header": {"name": "x-group", "exact": "insider"}}]);
    let all = json!({"steps": [{"match": insiders}, {"mirror": 5}, {"weight": 5}], "sticky": {"cookie": "version"}});
    let found = warned(all.clone(), service(&[Some("mysql")]));
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].contains("(web), and match, mirror, sticky looks at"), "{found:?}");
    assert!(
        warned(all.clone(), service(&[Some("tcp"), None])).is_empty(),
        "what is not declared is found out"
    );
    assert!(warned(all, service(&[Some("grpc")])).is_empty());
    assert!(warned(json!({"steps": [{"weight": 5}]}), service(&[Some("tcp")])).is_empty());
}

#[test]
fn copies_are_warned_about_where_a_service_has_nothing_but_grpc() {
    let target = json!({"spec": {"template": {"metadata": {"labels": {"app": "web"}}}}});
    let warned = |step: Value, protocols: &[Option<&str>]| {
        let ports: Vec<Value> = protocols.iter().map(|app| json!({"port": 80, "appProtocol": app})).collect();
        let service = json!({"metadata": {"name": "web"},
            "spec": {"clusterIP": "10.96.0.7", "selector": {"app": "web"}, "ports": ports}});
        let services: [Service; 1] = [serde_json::from_value(service).unwrap()];
        let facts = Facts { target: Target::Found(&target), services: &services, ..Facts::default() };
        about(&validate(&web(json!({"steps": [step, {"weight": 5}]})), &facts), "every gRPC call is a POST")
            .len()
    };
    let mirror = || json!({"mirror": 5});
    assert_eq!(warned(mirror(), &[Some("grpc"), Some("kubernetes.io/h2c")]), 1);
    assert_eq!(warned(mirror(), &[Some("grpc"), Some("http")]), 0);
    assert_eq!(warned(mirror(), &[None]), 0);
    assert_eq!(warned(json!({"weight": 1}), &[Some("grpc")]), 0);
}
