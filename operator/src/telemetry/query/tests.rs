use super::*;
use crate::model::tests::{pod, shop};

fn reporter(namespace: &str, workload: &str) -> Reporter {
    Reporter { namespace: namespace.into(), kind: "Deployment".into(), workload: workload.into() }
}

fn series(from: &str, direction: Direction, peer: &str, counts: [u64; 8]) -> (SeriesId, Counts) {
    let id = SeriesId {
        namespace: "shop".into(),
        peer: peer.into(),
        revision: "r1".into(),
        protocol: "http1".into(),
        ..SeriesId::other(reporter("shop", from), direction, true)
    };
    (id, Counts { classes: counts, ..Counts::default() })
}

fn sum(series: Vec<(SeriesId, Counts)>) -> Sum {
    Sum { window: 10, lost: 1, series }
}

fn names(stat: &Stat) -> Vec<(&str, u64, u64)> {
    let row = |row: &'_ StatRow| (row.golden.requests, row.golden.failures);
    stat.rows.iter().map(|found| (found.party.name.as_str(), row(found).0, row(found).1)).collect()
}

fn model() -> Model {
    let plain = Pod { injected: false, ..pod("b", "10.1.0.2", "r2") };
    let alone = Pod { workload: None, labels: Box::default(), ..pod("c", "10.1.0.3", "") };
    shop(&[pod("a", "10.1.0.1", "r1"), plain, alone])
}

fn golden() -> Sum {
    let (inbound, outbound) = (Direction::Inbound, Direction::Outbound);
    let mut routed = series("front", outbound, "web", [0, 5, 0, 0, 0, 1, 0, 0]);
    routed.0.route = "HTTPRoute/shop/canary".into();
    sum(vec![
        series("web", inbound, "front", [0, 80, 0, 10, 4, 3, 3, 0]),
        series("web", inbound, "_PLAIN", [0, 9, 0, 0, 1, 0, 0, 10]),
        series("api", inbound, "front", [0, 500, 0, 0, 0, 0, 0, 0]),
        series("front", outbound, "web", [0, 80, 0, 10, 10, 0, 0, 0]),
        series("front", outbound, "api", [0, 500, 0, 0, 0, 0, 0, 0]),
        series("api", outbound, "web", [0, 7, 0, 0, 0, 0, 0, 0]),
        routed,
    ])
}

#[test]
fn what_is_sent_to_a_pods_own_address_goes_to_a_service_account() {
    let mut model = model();
    let sum = sum(vec![series("front", Direction::Outbound, "web", [0, 5, 0, 0, 0, 0, 0, 0])]);
    let kind = |model: &Model| edges(&sum, model, None).edges[0].destination.kind.clone();
    assert_eq!(kind(&model), "Service", "of this name there is both");
    model.delete_service(&crate::model::tests::key("shop", "web"));
    assert_eq!(kind(&model), "ServiceAccount");
    let by_service = StatQuery { by: By::Service, ..StatQuery::default() };
    assert_eq!(stat(&sum, &model, &by_service).rows[0].party.kind, "ServiceAccount");
}

#[test]
fn what_has_to_do_with_a_namespace_is_counted_or_called_there() {
    let (id, _) = series("front", Direction::Outbound, "web", [0; 8]);
    let id = SeriesId { namespace: "payments".into(), ..id };
    let concerned = [None, Some("shop"), Some("payments"), Some("other")].map(|of| concerns(&id, of));
    assert_eq!(concerned, [true, true, true, false]);
}

#[test]
fn the_worst_workload_comes_first_and_idle_ones_are_there_too() {
    let stat = stat(&golden(), &model(), &StatQuery::default());
    assert_eq!((stat.window, stat.lost), (10, 1));
    assert_eq!(names(&stat), [("web", 120, 11), ("api", 500, 0), ("c", 0, 0)]);
    let web = &stat.rows[0];
    assert_eq!(web.meshed, Some(Meshed { with: 1, of: 2 }));
    assert_eq!((web.golden.client_errors, web.golden.abandoned, web.golden.rps), (10, 10, 12.0));
    assert_eq!(web.golden.success, Some(0.9), "what the client gave up is nobody's failure");
    let idle = &stat.rows[2];
    assert_eq!((idle.party.kind.as_str(), idle.golden.rps, idle.golden.success), ("Pod", 0.0, None));
}

