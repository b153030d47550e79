//! What a sidecar has seen, as it is shown. A sidecar may say anything: [`bound`] cuts what is too long, and drops headers
//! that nobody asked for, before it is kept.

use std::collections::HashMap;

use k8s_openapi::jiff::Timestamp;
use tulle_mesh::proto::TapEvent;
use tulle_mesh::proto::series_key::Direction;
use tulle_mesh::query::{Party, TapRequest};
use tulle_mesh::tap::{is_secret, shown_value};

use super::Seen;
use crate::model::Model;
use crate::telemetry::query;

/// The longest path that is shown, in bytes.
const MAX_PATH: usize = 1024;
/// The longest value of a header.
const MAX_VALUE: usize = 256;
/// The longest name of a route: its kind, and two names.
const MAX_ROUTE: usize = 600;
/// The longest name of anything else.
const MAX_NAME: usize = 253;
/// Names whose kind is remembered.
const MAX_KINDS: usize = 1_000;

/// Cuts what is too long in a request that a sidecar has seen, and keeps only these headers, in few lines.
pub fn bound(event: &mut TapEvent, headers: &[String]) {
    let names = [
        &mut event.peer_namespace,
        &mut event.peer,
        &mut event.method,
        &mut event.host,
        &mut event.reason,
        &mut event.protocol,
        &mut event.revision,
    ];
    names.into_iter().for_each(|name| cut(name, MAX_NAME));
    cut(&mut event.route, MAX_ROUTE);
    // A path has no query: what stands there may be a secret.
    if let Some(query) = event.path.find(['?', '#']) {
        event.path.truncate(query);
    }
    cut(&mut event.path, MAX_PATH);
    event.headers.retain(|header| headers.contains(&header.name) && !is_secret(&header.name));
    event.headers.truncate(2 * headers.len());
    for header in &mut event.headers {
        let shown = shown_value(&header.name, &header.value).len();
        cut(&mut header.value, shown.min(MAX_VALUE));
    }
}

/// Cuts why a sidecar refuses a tap.
pub fn cut_reason(why: &mut String) {
    cut(why, MAX_VALUE);
}

fn cut(text: &mut String, most: usize) {
    if text.len() > most {
        let mut end = most;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.shrink_to_fit();
    }
}

/// Which names that sidecars send to are of service accounts: finding that out looks at every pod.
#[derive(Default)]
pub struct Kinds(HashMap<(String, String), bool>);

impl Kinds {
    /// Whom a sidecar has sent a request to.
    fn destination(&mut self, model: &Model, namespace: &str, name: &str) -> Party {
        let key = (namespace.to_owned(), name.to_owned());
        let is_account = match self.0.get(&key) {
            Some(known) => *known,
            None => {
                let found = query::is_account(model, namespace, name);
                if self.0.len() >= MAX_KINDS {
                    self.0.clear();
                }
                self.0.insert(key, found);
                found
            }
        };
        query::destination(namespace, name, is_account)
    }
}

