use tulle_mesh::query::{Edges, Routes};

use super::*;
use crate::model::gateway::RouteObject;
use crate::model::tests::{canary, key, pod, route, shop};

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
fn an_edge_says_to_which_port_between_whom_and_where() {
    let mut model = model();
    model.apply_node("node-a".into(), "eu-a".into());
    let plain = |(id, counts): (SeriesId, Counts)| (SeriesId { mtls: false, ..id }, counts);
    let (requests, outbound) = ([0, 5, 0, 0, 0, 0, 0, 0], Direction::Outbound);
    let found = edges(&sum(vec![series("web", outbound, "web", requests)]), &model, None);
    let [edge] = found.edges.as_slice() else { panic!("{found:?}") };
    assert_eq!(edge.port, Some(80), "the only one that the Service has");
    let id = vec!["spiffe://cluster.local/ns/shop/sa/web".to_owned()];
    assert_eq!((&edge.client_ids, &edge.server_ids), (&id, &id));
    assert_eq!((edge.client_zones.join(","), edge.server_zones.join(",")), ("eu-a".into(), "eu-a".into()));
    let found = edges(&sum(vec![plain(series("web", outbound, "web", requests))]), &model, None);
    assert!(found.edges[0].client_ids.is_empty() && found.edges[0].server_ids.is_empty());
    let found = edges(&sum(vec![series("web", outbound, "gone", requests)]), &model, None);
    assert_eq!(found.edges[0].port, None);
    assert!(found.edges[0].server_ids.is_empty() && found.edges[0].server_zones.is_empty());
}

#[test]
fn of_a_service_with_several_ports_the_edge_has_the_one_that_its_route_names() {
    let mut model = model();
    let mut service = model.service(&key("shop", "web")).unwrap().clone();
    let second = crate::model::object::ServicePort { name: "admin".into(), port: 81, app_protocol: None };
    service.ports.push(second);
    model.apply_service(key("shop", "web"), service);
    model.apply_route(route("a", "shop", "web", "web"));
    let direct = series("front", Direction::Outbound, "web", [0, 9, 0, 0, 0, 0, 0, 0]);
    let routed = routed("HTTPRoute/shop/a", "web", "r1", 5);
    let ports: Vec<_> =
        edges(&sum(vec![direct, routed]), &model, None).edges.iter().map(|edge| edge.port).collect();
    assert_eq!(ports, [None, Some(80)]);
}

#[test]
fn an_ejection_before_the_protocol_is_known_is_of_the_edge_that_carries_the_requests() {
    let outbound = Direction::Outbound;
    let of = |protocol: &str, mtls: bool, requests: u64, ejections: u64| {
        let (id, counts) = series("front", outbound, "web", [0, requests, 0, 0, 0, 0, 0, 0]);
        (SeriesId { protocol: protocol.into(), mtls, ..id }, Counts { ejections, ..counts })
    };
    let opaque = of("opaque", true, 0, 2);
    let all = sum(vec![of("http1", false, 9, 0), of("http1", true, 5, 1), opaque.clone()]);
    let found = edges(&all, &model(), None).edges;
    let seen: Vec<_> = found
        .iter()
        .map(|edge| (edge.protocol.as_str(), edge.mtls, edge.golden.requests, edge.golden.ejections))
        .collect();
    assert_eq!(seen, [("http1", false, 9, 2), ("http1", true, 5, 1)]);
    let alone = edges(&sum(vec![opaque]), &model(), None).edges;
    assert_eq!(alone.iter().map(|edge| edge.golden.ejections).sum::<u64>(), 2, "it is not dropped");
}

