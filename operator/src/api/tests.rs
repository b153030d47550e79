//! Whole requests against the routes, with an API server that answers reviews.

use std::convert::Infallible;
use std::sync::Arc;

use axum::body::{Body, to_bytes};
use axum::http::{Request, Response, StatusCode, header};
use clap::Parser as _;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::watch;
use tower::{ServiceExt as _, service_fn};
use tulle_mesh::denial::DenialId;
use tulle_mesh::proto::{RecentDenial, RecentDenials, TelemetryReport};
use tulle_mesh::query::{AUDIENCE, Access, Denials, Diff, Evidence, Health, Paths, Refusal, Sidecars, Stat};

use super::{Api, Authenticator, routes};
use crate::discovery::AckTracker;
use crate::identity::authority::Authority;
use crate::lease::Leadership;
use crate::model::tests::{pod, shop};
use crate::rollout::answer;
use crate::rollout::input::tests::{in_progress, key, report};
use crate::settings::Settings;
use crate::telemetry::Aggregates;
use crate::telemetry::history::{Counts, Direction, Reporter, SeriesId};
use crate::watch::Hub;

/// An API server that knows three tokens: `shop` and `viewer` of service accounts, and `anna` of a person who may see
/// `shop` by a rule of RBAC.
fn api_server() -> Client {
    let answer = |request: Request<kube::client::Body>| async move {
        let path = request.uri().path().to_owned();
        let body = request.into_body().collect_bytes().await.unwrap();
        let asked: Value = serde_json::from_slice(&body).unwrap();
        let mut review = asked.clone();
        review["status"] = if path.ends_with("/tokenreviews") {
            token_status(&asked["spec"])
        } else {
            assert!(path.ends_with("/subjectaccessreviews"), "{path}");
            let wanted = &asked["spec"]["resourceAttributes"];
            let allowed = json!(["anna", "tulle.dev", "telemetry", "get", "shop"]);
            let found = json!([
                asked["spec"]["user"],
                wanted["group"],
                wanted["resource"],
                wanted["verb"],
                wanted["namespace"]
            ]);
            json!({"allowed": found == allowed})
        };
        let body = kube::client::Body::from(serde_json::to_vec(&review).unwrap());
        Ok::<_, Infallible>(Response::new(body))
    };
    Client::new(service_fn(answer), "default")
}

fn token_status(spec: &Value) -> Value {
    assert_eq!(spec["audiences"], json!([AUDIENCE]));
    let user = match spec["token"].as_str().unwrap() {
        "h.shop.s" => "system:serviceaccount:shop:default",
        "h.viewer.s" => "system:serviceaccount:tulle-system:tulle-viewer",
        "h.anna.s" => "anna",
        _ => return json!({"authenticated": false, "error": "unknown token"}),
    };
    json!({"authenticated": true, "audiences": [AUDIENCE], "user": {"username": user}})
}

/// What Deployment `shop/web` has served to a service account of its namespace.
fn served_to(account: &str) -> SeriesId {
    SeriesId {
        reporter: Reporter { namespace: "shop".into(), kind: "Deployment".into(), workload: "web".into() },
        direction: Direction::Inbound,
        namespace: "shop".into(),
        peer: account.into(),
        revision: "r1".into(),
        route: "".into(),
        protocol: "http1".into(),
        mtls: true,
    }
}

/// Counts of ten requests, one of which failed.
fn ten_requests() -> Counts {
    Counts { classes: [0, 9, 0, 0, 1, 0, 0, 0], ..Counts::default() }
}

/// The API of a mesh with Deployment `shop/web`, whose pod `a` has served ten requests, one of them with an error.
/// Needs a runtime of tokio.
pub(crate) fn api() -> Api {
    let settings = Settings::try_parse_from([
        "tulle-operator",
        "--namespace=tulle-system",
        "--pod-name=operator-0",
        "--pod-ip=10.0.0.1",
    ]);
    let aggregates = Arc::new(Aggregates::default());
    aggregates.history().add(served_to("client"), &ten_requests(), Timestamp::now().as_second());
    Api {
        hub: Arc::new(Hub::complete(shop(&[pod("a", "10.1.0.1", "r1")]))),
        acks: Arc::new(AckTracker::default()),
        aggregates,
        judge_inputs: Arc::default(),
        leadership: watch::channel(Leadership { mine: true, ..Leadership::default() }).1,
        authority: Arc::new(Authority::generate("cluster.local").unwrap().0),
        authenticator: Arc::new(Authenticator::new(api_server(), "tulle-system")),
        turns: super::turn::turns(),
        taps: Arc::default(),
        settings: Arc::new(settings.unwrap()),
    }
}

