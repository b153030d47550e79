//! Calls of a gRPC client over a connection, with the mesh and the API server of the tests of the JSON.

use std::net::Ipv4Addr;

use axum::body::{Body, to_bytes};
use axum::http::{StatusCode, header};
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::net::TcpListener;
use tonic::transport::Channel;
use tonic::{Code, Request};
use tower::ServiceExt as _;
use tulle_mesh::query::{self, Paths};

use super::proto::query_client::QueryClient;
use super::*;
use crate::api::serve;
use crate::api::tests::{api, api_of_denials, api_of_rare_clients, api_on_trial, get, policy_for_nobody};
use crate::telemetry::history::{Counts, Direction, Reporter, SeriesId};

/// A client of an API that is served on a port of its own.
async fn client(api: Api) -> QueryClient<Channel> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(serve(vec![listener], api));
    QueryClient::connect(format!("http://{address}")).await.unwrap()
}

/// A request with this token, as the middle part of one; an empty one is not sent.
fn with_token<T>(token: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    if !token.is_empty() {
        request.metadata_mut().insert("authorization", format!("Bearer h.{token}.s").parse().unwrap());
    }
    request
}

/// What a path of the same API answers as JSON.
async fn json_of<T: DeserializeOwned>(api: &Api, path: &str) -> T {
    let response = crate::api::routes(api.clone()).oneshot(get("viewer", path)).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK, "{path}");
    serde_json::from_slice(&to_bytes(response.into_body(), 1 << 20).await.unwrap()).unwrap()
}

/// What is compared of the two.
async fn both_of_json(api: &Api) -> (query::Stat, query::Edges) {
    (json_of(api, Paths::STAT).await, json_of(api, Paths::EDGES).await)
}

/// Counts three requests of `shop/web` to a Service of another namespace.
fn send_requests(api: &Api) {
    let id = SeriesId {
        reporter: Reporter { namespace: "shop".into(), kind: "Deployment".into(), workload: "web".into() },
        direction: Direction::Outbound,
        namespace: "payments".into(),
        peer: "checkout".into(),
        revision: "".into(),
        route: "".into(),
        protocol: "http2".into(),
        mtls: true,
    };
    let counts = Counts { classes: [0, 3, 0, 0, 0, 0, 0, 0], ..Counts::default() };
    api.aggregates.history().add(id, &counts, crate::telemetry::now());
}

fn in_namespace(namespace: &str) -> proto::StatRequest {
    proto::StatRequest { namespace: Some(namespace.to_owned()), ..proto::StatRequest::default() }
}

#[tokio::test]
async fn the_same_is_answered_as_by_json() {
    let api = api();
    send_requests(&api);
    let mut client = client(api.clone()).await;
    // The time goes on, and the sums with it: compared is what was asked for between two equal answers.
    let (stat, edges) = loop {
        let before = both_of_json(&api).await;
        let stat = client.stat(with_token("viewer", proto::StatRequest::default())).await.unwrap();
        let edges = client.edges(with_token("viewer", proto::EdgesRequest::default())).await.unwrap();
        if before == both_of_json(&api).await {
            assert_eq!(stat.get_ref(), &proto::StatReply::from(before.0));
            assert_eq!(edges.get_ref(), &proto::EdgesReply::from(before.1));
            break (stat.into_inner(), edges.into_inner());
        }
    };
    let [row] = stat.rows.as_slice() else { panic!("{stat:?}") };
    let (party, golden) = (row.party.as_ref().unwrap(), row.golden.as_ref().unwrap());
    assert_eq!((party.namespace.as_str(), party.name.as_str()), ("shop", "web"));
    assert_eq!((golden.requests, golden.failures), (10, 1));
    let [edge] = edges.edges.as_slice() else { panic!("{edges:?}") };
    let (source, destination) = (edge.source.as_ref().unwrap(), edge.destination.as_ref().unwrap());
    assert_eq!((source.name.as_str(), destination.name.as_str()), ("web", "checkout"));
    assert_eq!((edge.protocol.as_str(), edge.mtls), ("http2", true));
}

