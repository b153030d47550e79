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
        // The API server rejects a container whose limit exceeds that of its pod.
        if let Some(most) = raised(pod, resource.name, "limits", &share) {
            share.limit = share.limit.map(|limit| limit.min(most));
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

/// Resources that a pod can have requests and limits of its own for, and that injection raises.
pub(super) fn of_pods() -> impl Iterator<Item = &'static str> {
    RESOURCES.into_iter().map(|resource| resource.name)
}

/// The pod's own requests and limits, where it has them (`spec.resources`), with room for the sidecar:
/// `(kind, resource, amount)`.
pub(super) fn pod_level(pod: &Value, ours: &Value) -> Vec<(&'static str, &'static str, String)> {
    let ours = |resource: &Resource| {
        let at = |kind: &str| amount(ours.pointer(&format!("/{kind}/{}", resource.name))?);
        Some(Share { request: at("requests")?, limit: at("limits") })
    };
    let mut amounts = Vec::new();
    for kind in ["requests", "limits"] {
        for resource in &RESOURCES {
            let Some(share) = ours(resource) else { continue };
            if let Some(amount) = raised(pod, resource.name, kind, &share) {
                amounts.push((kind, resource.name, amount.to_string()));
            }
        }
    }
    amounts
}

/// The pod's own request or limit, where it has one (`spec.resources`), with room for the sidecar.
///
/// A limit that equals the request stays equal to it, because the pod's QoS class depends on that. The sidecar's share
/// of such a limit is its request; above that, it shares with the application what the pod has.
fn raised(pod: &Value, name: &str, kind: &str, share: &Share) -> Option<Quantity> {
    let own = |kind: &str| amount(pod.pointer(&format!("/spec/resources/{kind}/{name}"))?);
    // The API server takes the limit for a request that is missing.
    let is_equal = own("limits").is_some_and(|limit| own("requests").is_none_or(|request| request == limit));
    let room = if kind == "limits" && !is_equal { share.limit } else { None };
    Some(own(kind)?.plus(room.unwrap_or(share.request)))
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
        // A request or limit of the pod itself counts in place of those of its containers.
        let Some(total) = raised(pod, name, kind, share).or(total) else { continue };
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
    // With resources of its own, the pod's class does not depend on its containers, and `raised` keeps it.
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
mod tests;
