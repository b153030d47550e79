//! What is in the mesh: namespaces, sidecars, MeshPolicies, Canaries, routes.

use std::time::Duration;

use serde_json::Value;
use tulle_crds::{Effect, WorkloadKind, hindrances, keys, parse_duration};
use tulle_mesh::check::{
    self, Condition, Finding, Idle, Pod, Policy, PolicyState, SidecarJudge, Uninjected, WithoutSidecar,
    list as checks, or_ok,
};

use super::super::facts::{Facts, target_name};
use super::super::finding::{ReadRequest, UnreadCheck as _};
use super::{UNANSWERED, namespaces_request, operator_pods, time, view};
use crate::objects::{self, Kind, Tool, Unread, full_name, items, label, name, namespace, number, text};

/// The name with which the operator marks its entries in the status of a route.
const CONTROLLER: &str = "tulle.dev/mesh-controller";
/// The lifetime of a sidecar's certificate where the MeshConfig does not say it.
const LEAF_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// How long a step lasts that does not say it, as the CRD defines it.
const DEFAULT_HOLD: Duration = Duration::from_secs(120);
/// Steps of a Canary that names none.
const DEFAULT_STEPS: u32 = 5;
/// For how long Helm and Flux wait if nothing else is set.
const TOOL_TIMEOUT: Duration = Duration::from_secs(300);

pub(super) fn judge(facts: &Facts) -> Vec<Finding> {
    let mut findings = namespaces(facts);
    findings.extend(injected(facts));
    findings.extend(sidecars(facts));
    findings.extend(policies(facts));
    findings.extend(canaries(facts));
    findings.extend(routes(facts));
    findings
}

fn namespaces(facts: &Facts) -> Vec<Finding> {
    let namespaces = match &facts.namespaces {
        Ok(namespaces) => namespaces,
        Err(why) => return vec![checks::NAMESPACES.unread("namespaces", why, &namespaces_request(facts))],
    };
    let unknown = |namespace: &Value| {
        let value = label(namespace, keys::INJECT)?;
        let name = name(namespace);
        (!matches!(value, "enabled" | "required" | "disabled")).then(|| {
            checks::NAMESPACES
                .warning(format!("namespace {name} has label {}={value}, which has no effect", keys::INJECT))
                .hint("write enabled or required")
                .fix(format!("kubectl label --overwrite namespace {name} {}=enabled", keys::INJECT))
        })
    };
    or_ok(namespaces.iter().filter_map(unknown).collect(), || match namespaces.len() {
        0 => checks::NAMESPACES
            .warning(format!("no namespace has label {}", keys::INJECT))
            .hint("no pod gets a sidecar")
            .fix(format!("kubectl label namespace NAMESPACE {}=enabled", keys::INJECT)),
        count => checks::NAMESPACES.ok(format!("{count} namespaces")),
    })
}

/// Whether a pod without a sidecar should have one: it runs, has not opted out, and has an address of its own.
fn should_have_sidecar(pod: &Value) -> bool {
    let phase = text(pod, "/status/phase");
    let own_network = pod.pointer("/spec/hostNetwork").and_then(Value::as_bool) != Some(true);
    let is_static = objects::annotation(pod, "kubernetes.io/config.mirror").is_some();
    let opted_out = label(pod, keys::INJECT) == Some("disabled");
    own_network && !is_static && !opted_out && !matches!(phase, "Succeeded" | "Failed")
}

/// The workload whose restart makes a pod anew, as `kubectl rollout restart` takes it.
fn workload(pod: &Value) -> Option<String> {
    items(pod, "/metadata/ownerReferences").iter().find_map(|owner| {
        let owner_name = text(owner, "/name");
        match text(owner, "/kind") {
            // A Deployment names its ReplicaSets after itself and the hash of their template. kubectl restarts no other.
            "ReplicaSet" => {
                let hash = label(pod, "pod-template-hash")?;
                let deployment = owner_name.strip_suffix(hash)?.strip_suffix('-')?;
                Some(format!("deployment/{deployment}"))
            }
            "StatefulSet" => Some(format!("statefulset/{owner_name}")),
            "DaemonSet" => Some(format!("daemonset/{owner_name}")),
            _ => None,
        }
    })
}

/// A list of the namespace that is looked at, or of all.
fn list(kind: Kind, facts: &Facts) -> ReadRequest {
    ReadRequest::list(kind, facts.namespace.as_deref())
}

