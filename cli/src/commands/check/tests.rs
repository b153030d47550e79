//! One golden text per fault: what is reported of a mesh that has this fault and no other.

mod installation;
mod objects;
mod unread;

use serde_json::{Value, json};
use tulle_mesh::check::list::ALL;
use tulle_mesh::check::{Outcome, ROOT_ENDS_SOON};
use tulle_mesh::query;

use super::Args;
use super::facts::{Facts, Part, Permission};
use super::judge::{Options, judge};
use super::render::Report;
use crate::manifests::{DEFINITIONS, DEPLOYMENTS};
use crate::objects::Unread;
use crate::output::Output;

/// 2026-11-27T12:00:00Z.
const NOW: i64 = 1_795_780_800;
/// A certificate that ends at 2036-11-24T17:25:06Z, as PEM in base64.
const BUNDLE: &str = "LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0tCk1JSUJjRENDQVJXZ0F3SUJBZ0lVTXNxSjlXQUwxb0RiaFlKUURhRmRGTmsxbHZBd0NnWUlLb1pJemowRUF3SXcKRFRFTE1Ba0dBMVVFQXd3Q1kyRXdIaGNOTWpZeE1USTNNVGN5TlRBMldoY05Nell4TVRJME1UY3lOVEEyV2pBTgpNUXN3Q1FZRFZRUUREQUpqWVRCWk1CTUdCeXFHU000OUFnRUdDQ3FHU000OUF3RUhBMElBQlBZaDlMYkpKL21ICmI4VUpkNEtTYTBmTkdSckRLMGRnamtvczB6QU55bEhkV0dqcmFwRDEvM2p2YXpMdVQrUG5LbUt1YURKbVFKZXoKSFQ2WVhkNHFseGVqVXpCUk1CMEdBMVVkRGdRV0JCU2E4aCtQVkVkOVZyb29SWW5RUFd2ZjB3VGVNREFmQmdOVgpIU01FR0RBV2dCU2E4aCtQVkVkOVZyb29SWW5RUFd2ZjB3VGVNREFQQmdOVkhSTUJBZjhFQlRBREFRSC9NQW9HCkNDcUdTTTQ5QkFNQ0Ewa0FNRVlDSVFEVHNZZU5jMkcwVE83RjZKbkJPRjE4bUptK3FzekdacTlFZEFta2kzRkYKcXdJaEFJVFF4T0hOV0V3djhaNGVyYlYvQ21hR1RVUWdzR3VZbjZCWXowRnh2L1F1Ci0tLS0tRU5EIENFUlRJRklDQVRFLS0tLS0K";
const BUNDLE_ENDS: i64 = 2111160306;
const OPTIONS: Options = Options { pre: false, certs_within: 720 * 3600 };
const DAY: i64 = 86_400;

fn hook(name: &str, policy: &str) -> Value {
    json!({"name": name, "failurePolicy": policy, "clientConfig": {"caBundle": BUNDLE}})
}

fn deployment(name: &str) -> Value {
    json!({"metadata": {"name": name}, "spec": {"replicas": 2}, "status": {"availableReplicas": 2}})
}

fn definition(name: &str) -> Value {
    let of = |definition: &Value| definition["metadata"]["name"] == name;
    let own = tulle_crds::manifests().into_iter().map(|(_, definition)| definition).find(of).unwrap();
    let schema = &own["spec"]["versions"][0]["schema"];
    json!({"metadata": {"name": name},
        "spec": {"versions": [{"name": "v1alpha1", "served": true, "storage": true, "schema": schema}]},
        "status": {"storedVersions": ["v1alpha1"], "conditions": [{"type": "Established", "status": "True"}]}})
}

fn slice(service: &str, ready: bool) -> Value {
    json!({"metadata": {"name": service, "labels": {"kubernetes.io/service-name": service}},
        "endpoints": [{"conditions": {"ready": ready}}]})
}

fn namespace(name: &str, labels: Value) -> Value {
    json!({"metadata": {"name": name, "labels": labels}})
}

fn sidecar(pod: &str) -> query::Sidecar {
    query::Sidecar {
        namespace: "shop".to_owned(),
        pod: pod.to_owned(),
        version: "0.3.0".to_owned(),
        connected: true,
        acknowledged: 4,
        resources: 4,
        certificate_not_after: Some(NOW + DAY),
        ..query::Sidecar::default()
    }
}

