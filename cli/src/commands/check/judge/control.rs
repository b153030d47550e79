//! The control plane: operator, certificates, webhook.

use std::cmp::Ordering;

use k8s_openapi::ByteString;
use serde_json::Value;
use tulle_mesh::check::{self, Finding, Leadership, Outcome, list as checks, or_ok, version};
use x509_parser::pem::Pem;

use super::super::facts::Facts;
use super::super::finding::{ReadRequest, UnreadCheck as _};
use super::mesh::condition;
use super::{Options, UNANSWERED, duration, operator_is, operator_pods, or_ok_if_read, repair, time, view};
use crate::manifests::{DEPLOYMENTS, OPERATOR, WEBHOOK};
use crate::objects::{self, Kind, Read, items, label, name, number, text};

/// The hint where the API server does not trust the webhook's certificate.
const UNVERIFIED: &str =
    "the API server cannot call the webhook; when it starts, the webhook writes the present certificate";

pub(super) fn judge(facts: &Facts, options: Options) -> Vec<Finding> {
    let mut findings = deployments(facts);
    findings.extend(replicas(facts));
    findings.push(leader(facts));
    findings.extend(query(facts));
    findings.extend(root(facts, options));
    findings.extend(hooks(facts));
    findings.extend(bundles(facts));
    findings.extend(failure_policies(facts));
    findings.extend(endpoints(facts));
    findings
}

/// What stands still while no pod of a Deployment is available.
fn without(deployment: &str) -> &'static str {
    match deployment {
        WEBHOOK => {
            "new pods of `enabled` namespaces start without a sidecar, and those of `required` ones are rejected; objects are checked by their schema only"
        }
        _ => {
            "running sidecars go on with their last configuration; new pods wait for a certificate, and Canaries stand still"
        }
    }
}

/// The command that gives a Deployment a spare replica.
fn scale(system: &str, deployment: &str) -> String {
    format!("kubectl -n {system} scale deployment {deployment} --replicas=2")
}

/// How many pods a Deployment should have.
fn wanted(deployment: &Value) -> i64 {
    number(deployment, "/spec/replicas").unwrap_or(1)
}

fn deployments(facts: &Facts) -> Vec<Finding> {
    let system = &facts.system;
    let one = |(name, found): (&&'static str, &Read<Option<Value>>)| match found {
        // Before what is available: its last pods may still be ending.
        Ok(Some(deployment)) if wanted(deployment) == 0 => Some(
            checks::DEPLOYMENT
                .error(format!("Deployment {system}/{name} is scaled to 0 replicas"))
                .hint(without(name))
                .fix(scale(system, name)),
        ),
        Ok(Some(deployment)) if number(deployment, "/status/availableReplicas").unwrap_or(0) > 0 => None,
        Ok(Some(_)) => Some(
            checks::DEPLOYMENT
                .error(format!("Deployment {system}/{name} has no available pod"))
                .hint(without(name))
                .fix(format!("kubectl -n {system} describe pods -l app={name}")),
        ),
        Ok(None) => Some(
            checks::DEPLOYMENT
                .error(format!("Deployment {system}/{name} does not exist"))
                .hint("Tulle is not installed, or in another namespace: name it with --system-namespace")
                .fix(repair(facts)),
        ),
        Err(why) => {
            let request = ReadRequest::object(objects::DEPLOYMENT, Some(system), name);
            Some(checks::DEPLOYMENT.unread(&format!("Deployment {system}/{name}"), why, &request))
        }
    };
    or_ok(facts.deployments.iter().filter_map(one).collect(), || {
        checks::DEPLOYMENT.ok("both have available pods")
    })
}

fn replicas(facts: &Facts) -> Vec<Finding> {
    let system = &facts.system;
    let one = |(name, found): (&&'static str, &Read<Option<Value>>)| {
        let deployment = found.as_ref().ok()?.as_ref()?;
        let available = number(deployment, "/status/availableReplicas").unwrap_or(0);
        match wanted(deployment) {
            0 => None,
            1 => {
                let hint = format!("while its only pod restarts: {}", without(name));
                let found = format!("Deployment {system}/{name} has only 1 replica");
                Some(checks::REPLICAS.warning(found).hint(hint).fix(scale(system, name)))
            }
            wanted if available < wanted => Some(
                checks::REPLICAS
                    .warning(format!(
                        "{available} of {wanted} replicas of Deployment {system}/{name} are available"
                    ))
                    .hint("the events of the pods say why one is not ready: an image, a node, or a quota")
                    .fix(format!("kubectl -n {system} describe pods -l app={name}")),
            ),
            _ => None,
        }
    };
    // T0301 is about a Deployment that does not exist, cannot be read, or has no replica.
    let is_judged =
        |found: &Read<Option<Value>>| matches!(found, Ok(Some(deployment)) if wanted(deployment) != 0);
    let all_are = facts.deployments.values().all(is_judged);
    or_ok_if_read(facts.deployments.iter().filter_map(one).collect(), all_are, || {
        checks::REPLICAS.ok("every Deployment has at least two available replicas")
    })
}