#[test]
fn services_routes_and_revisions_have_rows_where_something_was_counted() {
    let by = |by| stat(&golden(), &model(), &StatQuery { by, ..StatQuery::default() });
    assert_eq!(names(&by(By::Service)), [("web", 113, 11), ("api", 500, 0)]);
    let routes = by(By::Route);
    assert_eq!(names(&routes), [("web", 6, 1)]);
    assert_eq!(routes.rows[0].route.as_deref(), Some("HTTPRoute/shop/canary"));
    let revisions = by(By::Revision);
    assert_eq!(names(&revisions), [("web", 120, 11), ("api", 500, 0)]);
    assert_eq!(revisions.rows[0].revision.as_deref(), Some("r1"));
    assert_eq!(revisions.rows[0].meshed, Some(Meshed { with: 1, of: 1 }));
}

#[test]
fn rows_are_those_of_a_namespace_and_a_name() {
    let of = |by, namespace: &str, name: Option<&str>| {
        let (namespace, name) = (Some(namespace.to_owned()), name.map(str::to_owned));
        stat(&golden(), &model(), &StatQuery { by, namespace, name, ..StatQuery::default() })
    };
    assert_eq!(names(&of(By::Workload, "other", None)), []);
    assert_eq!(names(&of(By::Workload, "shop", Some("api"))), [("api", 500, 0)]);
    assert_eq!(names(&of(By::Route, "shop", Some("canary"))), [("web", 6, 1)]);
    assert_eq!(names(&of(By::Route, "shop", Some("other"))), []);
}

#[test]
fn rows_are_of_what_one_workload_sent_to_another() {
    let of = |by, from: Option<&str>, to: Option<&str>| {
        let (from, to) = (from.map(str::to_owned), to.map(str::to_owned));
        stat(&golden(), &model(), &StatQuery { by, from, to, ..StatQuery::default() })
    };
    assert_eq!(names(&of(By::Service, Some("shop/api"), None)), [("web", 7, 0)]);
    assert_eq!(names(&of(By::Service, None, Some("shop/web"))), [("web", 113, 11)]);
    assert_eq!(names(&of(By::Service, Some("shop/front"), Some("shop/api"))), []);
    assert_eq!(names(&of(By::Workload, None, Some("shop/web"))), [("web", 120, 11)]);
    // Its pods have the service account `web`, from which nobody has got anything.
    assert_eq!(names(&of(By::Workload, Some("shop/web"), None)), []);
}

#[test]
fn edges_are_what_clients_counted_and_servers_of_clients_without_a_sidecar() {
    let found = edges(&golden(), &model(), None);
    let ends = |edges: &Edges| -> Vec<(String, String, u64)> {
        let of = |party: &Party| format!("{}/{}", party.kind, party.name);
        edges
            .edges
            .iter()
            .map(|edge| (of(&edge.source), of(&edge.destination), edge.golden.requests))
            .collect()
    };
    let expected = [
        ("Deployment/front", "Service/api", 500),
        ("Deployment/front", "Service/web", 106),
        ("Plain/", "Deployment/web", 20),
        ("Deployment/api", "Service/web", 7),
    ];
    let expected =
        expected.map(|(source, destination, count)| (source.to_owned(), destination.to_owned(), count));
    assert_eq!(ends(&found), expected);
    assert!(found.edges[0].mtls && found.edges[0].protocol == "http1");
    assert_eq!(ends(&edges(&golden(), &model(), Some("shop"))), expected);
    assert_eq!(ends(&edges(&golden(), &model(), Some("other"))), []);
}

#[test]
fn reasons_are_sorted_by_how_often_they_were_counted() {
    let mut counts = Counts::default();
    for (name, count) in [("b", 2), ("a", 2), ("c", 9), ("a", 1)] {
        counts.add_reason(&name.into(), count);
    }
    let reasons = counts.golden(10).reasons;
    let reasons: Vec<_> = reasons.iter().map(|reason| (reason.name.as_str(), reason.count)).collect();
    assert_eq!(reasons, [("c", 9), ("a", 3), ("b", 2)]);
}

#[test]
fn a_timeline_is_of_what_a_workload_served() {
    let mut history = History::new();
    for (id, counts) in golden().series {
        history.add(id, &counts, 1_800_000_000);
    }
    let timeline = timeline(&history, "shop", "web", 60, 1_800_000_005);
    let points: Vec<u64> = timeline.points.iter().map(|point| point.requests).collect();
    assert_eq!((timeline.step, points), (10, vec![120]));
}
