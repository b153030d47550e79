//! What passes a filter, what is shown of it, and what is counted instead.

use std::cell::Cell;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::net::{TcpListener, TcpStream};
use tulle_mesh::policy::RuleError;
use tulle_mesh::proto::TapFilter;
use tulle_mesh::proto::series_key::Direction;
use tulle_mesh::reason::Reason;

use super::collect::{BATCH, CAPACITY, EVERY};
use super::*;
use crate::call::{Call, Ended};
use crate::error::Failure;
use crate::http1::conn::split;
use crate::http1::head::parse_request;
use crate::http1::{Head, Start};
use crate::telemetry::{Series, SeriesKey};

/// A request as it might end: of a pod to `shop/cart`, which failed after 20 ms.
struct Sample {
    key: SeriesKey,
    head: Head,
    status: u16,
    took: Duration,
    failure: Option<Failure>,
}

impl Sample {
    fn new() -> Self {
        let key = SeriesKey {
            direction: "outbound",
            namespace: "shop".to_owned(),
            peer: "cart".to_owned(),
            revision: "v2".to_owned(),
            protocol: "http1",
            route: "HTTPRoute/shop/cart".into(),
            mtls: true,
        };
        Self {
            key,
            head: head("POST /v1/users/7?key=s3cret HTTP/1.1\r\nhost: cart\r\nx-user: 7\r\n\r\n"),
            status: 503,
            took: Duration::from_millis(20),
            failure: Some(Failure::UpstreamReset),
        }
    }

    fn request(&self) -> Request<'_> {
        Request {
            key: &self.key,
            head: &self.head,
            status: self.status,
            grpc_status: None,
            since: Instant::now(),
            took: self.took,
            attempts: 2,
            reason: self.failure.as_ref().map(Failure::reason),
        }
    }

    /// The same, which ended in this second of a tap.
    fn ended_in(&self, second: u32, tap: &Tap) -> Request<'_> {
        let since = tap.since + Duration::from_secs(u64::from(second) - 1);
        Request { since, took: Duration::ZERO, ..self.request() }
    }
}

fn head(text: &str) -> Head {
    parse_request(&mut BytesMut::from(text.as_bytes())).unwrap().unwrap()
}

fn passes(filter: &TapFilter, sample: &Sample) -> bool {
    Filter::compile(filter).unwrap().passes(&sample.request())
}

/// A tap of everything.
fn everything(id: u64) -> proto::Tap {
    proto::Tap { id, rate: MAX_RATE, ..proto::Tap::default() }
}

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn a_request_passes_when_all_that_is_set_holds() {
    let sample = Sample::new();
    let filter = TapFilter::default;
    for (filter, expected) in [
        (filter(), true),
        (TapFilter { peer_namespace: "shop".into(), peer: "cart".into(), ..filter() }, true),
        (TapFilter { peer_namespace: "shop".into(), peer: "web".into(), ..filter() }, false),
        (TapFilter { peer_namespace: "bank".into(), ..filter() }, false),
        (TapFilter { peer: "car".into(), ..filter() }, false),
        (TapFilter { method: "post".into(), ..filter() }, true),
        (TapFilter { method: "GET".into(), ..filter() }, false),
        (TapFilter { path: "/v1/**".into(), ..filter() }, true),
        (TapFilter { path: "/v1/users/*".into(), ..filter() }, true),
        (TapFilter { path: "/v1/*".into(), ..filter() }, false),
        (TapFilter { status_from: 500, status_to: 599, ..filter() }, true),
        (TapFilter { status_from: 503, status_to: 503, ..filter() }, true),
        (TapFilter { status_from: 503, ..filter() }, true),
        (TapFilter { status_from: 502, ..filter() }, false),
        (TapFilter { status_from: 400, status_to: 499, ..filter() }, false),
        (TapFilter { denied: true, ..filter() }, false),
        (TapFilter { slow_micros: 20_000, ..filter() }, true),
        (TapFilter { slow_micros: 20_001, ..filter() }, false),
        (TapFilter { direction: Direction::Outbound.into(), ..filter() }, true),
        (TapFilter { direction: Direction::Inbound.into(), ..filter() }, false),
        (TapFilter { method: "POST".into(), slow_micros: 1, peer: "web".into(), ..filter() }, false),
    ] {
        assert_eq!(passes(&filter, &sample), expected, "{filter:?}");
    }
}

#[test]
fn denied_requests_are_those_that_a_policy_or_a_limit_refused() {
    let filter = TapFilter { denied: true, ..TapFilter::default() };
    for (failure, expected) in [
        (Some(Failure::PolicyDenied), true),
        (Some(Failure::PolicyPlaintext), true),
        (Some(Failure::OursOverloaded), true),
        (Some(Failure::RouteNone), false),
        (Some(Failure::FaultInjected(503)), false),
        (Some(Failure::IdleTimeout), false),
        (Some(Failure::UpstreamNone), false),
        (None, false),
    ] {
        let sample = Sample { failure, ..Sample::new() };
        assert_eq!(passes(&filter, &sample), expected, "{:?}", sample.failure);
    }
}

