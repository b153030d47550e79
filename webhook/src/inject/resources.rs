//! Requests and limits of the injected containers.
//!
//! In: the settings, and the namespace's LimitRanges and ResourceQuotas. Out: requests and limits with which the pod
//! is admitted if it would be without a sidecar, and keeps its QoS class; warnings where that is impossible.

use k8s_openapi::api::core::v1::{LimitRange, LimitRangeItem, ResourceQuota};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as RawQuantity;
use serde_json::{Value, json};

use super::{PodSettings, containers_at};
use crate::quantity::Quantity;

/// LimitRanges and ResourceQuotas of a namespace.
#[derive(Clone, Debug, Default)]
pub struct NamespaceLimits {
    /// LimitRanges.
    pub ranges: Vec<LimitRange>,
    /// ResourceQuotas.
    pub quotas: Vec<ResourceQuota>,
}

/// A resource, and the sidecar's defaults for it.
struct Resource {
    name: &'static str,
    /// Enough for an idle sidecar (9 MiB resident) and a few connections.
    request: &'static str,
    /// Request and limit in a pod whose QoS class is Guaranteed: enough for about 5,000 requests per second.
    guaranteed: &'static str,
    /// Limit where a ResourceQuota requires one.
    limit: &'static str,
}

const RESOURCES: [Resource; 2] = [
    Resource { name: "cpu", request: "10m", guaranteed: "100m", limit: "500m" },
    Resource { name: "memory", request: "16Mi", guaranteed: "64Mi", limit: "128Mi" },
];

/// Written only where a LimitRange names it: its defaults, which are meant for applications, would apply otherwise.
const STORAGE: [Resource; 1] =
    [Resource { name: "ephemeral-storage", request: "16Mi", guaranteed: "256Mi", limit: "256Mi" }];

/// Request and limit of one container for one resource.
struct Share {
    request: Quantity,
    limit: Option<Quantity>,
}

/// Settings of the sidecar's resources.
#[derive(Clone, Copy)]
pub(super) struct Asked<'a> {
    /// What the pod's own annotations ask for.
    pub(super) pod: &'a PodSettings,
    /// The same, completed by the defaults of the namespace and of MeshConfig.
    pub(super) all: &'a PodSettings,
}

/// Requests and limits of each injected container. Both containers get the same, because ResourceQuotas and
/// LimitRanges apply to each one; the pod's total counts them once, because the init container ends before the
/// proxy starts.
pub(super) fn resources(
    pod: &Value,
    asked: Asked<'_>,
    namespace: &NamespaceLimits,
    warnings: &mut Vec<String>,
) -> Value {
    let guaranteed = is_guaranteed(pod);
    let best_effort = stays_best_effort(pod, asked, namespace);
    let (mut requests, mut limits) = (serde_json::Map::new(), serde_json::Map::new());
    for resource in RESOURCES.iter().chain(&STORAGE) {
        let bounds = bounds(namespace, resource.name);
        // Storage does not decide the QoS class.
        let is_storage = resource.name == STORAGE[0].name;
        let left_out = if is_storage { !bounds.any() } else { best_effort };
        if left_out {
            continue;
        }
        let mut share = wanted(resource, asked, namespace, &bounds, guaranteed);
        let before = (share.request, share.limit);
        clamp(&mut share, &bounds);
        let set = |settings: &PodSettings| {
            settings.request(resource.name).is_some() || settings.limit(resource.name).is_some()
        };
        if set(asked.all) && before != (share.request, share.limit) {
            warnings.push(format!(
                "the sidecar's {} is set to {} because a LimitRange of the namespace does not allow the configured values",
                resource.name,
                describe(&share)
            ));
        }
        if guaranteed && !is_storage && share.limit != Some(share.request) {
            warnings.push(format!(
                "the sidecar's {} ({}) changes the pod's QoS class from Guaranteed to Burstable; set its request and limit to the same value",
                resource.name,
                describe(&share)
            ));
        }
        warn_about_rejection(pod, resource.name, &share, namespace, warnings);
        requests.insert(resource.name.to_owned(), json!(share.request.to_string()));
        if let Some(limit) = share.limit {
            limits.insert(resource.name.to_owned(), json!(limit.to_string()));
        }
    }
    let both = [("requests", requests), ("limits", limits)].into_iter().filter(|(_, all)| !all.is_empty());
    Value::Object(both.map(|(kind, all)| (kind.to_owned(), Value::Object(all))).collect())
}

