//! The mesh that is shown: a shop of which every view has something to show, and many workloads beside it.

use std::net::Ipv4Addr;
use std::sync::Arc;

use anyhow::Result;
use tulle_crds::{WorkloadKind, keys};
use tulle_mesh::denial::DenialId;
use tulle_mesh::proto::{RecentDenial, RecentDenials, ResourceType, Stamp, TelemetryReport, stamp};
use tulle_mesh::reason::Reason;
use tulle_operator::discovery::{AckTracker, SidecarEvent, Stamps};
use tulle_operator::model::object::ServicePort;
use tulle_operator::model::{Model, Namespace, Pod, Service, Workload, WorkloadKey};
use tulle_operator::telemetry::Aggregates;
use tulle_operator::telemetry::history::{Counts, Direction, History, Reporter, SeriesId};

use crate::objects;

/// Seconds between two calls of [`count`].
pub const INTERVAL: i64 = 10;
const SHOP: &str = "shop";
/// Namespaces of the many workloads.
const TEAMS: u32 = 20;

/// Workloads of the shop. The first is the gateway, which everybody calls from outside.
const WORKLOADS: [&str; 6] = ["gateway", "checkout", "cart", "payments", "stock", "orders"];
const REVISION: &str = "6b8f9c5d4";
/// The new version of a workload with a Canary in progress.
const CANARY_REVISION: &str = "7c9d8e6f5";

/// Requests between two workloads in an interval.
#[derive(Clone, Copy)]
struct Calls {
    client: &'static str,
    server: &'static str,
    requests: u64,
    failures: u64,
    reason: &'static str,
    /// The typical latency in microseconds.
    micros: u64,
    route: &'static str,
}

const CALLS: [Calls; 7] = [
    Calls {
        client: "gateway",
        server: "checkout",
        requests: 400,
        failures: 12,
        reason: Reason::UpstreamTimeout.name(),
        micros: 42_000,
        route: "HTTPRoute/shop/checkout",
    },
    Calls {
        client: "gateway",
        server: "cart",
        requests: 900,
        failures: 0,
        reason: "",
        micros: 6_000,
        route: "",
    },
    Calls {
        client: "checkout",
        server: "cart",
        requests: 380,
        failures: 0,
        reason: "",
        micros: 5_000,
        route: "",
    },
    Calls {
        client: "checkout",
        server: "payments",
        requests: 390,
        failures: 11,
        reason: Reason::UpstreamReset.name(),
        micros: 30_000,
        route: "",
    },
    Calls {
        client: "checkout",
        server: "stock",
        requests: 395,
        failures: 0,
        reason: "",
        micros: 900,
        route: "",
    },
    Calls {
        client: "stock",
        server: "orders",
        requests: 60,
        failures: 0,
        reason: "",
        micros: 1_300_000,
        route: "",
    },
    Calls {
        client: "payments",
        server: "orders",
        requests: 40,
        failures: 1,
        reason: Reason::PolicyDenied.name(),
        micros: 1_100_000,
        route: "",
    },
];

fn kind_of(workload: &str) -> WorkloadKind {
    if workload == "orders" { WorkloadKind::StatefulSet } else { WorkloadKind::Deployment }
}

fn workload(namespace: &str, name: &str) -> WorkloadKey {
    WorkloadKey { kind: kind_of(name), namespace: namespace.into(), name: name.into() }
}

/// A pod of a workload. `number` tells it from all others.
fn pod(key: WorkloadKey, suffix: &str, number: u32, revision: &str) -> Pod {
    let name: Arc<str> = format!("{}-{suffix}", key.name).into();
    Pod {
        uid: format!("uid-{number}").into(),
        name,
        namespace: Arc::clone(&key.namespace),
        service_account: Arc::clone(&key.name),
        node: "node-1".into(),
        labels: Box::new([
            ("app".into(), Arc::clone(&key.name)),
            ("pod-template-hash".into(), revision.into()),
        ]),
        ips: Box::new([Ipv4Addr::from(0x0af4_0000 + number).into()]),
        workload: Some(key),
        injected: true,
        containers_ready: true,
        ready: true,
        ..Pod::default()
    }
}

/// Namespace and name of one of the many.
fn many(number: u32) -> (String, String) {
    (format!("team-{:02}", number % TEAMS), format!("service-{number:04}"))
}

