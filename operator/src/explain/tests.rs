//! Objects in, answers out.

use serde_json::{Value, json};
use tulle_crds::{MeshPolicy, WorkloadKind};

mod diff;
mod in_force;
mod reached;
mod routed;
mod seen;
mod suggested;

use super::*;
use crate::discovery::SidecarEvent;
use crate::model::gateway::{RouteKind, RouteObject, RouteSpec};
use crate::model::tests::{canary, key, pod, shop};
use crate::model::{Endpoint, Service, Slice, WorkloadKey};
use crate::telemetry::history::{Counts, Direction, Reporter, SeriesId, Sum};

fn policy(name: &str, spec: Value) -> MeshPolicy {
    serde_json::from_value(json!({
        "apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy", "spec": spec,
        "metadata": {"name": name, "namespace": "shop", "uid": "u", "generation": 1, "creationTimestamp": "2026-01-01T00:00:00Z"},
    }))
    .unwrap()
}

/// A policy for the pods or calls of Service `shop/web`, with these sections.
fn web(name: &str, mut sections: Value) -> MeshPolicy {
    sections["target"] = json!({"kind": "Service", "name": "web"});
    policy(name, sections)
}

fn apply(model: &mut Model, policy: MeshPolicy) {
    model.apply_policy(key("shop", policy.metadata.name.as_deref().unwrap()), policy);
}

/// An HTTPRoute of Service `shop/web` with these rules.
fn apply_route(model: &mut Model, rules: Value) {
    let parent = json!({"group": "", "kind": "Service", "namespace": "shop", "name": "web"});
    let spec: RouteSpec = serde_json::from_value(json!({"parentRefs": [parent], "rules": rules})).unwrap();
    model.apply_route(RouteObject {
        kind: RouteKind::Http,
        namespace: "shop".into(),
        name: "r".into(),
        uid: "r".into(),
        generation: 1,
        created: 0,
        parents: spec.parents,
        hostnames: spec.hostnames,
        rules: spec.rules,
    });
}

fn to(name: &str, weight: u32) -> Value {
    json!({"name": name, "namespace": "shop", "port": 80, "weight": weight})
}

/// A pod of Deployment `shop/{workload}`, with a service account of the same name.
fn pod_of(workload: &str, ip: &str) -> Pod {
    Pod {
        service_account: workload.into(),
        labels: Box::new([("app".into(), workload.into())]),
        workload: Some(WorkloadKey {
            kind: WorkloadKind::Deployment,
            namespace: "shop".into(),
            name: workload.into(),
        }),
        ..pod(&format!("{workload}-1"), ip, "r1")
    }
}

/// Service `shop/web` with one pod of revision r1, Service `shop/api` without any, and the client `shop/cart`.
fn world() -> Model {
    let mut model = shop(&[pod("web-1", "10.1.0.1", "r1")]);
    model.apply_service(key("shop", "api"), at(80, "10.96.0.2"));
    model.apply_pod(pod_of("cart", "10.1.0.9"));
    model
}

fn at(port: u16, ip: &str) -> Service {
    Service {
        cluster_ips: vec![ip.parse().unwrap()],
        ports: vec![ServicePort { name: "http".into(), port, app_protocol: None }],
        selector: [("app".to_owned(), "api".to_owned())].into(),
        ..Service::default()
    }
}

/// Service `shop/web` with a change.
fn change_service(model: &mut Model, change: impl FnOnce(&mut Service)) {
    let wanted = key("shop", "web");
    let mut service = model.service(&wanted).unwrap().clone();
    change(&mut service);
    model.apply_service(wanted, service);
}

fn question(path: &str) -> Question {
    Question {
        source: ("shop".to_owned(), "cart".to_owned()),
        destination: "shop/web".to_owned(),
        method: "GET".to_owned(),
        path: path.to_owned(),
        headers: Vec::new(),
    }
}

fn ask(model: &Model, question: &Question) -> Explanation {
    explain(model, &AckTracker::default(), question, &|_: &str| true).unwrap()
}

fn stage<'a>(explained: &'a Explanation, name: &str) -> &'a Stage {
    explained.stages.iter().find(|stage| stage.name == name).unwrap_or_else(|| panic!("{explained:#?}"))
}