fn leader(facts: &Facts) -> Finding {
    let leadership = match &facts.lease {
        Ok(Some(lease)) => Leadership::Lease {
            holder: text(lease, "/spec/holderIdentity").split('/').next().unwrap_or_default(),
            renewed: time(lease, "/spec/renewTime"),
        },
        Ok(None) => Leadership::NoLease,
        // The replica that was asked says so itself.
        Err(_) if facts.health.as_ref().is_ok_and(|health| health.leader) => {
            Leadership::Replica { knows_leader: true }
        }
        Err(why) => {
            let system = facts.system.as_str();
            let request = ReadRequest::object(objects::LEASE, Some(system), OPERATOR);
            return checks::LEADER.unread(&format!("Lease {system}/{OPERATOR}"), why, &request);
        }
    };
    check::leader(&leadership, &view(facts))
}

fn query(facts: &Facts) -> Vec<Finding> {
    let health = match &facts.health {
        Ok(health) => health,
        Err(why) => {
            let finding = checks::QUERY
                .error(format!("the operator did not answer: {why}"))
                .hint("a port-forward to its pod and a token are needed; sidecars were not checked")
                .fix(operator_pods(facts));
            return vec![finding];
        }
    };
    let mut findings =
        vec![checks::QUERY.ok(format!("pod {}, {} sidecars are connected", health.pod, health.sidecars))];
    findings.push(match (version(&facts.cli), version(&health.version)) {
        (Some((major, minor, _)), Some((other, its, _))) if (major, minor) == (other, its) => {
            checks::SKEW.ok(format!("both have version {}", health.version))
        }
        _ => {
            let found =
                format!("the operator has version {}, and this program {}", health.version, facts.cli);
            let skew = checks::SKEW.warning(found);
            if operator_is(facts, Ordering::Less) {
                skew.hint("use the program of the operator's version, or upgrade the operator")
                    .fix(repair(facts))
            } else {
                skew.hint("use the program of the operator's version").fix("tulle version")
            }
        }
    });
    findings.push(check::series(health));
    findings
}

fn root(facts: &Facts, options: Options) -> Vec<Finding> {
    let mut findings = match &facts.config {
        Ok(config) => {
            let conditions = config.as_ref().map(|config| items(config, "/status/conditions"));
            check::config(conditions.unwrap_or_default().iter().map(condition))
        }
        Err(why) => {
            let request = ReadRequest::object(objects::MESH_CONFIG, None, "mesh");
            vec![checks::ROOT.unread("MeshConfig mesh", why, &request)]
        }
    };
    let in_use = match &facts.health {
        Ok(health) => check::root(health, options.certs_within, &view(facts)),
        Err(_) => checks::ROOT
            .unknown("the root certificate", "the operator did not answer")
            .hint(UNANSWERED)
            .fix(operator_pods(facts)),
    };
    // That the root in memory is valid for long is not well beside a Secret that is lost.
    if findings.is_empty() || in_use.result != Outcome::Ok {
        findings.push(in_use);
    }
    findings
}

/// A webhook configuration of Tulle.
struct Configuration<'a> {
    kind: Kind,
    /// Kind and name, as they are printed.
    title: &'static str,
    found: &'a Read<Option<Value>>,
}

/// Both webhook configurations.
fn configurations(facts: &Facts) -> [Configuration<'_>; 2] {
    let (mutating, validating) =
        ("MutatingWebhookConfiguration tulle", "ValidatingWebhookConfiguration tulle");
    [
        Configuration { kind: objects::MUTATING, title: mutating, found: &facts.mutating },
        Configuration { kind: objects::VALIDATING, title: validating, found: &facts.validating },
    ]
}

/// Whether the API server has shown both, also if one does not exist.
fn are_read(facts: &Facts) -> bool {
    configurations(facts).iter().all(|configuration| configuration.found.is_ok())
}

/// The webhooks of the configurations that exist, each with its name and the configuration's.
fn webhooks(facts: &Facts) -> impl Iterator<Item = (&'static str, &Value)> {
    configurations(facts).into_iter().flat_map(|Configuration { title, found, .. }| {
        let found = found.as_ref().ok().and_then(Option::as_ref);
        found.map(|found| items(found, "/webhooks")).unwrap_or_default().iter().map(move |hook| (title, hook))
    })
}

fn hooks(facts: &Facts) -> Vec<Finding> {
    let one = |Configuration { kind, title, found }: Configuration<'_>| match found {
        Ok(Some(found)) if !items(found, "/webhooks").is_empty() => None,
        Ok(_) => Some(
            checks::HOOKS
                .error(format!("{title} is missing or empty"))
                .hint("new pods start without a sidecar, and invalid objects are not rejected")
                .fix(repair(facts)),
        ),
        Err(why) => Some(checks::HOOKS.unread(title, why, &ReadRequest::object(kind, None, "tulle"))),
    };
    or_ok(configurations(facts).into_iter().filter_map(one).collect(), || {
        checks::HOOKS.ok("both are installed")
    })
}