/// Pods of the shop, each with its number: two of each workload.
fn shop_pods() -> Vec<Pod> {
    let mut pods = Vec::new();
    for (name, number) in WORKLOADS.iter().zip(0..) {
        let second = if *name == "checkout" { CANARY_REVISION } else { REVISION };
        pods.push(pod(workload(SHOP, name), "x7k2p", 2 * number, REVISION));
        pods.push(pod(workload(SHOP, name), "q9m4d", 2 * number + 1, second));
    }
    pods
}

/// Everything that the operator would watch.
pub fn model(workloads: u32) -> Result<Model> {
    let mut model = Model::new("tulle-system", "cluster.local");
    let labels = || [(keys::INJECT.to_owned(), "enabled".to_owned())].into();
    model.apply_namespace(SHOP.into(), Namespace { labels: labels(), terminating: false });
    for team in 0..TEAMS {
        let name = format!("team-{team:02}");
        model.apply_namespace(name.into(), Namespace { labels: labels(), terminating: false });
    }
    shop_pods().into_iter().for_each(|pod| model.apply_pod(pod));
    for (name, number) in WORKLOADS.iter().zip(1_u32..) {
        model.apply_workload(
            workload(SHOP, name),
            Workload { replicas: 2, observed: true, ..Workload::default() },
        );
        let service = Service {
            uid: (*name).into(),
            cluster_ips: vec![Ipv4Addr::from(0x0a60_0000 + number).into()],
            ports: vec![ServicePort { name: "http".into(), port: 80, app_protocol: None }],
            selector: [("app".to_owned(), (*name).to_owned())].into(),
            ..Service::default()
        };
        model.apply_service((SHOP.into(), (*name).into()), service);
    }
    // Older than the label of its namespace.
    let old = pod(workload(SHOP, "reports"), "old", 90, REVISION);
    model.apply_pod(Pod { injected: false, ..old });
    for number in 0..workloads {
        let (namespace, name) = many(number);
        model.apply_pod(pod(workload(&namespace, &name), "0", 1_000 + number, REVISION));
    }
    for (name, policy) in objects::policies()? {
        model.apply_policy((SHOP.into(), name.into()), policy);
    }
    for (name, canary) in objects::canaries()? {
        model.apply_canary((SHOP.into(), name.into()), canary);
    }
    Ok(model)
}

/// Sidecars as they are usually, and one of each fault.
pub fn connect(acks: &AckTracker, workloads: u32, now: i64) {
    let uids = (0..12).chain((0..workloads).map(|number| 1_000 + number));
    for number in uids {
        let uid = format!("uid-{number}");
        let say = |event| acks.report(&uid, event, |_| {});
        // One has never been heard of.
        if number == 11 {
            continue;
        }
        say(SidecarEvent::Connected);
        say(SidecarEvent::Version(env!("CARGO_PKG_VERSION").into()));
        // One certificate ends soon.
        say(SidecarEvent::CertificateEnds(now + if number == 8 { 1_200 } else { 80_000 }));
        let stamps: Stamps = [Stamp {
            kind: stamp::Kind::Policy.into(),
            namespace: SHOP.to_owned(),
            name: "checkout".to_owned(),
            uid: "checkout".to_owned(),
            version: 1,
        }]
        .into();
        for kind in [ResourceType::Mtls, ResourceType::Access, ResourceType::Limits] {
            let name = (i32::from(kind), uid.as_str().into());
            say(SidecarEvent::Sent(name, Arc::clone(&stamps)));
            let name = (i32::from(kind), uid.as_str().into());
            match (number, kind) {
                // One is behind, and one refuses something.
                (3, ResourceType::Access) => {}
                (5, ResourceType::Limits) => {
                    let reason = "needs feature \"limits\", which this version does not have";
                    say(SidecarEvent::Refused(name, Arc::clone(&stamps), reason.to_owned()));
                }
                _ => say(SidecarEvent::Acked(name, Arc::clone(&stamps))),
            }
        }
    }
}