/// What is expected of one stage of `GET {path}` from `shop/cart` to `shop/web`.
struct Case {
    what: &'static str,
    apply: fn(&mut Model),
    path: &'static str,
    stage: &'static str,
    verdict: Verdict,
    object: &'static str,
    because: &'static str,
    outcome: &'static str,
}

const CASE: Case = Case {
    what: "nothing is set",
    apply: |_| {},
    path: "/",
    stage: "tls",
    verdict: Verdict::Pass,
    object: "",
    because: "mTLS; the server has to be spiffe://cluster.local/ns/shop/sa/web",
    outcome: "GET / from shop/cart reaches shop/web:80 at 1 of its pods, over mTLS.",
};

/// The server's access rules refuse the request.
const STOP: Case = Case {
    stage: "access",
    verdict: Verdict::Stop,
    object: "MeshPolicy/shop/p",
    outcome: "403 (PolicyDenied)",
    ..CASE
};

fn check(cases: &[Case]) {
    for case in cases {
        let mut model = world();
        (case.apply)(&mut model);
        let explained = ask(&model, &question(case.path));
        let found = stage(&explained, case.stage);
        let what = case.what;
        assert_eq!(found.verdict, case.verdict, "{what}: {explained:#?}");
        assert_eq!(found.object, case.object, "{what}: {explained:#?}");
        assert!(found.because.contains(case.because), "{what}: {explained:#?}");
        assert!(explained.outcome.contains(case.outcome), "{what}: {explained:#?}");
        let stops = explained.stages.iter().position(|stage| stage.verdict == Verdict::Stop);
        assert_eq!(explained.reaches, stops.is_none(), "{what}: {explained:#?}");
        assert!(
            stops.is_none_or(|stops| stops + 1 == explained.stages.len()),
            "{what}: nothing follows a stop"
        );
    }
}

#[test]
fn the_route_is_the_one_that_sidecars_take() {
    check(&[
        CASE,
        Case {
            what: "no rule of the route takes it",
            apply: |model| {
                apply_route(
                    model,
                    json!([{"matches": [{"path": {"value": "/v1"}}], "backendRefs": [to("web", 1)]}]),
                )
            },
            stage: "route",
            verdict: Verdict::Stop,
            object: "HTTPRoute/shop/r",
            because: "rules[0] wants path below /v1",
            outcome: "404 (RouteNone)",
            ..CASE
        },
        Case {
            what: "the second rule takes it",
            apply: |model| {
                let header = json!([{"name": "x-user", "value": "ada"}]);
                apply_route(
                    model,
                    json!([
                        {"matches": [{"headers": header}], "backendRefs": [to("api", 1)]},
                        {"backendRefs": [to("web", 1)]},
                    ]),
                );
            },
            stage: "route",
            object: "HTTPRoute/shop/r",
            because: "before it, rules[0] wants header x-user ada",
            ..CASE
        },
        Case {
            what: "the route redirects",
            apply: |model| {
                let to = json!({"type": "RequestRedirect", "requestRedirect": {"hostname": "new.example.com", "statusCode": 301}});
                apply_route(model, json!([{"filters": [to]}]));
            },
            path: "/a?b",
            stage: "route",
            verdict: Verdict::Stop,
            object: "HTTPRoute/shop/r",
            because: "redirects to http://new.example.com/a?b",
            outcome: "answers 301",
        },
        Case {
            what: "the backend does not exist",
            apply: |model| apply_route(model, json!([{"backendRefs": [to("gone", 1)]}])),
            stage: "backend",
            verdict: Verdict::Stop,
            object: "HTTPRoute/shop/r",
            because: "backend shop/gone:80 does not exist",
            outcome: "500 (RouteNoBackend)",
            ..CASE
        },
    ]);
}

