//! Requests that somebody looks at, in the sidecar of the client and in the one of the server. How the operator asks for
//! them is not part of this.

use prost::Message as _;
use serde_json::json;
use tokio::time::Instant;
use tulle_mesh::proto::series_key::Direction;
use tulle_mesh::proto::{Header, Tap, TapEvent, TapFilter};
use tulle_sidecar::tap::Collector;

use crate::harness::cluster::service_name;
use crate::harness::{Application, Cluster, NAMESPACE, Outcome, http1, within};

fn tap(filter: TapFilter) -> Tap {
    Tap { id: 1, filter: Some(filter), rate: 100, headers: vec!["x-user".into(), "authorization".into()] }
}

/// Waits for the next requests that are shown.
async fn shown(collector: &mut Collector<'_>) -> Vec<TapEvent> {
    within(async {
        loop {
            collector.ready().await;
            // A request is counted a moment before it is there.
            let messages = collector.take(Instant::now()).into_iter();
            let events = messages.flat_map(|tapped| tapped.events);
            let events: Vec<TapEvent> =
                events.map(|event| TapEvent::decode(event.as_slice()).unwrap()).collect();
            if !events.is_empty() {
                return events;
            }
        }
    })
    .await
}

#[tokio::test]
async fn a_denied_request_is_shown_by_both_sidecars_with_the_reason() {
    let cluster = Cluster::start().await;
    cluster.policy("Permissive", json!({"allow": [{"to": [{"methods": ["GET"]}]}]}));
    let pod = cluster.pod(true).await;
    let application = Application::start(&pod, http1::answer_all);
    let service = cluster.service(Some("http"), &[&application.port]).await;

    let mut client = Collector::new(&cluster.client.telemetry.taps);
    client.open(&tap(TapFilter { path: "/orders/*".into(), ..TapFilter::default() })).unwrap();
    let mut server = Collector::new(&pod.sidecar.as_ref().unwrap().telemetry.taps);
    server.open(&tap(TapFilter { denied: true, ..TapFilter::default() })).unwrap();

    let ask = async |request: &[u8]| {
        let mut stream = cluster.client.dial(service).await;
        within(http1::ask(&mut stream, request, || {})).await
    };
    assert_eq!(ask(http1::GET).await, Outcome::Whole(200));
    let denied: &[u8] =
        b"DELETE /orders/7?key=s3cret HTTP/1.1\r\nhost: shop\r\nx-user: ann\r\nauthorization: s3cret\r\n\r\n";
    assert_eq!(ask(denied).await, Outcome::Whole(403));

    let seen = [shown(&mut client).await, shown(&mut server).await];
    for events in &seen {
        assert_eq!(events.len(), 1, "the request that was allowed passes neither filter: {events:?}");
        let event = &events[0];
        assert_eq!((event.method.as_str(), event.host.as_str()), ("DELETE", "shop"));
        assert_eq!((event.path.as_str(), event.status, event.mtls), ("/orders/7", 403, true));
        assert_eq!(event.headers, [Header { name: "x-user".into(), value: "ann".into() }]);
        assert_eq!(event.peer_namespace, NAMESPACE);
    }
    let [client, server] = [&seen[0][0], &seen[1][0]];
    assert_eq!((client.direction(), client.reason.as_str()), (Direction::Outbound, "PolicyDenied"));
    assert_eq!(client.peer, service_name(service));
    assert_eq!((server.direction(), server.reason.as_str()), (Direction::Inbound, "PolicyDenied"));
    assert_eq!(server.peer, "pod-0");
}