/// The same mesh, where service account `rare` has called two hours ago and `client` just now.
pub(super) fn api_of_rare_clients() -> Api {
    let aggregates = Arc::new(Aggregates::default());
    let now = crate::telemetry::now();
    for (account, time) in [("rare", now - 7_200), ("client", now)] {
        aggregates.history().add(served_to(account), &ten_requests(), time);
    }
    Api { aggregates, ..api() }
}

/// The same mesh, where pod `a` has refused a client of another namespace, then one of its own, and three more.
pub(super) fn api_of_denials() -> Api {
    let api = api();
    let denial = |number: u32, namespace: &str, account: &str| RecentDenial {
        id: DenialId::new("uid-a", number).to_string(),
        at_unix_ms: i64::from(number),
        policy: "shop/web".into(),
        rule: "DenyRule(0)".into(),
        client: format!("spiffe://cluster.local/ns/{namespace}/sa/{account}"),
        method: "GET".into(),
        path: format!("/{number}"),
        cut: false,
    };
    let denials = vec![denial(1, "payments", "cart"), denial(2, "shop", "api")];
    let report = TelemetryReport {
        process: 7,
        sequence: 1,
        denials: Some(RecentDenials { denials, dropped: 3 }),
        ..TelemetryReport::default()
    };
    api.aggregates.add("uid-a", Some(served_to("client").reporter), &report);
    api
}

/// A MeshPolicy as JSON that would deny everything in namespace `shop`.
pub(super) fn policy_for_nobody() -> String {
    let object = json!({
        "apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy",
        "spec": {"target": {"kind": "Namespace"}, "access": {"allow": []}},
        "metadata": {"name": "nobody", "namespace": "shop"},
    });
    object.to_string()
}

/// The same mesh while Canary `shop/web` is on trial and pod `a` has failed 3 of 20 attempts, and the answer that the judge's
/// input at this look makes.
pub(super) fn api_on_trial() -> (Api, Evidence) {
    let (api, canary) = (api(), in_progress());
    api.hub.change(|model| model.apply_canary(key(), canary.clone()));
    report(&api.aggregates, 1, &[("uid-a", "r2", 20, 3), ("uid-gone", "r1", 400, 1)]);
    let input = api.judge_inputs.take(&api.aggregates, &key(), &canary, Timestamp::now(), true);
    let name = |uid: &str| api.hub.model().pod(uid).map(|pod| pod.name.to_string());
    let wanted = answer::evidence(name, &key(), &canary, &input, true);
    (api, wanted)
}

/// The answer to a request.
async fn asked(request: Request<Body>) -> (StatusCode, Vec<u8>) {
    asked_of(api(), request).await
}

/// The answer of an API to a request.
async fn asked_of(api: Api, request: Request<Body>) -> (StatusCode, Vec<u8>) {
    let response = routes(api).oneshot(request).await.unwrap();
    assert_eq!(response.headers()[header::CACHE_CONTROL], "no-store");
    let status = response.status();
    (status, to_bytes(response.into_body(), 1 << 20).await.unwrap().to_vec())
}

/// A request with this token, as the middle part of one; an empty one is not sent.
pub(super) fn get(token: &str, path: &str) -> Request<Body> {
    let request = Request::get(path);
    let request = match token {
        "" => request,
        token => request.header(header::AUTHORIZATION, format!("Bearer h.{token}.s")),
    };
    request.body(Body::empty()).unwrap()
}

async fn answered<T: DeserializeOwned>(token: &str, path: &str) -> T {
    let (status, body) = asked(get(token, path)).await;
    assert_eq!(status, StatusCode::OK, "{path}: {}", String::from_utf8_lossy(&body));
    serde_json::from_slice(&body).unwrap()
}

async fn refused(request: Request<Body>) -> (StatusCode, Refusal) {
    let (status, body) = asked(request).await;
    (status, serde_json::from_slice(&body).unwrap())
}