fn bundles(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut ends = Vec::new();
    for (configuration, hook) in webhooks(facts) {
        let hook_name = text(hook, "/name");
        let restart = format!("kubectl -n {} rollout restart deployment tulle-webhook", facts.system);
        let bundle = hook
            .pointer("/clientConfig/caBundle")
            .filter(|bundle| bundle.as_str().is_some_and(|pem| !pem.is_empty()));
        let Some(bundle) = bundle else {
            let missing = checks::BUNDLE
                .error(format!("{configuration}: webhook {hook_name} has no caBundle"))
                .hint("the webhook writes it as soon as it serves requests; until then it is not called");
            findings.push(missing.fix(format!("kubectl -n {} logs deployment/tulle-webhook", facts.system)));
            continue;
        };
        match not_after(bundle) {
            Some(end) if end <= facts.now => findings.push(
                checks::BUNDLE
                    .error(format!(
                        "{configuration}: every certificate in the caBundle of webhook {hook_name} has ended, the last one {} ago",
                        duration(facts.now - end)
                    ))
                    .hint(UNVERIFIED)
                    .fix(restart),
            ),
            Some(end) => ends.push(end),
            None => findings.push(
                checks::BUNDLE
                    .error(format!(
                        "{configuration}: the caBundle of webhook {hook_name} holds no certificate that can be read"
                    ))
                    .hint(UNVERIFIED)
                    .fix(restart),
            ),
        }
    }
    let first = ends.into_iter().min();
    or_ok(findings, || match first {
        Some(end) if are_read(facts) => checks::BUNDLE.ok(format!("valid for {}", duration(end - facts.now))),
        _ => checks::BUNDLE
            .unknown("caBundle", "not every webhook configuration could be read")
            .hint("T0501 says why")
            .fix("kubectl get mutatingwebhookconfiguration/tulle validatingwebhookconfiguration/tulle"),
    })
}

/// When the last certificate of a bundle ends, in Unix seconds. The bundle is PEM in base64.
fn not_after(bundle: &Value) -> Option<i64> {
    let ByteString(pem) = serde_json::from_value(bundle.clone()).ok()?;
    let ends = Pem::iter_from_buffer(&pem).filter_map(|block| {
        let block = block.ok()?;
        let certificate = block.parse_x509().ok()?;
        Some(certificate.validity().not_after.timestamp())
    });
    ends.max()
}

/// What each webhook does while Tulle's is unavailable: only namespaces that require sidecars reject their pods.
fn failure_policies(facts: &Facts) -> Vec<Finding> {
    let one = |(configuration, hook): (&str, &Value)| {
        let (hook_name, policy) = (text(hook, "/name"), text(hook, "/failurePolicy"));
        let wanted = if hook_name == "required.inject.tulle.dev" { "Fail" } else { "Ignore" };
        let hint = match wanted {
            "Fail" => {
                "while the webhook is unavailable, pods of `required` namespaces start without a sidecar"
            }
            _ => "while the webhook is unavailable, objects of users are rejected",
        };
        (policy != wanted).then(|| {
            checks::FAILURE
                .warning(format!(
                    "{configuration}: webhook {hook_name} has failurePolicy {policy}, and Tulle installs {wanted}"
                ))
                .hint(hint)
                .fix(repair(facts))
        })
    };
    let count = webhooks(facts).count();
    // T0501 is about a configuration that is empty or cannot be read.
    let is_read = count > 0 && are_read(facts);
    or_ok_if_read(webhooks(facts).filter_map(one).collect(), is_read, || {
        checks::FAILURE.ok(format!("of {count} webhooks"))
    })
}

fn endpoints(facts: &Facts) -> Vec<Finding> {
    let system = &facts.system;
    let slices = match &facts.slices {
        Ok(slices) => slices,
        Err(why) => {
            let request = ReadRequest::list(objects::ENDPOINT_SLICE, Some(system));
            return vec![checks::ENDPOINTS.unread(&format!("the endpoints in {system}"), why, &request)];
        }
    };
    let ready = |service: &str| {
        let of_service =
            slices.iter().filter(|slice| label(slice, "kubernetes.io/service-name") == Some(service));
        let endpoints = of_service.flat_map(|slice| items(slice, "/endpoints"));
        let is_ready =
            |endpoint: &&Value| endpoint.pointer("/conditions/ready").and_then(Value::as_bool) != Some(false);
        endpoints.filter(is_ready).count()
    };
    let one = |service: &&str| {
        (ready(service) == 0).then(|| {
            checks::ENDPOINTS
                .error(format!("Service {system}/{service} has no ready endpoint"))
                .hint("if its pods are ready, compare the Service's selector with their labels")
                .fix(format!("kubectl -n {system} describe service {service}"))
        })
    };
    or_ok(DEPLOYMENTS.iter().filter_map(one).collect(), || {
        checks::ENDPOINTS
            .ok(format!("{} slices in {system}", slices.iter().filter(|s| !name(s).is_empty()).count()))
    })
}