/// The pod's own requests and limits, where it has them (`spec.resources`), with room for the sidecar:
/// `(kind, resource, amount)`.
pub(super) fn pod_level(pod: &Value, ours: &Value) -> Vec<(&'static str, &'static str, String)> {
    let mut raised = Vec::new();
    for kind in ["requests", "limits"] {
        for resource in &RESOURCES {
            let at =
                |value: &Value, kind: &str| amount(value.pointer(&format!("/{kind}/{}", resource.name))?);
            let room = at(ours, kind).or_else(|| at(ours, "requests"));
            let own = pod.pointer("/spec/resources").and_then(|resources| at(resources, kind));
            if let (Some(own), Some(room)) = (own, room) {
                raised.push((kind, resource.name, own.plus(room).to_string()));
            }
        }
    }
    raised
}

fn describe(share: &Share) -> String {
    let limit = share.limit.map_or_else(|| "no limit".to_owned(), |limit| format!("limit {limit}"));
    format!("request {}, {limit}", share.request)
}

/// Request and limit before the LimitRanges are applied.
fn wanted(
    resource: &Resource,
    asked: Asked<'_>,
    namespace: &NamespaceLimits,
    bounds: &Bounds,
    guaranteed: bool,
) -> Share {
    let parse = |text: &str| Quantity::parse(text).unwrap_or_default();
    let of = |settings: &PodSettings| {
        (settings.request(resource.name).map(parse), settings.limit(resource.name).map(parse))
    };
    let (request, limit) = of(asked.all);
    if guaranteed {
        // Only what the pod itself asks for may end its QoS class; a default request is not meant as a limit.
        return match of(asked.pod) {
            (None, None) => {
                let least = parse(resource.guaranteed);
                let both = limit.unwrap_or_else(|| request.unwrap_or_default().max(least));
                Share { request: both, limit: Some(both) }
            }
            (request, limit) => {
                Share { request: request.or(limit).unwrap_or_default(), limit: limit.or(request) }
            }
        };
    }
    // A limit of our own, because the namespace's default is meant for applications, and its maximum is the default
    // where there is no other.
    let limit = limit.or_else(|| {
        let name = format!("limits.{}", resource.name);
        // A quota with a scope may count this pod: whether it does depends on more than is known here.
        let of_quota = |quota: &ResourceQuota| bound(quota.spec.as_ref()?.hard.as_ref(), &name);
        let by_quota = namespace.quotas.iter().any(|quota| of_quota(quota).is_some());
        // With a ratio, the limit decides how much is reserved.
        let text = if bounds.ratio.is_some() { resource.guaranteed } else { resource.limit };
        (by_quota || bounds.any()).then(|| parse(text).max(request.unwrap_or_default()))
    });
    let request = request.unwrap_or_else(|| parse(resource.request));
    Share { request: limit.map_or(request, |limit| request.min(limit)), limit }
}

/// What all LimitRanges of a namespace together allow a container.
#[derive(Default)]
struct Bounds {
    least: Option<Quantity>,
    most: Option<Quantity>,
    /// The largest limit, as a multiple of the request; also of the pod's, whose other containers keep it themselves.
    ratio: Option<Quantity>,
    has_default: bool,
}

impl Bounds {
    fn any(&self) -> bool {
        self.least.is_some() || self.most.is_some() || self.ratio.is_some() || self.has_default
    }
}

fn bounds(namespace: &NamespaceLimits, name: &str) -> Bounds {
    let mut bounds = Bounds::default();
    for (_, item) in items(namespace) {
        let ratio = bound(item.max_limit_request_ratio.as_ref(), name).filter(|ratio| !ratio.is_zero());
        if item.type_ == "Container" {
            bounds.least = bounds.least.max(bound(item.min.as_ref(), name));
            bounds.most = smaller(bounds.most, bound(item.max.as_ref(), name));
            bounds.has_default |= bound(item.default.as_ref(), name).is_some();
        }
        if ["Container", "Pod"].contains(&item.type_.as_str()) {
            bounds.ratio = smaller(bounds.ratio, ratio);
        }
    }
    bounds
}

fn smaller(a: Option<Quantity>, b: Option<Quantity>) -> Option<Quantity> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

/// Changes a share to values that the LimitRanges allow for a container.
fn clamp(share: &mut Share, bounds: &Bounds) {
    let was_equal = share.limit == Some(share.request);
    if let Some(least) = bounds.least {
        share.request = share.request.max(least);
        share.limit = share.limit.map(|limit| limit.max(least));
    }
    if let Some(most) = bounds.most {
        share.limit = Some(share.limit.map_or(most, |limit| limit.min(most)));
    }
    if let Some(limit) = share.limit {
        let least = bounds.ratio.map_or(Quantity::default(), |ratio| limit.divided_by(ratio));
        share.request = share.request.max(least).min(limit);
    }
    if was_equal && let Some(limit) = share.limit {
        share.request = limit;
    }
}