/// A mesh in which all is well.
fn healthy() -> Facts {
    let well = |name: &'static str, object: fn(&str) -> Value| (name, Ok(Some(object(name))));
    Facts {
        now: NOW,
        cli: "0.3.0".to_owned(),
        system: "tulle-system".to_owned(),
        namespace: None,
        server: Ok("v1.31.2+k3s1".to_owned()),
        nodes: Ok(vec![node("a", "v1.31.2")]),
        permissions: Vec::new(),
        namespaces: Ok(vec![namespace("shop", json!({"tulle.dev/inject": "enabled"}))]),
        uninjected: Ok(Vec::new()),
        definitions: DEFINITIONS.into_iter().map(|name| well(name, definition)).collect(),
        parts: vec![Part { object: "Service/tulle-system/tulle-operator".to_owned(), exists: Ok(true) }],
        deployments: DEPLOYMENTS.into_iter().map(|name| well(name, deployment)).collect(),
        lease: Ok(Some(lease("tulle-operator-1/10.0.0.1", "2026-11-27T11:59:58.000000Z"))),
        slices: Ok(DEPLOYMENTS.iter().map(|name| slice(name, true)).collect()),
        health: Ok(query::Health {
            version: "0.3.0".to_owned(),
            pod: "tulle-operator-1".to_owned(),
            leader: true,
            root_not_after: Some(NOW + 3650 * DAY),
            max_series: 100,
            ..query::Health::default()
        }),
        sidecars: Ok(query::Sidecars { sidecars: vec![sidecar("web-1")], without: Vec::new() }),
        injected: Ok(Vec::new()),
        mutating: Ok(Some(json!({"webhooks": [
            hook("required.inject.tulle.dev", "Fail"), hook("enabled.inject.tulle.dev", "Ignore")]}))),
        validating: Ok(Some(json!({"webhooks": [hook("validate.tulle.dev", "Ignore")]}))),
        config: Ok(Some(json!({"spec": {"certificates": {"leafLifetime": "24h"}}}))),
        policies: Ok(Vec::new()),
        canaries: Ok(Vec::new()),
        targets: [].into(),
        routes: Ok(Vec::new()),
        cilium: Ok(None),
    }
}

fn node(name: &str, kubelet: &str) -> Value {
    json!({"metadata": {"name": name}, "status": {"nodeInfo": {"kubeletVersion": kubelet}}})
}

fn lease(holder: &str, renewed: &str) -> Value {
    json!({"spec": {"holderIdentity": holder, "renewTime": renewed}})
}

/// The findings that are not OK, as `ID result: found`, with what to do. Fails if one lacks a hint or a command.
fn faults_with(facts: &Facts, options: Options) -> Vec<String> {
    let bad = judge(facts, options).into_iter().filter(|finding| finding.result != Outcome::Ok);
    bad.map(|finding| {
        assert!(!finding.hint.is_empty() && !finding.fix.is_empty(), "no hint, or no command: {finding:?}");
        let result = if finding.result == Outcome::Error { "error" } else { "warning" };
        format!("{} {result}: {} => {}", finding.id, finding.found, finding.fix)
    })
    .collect()
}

fn faults(change: impl FnOnce(&mut Facts)) -> Vec<String> {
    let mut facts = healthy();
    change(&mut facts);
    faults_with(&facts, OPTIONS)
}

#[test]
fn a_root_is_reported_as_early_as_on_the_page_unless_the_user_chooses_another_time() {
    let command = <Args as clap::Args>::augment_args(clap::Command::new("check"));
    let matches = command.try_get_matches_from(["check"]).unwrap();
    let parsed = <Args as clap::FromArgMatches>::from_arg_matches(&matches).unwrap();
    let expected = std::time::Duration::from_secs(ROOT_ENDS_SOON.unsigned_abs());
    assert_eq!((parsed.certs_within, Args::default().certs_within), (expected, expected));
}