fn injected(facts: &Facts) -> Vec<Finding> {
    let pods = match &facts.uninjected {
        Ok(pods) => pods,
        Err(why) => {
            // Pods are looked for only where a label asks for sidecars.
            let request = match &facts.namespaces {
                Ok(_) => list(objects::POD, facts),
                Err(_) => namespaces_request(facts),
            };
            return vec![checks::INJECTED.unread("pods of labelled namespaces", why, &request)];
        }
    };
    let asks = |wanted: &str| {
        let namespaces = facts.namespaces.as_ref().map(Vec::as_slice).unwrap_or_default();
        let namespace = namespaces.iter().find(|namespace| name(namespace) == wanted);
        matches!(namespace.and_then(|found| label(found, keys::INJECT)), Some("enabled" | "required"))
    };
    let without = pods.iter().filter(|pod| should_have_sidecar(pod) && asks(namespace(pod)));
    check::uninjected(without.map(|pod| {
        let workload = workload(pod);
        let is_restartable = workload.is_some();
        let pod = WithoutSidecar { namespace: namespace(pod), name: name(pod), is_restartable };
        Uninjected { pod, workload }
    }))
}

fn sidecars(facts: &Facts) -> Vec<Finding> {
    let sidecars = match &facts.sidecars {
        Ok(sidecars) => sidecars,
        Err(why) => {
            let unknown = checks::BEHIND.unknown("sidecars", "the operator did not answer");
            // Where it answers, T0304 is well, and does not say why this one request failed.
            let hint = match &facts.health {
                Ok(_) => format!("it answers, but not the question for sidecars: {why}"),
                Err(_) => UNANSWERED.to_owned(),
            };
            return vec![unknown.hint(hint).fix(operator_pods(facts))];
        }
    };
    let pods = facts.injected.as_ref().map(Vec::as_slice).unwrap_or_default();
    let health = facts.health.as_ref().ok();
    let judge = SidecarJudge::new(view(facts), health, pods.iter().map(pod), leaf_lifetime(facts));
    judge.judge(&sidecars.sidecars)
}

/// A pod with a sidecar. One that no node has taken is as old as its object.
fn pod(object: &Value) -> Pod<'_> {
    Pod {
        namespace: namespace(object),
        name: name(object),
        started: time(object, "/status/startTime").or_else(|| time(object, "/metadata/creationTimestamp")),
        terminating: !text(object, "/metadata/deletionTimestamp").is_empty(),
        idle: idle(object),
    }
}

/// The container because of which the sidecar of a pod does not run.
fn idle(pod: &Value) -> Option<Idle<'_>> {
    if matches!(text(pod, "/status/phase"), "Succeeded" | "Failed") {
        return None;
    }
    let is_there =
        |list: &str, container: &str| items(pod, list).iter().any(|one| text(one, "/name") == container);
    let names = ["tulle-init", "tulle-proxy"].into_iter();
    let mut wanted = names.filter(|container| is_there("/spec/initContainers", container));
    wanted.find_map(|container| {
        let statuses = items(pod, "/status/initContainerStatuses");
        let Some(status) = statuses.iter().find(|one| text(one, "/name") == container) else {
            return Some(Idle { container, state: "no node has started it", is_logged: false });
        };
        // The init container has done its work when it has ended well; the proxy must go on.
        let is_done = container == "tulle-init" && number(status, "/state/terminated/exitCode") == Some(0);
        let is_running = status.pointer("/state/running").is_some();
        let has_started = status.pointer("/started").and_then(Value::as_bool).unwrap_or(true);
        if is_done || (container == "tulle-proxy" && is_running && has_started) {
            return None;
        }
        let reason = ["/state/waiting/reason", "/state/terminated/reason"].map(|at| text(status, at));
        let state = reason.into_iter().find(|reason| !reason.is_empty());
        let state = state.unwrap_or(match (is_running, container) {
            (true, "tulle-proxy") => "running, but its startup probe fails",
            (true, _) => "running",
            (false, _) => "waiting",
        });
        // Why a container was not started again is in the pod's events only: an image that cannot be pulled any more, a
        // node that has no memory left. A proxy that has ended, however it did, keeps that state meanwhile.
        let has_failed = container == "tulle-init" && status.pointer("/state/terminated").is_some();
        Some(Idle { container, state, is_logged: is_running || has_failed || state == "CrashLoopBackOff" })
    })
}