#[tokio::test]
async fn without_a_valid_token_nothing_is_answered_and_the_hint_says_how_to_get_one() {
    for path in [Paths::STAT, Paths::EDGES, Paths::ROUTES, Paths::SIDECARS, Paths::DENIALS, Paths::HEALTH] {
        for token in ["", "stolen"] {
            let (status, refusal) = refused(get(token, path)).await;
            assert_eq!(status, StatusCode::UNAUTHORIZED, "{path}");
            assert!(refusal.hint.unwrap().contains("kubectl create token tulle-viewer"), "{path}");
        }
    }
}

#[tokio::test]
async fn a_token_of_a_namespace_shows_that_namespace_only() {
    let stat: Stat = answered("shop", "/api/v1/stat?namespace=shop").await;
    assert_eq!(stat.rows.len(), 1);
    for path in ["/api/v1/stat?namespace=payments", "/api/v1/stat", "/api/v1/edges", "/api/v1/sidecars"] {
        let (status, refusal) = refused(get("shop", path)).await;
        assert_eq!(status, StatusCode::FORBIDDEN, "{path}");
        assert!(refusal.error.starts_with("system:serviceaccount:shop:default may not see"), "{path}");
        assert!(refusal.hint.unwrap().contains("--resource=serviceaccounts/token"), "{path}");
    }
}

#[tokio::test]
async fn a_token_of_the_viewer_shows_all_namespaces() {
    let stat: Stat = answered("viewer", Paths::STAT).await;
    let [row] = stat.rows.as_slice() else { panic!("{stat:?}") };
    assert_eq!((row.party.namespace.as_str(), row.party.name.as_str()), ("shop", "web"));
    assert_eq!((row.golden.requests, row.golden.failures), (10, 1));
    let found: Sidecars = answered("viewer", Paths::SIDECARS).await;
    let pods: Vec<&str> = found.sidecars.iter().map(|sidecar| sidecar.pod.as_str()).collect();
    assert_eq!(pods, ["a"]);
}

#[tokio::test]
async fn a_person_sees_what_a_rule_of_rbac_allows() {
    let _: Stat = answered("anna", "/api/v1/stat?namespace=shop").await;
    for path in ["/api/v1/stat?namespace=payments", Paths::STAT] {
        assert_eq!(refused(get("anna", path)).await.0, StatusCode::FORBIDDEN, "{path}");
    }
}

/// What is answered about denials.
async fn denials(token: &str, query: &str) -> Denials {
    let path = format!("{}?{query}", Paths::DENIALS);
    let (status, body) = asked_of(api_of_denials(), get(token, &path)).await;
    assert_eq!(status, StatusCode::OK, "{path}: {}", String::from_utf8_lossy(&body));
    serde_json::from_slice(&body).unwrap()
}

/// Path and caller of each.
fn callers(found: &Denials) -> Vec<(&str, Option<&str>)> {
    let rows = found.rows.iter();
    rows.map(|row| (row.path.as_str(), row.caller.as_ref().map(|caller| caller.name.as_str()))).collect()
}

#[tokio::test]
async fn denials_name_the_rule_and_hide_callers_that_the_token_does_not_show() {
    let all = denials("viewer", "").await;
    assert_eq!(callers(&all), [("/2", Some("api")), ("/1", Some("cart"))]);
    assert!(all.leader);
    let first = &all.rows[0];
    assert_eq!((first.workload.name.as_str(), first.policy.as_str()), ("web", "web"));
    assert_eq!((first.rule.as_str(), &first.id), ("DenyRule(0)", &DenialId::new("uid-a", 2).to_string()));
    assert_eq!(callers(&denials("viewer", "namespace=shop").await), callers(&all));
    for token in ["shop", "anna"] {
        let own = denials(token, "namespace=shop&name=web").await;
        assert_eq!((callers(&own), own.dropped), (vec![("/2", Some("api")), ("/1", None)], 3), "{token}");
        let other = denials(token, "namespace=shop&name=api").await;
        assert_eq!(other, Denials { leader: true, ..Denials::default() }, "of another workload");
        for path in ["/api/v1/denials", "/api/v1/denials?namespace=payments"] {
            assert_eq!(refused(get(token, path)).await.0, StatusCode::FORBIDDEN, "{path}");
        }
    }
}