#[test]
fn requests_without_an_endpoint_are_no_plain_text_beside_those_that_mtls_secures() {
    let of = |mtls: bool, class: usize, reason: Option<&str>| {
        let mut classes = [0; 8];
        classes[class] = 5;
        let (id, counts) = series("front", Direction::Outbound, "web", classes);
        let reasons = reason.map(|reason| (reason.into(), 5)).into_iter().collect();
        (SeriesId { mtls, ..id }, Counts { reasons, ..counts })
    };
    let seen = |all: Vec<(SeriesId, Counts)>| -> Vec<(bool, u64)> {
        let found = edges(&sum(all), &model(), None).edges;
        found.iter().map(|edge| (edge.mtls, edge.golden.requests)).collect()
    };
    let nowhere = || of(false, 6, Some("UpstreamNone"));
    assert_eq!(seen(vec![nowhere(), of(true, 1, None)]), [(true, 10)]);
    assert_eq!(seen(vec![nowhere(), of(false, 1, None)]), [(false, 10)]);
    assert_eq!(seen(vec![nowhere()]), [(false, 5)], "it is not dropped");
    let plain = of(false, 6, Some("UpstreamReset"));
    assert_eq!(seen(vec![plain, of(true, 1, None)]), [(false, 5), (true, 5)], "somebody has got these");
}

#[test]
fn what_a_servers_sidecar_denied_is_denied_to_the_client_and_no_success() {
    let (id, counts) = series("front", Direction::Outbound, "web", [0, 0, 0, 0, 0, 0, 0, 10]);
    let mut counts = Counts { reasons: vec![("PolicyDenied".into(), 10)], ..counts };
    counts.judge(false);
    let all = sum(vec![(id, counts)]);
    let by_service = StatQuery { by: By::Service, ..StatQuery::default() };
    for golden in
        [&stat(&all, &model(), &by_service).rows[0].golden, &edges(&all, &model(), None).edges[0].golden]
    {
        assert_eq!((golden.requests, golden.denied, golden.client_errors, golden.abandoned), (10, 10, 0, 0));
        assert_eq!((golden.failures, golden.success), (0, None), "it says nothing of the server");
        assert_eq!(golden.reasons[0].name, "PolicyDenied");
    }
}

/// What a route has sent to a revision of a Service of `shop`.
fn routed(route: &str, service: &str, revision: &str, requests: u64) -> (SeriesId, Counts) {
    let (id, counts) = series("front", Direction::Outbound, service, [0, requests, 0, 0, 0, 0, 0, 0]);
    (SeriesId { route: route.into(), revision: revision.into(), ..id }, counts)
}

/// Route `shop/a` of Service `shop/web` with one rule for each of these backends; of an empty one, none.
fn rules(backends: &[&str]) -> RouteObject {
    let one = |backend: &str| route("a", "shop", "web", backend).rules.remove(0);
    let rules = backends.iter().map(|backend| {
        let mut rule = one(backend);
        if backend.is_empty() {
            rule.backend_refs.clear();
        }
        rule
    });
    RouteObject { rules: rules.collect(), ..route("a", "shop", "web", "web") }
}

/// Rules, backend, set, when last used, and requests of a row.
type Shown<'a> = (Vec<u32>, &'a str, &'a str, Option<i64>, Option<u64>);

/// Rules, backend, set, when it was seen, and requests.
fn shown(routes: &Routes) -> Vec<Shown<'_>> {
    let mut all = Vec::new();
    for row in &routes.rows {
        let rules = row.rules.iter().map(|rule| rule.index).collect();
        let backend = row.backend.as_ref().map_or("", |backend| backend.party.name.as_str());
        let requests = row.golden.as_ref().map(|golden| golden.requests);
        all.push((rules, backend, row.set.as_str(), row.last_seen, requests));
    }
    all
}

fn seen(series: &[(SeriesId, Counts)], at: i64) -> Vec<(Arc<SeriesId>, i64)> {
    series.iter().map(|(id, _)| (Arc::new(id.clone()), at)).collect()
}

