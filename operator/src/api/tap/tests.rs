//! Whole taps against the routes, with sidecars that are none.

use axum::body::BodyDataStream;
use axum::http::Request;
use futures::StreamExt as _;
use prost::Message as _;
use tokio::sync::mpsc::UnboundedReceiver;
use tower::ServiceExt as _;
use tulle_mesh::proto::operator_message::Message;
use tulle_mesh::proto::series_key::Direction;
use tulle_mesh::proto::{TapEvent, Tapped, Untap};
use tulle_mesh::query::{Paths, Refusal};

use super::*;
use crate::api::routes;
use crate::api::tests::api;
use crate::tap::{Registered, Sidecar};
use crate::telemetry::history::Reporter;

/// A sidecar of `shop/web`, with what it is sent.
fn sidecar(api: &Api, is_able: bool) -> (Registered, UnboundedReceiver<Message>) {
    let (sender, sent) = mpsc::unbounded_channel();
    let reporter = Reporter { namespace: "shop".into(), kind: "Deployment".into(), workload: "web".into() };
    let sidecar = Sidecar { namespace: "shop".into(), pod: "a".into(), reporter, is_able };
    let deliver = Box::new(move |message: Message| sender.send(message).is_ok());
    (api.taps.register(sidecar, deliver, std::time::Instant::now()), sent)
}

async fn asked(api: &Api, token: &str, query: &str) -> Response {
    let request = Request::get(format!("{}?{query}", Paths::TAP))
        .header(header::AUTHORIZATION, format!("Bearer h.{token}.s"))
        .body(Body::empty());
    routes(api.clone()).oneshot(request.unwrap()).await.unwrap()
}

async fn refusal(response: Response) -> (StatusCode, Refusal) {
    let status = response.status();
    let body = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
    (status, serde_json::from_slice(&body).unwrap())
}

/// The lines of a tap.
struct Reader {
    body: BodyDataStream,
    lines: std::collections::VecDeque<Tap>,
}

impl Reader {
    async fn start(api: &Api, query: &str) -> Self {
        let response = asked(api, "shop", query).await;
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()[header::CONTENT_TYPE], "application/x-ndjson");
        assert_eq!(response.headers()[header::CACHE_CONTROL], "no-store");
        Self { body: response.into_body().into_data_stream(), lines: [].into() }
    }

    /// The next line.
    async fn next(&mut self) -> Option<Tap> {
        while self.lines.is_empty() {
            let chunk = self.body.next().await?.unwrap();
            assert_eq!(chunk.last(), Some(&b'\n'), "a chunk ends with a line");
            let lines = chunk.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
            self.lines.extend(lines.map(|line| serde_json::from_slice::<Tap>(line).unwrap()));
        }
        self.lines.pop_front()
    }
}

#[tokio::test]
async fn a_tap_begins_with_its_sidecars_and_shows_what_they_see_until_its_client_leaves() {
    let api = api();
    let (web, mut sent) = sidecar(&api, true);
    let (_old, mut nothing) = sidecar(&api, false);
    let mut reader = Reader::start(&api, "namespace=shop&name=web&status=5xx&rate=7").await;
    let started = Tap::Started { sidecars: 1, unable: vec!["shop/a".to_owned()] };
    assert_eq!(reader.next().await, Some(started));
    let Some(Message::Tap(tap)) = sent.recv().await else { panic!("the sidecar was sent no tap") };
    let filter = tap.filter.unwrap();
    assert_eq!((filter.status_from, filter.status_to, tap.rate), (500, 599, 7));
    let event = TapEvent {
        direction: Direction::Inbound.into(),
        peer_namespace: "shop".into(),
        peer: "client".into(),
        path: "/cart".into(),
        ..TapEvent::default()
    };
    let tapped =
        Tapped { id: tap.id, events: vec![event.encode_to_vec()], passed: 5, lost: 4, ..Tapped::default() };
    web.tapped(tapped, std::time::Instant::now());
    let (mut paths, mut counted) = (Vec::new(), Passed::default());
    while paths.is_empty() || counted == Passed::default() {
        match reader.next().await.unwrap() {
            Tap::Request(request) => paths.push(format!("{} {}", request.destination.name, request.path)),
            Tap::Counts { passed, lost, not_shown, refused } => {
                assert_eq!((not_shown, refused), (None, vec![]));
                counted = Passed { passed, lost, ..Passed::default() };
            }
            Tap::Started { .. } => panic!("it starts once"),
        }
    }
    assert_eq!(
        (paths, counted),
        (vec!["web /cart".to_owned()], Passed { passed: 5, lost: 4, ..Passed::default() })
    );
    drop(reader);
    assert_eq!(sent.recv().await, Some(Message::Untap(Untap { id: tap.id })));
    assert!(nothing.try_recv().is_err(), "a sidecar that cannot show requests is not asked to");
}

