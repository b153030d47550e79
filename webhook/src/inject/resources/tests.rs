//! Shares of the sidecar in pods and namespaces of every kind.

use super::*;

fn limits(ranges: Value, quotas: Value) -> NamespaceLimits {
    let object = |kind: &str, spec: &Value, status: &Value| json!({"apiVersion": "v1", "kind": kind, "metadata": {"name": "team"}, "spec": spec, "status": status});
    let all = |list: &Value| list.as_array().unwrap().clone();
    NamespaceLimits {
        ranges: all(&ranges)
            .iter()
            .map(|item| {
                serde_json::from_value(object("LimitRange", &json!({"limits": [item]}), &Value::Null))
                    .unwrap()
            })
            .collect(),
        quotas: all(&quotas)
            .iter()
            .map(|q| {
                serde_json::from_value(object(
                    "ResourceQuota",
                    &json!({"hard": q["hard"]}),
                    &json!({"used": q["used"]}),
                ))
                .unwrap()
            })
            .collect(),
    }
}

fn pod(resources: Value) -> Value {
    json!({"spec": {"containers": [{"name": "app", "resources": resources}]}})
}

fn of(pod: &Value, settings: &PodSettings, limits: &NamespaceLimits) -> (Value, Vec<String>) {
    let mut warnings = Vec::new();
    (resources(pod, Asked { pod: settings, all: settings }, limits, &mut warnings), warnings)
}

#[test]
fn a_pod_without_resources_gets_small_requests_and_no_limits() {
    let (got, warnings) = of(&pod(json!({})), &PodSettings::default(), &NamespaceLimits::default());
    assert_eq!(got, json!({"requests": {"cpu": "10m", "memory": "16Mi"}}));
    assert!(warnings.is_empty());
}

