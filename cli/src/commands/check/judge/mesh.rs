//! What is in the mesh: namespaces, sidecars, MeshPolicies, Canaries, routes.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;
use tulle_crds::{keys, parse_duration, reason};
use tulle_mesh::query::Sidecar;

use super::super::facts::{Facts, target_name};
use super::super::finding::{self as checks, Finding, ReadRequest, or_ok};
use super::{UNANSWERED, duration, namespaces_request, operator_pods, time, version};
use crate::objects::{self, Kind, Tool, Unread, full_name, items, label, name, namespace, number, text};
use crate::tenants::some_of;

/// The name with which the operator marks its entries in the status of a route.
const CONTROLLER: &str = "tulle.dev/mesh-controller";
/// A sidecar or policy that is behind for longer than this many seconds is reported.
const BEHIND: i64 = 30;
/// A sidecar may be this many minor versions older than the operator.
const OLDER: u32 = 2;
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
    let mut without: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for pod in pods.iter().filter(|pod| should_have_sidecar(pod) && asks(namespace(pod))) {
        without.entry(namespace(pod)).or_default().push(name(pod).to_owned());
    }
    let one = |(namespace, pods): (&str, Vec<String>)| {
        checks::INJECTED
            .warning(format!(
                "{} pods of namespace {namespace} have no sidecar: {}",
                pods.len(),
                some_of(&pods)
            ))
            .hint("they were created before the label, or while the webhook was unavailable")
            .fix(format!("kubectl -n {namespace} rollout restart deployment,statefulset,daemonset"))
    };
    or_ok(without.into_iter().map(one).collect(), || checks::INJECTED.ok("none is without"))
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
    let all = sidecars.sidecars.as_slice();
    let operator = facts.health.as_ref().ok().and_then(|health| version(&health.version));
    let mut findings = vec![skewed(all, operator)];
    findings.extend(refused(all));
    findings.push(match &facts.health {
        Ok(health) if !health.leader => {
            let pod = &health.pod;
            checks::BEHIND
                .unknown(
                    "sidecars",
                    format!("pod {pod} does not lead, and knows only those that are connected to it"),
                )
                .hint(
                    "T0303 says which pod leads: check again when one does, and when you may read the Lease",
                )
                .fix(format!("kubectl -n {} get lease tulle-operator", facts.system))
        }
        _ => behind(all, facts),
    });
    findings.extend(certificates(all, facts));
    findings
}

fn pod_of(sidecar: &Sidecar) -> String {
    format!("{}/{}", sidecar.namespace, sidecar.pod)
}

fn skewed(all: &[Sidecar], operator: Option<(u32, u32, u32)>) -> Finding {
    let is_skewed = |sidecar: &&Sidecar| {
        operator.zip(version(&sidecar.version)).is_some_and(|(operator, own)| !supported(operator, own))
    };
    let named = |sidecar: &Sidecar| format!("{} ({})", pod_of(sidecar), sidecar.version);
    let pods: Vec<String> = all.iter().filter(is_skewed).map(named).collect();
    if pods.is_empty() {
        return checks::SIDECAR_SKEW.ok(format!("{} sidecars", all.len()));
    }
    let (count, pods) = (pods.len(), some_of(&pods));
    checks::SIDECAR_SKEW
        .warning(format!("{count} sidecars have a version that this operator does not support: {pods}"))
        .hint("an operator supports sidecars of its own and the two minor versions before it")
        .fix("kubectl get pods -A -L tulle.dev/sidecar")
}

fn refused(all: &[Sidecar]) -> Vec<Finding> {
    let one = |sidecar: &Sidecar| {
        let (first, count, pod) = (sidecar.refused.first()?, sidecar.refused.len(), pod_of(sidecar));
        Some(
            checks::REFUSED
                .error(format!("sidecar of {pod} has refused {count} resources: {first}"))
                .hint("it enforces the last version that it could; a restart brings the present sidecar")
                .fix(delete(sidecar)),
        )
    };
    or_ok(all.iter().filter_map(one).collect(), || checks::REFUSED.ok(format!("{} sidecars", all.len())))
}

/// Pods that come or go: created within [`BEHIND`] seconds, or being deleted. They connect soon, or never again.
fn in_transit(facts: &Facts) -> Vec<String> {
    let pods = facts.injected.as_ref().map(Vec::as_slice).unwrap_or_default();
    let comes_or_goes = |pod: &&Value| {
        let is_young = time(pod, "/metadata/creationTimestamp").is_some_and(|at| facts.now - at < BEHIND);
        is_young || !text(pod, "/metadata/deletionTimestamp").is_empty()
    };
    pods.iter().filter(comes_or_goes).map(full_name).collect()
}