#[tokio::test]
async fn a_tap_needs_the_right_to_see_its_namespace_and_parameters_that_exist() {
    let api = api();
    for (token, query, status, wanted) in [
        ("shop", "namespace=payments", StatusCode::FORBIDDEN, "may not see namespace payments"),
        ("shop", "", StatusCode::FORBIDDEN, "may not see all namespaces"),
        ("stolen", "namespace=shop", StatusCode::UNAUTHORIZED, "invalid"),
        ("shop", "namespace=shop&ns=shop", StatusCode::BAD_REQUEST, "unknown parameter \"ns\""),
        ("shop", "namespace=shop&header=cookie", StatusCode::BAD_REQUEST, "may hold credentials"),
    ] {
        let (found, refusal) = refusal(asked(&api, token, query).await).await;
        assert_eq!(found, status, "{query}");
        assert!(refusal.error.contains(wanted), "{query}: {}", refusal.error);
    }
}

#[tokio::test]
async fn a_caller_with_enough_taps_is_told_to_end_one() {
    let api = api();
    let mut readers = Vec::new();
    for _ in 0..crate::tap::MAX_OF_CALLER {
        readers.push(Reader::start(&api, "namespace=shop").await);
    }
    let (status, refusal) = refusal(asked(&api, "shop", "namespace=shop").await).await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS);
    assert!(refusal.error.starts_with("system:serviceaccount:shop:default has 8 taps"), "{}", refusal.error);
    assert!(refusal.hint.unwrap().contains("all who look at this namespace"));
}

#[tokio::test]
async fn a_right_that_is_gone_is_seen_and_one_that_holds_too() {
    let right = |token: &str, namespace: &str| Right {
        api: api(),
        token: [(header::AUTHORIZATION, format!("Bearer h.{token}.s").parse().unwrap())]
            .into_iter()
            .collect(),
        namespace: Some(namespace.to_owned()),
    };
    assert!(right("shop", "shop").holds().await);
    assert!(!right("shop", "payments").holds().await);
    assert!(!right("stolen", "shop").holds().await);
}

#[tokio::test]
async fn counts_that_are_due_follow_the_chunk_that_waits_and_none_is_lost() {
    let (api, wanted) = (api(), Wanted::default());
    let tapping = api.taps.start("anna", wanted, Default::default(), std::time::Instant::now()).unwrap();
    let mut lines = Lines::new(&tapping);
    lines.add(Passed { passed: 3, lost: 1, ..Passed::default() });
    lines.add(Passed { passed: 4, lost: 0, ..Passed::default() });
    let text = |chunk: Option<Bytes>| String::from_utf8(chunk.unwrap().to_vec()).unwrap();
    assert_eq!(text(lines.take()), "{\"type\":\"started\",\"sidecars\":0,\"unable\":[]}\n");
    assert_eq!(text(lines.take()), "{\"type\":\"counts\",\"passed\":7,\"lost\":1}\n");
    assert!(lines.take().is_none());
    lines.add(Passed { not_shown: 9, refused: vec!["shop/a: no".to_owned()], ..Passed::default() });
    lines.add(Passed { not_shown: 7, ..Passed::default() });
    assert_eq!(
        text(lines.take()),
        "{\"type\":\"counts\",\"passed\":0,\"lost\":0,\"notShown\":9,\"refused\":[\"shop/a: no\"]}\n"
    );
    assert_eq!(text(lines.take()), "{\"type\":\"counts\",\"passed\":0,\"lost\":0,\"notShown\":7}\n");
}
