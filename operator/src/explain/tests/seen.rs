//! What answers do not say to those who may not see it, and how long they get.

use super::*;
use crate::model::Namespace;

/// `explain` of somebody who sees namespace `shop` only.
fn ask_shop(model: &Model, question: &Question) -> Explanation {
    explain(model, &AckTracker::default(), question, &|namespace: &str| namespace == "shop").unwrap()
}

fn labelled(model: &mut Model, name: &str) {
    let labels = [("team".to_owned(), "pay".to_owned())].into();
    model.apply_namespace(name.into(), Namespace { labels, ..Namespace::default() });
}

fn by_label() -> Value {
    json!([{"from": [{"namespaceLabels": {"team": "pay"}}, {"namespaceLabels": {"team": "pay"}, "serviceAccount": "till"}]}])
}

#[test]
fn labels_of_namespaces_stay_labels() {
    let mut model = world();
    labelled(&mut model, "hidden");
    let policy = web("p", json!({"access": {"allow": by_label(), "deny": by_label()}}));
    apply(&mut model, policy);
    let rows = who_can(&model).rows;
    let clients: Vec<&str> = rows.iter().map(|row| row.client.as_str()).collect();
    assert_eq!(
        clients,
        [
            "namespaces with team=pay",
            "till in namespaces with team=pay",
            "namespaces with team=pay, till in namespaces with team=pay, denied by MeshPolicy/shop/p",
        ]
    );
    // A client in a namespace with the labels makes the rule the reason.
    let mut sum = last_hour();
    let (mut id, counts) = counted(Some("till"), 9);
    id.namespace = "hidden".into();
    sum.series.push((id, counts));
    let found = diff(&model, &sum, &web("p", json!({"access": {"deny": by_label()}})));
    let [row] = found.rows.as_slice() else { panic!("{found:?}") };
    assert_eq!(
        row.because,
        "rule 1 of deny matches (from namespaces with team=pay, till in namespaces with team=pay)"
    );
    labelled(&mut model, "shop");
    let explained = ask(&model, &question("/"));
    assert!(stage(&explained, "access").because.contains("(from namespaces with team=pay, till in"));
    assert!(!format!("{explained:?}").contains("hidden"), "{explained:?}");
}

#[test]
fn where_a_rule_as_it_was_written_is_gone_no_namespace_is_named() {
    let peer = tulle_mesh::proto::Peer { namespaces: vec!["hidden".to_owned()], ..Default::default() };
    assert_eq!(words::peer(&peer, None), "namespaces by label");
}

/// A pod of another namespace.
fn of_billing() -> Pod {
    Pod {
        namespace: "billing".into(),
        service_account: "ledger".into(),
        workload: None,
        ..pod("ledger-1", "10.1.0.7", "r1")
    }
}

/// A Service of namespace `billing` with one pod, which a route of `shop/web` leads to.
fn with_billing(model: &mut Model) {
    let billing = of_billing();
    model.apply_pod(billing.clone());
    model.apply_service(key("billing", "ledger"), at(80, "10.96.0.7"));
    let ports = vec![("http".into(), 8080)];
    let endpoints = vec![ready(&billing)];
    model.apply_slice(key("billing", "ledger-1"), Slice { service: "ledger".into(), ports, endpoints });
    let policy: MeshPolicy = serde_json::from_value(json!({
        "apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy",
        "spec": {"target": {"kind": "Service", "name": "ledger"}, "balance": {"by": "RoundRobin"}},
        "metadata": {"name": "inner", "namespace": "billing", "uid": "u", "generation": 1},
    }))
    .unwrap();
    model.apply_policy(key("billing", "inner"), policy);
    let backend = json!({"name": "ledger", "namespace": "billing", "port": 80});
    apply_route(model, json!([{"backendRefs": [backend]}]));
}