#[test]
fn weights_policies_and_canaries_are_named_where_they_decide() {
    check(&[
        Case {
            what: "two backends share by weight",
            apply: |model| apply_route(model, json!([{"backendRefs": [to("web", 70), to("api", 30)]}])),
            stage: "backend",
            verdict: Verdict::Depends,
            object: "HTTPRoute/shop/r",
            because: "70 % to shop/web:80, 30 % to shop/api:80",
            outcome: "depending on stage backend",
            ..CASE
        },
        Case {
            what: "a policy sets timeout and retries",
            apply: |model| {
                apply(
                    model,
                    web(
                        "calls",
                        json!({"timeout": {"request": "2s"}, "retry": {"on": ["5xx"], "attempts": 1}}),
                    ),
                )
            },
            stage: "backend",
            object: "Service/shop/web",
            because: "timeout request 2s (MeshPolicy/shop/calls); retries: at most 1 on 5xx",
            ..CASE
        },
        Case {
            what: "a Canary shares",
            apply: |model| {
                let pods = [pod("web-1", "10.1.0.1", "r1"), pod("web-2", "10.1.0.2", "r2")];
                model.apply_pod(pods[1].clone());
                let endpoints = pods.iter().map(ready).collect();
                let ports = vec![("http".into(), 8080)];
                model.apply_slice(key("shop", "web-1"), Slice { service: "web".into(), ports, endpoints });
                let status = json!({"approvedRevision": "r1", "canaryRevision": "r2", "weight": 5, "phase": "Progressing"});
                model.apply_canary(key("shop", "web"), canary(status));
            },
            stage: "split",
            verdict: Verdict::Depends,
            object: "Canary/shop/web",
            because: "95 % to revision r1, 5 % to revision r2",
            outcome: "depending on stage split",
            ..CASE
        },
        Case {
            what: "the Service is headless",
            apply: |model| {
                change_service(model, |service| {
                    *service =
                        Service { cluster_ips: vec![], other_ips: vec![], headless: true, ..service.clone() };
                });
            },
            stage: "address",
            object: "Service/shop/web",
            because: "headless",
            ..CASE
        },
    ]);
}

fn ready(pod: &Pod) -> Endpoint {
    Endpoint {
        address: pod.ips.first().copied(),
        ready: true,
        serving: true,
        pod_uid: Some(pod.uid.clone()),
        ..Endpoint::default()
    }
}

#[test]
fn a_server_without_endpoints_or_for_clients_with_a_sidecar_only_ends_a_request() {
    check(&[
        Case {
            what: "no endpoint is ready",
            apply: |model| model.delete_slice(&key("shop", "web-1")),
            stage: "endpoint",
            object: "Service/shop/web",
            because: "no ready endpoint",
            outcome: "503 (UpstreamNone)",
            ..STOP
        },
        Case {
            what: "a client without a sidecar and mtls Strict",
            apply: |model| {
                model.apply_pod(Pod { injected: false, ..pod_of("cart", "10.1.0.9") });
                apply(model, web("p", json!({"mtls": "Strict"})));
            },
            stage: "tls",
            because: "the client has no sidecar, and mtls of the server is Strict",
            outcome: "PolicyPlaintext",
            ..STOP
        },
        Case {
            what: "a client without a sidecar, and nothing is set",
            apply: |model| model.apply_pod(Pod { injected: false, ..pod_of("cart", "10.1.0.9") }),
            because: "plain text, because the client has no sidecar",
            outcome: "in plain text",
            ..CASE
        },
    ]);
}

#[test]
fn a_denial_names_its_policy_and_rule() {
    check(&[
        Case {
            what: "a rule denies",
            apply: |model| {
                apply(model, web("p", json!({"access": {"deny": [{"from": [{"serviceAccount": "cart"}]}]}})))
            },
            because: "denied by rule 1 of deny (from shop/cart); enforced by 0 of 1 sidecars, waiting for pod web-1",
            ..STOP
        },
        Case {
            what: "no rule allows",
            apply: |model| {
                apply(
                    model,
                    web("p", json!({"access": {"allow": [{"from": [{"serviceAccount": "admin"}]}]}})),
                )
            },
            because: "no rule of allow matches client shop/cart with GET /",
            ..STOP
        },
        Case {
            what: "another method is allowed",
            apply: |model| {
                apply(model, web("p", json!({"access": {"allow": [{"to": [{"methods": ["POST"]}]}]}})))
            },
            because: "no rule of allow matches",
            ..STOP
        },
    ]);
}