/// The lifetime of certificates that the MeshConfig sets.
fn leaf_lifetime(facts: &Facts) -> Duration {
    let config = facts.config.as_ref().ok().and_then(Option::as_ref);
    let lifetime = config.map(|config| text(config, "/spec/certificates/leafLifetime")).unwrap_or_default();
    parse_duration(lifetime).ok().filter(|lifetime| !lifetime.is_zero()).unwrap_or(LEAF_LIFETIME)
}

fn policies(facts: &Facts) -> Vec<Finding> {
    let policies = match &facts.policies {
        Ok(policies) => policies,
        Err(why) => {
            let request = list(objects::MESH_POLICY, facts);
            return vec![checks::POLICIES.unread("MeshPolicies", why, &request)];
        }
    };
    let policies: Vec<Policy<'_>> = policies.iter().map(policy).collect();
    check::policies(&policies, &view(facts))
}

fn policy(object: &Value) -> Policy<'_> {
    let state = PolicyState::Read {
        generation: number(object, "/metadata/generation").unwrap_or(0),
        observed: number(object, "/status/observedGeneration"),
        ready: objects::condition(object, "Ready").map(condition),
    };
    Policy { namespace: namespace(object), name: name(object), state }
}

/// A condition in the status of an object.
pub(super) fn condition(value: &Value) -> Condition<'_> {
    Condition {
        type_: text(value, "/type"),
        status: text(value, "/status"),
        reason: text(value, "/reason"),
        message: text(value, "/message"),
        since: time(value, "/lastTransitionTime"),
    }
}

fn canaries(facts: &Facts) -> Vec<Finding> {
    let canaries = match &facts.canaries {
        Ok(canaries) => canaries,
        Err(why) => return vec![checks::CANARIES.unread("Canaries", why, &list(objects::CANARY, facts))],
    };
    let known: Vec<check::Canary<'_>> = canaries.iter().map(canary).collect();
    let mut findings = check::canaries(&known);
    let owned = canaries.iter().filter_map(|canary| owned(canary, facts)).collect();
    let hindered = canaries.iter().flat_map(|canary| hindered(canary, facts)).collect();
    let all = canaries.len();
    let read = canaries.iter().filter(|canary| target(canary, facts).is_some()).count();
    let seen = match read == all {
        true => format!("{all} Canaries"),
        false => format!("{read} of {all} Canaries; the targets of the others were not found"),
    };
    findings.extend(or_ok(owned, || checks::OWNERS.ok(seen.clone())));
    findings.extend(or_ok(hindered, || checks::STRATEGY.ok(seen)));
    findings
}

fn canary(object: &Value) -> check::Canary<'_> {
    check::Canary {
        namespace: namespace(object),
        name: name(object),
        is_waiting: text(object, "/status/phase") == "Waiting",
        conditions: items(object, "/status/conditions").iter().map(condition).collect(),
    }
}

/// The least time that the steps take. `None`: as long as a user likes, because one is a pause.
fn least(canary: &Value) -> Option<Duration> {
    let steps = items(canary, "/spec/steps");
    if steps.is_empty() {
        return Some(DEFAULT_HOLD * DEFAULT_STEPS);
    }
    let hold = |step: &Value| {
        if step.get("pause").is_some() {
            return None;
        }
        let hold = text(step, "/hold");
        Some(if hold.is_empty() { DEFAULT_HOLD } else { parse_duration(hold).unwrap_or(DEFAULT_HOLD) })
    };
    steps.iter().map(hold).sum()
}

/// The workload of a Canary, if it exists and could be read.
fn target<'a>(canary: &Value, facts: &'a Facts) -> Option<&'a Value> {
    let (kind, target) = (text(canary, "/spec/target/kind"), text(canary, "/spec/target/name"));
    facts.targets.get(&target_name(kind, namespace(canary), target))
}