#[test]
fn a_guaranteed_pod_stays_guaranteed() {
    let fixed =
        json!({"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"cpu": "1000m", "memory": "1024Mi"}});
    let (got, warnings) = of(&pod(fixed.clone()), &PodSettings::default(), &NamespaceLimits::default());
    let same = json!({"cpu": "100m", "memory": "64Mi"});
    assert_eq!((got, warnings), (json!({"requests": same, "limits": same}), vec![]));
    let cpu = PodSettings { cpu: Some("250m".into()), ..PodSettings::default() };
    let (got, _) = of(&pod(fixed.clone()), &cpu, &NamespaceLimits::default());
    assert_eq!((&got["requests"]["cpu"], &got["limits"]["cpu"]), (&json!("250m"), &json!("250m")));
    let minimum = limits(json!([{"type": "Container", "min": {"memory": "100Mi"}}]), json!([]));
    let (got, _) = of(&pod(fixed.clone()), &PodSettings::default(), &minimum);
    assert_eq!(got["requests"], got["limits"]);
    let both = PodSettings { cpu: Some("50m".into()), cpu_limit: Some("1".into()), ..PodSettings::default() };
    let (_, warnings) = of(&pod(fixed), &both, &NamespaceLimits::default());
    assert!(warnings[0].contains("QoS class from Guaranteed to Burstable"), "{warnings:?}");
}

#[test]
fn a_best_effort_pod_stays_best_effort_where_a_quota_counts_by_this_class() {
    let none = PodSettings::default();
    let by_scope = |scope: &str| {
        let mut limits = limits(json!([]), json!([{"hard": {"limits.cpu": "4", "pods": "9"}}]));
        limits.quotas[0].spec.as_mut().unwrap().scopes = Some(vec![scope.into()]);
        limits
    };
    for scope in ["NotBestEffort", "BestEffort"] {
        let (got, warnings) = of(&pod(json!({})), &none, &by_scope(scope));
        assert_eq!((got, warnings), (json!({}), vec![]), "{scope}");
        let own = pod(json!({"requests": {"cpu": "1"}, "limits": {"cpu": "1"}}));
        let (got, _) = of(&own, &none, &by_scope(scope));
        assert_eq!(got["limits"]["cpu"], "500m", "a Burstable pod, {scope}");
        let asked = PodSettings { cpu: Some("20m".into()), ..PodSettings::default() };
        let (got, _) = of(&pod(json!({})), &asked, &by_scope(scope));
        assert_eq!(got["requests"]["cpu"], "20m", "what the pod asks for, {scope}");
    }
    let (got, _) = of(&pod(json!({})), &none, &by_scope("NotTerminating"));
    assert_eq!(got["requests"]["cpu"], "10m", "another scope");

    let mut selected = by_scope("NotTerminating");
    let spec = selected.quotas[0].spec.as_mut().unwrap();
    spec.scopes = None;
    let selector = json!({"matchExpressions": [{"scopeName": "NotBestEffort", "operator": "Exists"}]});
    spec.scope_selector = Some(serde_json::from_value(selector).unwrap());
    assert_eq!(of(&pod(json!({})), &none, &selected).0, json!({}), "by a selector");
    let mut of_mesh = Vec::new();
    let mesh = PodSettings { cpu: Some("20m".into()), ..PodSettings::default() };
    let asked = Asked { pod: &none, all: &mesh };
    assert_eq!(resources(&pod(json!({})), asked, &selected, &mut of_mesh), json!({}), "a default");
}

#[test]
fn a_pod_is_best_effort_only_if_nothing_of_it_has_a_request_or_limit() {
    assert!(is_best_effort(&pod(json!({"requests": {"cpu": "0", "ephemeral-storage": "1Gi"}}))));
    assert!(!is_best_effort(&pod(json!({"limits": {"memory": "1Gi"}}))));
    for part in [
        json!({"initContainers": [{"name": "i", "resources": {"requests": {"cpu": 1}}}]}),
        json!({"resources": {"requests": {"memory": "1Mi"}}}),
    ] {
        assert!(!is_best_effort(&json!({"spec": part})), "{part}");
    }
}

#[test]
fn a_quota_on_limits_gets_limits() {
    let quota = limits(json!([]), json!([{"hard": {"limits.cpu": "4", "limits.memory": "4Gi"}}]));
    let (got, warnings) = of(&pod(json!({})), &PodSettings::default(), &quota);
    assert_eq!(got["limits"], json!({"cpu": "500m", "memory": "128Mi"}));
    assert!(warnings.is_empty(), "{warnings:?}");
}

#[test]
fn a_limit_range_is_kept_at_both_ends() {
    let range = json!([{"type": "Container", "min": {"cpu": "20m", "memory": "32Mi"}, "max": {"cpu": "2", "memory": "64Mi"},
        "default": {"cpu": "2", "memory": "64Mi"}, "maxLimitRequestRatio": {"cpu": "10"}}]);
    let (got, _) = of(&pod(json!({})), &PodSettings::default(), &limits(range.clone(), json!([])));
    assert_eq!(
        got,
        json!({"requests": {"cpu": "20m", "memory": "32Mi"}, "limits": {"cpu": "100m", "memory": "64Mi"}})
    );
    let asked = PodSettings { memory: Some("128Mi".into()), ..PodSettings::default() };
    let (got, warnings) = of(&pod(json!({})), &asked, &limits(range, json!([])));
    assert_eq!(got["requests"]["memory"], "64Mi");
    assert!(
        warnings[0]
            .contains("memory is set to request 64Mi, limit 64Mi because a LimitRange of the namespace"),
        "{warnings:?}"
    );
}

#[test]
fn a_memory_limit_below_the_default_request_lowers_the_request() {
    let small = PodSettings { memory_limit: Some("12Mi".into()), ..PodSettings::default() };
    let (got, _) = of(&pod(json!({})), &small, &NamespaceLimits::default());
    assert_eq!((&got["requests"]["memory"], &got["limits"]["memory"]), (&json!("12Mi"), &json!("12Mi")));
}

#[test]
fn what_will_be_rejected_anyway_is_said_with_the_numbers() {
    let quota = limits(json!([]), json!([{"hard": {"requests.cpu": "1"}, "used": {"requests.cpu": "950m"}}]));
    let (_, warnings) = of(&pod(json!({"requests": {"cpu": "45m"}})), &PodSettings::default(), &quota);
    assert_eq!(
        warnings,
        [
            "the pod with its sidecar needs requests.cpu 55m and will be rejected because ResourceQuota team allows 1, of which 950m is used; raise the quota, or lower the sidecar's share with annotations tulle.dev/cpu and tulle.dev/cpu-limit"
        ]
    );
    let range = limits(json!([{"type": "Pod", "max": {"memory": "64Mi"}}]), json!([]));
    let (_, warnings) = of(&pod(json!({"requests": {"memory": "60Mi"}})), &PodSettings::default(), &range);
    assert!(warnings[0].contains("needs requests.memory 76Mi and will be rejected because LimitRange team allows a pod at most 64Mi"), "{warnings:?}");
}

#[test]
fn a_ratio_alone_a_scoped_quota_and_storage_are_met_too() {
    let none = PodSettings::default();
    let ratio = limits(json!([{"type": "Container", "maxLimitRequestRatio": {"cpu": "4"}}]), json!([]));
    let (got, _) = of(&pod(json!({})), &none, &ratio);
    assert_eq!((&got["requests"]["cpu"], &got["limits"]["cpu"]), (&json!("25m"), &json!("100m")));
    // The maximum of one range is met after the minimum of another has raised the limit.
    let two = json!([{"type": "Container", "maxLimitRequestRatio": {"cpu": "10"}}, {"type": "Container", "min": {"cpu": "200m"}, "max": {"cpu": "300m"}}]);
    let (got, _) = of(&pod(json!({})), &none, &limits(two, json!([])));
    assert_eq!((&got["requests"]["cpu"], &got["limits"]["cpu"]), (&json!("200m"), &json!("200m")));
    let mut scoped = limits(json!([]), json!([{"hard": {"limits.cpu": "4"}}]));
    scoped.quotas[0].spec.as_mut().unwrap().scopes = Some(vec!["NotTerminating".into()]);
    let (got, warnings) = of(&pod(json!({})), &none, &scoped);
    assert_eq!((&got["limits"]["cpu"], warnings.len()), (&json!("500m"), 0));
    let storage = limits(
        json!([{"type": "Container", "max": {"ephemeral-storage": "10Gi"}, "default": {"ephemeral-storage": "10Gi"}}]),
        json!([]),
    );
    let (got, _) = of(&pod(json!({})), &none, &storage);
    assert_eq!(
        (&got["requests"]["ephemeral-storage"], &got["limits"]["ephemeral-storage"]),
        (&json!("16Mi"), &json!("256Mi"))
    );
}

#[test]
fn the_default_limit_of_a_namespace_is_not_taken_for_the_sidecars() {
    let range = json!([{"type": "Container", "max": {"cpu": "4", "memory": "8Gi"}, "default": {"cpu": "4", "memory": "8Gi"}}]);
    let (got, _) = of(&pod(json!({})), &PodSettings::default(), &limits(range, json!([])));
    assert_eq!(got["limits"], json!({"cpu": "500m", "memory": "128Mi"}));
}

#[test]
fn a_default_request_of_the_mesh_is_no_limit_of_a_guaranteed_pod() {
    let fixed = json!({"limits": {"cpu": "1", "memory": "1Gi"}});
    let mesh = PodSettings { cpu: Some("20m".into()), ..PodSettings::default() };
    let asked = Asked { pod: &PodSettings::default(), all: &mesh };
    let got = resources(&pod(fixed), asked, &NamespaceLimits::default(), &mut Vec::new());
    assert_eq!((&got["requests"]["cpu"], &got["limits"]["cpu"]), (&json!("100m"), &json!("100m")));
}

#[test]
fn a_pod_with_resources_of_its_own_gets_room_for_the_sidecar() {
    let mut pod = pod(json!({"requests": {"cpu": "500m"}}));
    pod["spec"]["resources"] = json!({"requests": {"cpu": "500m"}, "limits": {"cpu": "1"}});
    let (ours, _) = of(&pod, &PodSettings::default(), &NamespaceLimits::default());
    assert_eq!(
        pod_level(&pod, &ours),
        [("requests", "cpu", "510m".to_owned()), ("limits", "cpu", "1010m".to_owned())]
    );
}

#[test]
fn a_limit_of_the_pod_that_equals_its_request_stays_equal() {
    let none = NamespaceLimits::default();
    let quota = limits(json!([]), json!([{"hard": {"limits.cpu": "9", "limits.memory": "9Gi"}}]));
    let range =
        json!([{"type": "Container", "default": {"cpu": "1", "memory": "1Gi"}, "min": {"cpu": "20m"}}]);
    let range = limits(range, json!([]));
    let ratio = limits(json!([{"type": "Container", "maxLimitRequestRatio": {"cpu": "2"}}]), json!([]));
    let default = PodSettings::default();
    let limit = PodSettings { cpu_limit: Some("1".into()), ..PodSettings::default() };
    // CPU, and memory behind a slash.
    let amounts = |text: &str| {
        let found = ["cpu", "memory"].into_iter().zip(text.split('/')).filter(|(_, text)| !text.is_empty());
        Value::Object(found.map(|(name, text)| (name.to_owned(), json!(text))).collect())
    };
    let own = "40m/100Mi";
    // The pod's requests and limits, the settings, and the namespace; then the pod's requests and limits with room for
    // the sidecar, and the sidecar's limits.
    for (case, requests, limits, settings, namespace, wanted_requests, wanted_limits, ours) in [
        ("free", own, own, &default, &none, "50m/116Mi", "50m/116Mi", ""),
        ("quota", own, own, &default, &quota, "50m/116Mi", "50m/116Mi", "50m/116Mi"),
        ("range", own, own, &default, &range, "60m/116Mi", "60m/116Mi", "60m/116Mi"),
        ("ratio", own, own, &default, &ratio, "90m/116Mi", "90m/116Mi", "90m"),
        ("setting", own, own, &limit, &none, "50m/116Mi", "50m/116Mi", "50m"),
        ("large", "2/4Gi", "2/4Gi", &default, &quota, "2010m/4112Mi", "2010m/4112Mi", "500m/128Mi"),
        ("burstable", own, "1/1Gi", &default, &quota, "50m/116Mi", "1500m/1152Mi", "500m/128Mi"),
        ("one of two", own, "40m/1Gi", &default, &quota, "50m/116Mi", "50m/1152Mi", "50m/128Mi"),
    ] {
        let mut pod = pod(json!({}));
        pod["spec"]["resources"] = json!({"requests": amounts(requests), "limits": amounts(limits)});
        let (share, warnings) = of(&pod, settings, namespace);
        let found = share.get("limits").cloned().unwrap_or(json!({}));
        assert_eq!((found, warnings), (amounts(ours), vec![]), "{case}");
        for (kind, resource, amount) in pod_level(&pod, &share) {
            pod["spec"]["resources"][kind][resource] = json!(amount);
        }
        let wanted = json!({"requests": amounts(wanted_requests), "limits": amounts(wanted_limits)});
        assert_eq!(pod["spec"]["resources"], wanted, "{case}");
    }
}

#[test]
fn a_quota_is_compared_with_the_pods_own_resources_where_it_has_them() {
    let quota = limits(json!([]), json!([{"hard": {"limits.cpu": "1"}, "used": {"limits.cpu": "960m"}}]));
    let mut pod = pod(json!({}));
    pod["spec"]["resources"] = json!({"requests": {"cpu": "40m"}, "limits": {"cpu": "40m"}});
    let (_, warnings) = of(&pod, &PodSettings::default(), &quota);
    assert!(warnings[0].contains("needs limits.cpu 50m and will be rejected"), "{warnings:?}");
}