#[test]
fn a_healthy_mesh_has_no_fault_and_every_check_reports() {
    assert_eq!(faults(|_| {}), Vec::<String>::new());
    let reported: Vec<&str> = judge(&healthy(), OPTIONS).iter().map(|finding| finding.id).collect();
    for check in ALL.iter().filter(|check| check.id != "T0103") {
        assert!(reported.contains(&check.id), "{}", check.id);
    }
}

#[test]
fn a_cluster_without_native_sidecars_or_stable_admission_policies_is_too_old() {
    assert_eq!(
        faults(|facts| facts.server = Ok("v1.28.9".to_owned())),
        [
            "T0101 error: the API server has version v1.28.9, which does not have native sidecars, and ValidatingAdmissionPolicies => kubectl version"
        ]
    );
    assert_eq!(
        faults(|facts| facts.server = Ok("v1.29.0-gke.1".to_owned())),
        [
            "T0101 error: the API server has version v1.29.0-gke.1, which does not have stable ValidatingAdmissionPolicies => kubectl version"
        ]
    );
    assert_eq!(
        faults(|facts| facts.nodes = Ok(vec![node("a", "v1.31.0"), node("old", "v1.28.1")])),
        [
            "T0102 error: node old has kubelet v1.28.1, which does not start native sidecars before the application => kubectl cordon old"
        ]
    );
}

#[test]
fn before_an_installation_only_the_cluster_and_the_rights_are_looked_at() {
    let right = |right: &str, allowed| Permission { right: right.to_owned(), allowed };
    let mut facts = healthy();
    facts.deployments = DEPLOYMENTS.into_iter().map(|name| (name, Ok(None))).collect();
    facts.definitions = DEFINITIONS.into_iter().map(|name| (name, Ok(None))).collect();
    facts.mutating = Ok(None);
    facts.permissions = vec![right("create namespaces", Ok(true))];
    let pre = Options { pre: true, ..OPTIONS };
    assert_eq!(faults_with(&facts, pre), Vec::<String>::new());
    facts.permissions.push(right("patch clusterroles.rbac.authorization.k8s.io", Ok(false)));
    facts.permissions.push(right("create roles", Err(Unread::Failed("timed out".to_owned()))));
    assert_eq!(
        faults_with(&facts, pre),
        [
            "T0103 error: you may not patch clusterroles.rbac.authorization.k8s.io => kubectl auth can-i patch clusterroles.rbac.authorization.k8s.io",
            "T0103 warning: whether you may create roles could not be checked: timed out => kubectl auth can-i create roles",
        ]
    );
}

#[test]
fn a_namespace_that_rejects_the_init_container_is_an_error() {
    let labels = json!({"tulle.dev/inject": "enabled", "pod-security.kubernetes.io/enforce": "baseline"});
    assert_eq!(
        faults(|facts| facts.namespaces = Ok(vec![namespace("shop", labels)])),
        [
            "T0104 error: namespace shop enforces Pod Security level baseline, which rejects the init container tulle-init => kubectl label --overwrite namespace shop pod-security.kubernetes.io/enforce=privileged"
        ]
    );
}

#[test]
fn definitions_must_be_installed_serve_this_version_and_have_one_manager() {
    let with = |definition: Option<Value>| {
        move |facts: &mut Facts| drop(facts.definitions.insert("canaries.tulle.dev", Ok(definition)))
    };
    assert_eq!(
        faults(with(None)),
        [
            "T0201 error: canaries.tulle.dev is not installed => tulle upgrade --apply --system-namespace tulle-system"
        ]
    );
    let mut pending = definition("canaries.tulle.dev");
    pending["status"]["conditions"][0]["status"] = json!("False");
    assert_eq!(
        faults(with(Some(pending))),
        ["T0201 error: canaries.tulle.dev is not established => kubectl describe crd canaries.tulle.dev"]
    );
    let mut newer = definition("canaries.tulle.dev");
    newer["spec"]["versions"][0]["name"] = json!("v1");
    assert_eq!(
        faults(with(Some(newer))),
        [
            "T0202 error: canaries.tulle.dev serves v1, and this program needs v1alpha1 => tulle upgrade --apply --system-namespace tulle-system",
            "T0202 error: canaries.tulle.dev has stored objects as \"v1alpha1\", which it does not serve any more => kubectl get crd canaries.tulle.dev -o yaml",
        ]
    );
    let mut other = definition("canaries.tulle.dev");
    other["metadata"]["annotations"] = json!({"meta.helm.sh/release-name": "tulle"});
    assert_eq!(
        faults(with(Some(other))),
        [
            "T0203 warning: canaries.tulle.dev is managed by Helm, and meshpolicies.tulle.dev by kubectl or tulle => kubectl get crd canaries.tulle.dev meshpolicies.tulle.dev --show-managed-fields -o yaml"
        ]
    );
}