#[test]
fn paths_are_judged_in_every_reading_and_as_routes_have_made_them() {
    check(&[
        Case {
            what: "one reading of the path is denied",
            apply: |model| {
                apply(model, web("p", json!({"access": {"deny": [{"to": [{"paths": ["/admin/**"]}]}]}})))
            },
            path: "/a/../admin/x",
            because: "denied by rule 1 of deny",
            ..STOP
        },
        Case {
            what: "the path is denied that a route has made",
            apply: |model| {
                let to_admin = json!({"type": "URLRewrite", "urlRewrite": {"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/admin"}}});
                apply_route(
                    model,
                    json!([{"matches": [{"path": {"value": "/v1"}}], "filters": [to_admin], "backendRefs": [to("web", 1)]}]),
                );
                apply(model, web("p", json!({"access": {"deny": [{"to": [{"paths": ["/admin/**"]}]}]}})));
            },
            path: "/v1/x",
            because: "denied by rule 1 of deny",
            ..STOP
        },
    ]);
}

#[test]
fn what_is_opaque_only_tried_or_limited_is_said_to_be() {
    check(&[
        Case {
            what: "an opaque connection is never surely what an allow looks for",
            apply: |model| {
                change_service(model, |service| service.ports[0].app_protocol = Some("tcp".to_owned()));
                apply(model, web("p", json!({"access": {"allow": [{"to": [{"methods": ["GET"]}]}]}})));
            },
            because: "no rule of allow matches an opaque connection",
            outcome: "resets the connection",
            ..STOP
        },
        Case {
            what: "an opaque connection may be what a deny looks for",
            apply: |model| {
                change_service(model, |service| service.ports[0].app_protocol = Some("tcp".to_owned()));
                let deny = json!([{"to": [{"paths": ["/v2/admin/**"]}]}]);
                apply(model, web("p", json!({"access": {"deny": deny}})));
            },
            because: "of deny (from everybody to /v2/admin/**); the content of an opaque connection is not known",
            outcome: "resets the connection",
            ..STOP
        },
        Case {
            what: "a policy in Shadow would deny",
            apply: |model| apply(model, web("tried", json!({"mode": "Shadow", "access": {"allow": []}}))),
            stage: "access",
            because: "MeshPolicy/shop/tried, in Shadow, would deny it",
            ..CASE
        },
        Case {
            what: "limits hold",
            apply: |model| apply(model, web("p", json!({"limits": {"concurrency": 64}}))),
            stage: "limits",
            verdict: Verdict::Depends,
            because: "64 requests at once",
            outcome: "depending on stage limits",
            ..STOP
        },
    ]);
}

#[test]
fn what_all_sidecars_enforce_is_said_without_a_remark() {
    let mut model = world();
    apply(&mut model, web("p", json!({"access": {"deny": []}})));
    let acks = AckTracker::default();
    acks.report("uid-web-1", SidecarEvent::Connected, |_| {});
    let stamp = tulle_mesh::proto::Stamp {
        kind: tulle_mesh::proto::stamp::Kind::Policy.into(),
        namespace: "shop".into(),
        name: "p".into(),
        uid: "u".into(),
        version: 1,
    };
    let name = (ResourceType::Access as i32, "uid-web-1".into());
    acks.report("uid-web-1", SidecarEvent::Acked(name, [stamp].into()), |_| {});
    let explained = explain(&model, &acks, &question("/"), &|_: &str| true).unwrap();
    let access = stage(&explained, "access");
    assert_eq!(access.because, "no rule of deny matches, and there is no allow");
    assert!(stage(&ask(&model, &question("/")), "access").because.contains("0 of 1 sidecars"));
}

/// Requests that pods of `shop/web` have counted from a client, over mTLS where it has a service account.
fn counted(account: Option<&str>, requests: u64) -> (SeriesId, Counts) {
    let reporter = Reporter { namespace: "shop".into(), kind: "Deployment".into(), workload: "web".into() };
    let id = SeriesId {
        reporter,
        direction: Direction::Inbound,
        namespace: account.map_or("", |_| "shop").into(),
        peer: account.unwrap_or("_PLAIN").into(),
        revision: "r1".into(),
        route: "".into(),
        protocol: "http1".into(),
        mtls: account.is_some(),
    };
    let mut counts = Counts::default();
    counts.classes[1] = requests;
    (id, counts)
}