/// A request as it is shown. `None`: its direction is one that this build does not know.
pub fn request(seen: Seen, model: &Model, kinds: &mut Kinds) -> Option<TapRequest> {
    let Seen { sidecar, event } = seen;
    let own = sidecar.reporter.party();
    let (direction, source, destination) = match event.direction() {
        Direction::Outbound => {
            ("outbound", own, kinds.destination(model, &event.peer_namespace, &event.peer))
        }
        Direction::Inbound => ("inbound", query::client(&event.peer_namespace, &event.peer), own),
        Direction::Unspecified | Direction::Policy => return None,
    };
    let named = |text: String| Some(text).filter(|text| !text.is_empty());
    let ended = Timestamp::from_microsecond(event.ended_unix_micros).unwrap_or(Timestamp::UNIX_EPOCH);
    Some(TapRequest {
        time: format!("{ended:.3}"),
        direction: direction.to_owned(),
        pod: format!("{}/{}", sidecar.namespace, sidecar.pod),
        source,
        destination,
        method: event.method,
        host: event.host,
        path: event.path,
        status: u16::try_from(event.status).ok().filter(|status| *status != 0),
        grpc_status: event.grpc_status,
        latency_ms: event.micros as f64 / 1_000.0,
        mtls: event.mtls,
        reason: named(event.reason),
        route: named(event.route),
        revision: named(event.revision),
        protocol: event.protocol,
        attempts: event.attempts,
        headers: event.headers.into_iter().map(|header| (header.name, header.value)).collect(),
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tulle_mesh::proto::Header;

    use super::*;
    use crate::model::tests::{pod, shop};
    use crate::tap::Sidecar;

    fn seen(direction: Direction, peer: &str) -> Seen {
        let model = shop(&[pod("a", "10.1.0.1", "r1")]);
        let sidecar = Sidecar {
            namespace: "shop".into(),
            pod: "a".into(),
            reporter: query::reporter(model.pod("uid-a").unwrap()),
            is_able: true,
        };
        let event = TapEvent {
            ended_unix_micros: 1_700_000_000_123_456,
            direction: direction.into(),
            peer_namespace: "shop".into(),
            peer: peer.into(),
            method: "GET".into(),
            host: "web".into(),
            path: "/cart".into(),
            status: 503,
            micros: 4_210,
            mtls: true,
            reason: "UpstreamReset".into(),
            attempts: 2,
            ..TapEvent::default()
        };
        Seen { sidecar: Arc::new(sidecar), event }
    }

    fn shown(direction: Direction, peer: &str) -> TapRequest {
        let model = shop(&[pod("a", "10.1.0.1", "r1")]);
        request(seen(direction, peer), &model, &mut Kinds::default()).unwrap()
    }

    fn party(kind: &str, name: &str) -> Party {
        Party { namespace: "shop".into(), kind: kind.into(), name: name.into() }
    }

    #[test]
    fn an_inbound_request_comes_from_the_peer_and_an_outbound_one_goes_there() {
        let own = party("Deployment", "web");
        let ends = |direction, peer| {
            let shown = shown(direction, peer);
            (shown.direction, shown.source, shown.destination)
        };
        let inbound = |source| ("inbound".to_owned(), source, own.clone());
        assert_eq!(ends(Direction::Inbound, "client"), inbound(party("ServiceAccount", "client")));
        assert_eq!(ends(Direction::Inbound, "_PLAIN"), inbound(party("Plain", "")));
        let outbound = |destination| ("outbound".to_owned(), own.clone(), destination);
        assert_eq!(ends(Direction::Outbound, "web"), outbound(party("Service", "web")));
        assert_eq!(ends(Direction::Outbound, "db"), outbound(party("Service", "db")));
    }

    #[test]
    fn a_name_that_only_a_service_account_has_is_one() {
        let mut of_account = pod("b", "10.1.0.2", "r1");
        of_account.service_account = "batch".into();
        let model = shop(&[pod("a", "10.1.0.1", "r1"), of_account]);
        let mut kinds = Kinds::default();
        for _ in 0..2 {
            let shown = request(seen(Direction::Outbound, "batch"), &model, &mut kinds).unwrap();
            assert_eq!(shown.destination, party("ServiceAccount", "batch"));
        }
    }

    #[test]
    fn times_latencies_and_what_is_empty_are_shown_as_people_read_them() {
        let shown = shown(Direction::Inbound, "client");
        assert_eq!(shown.time, "2023-11-14T22:13:20.123Z");
        assert_eq!((shown.latency_ms, shown.status, shown.grpc_status), (4.21, Some(503), None));
        assert_eq!(
            (shown.reason.as_deref(), shown.route, shown.revision),
            (Some("UpstreamReset"), None, None)
        );
        assert_eq!(shown.pod, "shop/a");
    }

    #[test]
    fn a_direction_that_this_build_does_not_know_is_not_shown() {
        let model = shop(&[]);
        assert_eq!(request(seen(Direction::Unspecified, "client"), &model, &mut Kinds::default()), None);
    }

    #[test]
    fn a_sidecar_that_says_too_much_is_cut() {
        let header = |name: &str, value: &str| Header { name: name.into(), value: value.into() };
        let mut event = TapEvent {
            path: format!("/{}?token=s3cret", "é".repeat(1_000)),
            host: "h".repeat(10_000),
            headers: vec![
                header("authorization", "Bearer s3cret"),
                header("user-agent", &"a".repeat(10_000)),
                header("user-agent", "b"),
                header("user-agent", "c"),
            ],
            ..TapEvent::default()
        };
        bound(&mut event, &["user-agent".to_owned()]);
        assert_eq!(
            (event.path.len(), event.host.len()),
            (MAX_PATH - 1, MAX_NAME),
            "at the end of a character"
        );
        let values: Vec<_> =
            event.headers.iter().map(|header| (header.name.as_str(), header.value.len())).collect();
        assert_eq!(values, [("user-agent", MAX_VALUE), ("user-agent", 1)]);
        let headers = vec![header("authorization", "s3cret"), header("referer", "/a?token=s3cret")];
        let mut secrets = TapEvent { headers, ..TapEvent::default() };
        bound(&mut secrets, &["authorization".to_owned(), "referer".to_owned()]);
        assert_eq!(secrets.headers, [header("referer", "/a")], "also where it was asked for");
        let mut short = TapEvent { path: "/a?token=s3cret".into(), ..TapEvent::default() };
        bound(&mut short, &[]);
        assert_eq!(short.path, "/a");
    }
}