#[test]
fn a_control_plane_without_pods_or_with_one_is_reported() {
    let with = |deployment: Option<Value>| {
        move |facts: &mut Facts| drop(facts.deployments.insert("tulle-webhook", Ok(deployment)))
    };
    let pods = |wanted: u32, available: u32| {
        Some(json!({"spec": {"replicas": wanted}, "status": {"availableReplicas": available}}))
    };
    assert_eq!(
        faults(with(None)),
        [
            "T0301 error: Deployment tulle-system/tulle-webhook does not exist => tulle upgrade --apply --system-namespace tulle-system"
        ]
    );
    let scale = "kubectl -n tulle-system scale deployment tulle-webhook --replicas=2";
    assert_eq!(
        faults(with(pods(1, 1))),
        [format!("T0302 warning: Deployment tulle-system/tulle-webhook has only 1 replica => {scale}")]
    );
    assert_eq!(
        faults(with(pods(0, 0))),
        [format!("T0301 error: Deployment tulle-system/tulle-webhook is scaled to 0 replicas => {scale}")]
    );
    assert_eq!(
        faults(with(pods(3, 0))),
        [
            "T0301 error: Deployment tulle-system/tulle-webhook has no available pod => kubectl -n tulle-system describe pods -l app=tulle-webhook",
            "T0302 warning: 0 of 3 replicas of Deployment tulle-system/tulle-webhook are available => kubectl -n tulle-system describe pods -l app=tulle-webhook",
        ]
    );
}

#[test]
fn a_lease_that_nobody_renews_is_reported() {
    let logs = "kubectl -n tulle-system logs deployment/tulle-operator";
    for (found, what) in [
        (None, "Lease tulle-system/tulle-operator does not exist, so no replica has ever led"),
        (Some(lease("", "2026-11-27T11:59:58.000000Z")), "no replica leads"),
        (
            Some(lease("tulle-operator-1/10.0.0.1", "2026-11-27T11:58:00.000000Z")),
            "pod tulle-operator-1 has not renewed the Lease for 2m",
        ),
    ] {
        let expected = format!("T0303 error: {what} => {logs}");
        assert_eq!(faults(|facts| facts.lease = Ok(found)), [expected]);
    }
}

#[test]
fn an_operator_that_does_not_answer_leaves_the_other_checks_to_go_on() {
    let found = faults(|facts| {
        facts.health = Err("no route to it".to_owned());
        facts.sidecars = Err("no route to it".to_owned());
    });
    assert_eq!(
        found,
        [
            "T0304 error: the operator did not answer: no route to it => kubectl -n tulle-system get pods -l app=tulle-operator",
            "T0401 warning: the root certificate could not be checked: the operator did not answer => kubectl -n tulle-system get pods -l app=tulle-operator",
            "T0703 warning: sidecars could not be checked: the operator did not answer => kubectl -n tulle-system get pods -l app=tulle-operator",
        ]
    );
}

#[test]
fn another_version_of_this_program_and_an_operator_without_room_are_warnings() {
    assert_eq!(
        faults(|facts| facts.cli = "0.4.1".to_owned()),
        [
            "T0305 warning: the operator has version 0.3.0, and this program 0.4.1 => tulle upgrade --apply --system-namespace tulle-system"
        ]
    );
    assert_eq!(faults(|facts| facts.cli = "0.3.9".to_owned()), Vec::<String>::new());
    assert_eq!(
        faults(|facts| facts.health.as_mut().unwrap().series = 100),
        [
            "T0306 warning: the operator holds 100 series, and takes no more => tulle top -A --once --limit 0 --window 6h"
        ]
    );
}