/// Warns when a pod with its sidecar exceeds what a ResourceQuota has left or a LimitRange allows for a pod, because
/// otherwise only the status of its controller shows the rejection.
fn warn_about_rejection(
    pod: &Value,
    name: &str,
    share: &Share,
    namespace: &NamespaceLimits,
    warnings: &mut Vec<String>,
) {
    let totals = [
        ("requests", total(pod, name, "requests", Some(share.request))),
        ("limits", total(pod, name, "limits", share.limit)),
    ];
    for (kind, total) in totals {
        let Some(total) = total else { continue };
        for quota in &namespace.quotas {
            let names = [format!("{kind}.{name}"), name.to_owned()];
            // In a ResourceQuota, `cpu` is the same as `requests.cpu`.
            let key = names.iter().take(if kind == "requests" { 2 } else { 1 });
            for key in key {
                let Some(hard) = hard(quota, key) else { continue };
                let used = quota.status.as_ref().and_then(|status| status.used.as_ref());
                let used = used.and_then(|used| bound(Some(used), key)).unwrap_or_default();
                if total > hard.minus(used) {
                    let quota = quota.metadata.name.as_deref().unwrap_or("");
                    warnings.push(format!(
                        "the pod with its sidecar needs {key} {total} and will be rejected because ResourceQuota {quota} allows {hard}, of which {used} is used; raise the quota, or lower the sidecar's share with annotations tulle.dev/{name} and tulle.dev/{name}-limit"
                    ));
                }
            }
        }
        let pods = items(namespace).filter(|(_, item)| item.type_ == "Pod");
        for (range, item) in pods {
            if let Some(most) = bound(item.max.as_ref(), name).filter(|most| total > *most) {
                warnings.push(format!(
                    "the pod with its sidecar needs {kind}.{name} {total} and will be rejected because LimitRange {range} allows a pod at most {most}; raise its max, or lower the sidecar's share with annotations tulle.dev/{name} and tulle.dev/{name}-limit"
                ));
            }
        }
    }
}

/// The sum over the sidecar and the pod's containers that run at the same time; `None` when one of these containers
/// has no limit.
fn total(pod: &Value, name: &str, kind: &str, ours: Option<Quantity>) -> Option<Quantity> {
    let at = |container: &Value, kind: &str| amount(container.pointer(&format!("/resources/{kind}/{name}"))?);
    let sidecars = containers_at(pod, "/spec/initContainers")
        .filter(|container| container.get("restartPolicy").and_then(Value::as_str) == Some("Always"));
    let mut sum = ours?;
    for container in containers_at(pod, "/spec/containers").chain(sidecars) {
        let amount =
            at(container, kind).or_else(|| if kind == "requests" { at(container, "limits") } else { None });
        sum = sum.plus(match amount {
            Some(amount) => amount,
            None if kind == "requests" => Quantity::default(),
            None => return None,
        });
    }
    Some(sum)
}

/// Whether a pod has the QoS class Guaranteed: every container has limits of CPU and memory, and requests equal to
/// them. <https://kubernetes.io/docs/concepts/workloads/pods/pod-qos/>
fn is_guaranteed(pod: &Value) -> bool {
    let guaranteed = |container: &Value| {
        RESOURCES.iter().all(|resource| {
            let at = |kind: &str| amount(container.pointer(&format!("/resources/{kind}/{}", resource.name))?);
            let limit = at("limits").filter(|limit| !limit.is_zero());
            limit.is_some_and(|limit| at("requests").is_none_or(|request| request == limit))
        })
    };
    // With resources of its own, the pod's class does not depend on its containers.
    if pod.pointer("/spec/resources").is_some_and(|resources| *resources != json!({})) {
        return false;
    }
    let mut containers =
        ["/spec/containers", "/spec/initContainers"].into_iter().flat_map(|path| containers_at(pod, path));
    containers_at(pod, "/spec/containers").next().is_some() && containers.all(guaranteed)
}

/// Whether the sidecar gets no requests and limits of CPU and memory, because the pod has the QoS class BestEffort and
/// a quota counts by this class: one of scope NotBestEffort would reject the pod, whose own containers have none. What
/// the pod itself asks for is set all the same. A default is not meant to change the class.
fn stays_best_effort(pod: &Value, asked: Asked<'_>, namespace: &NamespaceLimits) -> bool {
    let asks = |name: &str| asked.pod.request(name).is_some() || asked.pod.limit(name).is_some();
    // The API server gives the containers defaults of their own, which a template does not show.
    let has_defaults = |name: &str| bounds(namespace, name).any();
    namespace.quotas.iter().any(counts_by_class)
        && is_best_effort(pod)
        && !RESOURCES.iter().any(|resource| asks(resource.name) || has_defaults(resource.name))
}