#[test]
fn a_request_without_a_status_is_in_no_range_of_them() {
    let sample = Sample { status: 0, ..Sample::new() };
    for (from, to) in [(0, 599), (1, 999), (500, 599)] {
        let filter = TapFilter { status_from: from, status_to: to, ..TapFilter::default() };
        assert!(!passes(&filter, &sample), "{from} to {to}");
    }
    assert!(passes(&TapFilter::default(), &sample));
}

#[test]
fn a_path_is_matched_as_applications_may_read_it() {
    let filter = TapFilter { path: "/admin/**".into(), ..TapFilter::default() };
    for (target, expected) in [
        ("/admin/users?x", true),
        ("/%61dmin/users", true),
        ("/shop/../admin/users", true),
        ("http://cart/admin/users", true),
        ("/shop/admin/users", false),
        ("/shop?x=/admin/users", false),
    ] {
        let head = head(&format!("GET {target} HTTP/1.1\r\nhost: cart\r\n\r\n"));
        let sample = Sample { head, ..Sample::new() };
        assert_eq!(passes(&filter, &sample), expected, "{target}");
    }
}

#[test]
fn a_filter_that_cannot_be_used_is_refused() {
    let filter = TapFilter::default;
    for (filter, expected) in [
        (
            TapFilter { path: "v1/**".into(), ..filter() },
            TapRefused::Path(RuleError::Path("v1/**".to_owned())),
        ),
        (
            TapFilter { status_from: 500, status_to: 499, ..filter() },
            TapRefused::Status { from: 500, to: 499 },
        ),
        (TapFilter { status_from: 70_000, ..filter() }, TapRefused::Status { from: 70_000, to: 0 }),
        (TapFilter { direction: 9, ..filter() }, TapRefused::Direction(9)),
    ] {
        assert_eq!(Filter::compile(&filter).unwrap_err(), expected);
        let taps = Taps::default();
        let mut collector = Collector::new(&taps);
        let tap = proto::Tap { filter: Some(filter), ..everything(1) };
        assert_eq!(collector.open(&tap), Err(expected));
        assert!(!collector.is_open());
    }
}

#[test]
fn what_is_beyond_the_rate_of_a_second_is_lost_and_counted() {
    let (shown, mut received) = mpsc::channel(CAPACITY);
    let filter = TapFilter { method: "POST".into(), ..TapFilter::default() };
    let tap = proto::Tap { rate: 2, filter: Some(filter), ..everything(1) };
    let tap = Tap::compile(&tap, shown).unwrap();
    let sample = Sample::new();
    for _ in 0..5 {
        tap.show(&sample.ended_in(1, &tap));
    }
    tap.show(&sample.ended_in(2, &tap));
    let other = Sample { head: head("GET / HTTP/1.1\r\nhost: cart\r\n\r\n"), ..Sample::new() };
    tap.show(&other.ended_in(2, &tap));
    assert_eq!(tap.counts(), Tapped { id: 1, passed: 6, lost: 3, ..Tapped::default() });
    let count = std::iter::from_fn(|| received.try_recv().ok()).count();
    assert_eq!(count, 3);
    assert_eq!(tap.counts(), Tapped { id: 1, ..Tapped::default() }, "each is counted once");
}

#[test]
fn a_rate_is_at_least_one_and_at_most_a_hundred() {
    for (rate, expected) in [(0, 1), (7, 7), (1_000_000, 100)] {
        let (shown, _received) = mpsc::channel(CAPACITY);
        let tap = Tap::compile(&proto::Tap { rate, ..everything(1) }, shown).unwrap();
        let sample = Sample::new();
        for _ in 0..150 {
            tap.show(&sample.ended_in(1, &tap));
        }
        let Tapped { passed, lost, .. } = tap.counts();
        assert_eq!((passed, passed - lost), (150, expected), "{rate}");
    }
}

#[test]
fn what_finds_no_room_on_its_way_is_lost_and_nobody_waits() {
    let (shown, mut received) = mpsc::channel(CAPACITY);
    let tap = Tap::compile(&everything(1), shown).unwrap();
    let sample = Sample::new();
    let more = CAPACITY as u32 + 7;
    for second in 1..=more {
        tap.show(&sample.ended_in(second, &tap));
    }
    assert_eq!(tap.counts(), Tapped { id: 1, passed: more.into(), lost: 7, ..Tapped::default() });
    received.try_recv().unwrap();
    tap.show(&sample.ended_in(more + 1, &tap));
    assert_eq!(tap.counts().lost, 0, "there is room again");
    drop(received);
    tap.show(&sample.ended_in(more + 2, &tap));
    assert_eq!(tap.counts().lost, 1, "the stream has ended");
}