#[tokio::test]
async fn health_sidecars_and_the_timeline_are_answered() {
    let mut client = client(api()).await;
    let health = client.health(with_token("anna", proto::HealthRequest {})).await.unwrap().into_inner();
    assert!(health.leader);
    assert_eq!((health.pod.as_str(), health.series), ("operator-0", 1));
    let sidecars = client.sidecars(with_token("viewer", proto::SidecarsRequest::default())).await.unwrap();
    let pods: Vec<_> = sidecars.get_ref().sidecars.iter().map(|sidecar| sidecar.pod.as_str()).collect();
    assert_eq!(pods, ["a"]);
    let asked = proto::TimelineRequest {
        namespace: Some("shop".to_owned()),
        name: Some("web".to_owned()),
        window: None,
    };
    let timeline = client.timeline(with_token("shop", asked)).await.unwrap();
    assert_eq!(timeline.get_ref().points.iter().map(|point| point.requests).sum::<u64>(), 10);
}

#[tokio::test]
async fn without_a_valid_token_a_call_is_unauthenticated_and_the_message_says_how_to_get_one() {
    let mut client = client(api()).await;
    for token in ["", "stolen"] {
        let status = client.stat(with_token(token, proto::StatRequest::default())).await.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated, "{status}");
        let how =
            ". hint: send `authorization: Bearer TOKEN`; a token for every namespace: kubectl create token";
        assert!(status.message().contains(how), "{status}");
    }
}

#[tokio::test]
async fn another_namespace_is_denied_with_the_rule_to_add() {
    let mut client = client(api()).await;
    client.stat(with_token("shop", in_namespace("shop"))).await.unwrap();
    let status = client.stat(with_token("shop", in_namespace("payments"))).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    let message = status.message();
    assert!(message.contains("may not see namespace payments. hint: "), "{message}");
    assert!(message.contains("{apiGroups: [tulle.dev], resources: [telemetry], verbs: [get]}"), "{message}");
    // Absent means all of them, and empty means nothing.
    let status = client.stat(with_token("shop", proto::StatRequest::default())).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    let status = client.stat(with_token("viewer", in_namespace(""))).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
}

#[tokio::test]
async fn a_wrong_field_is_refused_with_what_to_write() {
    let mut client = client(api()).await;
    let stat = |change: fn(&mut proto::StatRequest)| {
        let mut asked = proto::StatRequest::default();
        change(&mut asked);
        asked
    };
    for (asked, wanted) in [
        (stat(|asked| asked.window = Some(5)), "write a number of seconds from 10 to 21600"),
        (stat(|asked| asked.by = 99), "write workload, service, route or revision"),
        (stat(|asked| asked.from = Some("web".to_owned())), "write NAMESPACE/NAME"),
        (stat(|asked| asked.name = Some("a".repeat(9000))), "longer than 8192 bytes"),
        // It is quoted, but not beyond what a header may hold.
        (stat(|asked| asked.name = Some("ä".repeat(4000))), "name is \"ää"),
    ] {
        let status = client.stat(with_token("viewer", asked)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains(wanted), "{status}");
        assert!(status.message().len() <= MAX_MESSAGE);
    }
    let neither = client.access(with_token("viewer", proto::AccessRequest::default())).await.unwrap_err();
    assert!(neither.message().contains("who=can"), "{neither}");
}

#[tokio::test]
async fn an_explanation_needs_the_right_to_see_both_ends() {
    let mut client = client(api()).await;
    let asked = proto::ExplainRequest {
        source: Some("shop/web".to_owned()),
        destination: Some("payments/checkout".to_owned()),
        header: vec!["x-user:beta".to_owned()],
        ..proto::ExplainRequest::default()
    };
    let status = client.explain(with_token("shop", asked)).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    assert!(status.message().contains("may not see namespace payments"), "{status}");
}