/// Whether a quota counts only pods that have, or do not have, the QoS class BestEffort.
fn counts_by_class(quota: &ResourceQuota) -> bool {
    let Some(spec) = &quota.spec else { return false };
    let expressions =
        spec.scope_selector.iter().flat_map(|selector| selector.match_expressions.iter().flatten());
    let selected = expressions.map(|expression| expression.scope_name.as_str());
    let mut scopes = spec.scopes.iter().flatten().map(String::as_str).chain(selected);
    scopes.any(|scope| ["BestEffort", "NotBestEffort"].contains(&scope))
}

/// Whether a pod has the QoS class BestEffort: neither the pod nor a container has a request or limit of CPU or memory.
fn is_best_effort(pod: &Value) -> bool {
    let has = |holder: &Value, kind: &str, name: &str| {
        let found = holder.pointer(&format!("/resources/{kind}/{name}")).and_then(amount);
        found.is_some_and(|amount| !amount.is_zero())
    };
    let has_any = |holder: &Value| {
        RESOURCES
            .iter()
            .any(|resource| has(holder, "requests", resource.name) || has(holder, "limits", resource.name))
    };
    let containers =
        ["/spec/containers", "/spec/initContainers"].into_iter().flat_map(|path| containers_at(pod, path));
    !pod.pointer("/spec").into_iter().chain(containers).any(has_any)
}

/// A quantity in a manifest: text, or a number.
pub(super) fn amount(value: &Value) -> Option<Quantity> {
    Quantity::parse(value.as_str().map_or_else(|| value.to_string(), str::to_owned).as_str())
}

fn items(namespace: &NamespaceLimits) -> impl Iterator<Item = (&str, &LimitRangeItem)> {
    namespace.ranges.iter().flat_map(|range| {
        let name = range.metadata.name.as_deref().unwrap_or("");
        range.spec.iter().flat_map(move |spec| spec.limits.iter().map(move |item| (name, item)))
    })
}

fn bound(amounts: Option<&std::collections::BTreeMap<String, RawQuantity>>, name: &str) -> Option<Quantity> {
    Quantity::parse(&amounts?.get(name)?.0)
}

/// The amount that a ResourceQuota allows. Quotas with scopes count only some pods and are left to the API server.
fn hard(quota: &ResourceQuota, name: &str) -> Option<Quantity> {
    let spec = quota.spec.as_ref()?;
    let scoped =
        spec.scopes.as_ref().is_some_and(|scopes| !scopes.is_empty()) || spec.scope_selector.is_some();
    if scoped { None } else { bound(spec.hard.as_ref(), name) }
}

#[cfg(test)]
mod tests {
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
        let fixed = json!({"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"cpu": "1000m", "memory": "1024Mi"}});
        let (got, warnings) = of(&pod(fixed.clone()), &PodSettings::default(), &NamespaceLimits::default());
        let same = json!({"cpu": "100m", "memory": "64Mi"});
        assert_eq!((got, warnings), (json!({"requests": same, "limits": same}), vec![]));
        let cpu = PodSettings { cpu: Some("250m".into()), ..PodSettings::default() };
        let (got, _) = of(&pod(fixed.clone()), &cpu, &NamespaceLimits::default());
        assert_eq!((&got["requests"]["cpu"], &got["limits"]["cpu"]), (&json!("250m"), &json!("250m")));
        let minimum = limits(json!([{"type": "Container", "min": {"memory": "100Mi"}}]), json!([]));
        let (got, _) = of(&pod(fixed.clone()), &PodSettings::default(), &minimum);
        assert_eq!(got["requests"], got["limits"]);
        let both =
            PodSettings { cpu: Some("50m".into()), cpu_limit: Some("1".into()), ..PodSettings::default() };
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
        let quota =
            limits(json!([]), json!([{"hard": {"requests.cpu": "1"}, "used": {"requests.cpu": "950m"}}]));
        let (_, warnings) = of(&pod(json!({"requests": {"cpu": "45m"}})), &PodSettings::default(), &quota);
        assert_eq!(
            warnings,
            [
                "the pod with its sidecar needs requests.cpu 55m and will be rejected because ResourceQuota team allows 1, of which 950m is used; raise the quota, or lower the sidecar's share with annotations tulle.dev/cpu and tulle.dev/cpu-limit"
            ]
        );
        let range = limits(json!([{"type": "Pod", "max": {"memory": "64Mi"}}]), json!([]));
        let (_, warnings) =
            of(&pod(json!({"requests": {"memory": "60Mi"}})), &PodSettings::default(), &range);
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
}