#[test]
fn an_explanation_ends_where_a_route_leads_to_a_namespace_that_may_not_be_seen() {
    let mut model = world();
    with_billing(&mut model);
    let explained = ask_shop(&model, &question("/"));
    let last = explained.stages.last().unwrap();
    assert_eq!((last.name.as_str(), last.verdict), ("backend", Verdict::Depends));
    assert!(last.because.ends_with("goes to namespace billing, which this token does not show"), "{last:?}");
    assert!(explained.outcome.contains("tulle -A") && !explained.reaches, "{}", explained.outcome);
    assert!(!format!("{explained:?}").contains("inner"), "a policy of the other namespace: {explained:?}");
    let all = ask(&model, &question("/"));
    assert!(all.stages.iter().any(|stage| stage.name == "access"), "whoever sees all sees the rest: {all:?}");
    // Whether a backend exists there is not told either.
    model.delete_service(&key("billing", "ledger"));
    assert_eq!(ask_shop(&model, &question("/")), explained);
}

#[test]
fn a_pod_of_another_namespace_behind_a_slice_is_not_looked_at() {
    let mut model = world();
    let billing = of_billing();
    model.apply_pod(billing.clone());
    let slice = |endpoints| Slice { service: "web".into(), ports: vec![("http".into(), 8080)], endpoints };
    model.apply_slice(key("shop", "web-1"), slice(vec![ready(&billing)]));
    let explained = ask_shop(&model, &question("/"));
    assert!(!explained.reaches);
    assert_eq!(explained.stages.last().unwrap().name, "endpoint");
    assert!(!format!("{explained:?}").contains("ledger"), "{explained:?}");
    model.apply_slice(
        key("shop", "web-1"),
        slice(vec![ready(&billing), ready(&pod("web-1", "10.1.0.1", "r1"))]),
    );
    let explained = ask_shop(&model, &question("/"));
    assert!(explained.reaches, "{explained:?}");
    assert!(stage(&explained, "endpoint").because.contains("1 of them of pods of other namespaces"));
    assert!(!format!("{explained:?}").contains("ledger"), "{explained:?}");
}

#[test]
fn pods_that_are_waited_for_are_named_in_namespaces_that_may_be_seen() {
    let model = world();
    let (acks, asked) = (AckTracker::default(), question("/"));
    let client = Client::find(&model, &asked.source).unwrap();
    let dialled = Dialled::find(&model, &asked.destination).unwrap();
    let shown = |namespace: &str| namespace == "shop";
    let world = World { model: &model, acks: &acks, question: &asked, client, dialled, shown: &shown };
    let behind = |pods: &[&str]| -> std::collections::BTreeSet<String> {
        pods.iter().map(|pod| (*pod).to_owned()).collect()
    };
    let text = |pods: &[&str], refusal| stages::enforced(&world, 3, &behind(pods), refusal);
    assert_eq!(
        text(&["billing/a", "shop/b"], Some("pod billing/a: rule of hidden")),
        "; enforced by 1 of 3 sidecars, waiting for pod shop/b, refused by a pod of another namespace"
    );
    assert_eq!(
        text(&["billing/a"], None),
        "; enforced by 2 of 3 sidecars, waiting for a pod of another namespace"
    );
}

#[test]
fn an_answer_about_access_is_cut_off_at_its_most_rows_and_says_so() {
    let mut model = world();
    let callers: Vec<Value> = (0..64).map(|number| json!({"serviceAccount": format!("a{number}")})).collect();
    let rules = vec![json!({"from": callers}); 4];
    apply(&mut model, policy("p", json!({"target": {"kind": "Namespace"}, "access": {"allow": rules}})));
    assert!(!who_can(&model).truncated);
    // 256 callers of each of 20 workloads.
    for number in 0..20 {
        model.apply_pod(pod_of(&format!("w{number}"), &format!("10.1.1.{number}")));
    }
    let found = access(&model, &last_hour(), "shop", "", AccessDirection::WhoCan).unwrap();
    assert_eq!((found.rows.len(), found.truncated), (5_000, true));
}

#[test]
fn what_does_not_exist_is_named() {
    let model = world();
    let error = |source: &str, destination: &str| {
        let (source, destination) = (("shop".to_owned(), source.to_owned()), destination.to_owned());
        let asked = Question { source, destination, ..question("/") };
        explain(&model, &AckTracker::default(), &asked, &|_: &str| true).unwrap_err()
    };
    assert!(error("gone", "shop/web").contains("no pod of a workload gone"));
    assert_eq!(error("cart", "shop/gone"), "there is no Service gone in namespace shop");
    assert_eq!(error("cart", "shop/web:81"), "Service shop/web has the ports 80");
    assert!(error("cart", "web").contains("write namespace/service"));
}