#[tokio::test]
async fn evidence_of_a_canary_is_the_judges_input_within_its_namespace() {
    let (api, wanted) = api_on_trial();
    let mut client = client(api).await;
    let of = |namespace: &str, canary: &str| proto::EvidenceRequest {
        namespace: Some(namespace.to_owned()),
        canary: Some(canary.to_owned()),
    };
    let found = client.evidence(with_token("shop", of("shop", "web"))).await.unwrap();
    assert_eq!(found.get_ref(), &proto::EvidenceReply::from(wanted));
    let failures: Vec<_> = found.get_ref().pods.iter().map(|pod| (pod.name.as_str(), pod.failures)).collect();
    assert_eq!(failures, [("a", 3), ("uid-gone", 1)]);
    let status = client.evidence(with_token("shop", of("payments", "web"))).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    let status = client.evidence(with_token("shop", of("shop", "other"))).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::NotFound, "there is no Canary shop/other"));
    let status = client.evidence(with_token("shop", proto::EvidenceRequest::default())).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
}

#[tokio::test]
async fn denials_are_listed_within_their_namespace() {
    let mut client = client(api_of_denials()).await;
    let asked = proto::DenialsRequest { namespace: Some("shop".to_owned()), name: None };
    let found = client.denials(with_token("shop", asked)).await.unwrap().into_inner();
    let rows: Vec<_> = found.rows.iter().map(|row| (row.path.as_str(), row.caller.is_some())).collect();
    assert_eq!((found.leader, found.dropped, rows), (true, 3, vec![("/2", true), ("/1", false)]));
    let status = client.denials(with_token("shop", proto::DenialsRequest::default())).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
}

#[tokio::test]
async fn a_policy_is_compared_within_its_namespace() {
    let mut client = client(api()).await;
    let policy = |namespace: &str| {
        let object = json!({
            "apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy",
            "spec": {"target": {"kind": "Namespace"}},
            "metadata": {"name": "web", "namespace": namespace},
        });
        proto::DiffRequest { policy: object.to_string(), window: None }
    };
    let diff = client.diff(with_token("shop", policy("shop"))).await.unwrap();
    assert!(diff.get_ref().rows.is_empty());
    let status = client.diff(with_token("shop", policy("payments"))).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
}

#[tokio::test]
async fn policies_are_about_the_traffic_of_the_time_that_is_asked_for() {
    let mut client = client(api_of_rare_clients()).await;
    for (window, callers) in [(None, 2), (Some(3_600), 1)] {
        let asked = proto::AccessRequest { who: true, window, ..proto::AccessRequest::default() };
        let found = client.access(with_token("viewer", asked)).await.unwrap().into_inner();
        let [policy] = found.suggested.as_slice() else { panic!("{found:?}") };
        assert_eq!(policy.matches("serviceAccount").count(), callers, "{window:?}: {policy}");
    }
    for (window, edges) in [(None, 1), (Some(21_600), 2)] {
        let asked = proto::DiffRequest { policy: policy_for_nobody(), window };
        let found = client.diff(with_token("shop", asked)).await.unwrap().into_inner();
        assert_eq!(found.rows.len(), edges, "{window:?}: {found:?}");
    }
    let asked = proto::DiffRequest { policy: policy_for_nobody(), window: Some(5) };
    let status = client.diff(with_token("shop", asked)).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    assert!(status.message().contains("from 10 to 21600"), "{status}");
}

#[tokio::test]
async fn a_message_that_is_longer_than_a_policy_may_be_is_not_read() {
    // Not compressed, and the length of the message that would follow.
    let length = u32::try_from(MAX_BODY + 1).unwrap().to_be_bytes();
    let body = [&[0_u8][..], &length].concat();
    let request = axum::http::Request::post("/tulle.v1.Query/Diff")
        .header(header::AUTHORIZATION, "Bearer h.shop.s")
        .header(header::CONTENT_TYPE, "application/grpc");
    let response = crate::api::routes(api()).oneshot(request.body(Body::from(body)).unwrap()).await.unwrap();
    assert_eq!(response.headers()["grpc-status"], (Code::OutOfRange as i32).to_string().as_str());
}