#[test]
fn rules_that_nobody_has_used_are_shown_without_figures() {
    let mut model = model();
    model.apply_route(rules(&["web", "api", ""]));
    let used = vec![routed("HTTPRoute/shop/a", "web", "r1", 5)];
    let seen = seen(&used, 70);
    let found = routes(&sum(used), &seen, &model, Some("shop"));
    let expected = [
        (vec![0], "web", "", Some(70), Some(5)),
        (vec![1], "api", "", None, None),
        (vec![2], "", "", None, None),
    ];
    assert_eq!(shown(&found), expected);
    assert_eq!(
        (found.rows[0].party.name.as_str(), found.rows[0].route.as_str()),
        ("web", "HTTPRoute/shop/a")
    );
    assert_eq!(found.rows[0].revision.as_deref(), Some("r1"));
    assert_eq!(found.rows[1].backend.as_ref().unwrap().port, Some(80));
    assert!(routes(&sum(Vec::new()), &[], &model, Some("other")).rows.is_empty());
}

#[test]
fn what_a_rule_answers_itself_is_told_from_what_pods_serve() {
    let mut model = model();
    model.apply_route(rules(&["web", ""]));
    let used = vec![routed("HTTPRoute/shop/a", "web", "r1", 5), routed("HTTPRoute/shop/a", "web", "", 2)];
    let found = routes(&sum(used), &[], &model, None);
    let expected = [(vec![0], "web", "", None, Some(5)), (vec![0, 1], "web", "", None, Some(2))];
    let mut rows = shown(&found);
    rows.sort_by_key(|row| row.0.len());
    assert_eq!(rows, expected, "the second may be redirects, or requests for which there was no pod");
}

/// Requests of a route that its clients' sidecars answered, with this reason.
fn unserved(route: &str, dialled: &str, requests: u64, reason: &str) -> (SeriesId, Counts) {
    let (id, mut counts) = routed(route, dialled, "", 0);
    counts.classes[6] = requests;
    counts.add_reason(&reason.into(), requests);
    (id, counts)
}

#[test]
fn requests_that_reached_no_backend_are_those_of_the_rule_whose_backend_does_not_exist() {
    let mut model = model();
    model.apply_route(rules(&["web", "nosuch"]));
    let route = "HTTPRoute/shop/a";
    let used = vec![routed(route, "web", "r1", 10), unserved(route, "web", 10, "RouteNoBackend")];
    let found = routes(&sum(used.clone()), &[], &model, None);
    let expected = [(vec![0], "web", "", None, Some(10)), (vec![1], "", "", None, Some(10))];
    assert_eq!(shown(&found), expected);
    let success: Vec<_> = found.rows.iter().map(|row| row.golden.as_ref().unwrap().success).collect();
    assert_eq!(success, [Some(1.0), Some(0.0)]);
    assert_eq!(found.rows[1].golden.as_ref().unwrap().reasons[0].name, "RouteNoBackend");
    // Later nothing was counted in the window.
    let found = routes(&sum(Vec::new()), &seen(&used, 70), &model, None);
    let shown = shown(&found);
    assert_eq!((shown[0].0.clone(), shown[0].3), (vec![0], Some(70)), "{shown:?}");
    assert!(shown.iter().all(|row| !row.0.is_empty()), "{shown:?}");
}

#[test]
fn what_reached_no_backend_is_told_from_what_found_no_pod() {
    let mut model = model();
    model.apply_route(rules(&["web", "nosuch"]));
    let route = "HTTPRoute/shop/a";
    let (id, mut counts) = unserved(route, "web", 3, "UpstreamNone");
    counts.merge(&unserved(route, "web", 7, "RouteNoBackend").1);
    let found = routes(&sum(vec![(id, counts)]), &[], &model, None);
    let expected = [(vec![0], "web", "", None, Some(3)), (vec![1], "", "", None, Some(7))];
    assert_eq!(shown(&found), expected);
    let reasons: Vec<_> =
        found.rows.iter().map(|row| row.golden.as_ref().unwrap().reasons[0].name.clone()).collect();
    assert_eq!(reasons, ["UpstreamNone", "RouteNoBackend"]);
}