/// A tool that takes a rollout in progress for a failed one.
fn owned(canary: &Value, facts: &Facts) -> Option<Finding> {
    let (kind, name_of_target) = (text(canary, "/spec/target/kind"), text(canary, "/spec/target/name"));
    let tool = objects::managed_by(target(canary, facts)?)?;
    if least(canary).is_some_and(|least| least <= TOOL_TIMEOUT) {
        return None;
    }
    let hint = match tool {
        Tool::Helm => {
            "Helm waits for 5 minutes by default when it waits: set helm --timeout to more than the steps take, and use neither --atomic nor --rollback-on-failure, which restore the old version"
        }
        Tool::Flux => {
            "Flux waits for 5 minutes by default: set spec.timeout of its Kustomization or HelmRelease to more than the steps take, and use no spec.upgrade.remediation, which restores the old version"
        }
        Tool::ArgoCd => {
            "Argo CD reports the application as Progressing until the promotion: let no sync wave and no `argocd app wait` with a shorter --timeout depend on it"
        }
    };
    let steps = match least(canary) {
        Some(least) => format!("the steps take at least {} s", least.as_secs()),
        None => "a step is a pause".to_owned(),
    };
    let found = format!(
        "Canary {}: {kind} {name_of_target} is managed by {}, and {steps}",
        full_name(canary),
        tool.name()
    );
    let fix = format!("kubectl -n {} describe canary {}", namespace(canary), name(canary));
    Some(checks::OWNERS.warning(found).hint(hint).fix(fix))
}

/// Strategies of a target with which a version is not judged, or not rolled out. What costs stable pods only is said when
/// the objects are applied.
fn hindered(canary: &Value, facts: &Facts) -> Vec<Finding> {
    let kind = WorkloadKind::named(text(canary, "/spec/target/kind"));
    let Some((kind, workload)) = kind.zip(target(canary, facts)) else { return Vec::new() };
    let (place, target) = (namespace(canary), text(canary, "/spec/target/name"));
    let fix = format!("kubectl -n {place} edit {} {target}", kind.name().to_lowercase());
    let said = hindrances(kind, workload).into_iter().filter(|found| found.effect != Effect::Costly);
    said.map(|found| {
        let what = format!("Canary {}: {} {target} {}", full_name(canary), kind.name(), found.what);
        let finding = match found.effect {
            // As at admission: another number of pods may mend it.
            Effect::Unjudged if !found.at_present => checks::STRATEGY.error(what),
            _ => checks::STRATEGY.warning(what),
        };
        finding.hint(found.remedy).fix(fix.clone())
    })
    .collect()
}

fn routes(facts: &Facts) -> Vec<Finding> {
    let routes = match &facts.routes {
        Ok(routes) => routes,
        Err(Unread::NotServed) => return vec![checks::ROUTES.ok("the Gateway API is not installed")],
        Err(why) => return vec![checks::ROUTES.unread("routes", why, &list(objects::HTTP_ROUTE, facts))],
    };
    let faults: Vec<Finding> = routes.iter().flat_map(route_faults).collect();
    or_ok(faults, || checks::ROUTES.ok(format!("{} routes", routes.len())))
}

/// Parents that are meant to be Services, and are none.
fn groupless(route: &Value) -> Vec<Finding> {
    let parents = items(route, "/spec/parentRefs").iter();
    let found = parents.filter(|parent| objects::is_service_without_group(parent)).map(|parent| {
        let (kind, parent) = (text(route, "/kind"), text(parent, "/name"));
        let found = format!("{kind} {}: parent {parent} of kind Service has no group \"\"", full_name(route));
        let fix = format!("kubectl -n {} edit {} {}", namespace(route), kind.to_lowercase(), name(route));
        let hint = "the route has no effect for this parent: write group: \"\" in its parentRef";
        checks::ROUTES.warning(found).hint(hint).fix(fix)
    });
    found.collect()
}

fn route_faults(route: &Value) -> Vec<Finding> {
    let kind = text(route, "/kind");
    let mut findings = groupless(route);
    for parent in items(route, "/status/parents") {
        if text(parent, "/controllerName") != CONTROLLER {
            continue;
        }
        for condition in items(parent, "/conditions") {
            let type_ = text(condition, "/type");
            if !matches!(type_, "Accepted" | "ResolvedRefs") || text(condition, "/status") != "False" {
                continue;
            }
            let found = format!(
                "{kind} {}: {type_} is False for parent {}: {}: {}",
                full_name(route),
                text(parent, "/parentRef/name"),
                text(condition, "/reason"),
                text(condition, "/message")
            );
            let fix =
                format!("kubectl -n {} describe {} {}", namespace(route), kind.to_lowercase(), name(route));
            findings.push(match type_ {
                "Accepted" => {
                    checks::ROUTES.error(found).hint("the route has no effect for this parent").fix(fix)
                }
                _ => checks::ROUTES
                    .error(found)
                    .hint("requests for a backend that does not exist are answered with 500")
                    .fix(fix),
            });
        }
    }
    findings
}