#[test]
fn a_request_is_looked_at_only_while_somebody_taps() {
    let (taps, sample, looked) = (Taps::default(), Sample::new(), Cell::new(0));
    let end_one = || {
        taps.show(|| {
            looked.set(looked.get() + 1);
            sample.request()
        });
        looked.get()
    };
    assert_eq!(end_one(), 0);
    let mut collector = Collector::new(&taps);
    assert_eq!(end_one(), 0, "a stream without a tap");
    collector.open(&everything(7)).unwrap();
    assert_eq!(end_one(), 1);
    collector.close(8);
    assert_eq!(end_one(), 2, "another tap was closed");
    collector.close(7);
    assert_eq!(end_one(), 2);
    collector.open(&everything(7)).unwrap();
    drop(collector);
    assert_eq!(end_one(), 2, "the stream has ended");
}

#[test]
fn a_sidecar_serves_four_taps_at_once() {
    let taps = Taps::default();
    let mut collector = Collector::new(&taps);
    for id in 1..=4 {
        assert_eq!(collector.open(&everything(id)), Ok(()));
    }
    assert_eq!(collector.open(&everything(5)), Err(TapRefused::TooMany));
    assert_eq!(collector.open(&everything(4)), Ok(()), "in place of itself");
    collector.close(1);
    assert_eq!(collector.open(&everything(5)), Ok(()));
}

#[test]
fn the_operator_is_told_why_a_tap_is_not_served() {
    let why = TapRefused::TooMany;
    let refused = "4 taps are open already".to_owned();
    assert_eq!(why.answer(7), Tapped { id: 7, refused, ..Tapped::default() });
}