fn last_hour() -> Sum {
    let series = vec![counted(Some("cart"), 360), counted(Some("admin"), 36), counted(None, 7)];
    Sum { window: 3_600, lost: 0, series }
}

fn who_can(model: &Model) -> tulle_mesh::query::Access {
    access(model, &last_hour(), "shop", "web", AccessDirection::WhoCan).unwrap()
}

#[test]
fn who_can_reach_a_workload_is_in_the_words_of_its_rules() {
    let mut model = world();
    let rows = who_can(&model).rows;
    assert_eq!((rows.len(), rows[0].client.as_str(), rows[0].seen), (1, "everybody", 403));
    let allow = json!([
        {"from": [{"serviceAccount": "cart"}], "to": [{"methods": ["GET"], "paths": ["/v1/**"]}]},
        {"from": [{"namespace": "pay"}, {"cidr": "10.0.0.0/8"}]},
    ]);
    let deny = json!([{"from": [{"serviceAccount": "admin"}]}]);
    apply(&mut model, web("p", json!({"access": {"allow": allow, "deny": deny}})));
    let rows = who_can(&model).rows;
    let found: Vec<(&str, &str, u64)> =
        rows.iter().map(|row| (row.client.as_str(), row.allowed_by.as_str(), row.seen)).collect();
    assert_eq!(
        found,
        [
            ("shop/cart", "MeshPolicy/shop/p", 360),
            ("namespace pay", "MeshPolicy/shop/p", 0),
            ("10.0.0.0/8", "MeshPolicy/shop/p", 0),
            ("shop/admin, denied by MeshPolicy/shop/p", "", 36),
        ]
    );
    assert_eq!(
        (rows[0].methods.as_slice(), rows[0].paths.as_slice()),
        (&["GET".to_owned()][..], &["/v1/**".to_owned()][..])
    );
    let by_service = access(&model, &last_hour(), "shop", "nobody", AccessDirection::WhoCan);
    assert!(by_service.is_err());
}

#[test]
fn what_a_workload_can_reach_leaves_out_what_refuses_it() {
    let mut model = world();
    let reached = |model: &Model| -> Vec<(String, String)> {
        let found = access(model, &last_hour(), "shop", "cart", AccessDirection::WhatCan).unwrap();
        found.rows.into_iter().map(|row| (row.destination.name, row.allowed_by)).collect()
    };
    let pair = |name: &str, by: &str| (name.to_owned(), by.to_owned());
    assert_eq!(reached(&model), [pair("cart", ""), pair("web", "")]);
    let allowing = json!({"access": {"allow": [{"from": [{"serviceAccount": "cart"}]}]}});
    apply(&mut model, web("p", allowing));
    assert_eq!(reached(&model), [pair("cart", ""), pair("web", "MeshPolicy/shop/p")]);
    apply(&mut model, web("p", json!({"access": {"allow": []}})));
    assert_eq!(reached(&model), [pair("cart", "")]);
}

#[test]
fn the_suggested_policy_admits_exactly_the_clients_that_were_seen() {
    let mut model = world();
    let suggested = who_can(&model).suggested;
    let policy: MeshPolicy = serde_json::from_value(suggested[0].clone()).unwrap();
    assert_eq!(policy.spec.mode, tulle_crds::PolicyMode::Shadow);
    assert_eq!(
        suggested[0]["spec"],
        json!({
            "target": {"kind": "Workload", "selector": {"matchLabels": {"app": "web"}}},
            "mode": "Shadow",
            "access": {"allow": [{"from": [
                {"serviceAccount": "admin", "namespace": "shop"},
                {"serviceAccount": "cart", "namespace": "shop"},
            ]}]},
        })
    );
    apply(&mut model, policy);
    assert!(who_can(&model).suggested.is_empty(), "it is being tried");
}