fn behind(all: &[Sidecar], facts: &Facts) -> Finding {
    let in_transit = in_transit(facts);
    let one = |sidecar: &Sidecar| {
        let pod = pod_of(sidecar);
        if in_transit.contains(&pod) {
            return None;
        }
        if !sidecar.connected {
            return Some(format!("{pod} (not connected)"));
        }
        let waits = sidecar.behind_seconds.is_some_and(|seconds| seconds > BEHIND.unsigned_abs());
        waits.then(|| format!("{pod} ({}/{})", sidecar.acknowledged, sidecar.resources))
    };
    let pods: Vec<String> = all.iter().filter_map(one).collect();
    if pods.is_empty() {
        return checks::BEHIND.ok(format!("{} sidecars", all.len()));
    }
    let (count, pods) = (pods.len(), some_of(&pods));
    checks::BEHIND
        .warning(format!("{count} sidecars have waited for over {BEHIND} s or are not connected: {pods}"))
        .hint("they enforce the configuration before; look at their logs, and whether they reach port 26160")
        .fix("tulle pods -A")
}

/// For how many seconds a certificate must be valid. A sidecar renews it at half of its lifetime, so that one with less
/// than a quarter left was not renewed when it was due.
fn least_left(facts: &Facts) -> i64 {
    let config = facts.config.as_ref().ok().and_then(Option::as_ref);
    let lifetime = config.map(|config| text(config, "/spec/certificates/leafLifetime")).unwrap_or_default();
    let lifetime =
        parse_duration(lifetime).ok().filter(|lifetime| !lifetime.is_zero()).unwrap_or(LEAF_LIFETIME);
    i64::try_from(lifetime.as_secs() / 4).unwrap_or(i64::MAX)
}

fn certificates(all: &[Sidecar], facts: &Facts) -> Vec<Finding> {
    let (now, least) = (facts.now, least_left(facts));
    let one = |sidecar: &Sidecar| {
        let left = sidecar.certificate_not_after.map(|ends| ends - now).filter(|left| *left < least)?;
        let pod = pod_of(sidecar);
        Some(if left <= 0 {
            checks::CERTIFICATE
                .error(format!("the certificate of {pod} ended {} ago", duration(left)))
                .hint("it can neither connect nor be connected to with mTLS")
                .fix(delete(sidecar))
        } else {
            checks::CERTIFICATE
                .warning(format!("the certificate of {pod} ends in {}", duration(left)))
                .hint("it is renewed at half of its lifetime: look at the logs of its sidecar")
                .fix(format!("kubectl -n {} logs {} -c tulle-proxy", sidecar.namespace, sidecar.pod))
        })
    };
    or_ok(all.iter().filter_map(one).collect(), || checks::CERTIFICATE.ok(format!("{} sidecars", all.len())))
}

fn delete(sidecar: &Sidecar) -> String {
    format!("kubectl -n {} delete pod {}", sidecar.namespace, sidecar.pod)
}

fn supported(operator: (u32, u32, u32), sidecar: (u32, u32, u32)) -> bool {
    let ((major, minor, _), (its, own, _)) = (operator, sidecar);
    major == its && own <= minor && minor - own <= OLDER
}

/// Whether the operator has looked at the present version of an object. Without a status, it has never.
fn is_observed(object: &Value) -> bool {
    let observed = number(object, "/status/observedGeneration");
    observed.is_some_and(|observed| observed >= number(object, "/metadata/generation").unwrap_or(0))
}

fn policies(facts: &Facts) -> Vec<Finding> {
    let policies = match &facts.policies {
        Ok(policies) => policies,
        Err(why) => {
            let request = list(objects::MESH_POLICY, facts);
            return vec![checks::POLICIES.unread("MeshPolicies", why, &request)];
        }
    };
    let one = |policy: &Value| {
        let found = policy_fault(policy, facts.now)?;
        let (namespace, name) = (namespace(policy), name(policy));
        Some(found.fix(format!("kubectl -n {namespace} describe meshpolicy {name}")))
    };
    or_ok(policies.iter().filter_map(one).collect(), || {
        checks::POLICIES.ok(format!("{} MeshPolicies", policies.len()))
    })
}

