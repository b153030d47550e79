//! Which pod is tried, and how the answer is read.

use serde_json::{Value, json};

use super::admission::{Answer, answer, warning};
use super::template::{pod, without_bookkeeping};
use super::{refusal, without_sidecar};
use crate::commands::lint::read::Document;
use crate::output::Output;

fn document(value: Value) -> Document {
    Document { file: "shop.yaml".into(), value }
}

#[test]
fn the_pod_of_a_workload_has_the_metadata_and_spec_of_its_template() {
    let template = json!({
        "metadata": {"labels": {"app": "web"}, "annotations": {"a": "b"}, "name": "ignored"},
        "spec": {"containers": [{"name": "web", "newField": 1}]},
    });
    let expected = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "labels": {"app": "web"}, "annotations": {"a": "b"}, "namespace": "shop", "generateName": "web-",
        },
        "spec": {"containers": [{"name": "web", "newField": 1}]},
    });
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"}, "spec": {"template": template},
    });
    assert_eq!(pod(&document(deployment), "shop"), Some(expected.clone()));
    let cron = json!({
        "apiVersion": "batch/v1", "kind": "CronJob", "metadata": {"name": "web"},
        "spec": {"jobTemplate": {"spec": {"template": template}}},
    });
    assert_eq!(pod(&document(cron), "shop"), Some(expected));
}

#[test]
fn a_pod_keeps_its_name_and_other_kinds_have_no_pod() {
    let named = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": {}});
    let made = pod(&document(named), "shop").unwrap();
    assert_eq!(made["metadata"], json!({"name": "one", "namespace": "shop"}));
    for (version, kind) in
        [("v1", "Service"), ("example.com/v1", "Deployment"), ("tulle.dev/v1alpha1", "Canary")]
    {
        assert_eq!(pod(&document(json!({"apiVersion": version, "kind": kind})), "shop"), None, "{kind}");
    }
}

#[test]
fn a_namespace_that_does_not_ask_for_sidecars_is_refused_with_the_command_that_changes_it() {
    assert_eq!(refusal("shop", Some("enabled")), None);
    assert_eq!(refusal("shop", Some("required")), None);
    let printed = refusal("shop", None).unwrap().message(&Output::default());
    assert!(printed.contains("no label tulle.dev/inject"), "{printed}");
    assert!(
        printed.contains("kubectl label --overwrite namespace shop tulle.dev/inject=enabled"),
        "{printed}"
    );
    assert!(refusal("shop", Some("yes")).unwrap().to_string().contains("tulle.dev/inject=yes"));
    assert!(refusal("kube-system", Some("enabled")).is_some());
}

#[test]
fn a_pod_without_a_sidecar_is_reported_with_the_reason() {
    assert_eq!(without_sidecar(&json!({"metadata": {"labels": {"tulle.dev/sidecar": "1"}}}), &[]), None);
    let why = |pod: Value| without_sidecar(&pod, &["port 80 is skipped".to_owned()]).unwrap();
    assert!(why(json!({"metadata": {"labels": {"tulle.dev/inject": "disabled"}}})).contains("disabled"));
    assert!(why(json!({"spec": {"hostNetwork": true}})).contains("network of its node"));
    assert!(why(json!({})).contains("tulle check"));
    let said = "the pod gets no sidecar because it has hostNetwork: true".to_owned();
    assert_eq!(without_sidecar(&json!({"spec": {"hostNetwork": true}}), &[said]), None);
    let webhook = include_str!("../../../../webhook/src/inject/mod.rs");
    assert!(webhook.contains(super::NO_SIDECAR), "the webhook warns in other words");
}

#[test]
fn warnings_are_read_without_their_code_and_quotes() {
    assert_eq!(warning("299 - \"port 80 is skipped\""), "port 80 is skipped");
    assert_eq!(warning("299 - \"write \\\"80\\\"\""), "write \"80\"");
    assert_eq!(warning("odd"), "odd");
}

#[test]
fn a_rejection_is_an_answer_and_a_missing_right_is_an_error() {
    let said = |message: &str| json!({"kind": "Status", "message": message});
    let taken = answer(201, json!({"kind": "Pod"}), vec!["w".into()]).unwrap();
    assert_eq!(taken, Answer::Taken { object: json!({"kind": "Pod"}), warnings: vec!["w".into()] });
    let webhook = answer(403, said("pods \"web\" is forbidden: uid 4150 is reserved"), Vec::new()).unwrap();
    assert!(matches!(webhook, Answer::Refused { message, .. } if message.contains("4150")));
    let denied = "pods is forbidden: User \"ann\" cannot create resource \"pods\" in API group \"\"";
    assert!(answer(403, said(denied), Vec::new()).is_err());
    assert!(answer(503, Value::Null, Vec::new()).unwrap_err().to_string().contains("HTTP status 503"));
}

#[test]
fn an_apply_with_an_unknown_field_is_a_rejection_although_its_status_is_500() {
    let said = |message: &str| json!({"kind": "Status", "message": message});
    let typo = "failed to create typed patch object (shop/p; tulle.dev/v1alpha1, Kind=MeshPolicy): \
                .spec.timeouts: field not declared in schema";
    let found = answer(500, said(typo), Vec::new()).unwrap();
    assert_eq!(found, Answer::Refused { message: typo.to_owned(), warnings: Vec::new() });
    let webhook = "Internal error occurred: failed calling webhook \"web.shop.dev\"";
    assert!(answer(500, said(webhook), Vec::new()).is_err());
}

#[test]
fn what_the_api_server_writes_for_itself_is_not_printed() {
    let pod = json!({"metadata": {"name": "web", "uid": "1", "managedFields": []}, "spec": {}, "status": {}});
    assert_eq!(without_bookkeeping(pod), json!({"metadata": {"name": "web"}, "spec": {}}));
}