#[tokio::test]
async fn a_token_in_a_cookie_is_none() {
    let request = Request::get("/api/v1/health").header(header::COOKIE, "tulle-session=h.shop.s");
    assert_eq!(asked(request.body(Body::empty()).unwrap()).await.0, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn a_token_that_can_be_none_is_refused_without_a_review() {
    // A token that is reviewed is answered 503, because this API server answers nothing.
    let answer = |_: Request<kube::client::Body>| async {
        Err::<Response<kube::client::Body>, _>(std::io::Error::other("asked"))
    };
    let unreachable = Client::new(service_fn(answer), "default");
    let authenticator = Arc::new(Authenticator::new(unreachable, "tulle-system"));
    for (token, status) in
        [("opaque", StatusCode::UNAUTHORIZED), ("h.shop.s", StatusCode::SERVICE_UNAVAILABLE)]
    {
        let request = Request::get(Paths::HEALTH).header(header::AUTHORIZATION, format!("Bearer {token}"));
        let api = Api { authenticator: Arc::clone(&authenticator), ..api() };
        let response = routes(api).oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
        assert_eq!(response.status(), status, "{token}");
        let body = to_bytes(response.into_body(), 1 << 20).await.unwrap();
        assert!(!String::from_utf8_lossy(&body).contains("asked"), "the words of the API server");
    }
}

#[tokio::test]
async fn nobody_without_a_token_waits_for_a_turn() {
    // There is no turn: whoever waited for one would not be answered.
    for (token, path, status) in [
        ("", Paths::HEALTH, StatusCode::UNAUTHORIZED),
        ("stolen", Paths::STAT, StatusCode::UNAUTHORIZED),
        ("", "/", StatusCode::UNAUTHORIZED),
        ("", "/assets/page.css", StatusCode::OK),
    ] {
        let response = super::routes_with(api(), 0).oneshot(get(token, path)).await.unwrap();
        assert_eq!(response.status(), status, "{path}");
    }
}

#[tokio::test]
async fn a_body_that_is_not_said_to_be_json_is_refused() {
    let request = Request::post(Paths::DIFF).header(header::AUTHORIZATION, "Bearer h.shop.s");
    let request = request.header(header::CONTENT_TYPE, "text/plain").body(Body::from("{}")).unwrap();
    assert_eq!(refused(request).await.0, StatusCode::UNSUPPORTED_MEDIA_TYPE);
}

#[tokio::test]
async fn health_needs_a_token_and_no_right() {
    let health: Health = answered("anna", Paths::HEALTH).await;
    assert!(health.leader);
    assert_eq!((health.pod.as_str(), health.trust_domain.as_str()), ("operator-0", "cluster.local"));
    assert_eq!(health.series, 1);
    assert!(health.root_not_after.is_some());
}

#[tokio::test]
async fn a_wrong_parameter_is_refused_with_what_to_write() {
    let long = format!("/api/v1/stat?name={}", "a".repeat(9000));
    for (path, wanted) in [
        ("/api/v1/stat?window=1m", "write a number of seconds from 10 to 21600"),
        ("/api/v1/edges?window=5", "write a number of seconds from 10 to 21600"),
        ("/api/v1/stat?by=pod", "write workload, service, route or revision"),
        ("/api/v1/stat?ns=shop", "there are by, namespace, name, from, to, window"),
        ("/api/v1/stat?from=web", "write NAMESPACE/NAME"),
        ("/api/v1/timeline?namespace=shop", "write name=web"),
        ("/api/v1/explain?source=shop/web", "write destination="),
        ("/api/v1/explain?source=shop/web&destination=shop/web:http", "NAMESPACE/SERVICE:PORT"),
        ("/api/v1/explain?source=shop/web&destination=shop/web&path=a", "begins with /"),
        ("/api/v1/explain?source=shop/web&destination=shop/web&method=G%20T", "write one such as GET"),
        ("/api/v1/access?namespace=shop&name=web", "who=can"),
        ("/api/v1/access?who=can&window=21601", "write a number of seconds from 10 to 21600"),
        (long.as_str(), "longer than 8192 bytes"),
    ] {
        let (status, refusal) = refused(get("viewer", path)).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{path}");
        assert!(refusal.error.contains(wanted), "{path}: {}", refusal.error);
    }
}

#[tokio::test]
async fn an_explanation_needs_the_right_to_see_both_ends() {
    let path = "/api/v1/explain?source=shop/web&destination=payments/checkout";
    let (status, refusal) = refused(get("shop", path)).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    assert!(refusal.error.ends_with("may not see namespace payments"), "{}", refusal.error);
    let what = "/api/v1/access?namespace=shop&name=web&what=can";
    assert_eq!(refused(get("shop", what)).await.0, StatusCode::FORBIDDEN);
}

#[tokio::test]
async fn suggested_policies_admit_who_called_hours_ago_unless_a_shorter_time_is_asked_for() {
    let api = api_of_rare_clients();
    let both = json!([
        {"serviceAccount": "client", "namespace": "shop"},
        {"serviceAccount": "rare", "namespace": "shop"},
    ]);
    let recent = json!([{"serviceAccount": "client", "namespace": "shop"}]);
    for (path, callers, seen, time) in [
        ("/api/v1/access?namespace=shop&who=can", &both, 20_u64, 7_200_u64..7_260),
        ("/api/v1/access?namespace=shop&who=can&window=21600", &both, 20, 7_200..7_260),
        ("/api/v1/access?namespace=shop&who=can&window=3600", &recent, 10, 3_600..3_660),
        // Who may reach one workload is a question about the last hour, unless it says otherwise.
        ("/api/v1/access?namespace=shop&name=web&who=can", &recent, 10, 3_600..3_660),
        ("/api/v1/access?namespace=shop&name=web&who=can&window=21600", &both, 20, 7_200..7_260),
    ] {
        let (status, body) = asked_of(api.clone(), get("shop", path)).await;
        assert_eq!(status, StatusCode::OK, "{path}: {}", String::from_utf8_lossy(&body));
        let found: Access = serde_json::from_slice(&body).unwrap();
        let [policy] = found.suggested.as_slice() else { panic!("{path}: {found:?}") };
        assert_eq!(&policy["spec"]["access"]["allow"][0]["from"], callers, "{path}");
        assert_eq!(found.rows.iter().map(|row| row.seen).collect::<Vec<_>>(), [seen], "{path}");
        assert!(time.contains(&found.window), "{path}: {}", found.window);
    }
}

#[tokio::test]
async fn a_policy_is_compared_with_the_last_hour_unless_a_longer_time_is_asked_for() {
    let api = api_of_rare_clients();
    let post = |path: &str| {
        let request = Request::post(path).header(header::AUTHORIZATION, "Bearer h.shop.s");
        let request = request.header(header::CONTENT_TYPE, "application/json");
        asked_of(api.clone(), request.body(Body::from(policy_for_nobody())).unwrap())
    };
    for (path, clients, time) in [
        ("/api/v1/diff", vec!["client"], 3_600_u64..3_660),
        ("/api/v1/diff?window=3600", vec!["client"], 3_600..3_660),
        ("/api/v1/diff?window=21600", vec!["client", "rare"], 7_200..7_260),
    ] {
        let (status, body) = post(path).await;
        assert_eq!(status, StatusCode::OK, "{path}: {}", String::from_utf8_lossy(&body));
        let found: Diff = serde_json::from_slice(&body).unwrap();
        let mut denied: Vec<&str> = found.rows.iter().map(|row| row.edge.source.name.as_str()).collect();
        denied.sort_unstable();
        assert_eq!(denied, clients, "{path}");
        assert!(time.contains(&found.window), "{path}: {}", found.window);
    }
    for (path, wanted) in [
        ("/api/v1/diff?window=6h", "write a number of seconds from 10 to 21600"),
        ("/api/v1/diff?since=60", "there are window"),
    ] {
        let (status, body) = post(path).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{path}");
        assert!(String::from_utf8_lossy(&body).contains(wanted), "{path}");
    }
}

const EVIDENCE: &str = "/api/v1/evidence?namespace=shop&canary=web";

#[tokio::test]
async fn evidence_is_the_judges_input_at_its_last_look() {
    let (api, wanted) = api_on_trial();
    // Reported since the last look: the judge has not decided by it yet.
    report(&api.aggregates, 2, &[("uid-a", "r2", 1000, 1000)]);
    let (status, body) = asked_of(api, get("shop", EVIDENCE)).await;
    assert_eq!(status, StatusCode::OK, "{}", String::from_utf8_lossy(&body));
    assert_eq!(body, serde_json::to_vec(&wanted).unwrap());
    let found: Evidence = serde_json::from_slice(&body).unwrap();
    assert!(found.leader && found.block_start.is_some());
    let pods: Vec<_> = found.pods.iter().map(|pod| (pod.name.as_str(), pod.attempts, pod.failures)).collect();
    assert_eq!(pods, [("a", 20, 3), ("uid-gone", 400, 1)]);
    assert_eq!((found.canary.attempts, found.stable.attempts), (120, 1300), "with the blocks before");
}

#[tokio::test]
async fn a_replica_that_does_not_lead_answers_with_the_status_and_says_so() {
    let (api, _) = api_on_trial();
    let follower = Api { leadership: watch::channel(Leadership::default()).1, ..api };
    let (status, body) = asked_of(follower, get("viewer", EVIDENCE)).await;
    assert_eq!(status, StatusCode::OK);
    let found: Evidence = serde_json::from_slice(&body).unwrap();
    assert!(!found.leader && found.pods.is_empty() && found.block_start.is_none(), "{found:?}");
    assert_eq!((found.blocks, found.canary.attempts, found.stable.attempts), (4, 100, 900));
    assert_eq!(found.because, "99 more requests to the canary are needed");
}

#[tokio::test]
async fn evidence_needs_the_right_to_see_the_namespace_and_a_canary_that_exists() {
    for (token, path, status, wanted) in [
        ("shop", "/api/v1/evidence?namespace=payments&canary=web", StatusCode::FORBIDDEN, "may not see"),
        ("stolen", EVIDENCE, StatusCode::UNAUTHORIZED, "token"),
        ("viewer", EVIDENCE, StatusCode::NOT_FOUND, "there is no Canary shop/web"),
        ("viewer", "/api/v1/evidence?namespace=shop", StatusCode::BAD_REQUEST, "write canary=web"),
        ("viewer", "/api/v1/evidence?canary=web", StatusCode::BAD_REQUEST, "write namespace=shop"),
        ("viewer", "/api/v1/evidence?name=web", StatusCode::BAD_REQUEST, "there are namespace, canary"),
    ] {
        let (found, refusal) = refused(get(token, path)).await;
        assert_eq!(found, status, "{path}");
        assert!(refusal.error.contains(wanted), "{path}: {}", refusal.error);
    }
}

#[tokio::test]
async fn the_page_of_a_canary_shows_the_same_evidence() {
    let (api, wanted) = api_on_trial();
    let response = routes(api).oneshot(get("shop", "/canary/shop/web")).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    let body = to_bytes(response.into_body(), 1 << 20).await.unwrap();
    let text = String::from_utf8_lossy(&body);
    assert!(text.contains("Attempts by pod") && text.contains("uid-gone"), "{text}");
    for attempts in [wanted.canary.attempts, wanted.stable.attempts] {
        assert!(text.contains(&format!("data-v=\"{attempts}\"")), "{attempts} in {text}");
    }
}

#[tokio::test]
async fn a_body_that_is_not_a_policy_or_too_long_is_refused() {
    let post = |body: String| {
        let request = Request::post(Paths::DIFF).header(header::AUTHORIZATION, "Bearer h.shop.s");
        request.header(header::CONTENT_TYPE, "application/json").body(Body::from(body)).unwrap()
    };
    let policy = |namespace: Value| {
        let object = json!({
            "apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy",
            "spec": {"target": {"kind": "Namespace"}},
            "metadata": {"name": "web", "namespace": namespace},
        });
        object.to_string()
    };
    for (body, wanted) in [
        ("{".to_owned(), "not a MeshPolicy as JSON"),
        (json!({"kind": "Canary"}).to_string(), "of kind \"Canary\""),
        (policy(Value::Null), "no metadata.namespace"),
    ] {
        let (status, refusal) = refused(post(body)).await;
        assert_eq!(status, StatusCode::BAD_REQUEST);
        assert!(refusal.error.contains(wanted), "{}", refusal.error);
    }
    assert_eq!(refused(post(policy(json!("payments")))).await.0, StatusCode::FORBIDDEN);
    assert_eq!(refused(post(" ".repeat(300 * 1024))).await.0, StatusCode::PAYLOAD_TOO_LARGE);
}

#[tokio::test]
async fn an_unknown_path_and_a_wrong_method_are_explained() {
    let (status, refusal) = refused(get("viewer", "/api/v2/stat")).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    assert!(refusal.error.contains("/api/v1/stat"), "{}", refusal.error);
    let (status, refusal) = refused(get("viewer", Paths::DIFF)).await;
    assert_eq!(status, StatusCode::METHOD_NOT_ALLOWED);
    assert!(refusal.error.contains("POST for /api/v1/diff"), "{}", refusal.error);
}