#[test]
fn a_share_of_a_rule_whose_backend_does_not_exist_has_a_row_of_that_rule() {
    let mut model = model();
    let mut both = rules(&["web", "nosuch"]);
    let second = both.rules.remove(1);
    both.rules[0].backend_refs.extend(second.backend_refs);
    model.apply_route(both);
    let route = "HTTPRoute/shop/a";
    let found = routes(&sum(vec![routed(route, "web", "r1", 5)]), &[], &model, None);
    assert_eq!(shown(&found), [(vec![0], "web", "", None, Some(5)), (vec![0], "nosuch", "", None, None)]);
    let used = vec![routed(route, "web", "r1", 5), unserved(route, "web", 4, "RouteNoBackend")];
    let found = routes(&sum(used), &[], &model, None);
    assert_eq!(shown(&found), [(vec![0], "web", "", None, Some(5)), (vec![0], "", "", None, Some(4))]);
}

#[test]
fn a_rule_that_was_used_before_the_window_says_when() {
    let mut model = model();
    model.apply_route(rules(&["web"]));
    let seen = seen(&[routed("HTTPRoute/shop/a", "web", "r1", 0)], 70);
    let found = routes(&sum(Vec::new()), &seen, &model, None);
    assert_eq!(shown(&found), [(vec![0], "web", "", Some(70), None)]);
}

#[test]
fn rules_that_lead_to_one_service_share_its_figures_once_there_are_any() {
    let mut model = model();
    model.apply_route(rules(&["web", "api", "web"]));
    let unused = routes(&sum(Vec::new()), &[], &model, None);
    let rules_of = |found: &Routes| shown(found).into_iter().map(|row| row.0).collect::<Vec<_>>();
    assert_eq!(rules_of(&unused), [[0], [1], [2]]);
    let used = vec![routed("HTTPRoute/shop/a", "web", "r1", 5)];
    let found = routes(&sum(used), &[], &model, None);
    assert_eq!(rules_of(&found), [vec![0, 2], vec![1]], "nobody has counted by rule");
}

#[test]
fn revisions_under_a_canary_are_stable_or_canary() {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1"), pod("b", "10.1.0.2", "r2")]);
    model.apply_canary(
        key("shop", "web"),
        canary(serde_json::json!({
            "approvedRevision": "r1", "canaryRevision": "r2", "weight": 10, "phase": "Progressing",
        })),
    );
    model.apply_route(rules(&["web"]));
    let used = ["r1", "r2", "r3"].map(|revision| routed("HTTPRoute/shop/a", "web", revision, 5));
    let found = routes(&sum(used.to_vec()), &[], &model, None);
    let sets: Vec<_> = found.rows.iter().map(|row| row.set.as_str()).collect();
    assert_eq!(sets, ["stable", "canary", ""]);
}

#[test]
fn what_no_rule_accounts_for_is_shown_with_its_route() {
    let mut model = model();
    model.apply_route(rules(&["web"]));
    let used =
        vec![routed("HTTPRoute/shop/a", "api", "r1", 5), routed("HTTPRoute/shop/gone", "api", "r1", 6)];
    let found = routes(&sum(used), &[], &model, None);
    let rows: Vec<_> = found
        .rows
        .iter()
        .map(|row| (row.party.name.as_str(), row.route.as_str(), row.rules.len(), row.golden.is_some()))
        .collect();
    let expected = [
        ("api", "HTTPRoute/shop/gone", 0, true),
        ("web", "HTTPRoute/shop/a", 1, false),
        ("web", "HTTPRoute/shop/a", 0, true),
    ];
    assert_eq!(rows, expected);
}

#[test]
fn attempts_fail_once_more_for_each_retry_and_timeouts_are_counted_over_their_reasons() {
    let mut counts = Counts { classes: [0, 90, 0, 0, 10, 0, 0, 0], retries: 50, ..Counts::default() };
    for (name, count) in [
        ("UpstreamTimeout", 3),
        ("DeadlineExceeded", 2),
        ("IdleTimeout", 1),
        ("Timeout", 1),
        ("UpstreamReset", 9),
    ] {
        counts.add_reason(&name.into(), count);
    }
    let golden = counts.golden(10);
    assert_eq!((golden.success, golden.attempt_success), (Some(0.9), Some(0.6)));
    assert_eq!(golden.timeouts, 7);
    assert_eq!(Counts::default().golden(10).attempt_success, None);
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