#[test]
fn the_root_is_a_warning_before_it_ends_and_an_error_after() {
    let save = "kubectl -n tulle-system get secret tulle-root -o yaml > tulle-root.yaml";
    let ending =
        |left: i64| faults(move |facts| facts.health.as_mut().unwrap().root_not_after = Some(NOW + left));
    assert_eq!(ending(20 * DAY), [format!("T0401 warning: the root certificate ends in 20d => {save}")]);
    assert_eq!(
        ending(-3 * DAY),
        [format!(
            "T0401 error: the root certificate ended 3d ago, so sidecars cannot connect to each other => {save}"
        )]
    );
    assert_eq!(ending(31 * DAY), Vec::<String>::new());
    let strict = Options { certs_within: 60 * DAY, ..OPTIONS };
    let mut facts = healthy();
    facts.health.as_mut().unwrap().root_not_after = Some(NOW + 31 * DAY);
    assert_eq!(faults_with(&facts, strict).len(), 1);
}

#[test]
fn a_webhook_that_is_missing_or_that_cannot_be_verified_is_an_error() {
    let only = |bundle: Value| {
        let mut hook = hook("validate.tulle.dev", "Ignore");
        hook["clientConfig"]["caBundle"] = bundle;
        move |facts: &mut Facts| facts.validating = Ok(Some(json!({"webhooks": [hook]})))
    };
    let configuration = "ValidatingWebhookConfiguration tulle";
    let restart = "kubectl -n tulle-system rollout restart deployment tulle-webhook";
    assert_eq!(
        faults(|facts| facts.validating = Ok(None)),
        [format!(
            "T0501 error: {configuration} is missing or empty => tulle upgrade --apply --system-namespace tulle-system"
        )]
    );
    assert_eq!(
        faults(only(Value::Null)),
        [format!(
            "T0502 error: {configuration}: webhook validate.tulle.dev has no caBundle => kubectl -n tulle-system logs deployment/tulle-webhook"
        )]
    );
    assert_eq!(
        faults(only(json!("bm90IGEgY2VydGlmaWNhdGU="))),
        [format!(
            "T0502 error: {configuration}: the caBundle of webhook validate.tulle.dev holds no certificate that can be read => {restart}"
        )]
    );
}

#[test]
fn a_bundle_whose_certificate_has_ended_is_an_error() {
    let mut facts = healthy();
    facts.now = BUNDLE_ENDS + 2 * DAY;
    let found = faults_with(&facts, OPTIONS);
    let ended: Vec<&String> = found.iter().filter(|fault| fault.starts_with("T0502")).collect();
    assert_eq!(ended.len(), 3, "each webhook: {found:?}");
    assert!(ended[0].contains("every certificate in the caBundle of webhook"), "{}", ended[0]);
    assert!(ended[0].contains("the last one 2d ago"), "{}", ended[0]);
}

#[test]
fn a_failure_policy_that_somebody_has_changed_is_a_warning() {
    assert_eq!(
        faults(|facts| facts.validating = Ok(Some(json!({"webhooks": [hook("validate.tulle.dev", "Fail")]})))),
        [
            "T0503 warning: ValidatingWebhookConfiguration tulle: webhook validate.tulle.dev has failurePolicy Fail, and Tulle installs Ignore => tulle upgrade --apply --system-namespace tulle-system"
        ]
    );
}

#[test]
fn a_service_without_ready_endpoints_is_an_error() {
    assert_eq!(
        faults(|facts| facts.slices = Ok(vec![slice("tulle-operator", true), slice("tulle-webhook", false)])),
        [
            "T0504 error: Service tulle-system/tulle-webhook has no ready endpoint => kubectl -n tulle-system describe service tulle-webhook"
        ]
    );
}

#[test]
fn a_label_that_means_nothing_and_no_label_at_all_are_warnings() {
    assert_eq!(
        faults(|facts| facts.namespaces = Ok(vec![namespace("shop", json!({"tulle.dev/inject": "true"}))])),
        [
            "T0601 warning: namespace shop has label tulle.dev/inject=true, which has no effect => kubectl label --overwrite namespace shop tulle.dev/inject=enabled"
        ]
    );
    assert_eq!(
        faults(|facts| facts.namespaces = Ok(Vec::new())),
        [
            "T0601 warning: no namespace has label tulle.dev/inject => kubectl label namespace NAMESPACE tulle.dev/inject=enabled"
        ]
    );
}