fn policy_fault(policy: &Value, now: i64) -> Option<Finding> {
    let name = format!("MeshPolicy {}", full_name(policy));
    let Some(ready) = objects::condition(policy, "Ready").filter(|_| is_observed(policy)) else {
        return Some(
            checks::POLICIES
                .warning(format!("{name}: its present version has no status"))
                .hint("the leading operator writes it within seconds; see whether one leads"),
        );
    };
    let (why, message) = (text(ready, "/reason"), text(ready, "/message"));
    let found = format!("{name}: {why}: {message}");
    let since = time(ready, "/lastTransitionTime").map_or(0, |at| now - at);
    match why {
        reason::INVALID => {
            Some(checks::POLICIES.error(found).hint("nothing of it is enforced: correct the value"))
        }
        reason::CONFLICTED => {
            Some(checks::POLICIES.error(found).hint("the older policy holds: delete one of the two sections"))
        }
        reason::REFUSED => Some(
            checks::POLICIES
                .error(found)
                .hint("restart the pods, which brings a sidecar that has what the policy needs"),
        ),
        reason::TARGET_NOT_FOUND => {
            Some(checks::POLICIES.error(found).hint("correct the target, or create it"))
        }
        reason::NO_WORKLOADS => {
            Some(checks::POLICIES.warning(found).hint("it selects no pod with a sidecar: compare the labels"))
        }
        reason::PROPAGATING if since > BEHIND => Some(
            checks::POLICIES
                .warning(format!("{found} (for {})", duration(since)))
                .hint("`tulle pods` lists the sidecars that are behind or not connected"),
        ),
        _ => None,
    }
}

fn canaries(facts: &Facts) -> Vec<Finding> {
    let canaries = match &facts.canaries {
        Ok(canaries) => canaries,
        Err(why) => return vec![checks::CANARIES.unread("Canaries", why, &list(objects::CANARY, facts))],
    };
    let count = format!("{} Canaries", canaries.len());
    let with_command = |canary: &Value, finding: Finding| {
        if !finding.fix.is_empty() {
            return finding;
        }
        finding.fix(format!("kubectl -n {} describe canary {}", namespace(canary), name(canary)))
    };
    let of = |fault: &dyn Fn(&Value) -> Option<Finding>| {
        canaries.iter().filter_map(|canary| Some(with_command(canary, fault(canary)?))).collect::<Vec<_>>()
    };
    let mut findings = or_ok(of(&stuck), || checks::CANARIES.ok(count.clone()));
    findings.extend(or_ok(of(&late), || checks::DEADLINES.ok(count.clone())));
    findings.extend(or_ok(of(&|canary: &Value| owned(canary, facts)), || checks::OWNERS.ok(count.clone())));
    findings
}

/// What keeps a Canary from working.
fn stuck(canary: &Value) -> Option<Finding> {
    let name = format!("Canary {}", full_name(canary));
    let conditions = items(canary, "/status/conditions");
    let of = |condition: &Value| {
        format!("{name}: {}: {}", text(condition, "/reason"), text(condition, "/message"))
    };
    let with = |type_: &str, status: &str| {
        objects::condition(canary, type_).filter(|condition| text(condition, "/status") == status)
    };
    if let Some(stalled) = with("Stalled", "True") {
        let hint = "the workload's controller does not replace the remaining pods: look at its events";
        return Some(checks::CANARIES.error(of(stalled)).hint(hint));
    }
    if let Some(dial) = conditions.iter().find(|condition| text(condition, "/reason") == "ClientsDialPods") {
        let hint =
            "clients reach pods by their addresses, so no share can be set: let them use a ClusterIP Service";
        return Some(checks::CANARIES.error(of(dial)).hint(hint));
    }
    let waits = text(canary, "/status/phase") == "Waiting";
    let not_ready = with("Ready", "False")?;
    // A target that does not exist yet is what a Canary waits for when both are applied together.
    Some(if waits {
        checks::CANARIES.warning(of(not_ready)).hint("create the target, or correct its name")
    } else {
        checks::CANARIES.error(of(not_ready)).hint("new versions are not rolled out in steps")
    })
}

/// Deadlines that end a rollout that works.
fn late(canary: &Value) -> Option<Finding> {
    let name = format!("Canary {}", full_name(canary));
    let short = objects::condition(canary, "ProgressDeadline")
        .filter(|condition| text(condition, "/status") == "False")
        .map(|condition| (condition, "the workload itself goes on; only tools that wait for it fail"));
    let exceeded = objects::condition(canary, "DeadlineExceeded")
        .filter(|condition| text(condition, "/status") == "True")
        .map(|condition| (condition, "promote or abort it, or give it more traffic"));
    let (condition, hint) = exceeded.or(short)?;
    Some(checks::DEADLINES.warning(format!("{name}: {}", text(condition, "/message"))).hint(hint))
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

/// A tool that takes a rollout in progress for a failed one.
fn owned(canary: &Value, facts: &Facts) -> Option<Finding> {
    let (kind, target) = (text(canary, "/spec/target/kind"), text(canary, "/spec/target/name"));
    let workload = facts.targets.get(&target_name(kind, namespace(canary), target))?;
    let tool = objects::managed_by(workload)?;
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
    let found =
        format!("Canary {}: {kind} {target} is managed by {}, and {steps}", full_name(canary), tool.name());
    Some(checks::OWNERS.warning(found).hint(hint))
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

fn route_faults(route: &Value) -> Vec<Finding> {
    let kind = text(route, "/kind");
    let mut findings = Vec::new();
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