#[tokio::test(start_paused = true)]
async fn requests_are_sent_four_times_a_second_or_when_there_are_many() {
    let (taps, sample) = (Taps::default(), Sample::new());
    let show = |count: usize| (0..count).for_each(|_| taps.show(|| sample.request()));
    let mut collector = Collector::new(&taps);
    let none = TapFilter { method: "GET".into(), ..TapFilter::default() };
    collector.open(&proto::Tap { filter: Some(none), ..everything(1) }).unwrap();
    collector.open(&everything(2)).unwrap();
    let began = Instant::now();
    show(3);
    collector.ready().await;
    assert!(began.elapsed() >= EVERY);
    let messages = collector.take(Instant::now());
    assert_eq!(messages.len(), 1, "nothing is said of a tap that nothing has passed");
    let Tapped { id, events, passed, lost, .. } = &messages[0];
    assert_eq!((*id, events.len(), *passed, *lost), (2, 3, 3, 0));

    let began = Instant::now();
    show(BATCH);
    collector.ready().await;
    assert_eq!(began.elapsed(), Duration::ZERO);
    assert_eq!(collector.take(Instant::now())[0].events.len(), BATCH);

    collector.ready().await;
    assert!(collector.take(Instant::now()).is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_tap_that_was_closed_shows_nothing_more() {
    let (taps, sample) = (Taps::default(), Sample::new());
    let mut collector = Collector::new(&taps);
    collector.open(&everything(1)).unwrap();
    collector.open(&everything(2)).unwrap();
    taps.show(|| sample.request());
    collector.close(1);
    collector.ready().await;
    let ids: Vec<u64> = collector.take(Instant::now()).iter().map(|message| message.id).collect();
    assert_eq!(ids, [2]);
}

#[test]
fn a_request_is_shown_as_it_was_counted() {
    let sample = Sample::new();
    let event = sample.request().event(&ShownHeaders::of(&names(&["X-User", "x-absent"])));
    let ended_unix_micros = event.ended_unix_micros;
    assert!(ended_unix_micros > 0);
    let expected = TapEvent {
        ended_unix_micros,
        direction: Direction::Outbound.into(),
        peer_namespace: "shop".into(),
        peer: "cart".into(),
        method: "POST".into(),
        host: "cart".into(),
        path: "/v1/users/7".into(),
        status: 503,
        micros: 20_000,
        mtls: true,
        reason: "UpstreamReset".into(),
        headers: vec![proto::Header { name: "x-user".into(), value: "7".into() }],
        route: "HTTPRoute/shop/cart".into(),
        protocol: "http1".into(),
        attempts: 2,
        grpc_status: None,
        revision: "v2".into(),
    };
    assert_eq!(event, expected);
}

#[test]
fn credentials_and_what_sidecars_tell_each_other_are_never_shown() {
    let hidden = [
        "authorization",
        "Proxy-Authorization",
        "cookie",
        "Set-Cookie",
        "x-api-key",
        "X-Auth-Token",
        "x-csrf-token",
        "x-client-secret",
        "x-amzn-oidc-jwt",
        "x-hub-signature",
        "db-password",
        "session-id",
        "tulle-client-id",
    ];
    let mut head = head("GET /a?key=s3cret HTTP/1.1\r\nhost: cart\r\n\r\n");
    for name in hidden {
        head.headers.push((name.into(), Bytes::from_static(b"s3cret")));
        let sample = Sample { head: head.clone(), ..Sample::new() };
        let event = sample.request().event(&ShownHeaders::of(&names(&[name])));
        assert!(event.headers.is_empty(), "{name}");
    }
    let sample = Sample { head, ..Sample::new() };
    let asked = names(&[hidden.as_slice(), &["host"]].concat());
    let event = sample.request().event(&ShownHeaders::of(&asked));
    assert_eq!(event.headers.len(), 1, "one that was asked for beyond those that are hidden is shown");
    assert!(!format!("{event:?}").contains("s3cret"), "{event:?}");
    let event = sample.request().event(&ShownHeaders::default());
    assert!(event.headers.is_empty(), "nobody has asked for any");
}

#[test]
fn a_url_in_a_header_is_shown_without_its_query() {
    let head = head("GET / HTTP/1.1\r\nhost: cart\r\nreferer: https://cart/a?key=s3cret\r\n\r\n");
    let sample = Sample { head, ..Sample::new() };
    let event = sample.request().event(&ShownHeaders::of(&names(&["Referer"])));
    assert_eq!(event.headers, [proto::Header { name: "referer".into(), value: "https://cart/a".into() }]);
}

#[test]
fn at_most_eight_headers_are_shown() {
    let mut head = head("GET / HTTP/1.1\r\nhost: cart\r\n\r\n");
    let asked: Vec<String> = (0..20).map(|number| format!("x-{}", number / 2)).collect();
    head.headers.extend(asked.iter().map(|name| (name.clone().into(), Bytes::from_static(b"y"))));
    let sample = Sample { head, ..Sample::new() };
    let shown = sample.request().event(&ShownHeaders::of(&asked)).headers;
    let shown: Vec<&str> = shown.iter().map(|header| header.name.as_str()).collect();
    assert_eq!(shown, ["x-0", "x-1", "x-2", "x-3", "x-4", "x-5", "x-6", "x-7"]);
}

#[test]
fn what_is_long_is_cut_between_characters() {
    let mut head = head("GET / HTTP/1.1\r\nhost: cart\r\n\r\n");
    // An odd byte first: each bound falls into a character of two bytes.
    let long = format!("/{}", "ä".repeat(2_000));
    head.start = Start::Request { method: Bytes::from(vec![b'A'; 100]), target: long.clone().into() };
    head.headers = vec![
        ("host".into(), Bytes::from(vec![b'h'; 300])),
        ("x-text".into(), long.clone().into()),
        ("x-bytes".into(), Bytes::from(vec![0xff; 300])),
    ];
    let sample = Sample { head, ..Sample::new() };
    let event = sample.request().event(&ShownHeaders::of(&names(&["x-text", "x-bytes"])));
    assert_eq!((event.method.len(), event.host.len()), (32, 255));
    assert_eq!(event.path, &long[..511]);
    let values: Vec<&str> = event.headers.iter().map(|header| header.value.as_str()).collect();
    // A replacement character has three bytes.
    assert_eq!(values, [&long[..255], "\u{fffd}".repeat(85).as_str()]);
}

#[tokio::test]
async fn the_status_is_what_the_client_got() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (mut reader, mut writer) = split(stream, BytesMut::new());
    let series = Series::new(Arc::new(Sample::new().key));
    let answered = |result| Ended { result, answered: true, ..Ended::failed(Failure::ClientGone) };
    for (ended, status, reason) in [
        (answered(Ok(204)), 204, ""),
        (Ended { sidecar_reason: Some(Reason::PolicyDenied), ..answered(Ok(403)) }, 403, "PolicyDenied"),
        (answered(Err(Failure::UpstreamReset)), 0, "UpstreamReset"),
        (Ended::failed(Failure::PolicyDenied), 403, "PolicyDenied"),
        (Ended::failed(Failure::FaultInjected(418)), 418, "FaultInjected"),
        (Ended::failed(Failure::ClientGaveUp), 0, "ClientGaveUp"),
    ] {
        let call = Call::http1(Sample::new().head, &mut reader, &mut writer);
        let event = Request::of(&call, &series, &ended, call.since.elapsed()).event(&ShownHeaders::default());
        assert_eq!((event.status, event.reason.as_str(), event.attempts), (status, reason, 0), "{ended:?}");
        assert_eq!((event.peer.as_str(), event.revision.as_str()), ("cart", "v2"));
    }
}