#[test]
fn pods_without_a_sidecar_are_listed_unless_they_cannot_or_need_not_have_one() {
    let pod = |name: &str, rest: Value| {
        let mut pod = json!({"metadata": {"name": name, "namespace": "shop",
            "labels": {"pod-template-hash": "6d9f"},
            "ownerReferences": [{"kind": "ReplicaSet", "name": "web-a-6d9f", "controller": true}]}});
        for (key, value) in rest.as_object().unwrap() {
            pod[key] = value.clone();
        }
        pod
    };
    let mut pods: Vec<Value> = (0..6).map(|number| pod(&format!("web-{number}"), json!({}))).collect();
    pods.push(pod("host", json!({"spec": {"hostNetwork": true}})));
    pods.push(pod("done", json!({"status": {"phase": "Succeeded"}})));
    let opted_out =
        json!({"metadata": {"name": "out", "namespace": "shop", "labels": {"tulle.dev/inject": "disabled"}}});
    pods.push(opted_out);
    assert_eq!(
        faults(|facts| facts.uninjected = Ok(pods)),
        [
            "T0602 warning: 6 pods of namespace shop have no sidecar: web-0, web-1, web-2, web-3, web-4 and 1 more => kubectl -n shop rollout restart deployment/web-a"
        ]
    );
}

#[test]
fn a_pod_without_a_workload_and_a_sidecar_is_to_be_created_again() {
    let pod = json!({"metadata": {"name": "alone", "namespace": "shop"}});
    assert_eq!(
        faults(|facts| facts.uninjected = Ok(vec![pod])),
        [
            "T0602 warning: 1 pods of namespace shop have no sidecar: alone => kubectl -n shop replace --force -f MANIFEST"
        ]
    );
}

#[test]
fn sidecars_that_are_too_old_behind_or_without_a_certificate_are_reported() {
    let with = |change: fn(&mut query::Sidecar)| {
        faults(move |facts| change(&mut facts.sidecars.as_mut().unwrap().sidecars[0]))
    };
    assert_eq!(with(|sidecar| sidecar.version = "0.1.0".to_owned()), Vec::<String>::new());
    assert_eq!(
        faults(|facts| {
            facts.cli = "0.5.0".to_owned();
            facts.health.as_mut().unwrap().version = "0.5.0".to_owned();
            facts.sidecars.as_mut().unwrap().sidecars[0].version = "0.2.9".to_owned();
        }),
        [
            "T0701 warning: 1 sidecars have a version that this operator does not support: shop/web-1 (0.2.9) => kubectl get pods -A -L tulle.dev/sidecar"
        ]
    );
    assert_eq!(
        with(|sidecar| sidecar.version = "0.4.0".to_owned()),
        [
            "T0701 warning: 1 sidecars have a version that this operator does not support: shop/web-1 (0.4.0) => kubectl get pods -A -L tulle.dev/sidecar"
        ]
    );
    assert_eq!(
        with(|sidecar| sidecar.refused = vec!["Policy: needs limits/v2".to_owned()]),
        [
            "T0702 error: sidecar of shop/web-1 has refused 1 resources: Policy: needs limits/v2 => kubectl -n shop delete pod web-1"
        ]
    );
    assert_eq!(
        with(|sidecar| {
            sidecar.acknowledged = 3;
            sidecar.behind_seconds = Some(31);
        }),
        [
            "T0703 warning: 1 sidecars have waited for over 30 s or are not connected: shop/web-1 (3/4) => tulle pods -A"
        ]
    );
    assert_eq!(with(|sidecar| sidecar.behind_seconds = Some(30)), Vec::<String>::new());
    assert_eq!(
        with(|sidecar| sidecar.connected = false),
        [
            "T0703 warning: 1 sidecars have waited for over 30 s or are not connected: shop/web-1 (not connected) => tulle pods -A"
        ]
    );
    assert_eq!(
        with(|sidecar| sidecar.certificate_not_after = Some(NOW + 600)),
        [
            "T0704 warning: the certificate of shop/web-1 ends in 10m => kubectl -n shop logs web-1 -c tulle-proxy"
        ]
    );
    let short_lived = faults(|facts| {
        facts.config = Ok(Some(json!({"spec": {"certificates": {"leafLifetime": "20m"}}})));
        facts.sidecars.as_mut().unwrap().sidecars[0].certificate_not_after = Some(NOW + 600);
    });
    assert_eq!(short_lived, Vec::<String>::new());
    assert_eq!(
        with(|sidecar| sidecar.certificate_not_after = Some(NOW - 600)),
        ["T0704 error: the certificate of shop/web-1 ended 10m ago => kubectl -n shop delete pod web-1"]
    );
}