/// A pod of checkout has refused a request, one of which the path was cut, and a connection.
pub fn refuse(aggregates: &Aggregates, now: i64) {
    let is_checkout = |pod: &Pod| pod.workload.as_ref().is_some_and(|workload| &*workload.name == "checkout");
    let Some(pod) = shop_pods().into_iter().find(is_checkout) else { return };
    let client = |name: &str| format!("spiffe://cluster.local/ns/{SHOP}/sa/{name}");
    let refused = |number: u32, client: String, method: &str, path: &str, rule: &str| RecentDenial {
        id: DenialId::new(&pod.uid, number).to_string(),
        at_unix_ms: (now - 60 + i64::from(number)) * 1_000,
        policy: format!("{SHOP}/checkout"),
        rule: rule.to_owned(),
        client,
        method: method.to_owned(),
        path: path.to_owned(),
        cut: number == 2,
    };
    let long = format!("/export/{}", "0123456789".repeat(24));
    let report = TelemetryReport {
        sequence: 1,
        process: 1,
        denials: Some(RecentDenials {
            denials: vec![
                refused(1, client("stock"), "DELETE", "/orders/17", "DenyRule(0)"),
                refused(2, client("reports"), "GET", &long, "NoAllowMatched"),
                refused(3, String::new(), "", "", "NoAllowMatched"),
            ],
            dropped: 4,
        }),
        ..TelemetryReport::default()
    };
    aggregates.add_at(&pod.uid, Some(reporter_of(SHOP, "checkout")), &report, now);
}

/// Adds what all sidecars count in an interval that ends at `time`.
pub fn count(history: &mut History, workloads: u32, time: i64) {
    for calls in &CALLS {
        let counts = counts(calls.requests, calls.failures, calls.reason, calls.micros, time);
        let series = |reporter: &str, direction: Direction, peer: &str| SeriesId {
            reporter: reporter_of(SHOP, reporter),
            direction,
            namespace: SHOP.into(),
            peer: peer.into(),
            revision: REVISION.into(),
            route: if direction == Direction::Outbound { calls.route.into() } else { "".into() },
            protocol: "http1".into(),
            mtls: true,
        };
        history.add(series(calls.client, Direction::Outbound, calls.server), &counts, time);
        history.add(series(calls.server, Direction::Inbound, calls.client), &counts, time);
    }
    // Clients without a sidecar, whose requests only the server counts.
    for (server, namespace, requests) in [("gateway", "ingress", 1_300), ("payments", "legacy", 30)] {
        let plain = SeriesId {
            namespace: namespace.into(),
            peer: "_PLAIN".into(),
            revision: REVISION.into(),
            protocol: "http1".into(),
            ..SeriesId::other(reporter_of(SHOP, server), Direction::Inbound, false)
        };
        history.add(
            plain,
            &counts(requests, requests / 400, Reason::UpstreamTimeout.name(), 55_000, time),
            time,
        );
    }
    for number in 0..workloads {
        let (namespace, name) = many(number);
        let failures = u64::from(number % 97 == 0);
        let counts = counts(5 + u64::from(number % 50), failures, Reason::UpstreamReset.name(), 2_000, time);
        let inbound = SeriesId {
            namespace: namespace.as_str().into(),
            peer: "client".into(),
            revision: REVISION.into(),
            protocol: "http2".into(),
            ..SeriesId::other(reporter_of(&namespace, &name), Direction::Inbound, true)
        };
        history.add(inbound, &counts, time);
    }
}

fn reporter_of(namespace: &str, name: &str) -> Reporter {
    Reporter { namespace: namespace.into(), kind: kind_of(name).name().into(), workload: name.into() }
}

/// What is counted of about so many requests. A wave goes over them, because a chart with straight lines shows nothing.
fn counts(requests: u64, failures: u64, reason: &str, micros: u64, time: i64) -> Counts {
    let wave = 1.0 + 0.3 * (time as f64 / 70.0).sin();
    let requests = (requests as f64 * wave) as u64 + 1;
    let client_errors = requests / 40;
    let failures = failures.min(requests - client_errors);
    let mut counts = Counts {
        classes: [0, requests - failures - client_errors, 0, client_errors, failures, 0, 0, 0],
        bytes_up: requests * 300,
        bytes_down: requests * 4_000,
        retries: failures,
        ..Counts::default()
    };
    for number in 0..requests {
        // Most between 60 % and 140 % of what is typical, one in fifty far above.
        let percent = if number % 50 == 49 { 450 } else { 60 + number * 37 % 80 };
        counts.latency.record((micros as f64 * percent as f64 / 100.0 * wave) as u64);
    }
    if failures > 0 {
        counts.add_reason(&reason.into(), failures);
    }
    counts
}