#[tokio::test]
async fn codes_of_the_protocol_are_answered_as_the_description_says() {
    let broken = [0_u8, 0, 0, 0, 1, 0xff];
    let compressed = [1_u8, 0, 0, 0, 0];
    for (method, body, code) in [
        ("Nothing", &[0_u8, 0, 0, 0, 0][..], Code::Unimplemented),
        ("Stat", &compressed[..], Code::Internal),
        ("Stat", &broken[..], Code::Internal),
    ] {
        let request = axum::http::Request::post(format!("/tulle.v1.Query/{method}"))
            .header(header::AUTHORIZATION, "Bearer h.shop.s")
            .header(header::CONTENT_TYPE, "application/grpc")
            .body(Body::from(body.to_vec()));
        let response = crate::api::routes(api()).oneshot(request.unwrap()).await.unwrap();
        assert_eq!(response.headers()["grpc-status"], (code as i32).to_string().as_str(), "{method}");
    }
}

#[test]
fn the_description_has_every_code_that_a_call_may_end_with() {
    let description = include_str!("../../../../mesh/proto/tulle/v1/query.proto");
    for code in [
        "UNAUTHENTICATED",
        "PERMISSION_DENIED",
        "INVALID_ARGUMENT",
        "NOT_FOUND",
        "RESOURCE_EXHAUSTED",
        "UNAVAILABLE",
        "OUT_OF_RANGE",
        "UNIMPLEMENTED",
        "INTERNAL",
    ] {
        assert!(description.contains(&format!("{code} (")), "{code}");
    }
}

#[tokio::test]
async fn a_call_that_is_refused_at_the_door_is_answered_as_grpc() {
    let request = axum::http::Request::post("/tulle.v1.Query/Stat").body(Body::empty()).unwrap();
    let response = crate::api::routes(api()).oneshot(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()[header::CONTENT_TYPE], "application/grpc");
    assert_eq!(response.headers()["grpc-status"], (Code::Unauthenticated as i32).to_string().as_str());
}

#[tokio::test]
async fn json_and_the_page_are_answered_beside_the_service() {
    let api = api();
    let _: query::Health = json_of(&api, Paths::HEALTH).await;
    for path in ["/nothing", "/tulle.v1.Other/Stat"] {
        let response = crate::api::routes(api.clone()).oneshot(get("viewer", path)).await.unwrap();
        assert_eq!(response.status(), StatusCode::NOT_FOUND, "{path}");
    }
}

#[test]
fn a_refusal_keeps_its_meaning_as_a_status() {
    for (status, code) in [
        (StatusCode::UNAUTHORIZED, Code::Unauthenticated),
        (StatusCode::FORBIDDEN, Code::PermissionDenied),
        (StatusCode::NOT_FOUND, Code::NotFound),
        (StatusCode::BAD_REQUEST, Code::InvalidArgument),
        (StatusCode::UNSUPPORTED_MEDIA_TYPE, Code::InvalidArgument),
        (StatusCode::TOO_MANY_REQUESTS, Code::ResourceExhausted),
        (StatusCode::INTERNAL_SERVER_ERROR, Code::Internal),
        (StatusCode::SERVICE_UNAVAILABLE, Code::Unavailable),
    ] {
        let plain = Status::from(Refused::new(status, "no"));
        assert_eq!((plain.code(), plain.message()), (code, "no"), "{status}");
        let hinted = Status::from(Refused::new(status, "no").with_hint("ask"));
        assert_eq!(hinted.message(), "no. hint: ask");
    }
}

#[test]
fn only_methods_of_the_service_are_answered_as_grpc() {
    assert!(has_path("/tulle.v1.Query/Stat"));
    for other in ["/tulle.v1.Query", "/tulle.v1.QueryOther/Stat", "/api/v1/stat", "/"] {
        assert!(!has_path(other), "{other}");
    }
}