#[test]
fn ciliums_socket_load_balancer_is_a_warning_unless_it_leaves_pods_alone() {
    let config = |data: Value| faults(move |facts| facts.cilium = Ok(Some(json!({"data": data}))));
    let found = config(json!({"kube-proxy-replacement": "true"}));
    assert!(found[0].starts_with("T0930 warning: Cilium replaces Services' addresses"), "{found:?}");
    assert_eq!(config(json!({"bpf-lb-sock": "true"})).len(), 1);
    assert_eq!(config(json!({"kube-proxy-replacement": "false"})), Vec::<String>::new());
    let left = json!({"kube-proxy-replacement": "true", "bpf-lb-sock-hostns-only": "true"});
    assert_eq!(config(left), Vec::<String>::new());
}

#[test]
fn what_may_not_be_read_is_a_warning_and_the_rest_is_checked() {
    let forbidden = || Unread::Forbidden("nodes is forbidden".to_owned());
    let found = faults(|facts| {
        facts.nodes = Err(forbidden());
        facts.namespaces = Err(forbidden());
        facts.uninjected = Err(forbidden());
        facts.lease = Err(forbidden());
        facts.slices = Err(forbidden());
        facts.mutating = Err(forbidden());
        facts.validating = Err(forbidden());
        facts.policies = Err(forbidden());
        facts.canaries = Err(forbidden());
        facts.routes = Err(forbidden());
        facts.cilium = Err(forbidden());
    });
    assert!(found.iter().all(|fault| fault.contains(" warning: ")), "{found:#?}");
    assert_eq!(
        found[0],
        "T0102 warning: the nodes' versions could not be checked: not allowed to read: nodes is forbidden => kubectl auth can-i list nodes"
    );
}

#[test]
fn the_text_has_headings_marks_words_hints_and_a_summary() {
    let mut facts = healthy();
    facts.deployments.insert("tulle-webhook", Ok(None));
    facts.health.as_mut().unwrap().series = 100;
    let report = Report::of(judge(&facts, OPTIONS));
    let short = report.text(&Output::default(), true);
    assert_eq!(
        short,
        "operator\n--------\n\
         × error   T0301  operator and webhook are available\n    \
         Deployment tulle-system/tulle-webhook does not exist\n    \
         hint: Tulle is not installed, or in another namespace: name it with --system-namespace\n    \
         fix: tulle upgrade --apply --system-namespace tulle-system\n\
         ‼ warning T0306  the operator has room for all series\n    \
         the operator holds 100 series, and takes no more\n    \
         hint: what is counted beyond them is not shown; Canaries are judged all the same\n    \
         fix: tulle top -A --once --limit 0 --window 6h\n\n\
         × 1 error, 1 warning\n"
    );
    let long = report.text(&Output::default(), false);
    assert!(long.starts_with("cluster\n-------\n√ ok      T0101  the Kubernetes version is supported (the API server has version v1.31.2+k3s1)\n"), "{long}");
    assert_eq!(report.ids(), "T0301\nT0306\n");
    let healthy = Report::of(judge(&healthy(), OPTIONS));
    assert!(healthy.text(&Output::default(), false).ends_with("\n√ all is well\n"));
    assert_eq!(healthy.text(&Output::default(), true), "√ all is well\n");
}

#[test]
fn the_json_form_has_results_as_words() {
    let report = Report::of(judge(&healthy(), OPTIONS));
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!((&json["result"], &json["errors"], &json["warnings"]), (&json!("ok"), &json!(0), &json!(0)));
    assert_eq!(
        json["categories"][0]["findings"][0],
        json!({"id": "T0101", "category": "cluster", "check": "the Kubernetes version is supported", "result": "ok",
            "found": "the API server has version v1.31.2+k3s1"})
    );
}
