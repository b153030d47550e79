//! Golden tables of `tulle stat`, and how its command line is understood.

use tulle_mesh::query::Reason;

use super::*;

fn row(kind: &str, name: &str, golden: Golden) -> StatRow {
    let party = Party { namespace: "shop".into(), kind: kind.into(), name: name.into() };
    StatRow { party, meshed: Some(Meshed { with: 2, of: 3 }), golden, ..StatRow::default() }
}

fn failing() -> Golden {
    Golden {
        requests: 7_400,
        failures: 90,
        client_errors: 12,
        denied: 5,
        rps: 123.4,
        success: Some(0.9878),
        p50_ms: Some(4.21),
        p95_ms: Some(38.0),
        p99_ms: Some(1_234.0),
        retries: 1_200,
        timeouts: 7,
        reasons: vec![Reason { name: "UpstreamReset".into(), count: 80 }],
        connections: 3,
        bytes_up: 72_000,
        bytes_down: 60_000_000,
        ..Golden::default()
    }
}

fn drawn(rows: Vec<StatRow>, by: By, with_namespace: bool, wide: bool) -> String {
    let stat = Stat { window: 60, lost: 0, rows };
    table(&stat, by, with_namespace, wide, &Output::default()).to_string()
}

#[test]
fn workloads_show_their_golden_signals() {
    let rows = vec![row("Deployment", "web", failing()), row("Deployment", "idle", Golden::default())];
    let expected = "\
NAME   MESHED   RPS   SUCCESS   P50     P95    P99    WORST
web    2/3      123   98.78%    4.2ms   38ms   1.2s   UpstreamReset
idle   2/3      0     -         -       -      -      -
";
    assert_eq!(drawn(rows, By::Workload, false, false), expected);
}

#[test]
fn a_wide_table_of_all_namespaces_starts_with_the_namespace() {
    let expected = "\
NAMESPACE   NAME   RPS   SUCCESS   P50     P95    P99    WORST           RETRIES   TIMEOUTS   4XX   ABANDONED   DENIED   CONNS   IN        OUT
shop        web    123   98.78%    4.2ms   38ms   1.2s   UpstreamReset   1.2k      7          12    0           5        3       1.2kB/s   1.0MB/s
";
    assert_eq!(drawn(vec![row("Service", "web", failing())], By::Service, true, true), expected);
}

#[test]
fn rows_of_several_kinds_carry_the_kind() {
    let rows = vec![row("Deployment", "web", failing()), row("Job", "web", failing())];
    let drawn = drawn(rows, By::Workload, false, false);
    assert!(drawn.contains("deployment/web") && drawn.contains("job/web"), "{drawn}");
}

#[test]
fn routes_and_revisions_have_a_column_of_their_own() {
    let mut of_route = row("Service", "web", failing());
    of_route.route = Some("HTTPRoute/shop/checkout".into());
    let drawn_routes = drawn(vec![of_route], By::Route, false, false);
    assert!(drawn_routes.starts_with("NAME                 SERVICE   RPS"), "{drawn_routes}");
    assert!(drawn_routes.contains("httproute/checkout   web       123"), "{drawn_routes}");
    assert_eq!(route_of(Some("HTTPRoute/client/checkout"), "shop"), "client/httproute/checkout");
    assert_eq!(route_of(None, "shop"), "-");
    let mut of_revision = row("Deployment", "web", failing());
    of_revision.revision = Some("5d8f".into());
    let drawn_revisions = drawn(vec![of_revision], By::Revision, false, false);
    assert!(drawn_revisions.contains("web    5d8f       2/3      123"), "{drawn_revisions}");
}

#[test]
fn kinds_have_plural_and_short_names() {
    let read = |target: &str, name: Option<&str>| Target::read(target, name).unwrap();
    let all = Target { by: By::Workload, kind: None, name: None };
    assert_eq!(read("workloads", None), all);
    let web = Target { by: By::Workload, kind: Some("Deployment"), name: Some("web".into()) };
    assert_eq!(read("deploy/web", None), web);
    assert_eq!(read("Deployment", Some("web")), web);
    assert_eq!(read("svc", None).by, By::Service);
    assert_eq!(read("rev", None).by, By::Revision);
    assert_eq!(read("routes", None).by, By::Route);
}

#[test]
fn a_name_is_looked_up_among_the_kinds_that_it_may_be_of() {
    let kinds = |target: &str| -> Vec<&'static str> {
        Target::read(target, None).unwrap().kinds().iter().map(|kind| kind.kind).collect()
    };
    assert_eq!(kinds("svc/web"), ["Service"]);
    assert_eq!(kinds("deploy/web"), ["Deployment"]);
    assert_eq!(kinds("pod/web-1"), ["Pod"]);
    assert_eq!(kinds("workload/web"), ["Deployment", "StatefulSet", "DaemonSet", "Job", "Pod"]);
    assert!(kinds("route/web").is_empty());
}

#[test]
fn an_unknown_kind_is_a_wrong_command_line_that_says_what_was_meant() {
    let error = Target::read("web", None).unwrap_err();
    assert_eq!(error.code(), 2);
    assert!(error.to_string().ends_with("workload/web"), "{error}");
    assert_eq!(Target::read("svc/web", Some("web")).unwrap_err().code(), 2);
    assert_eq!(Target::read("svc/", None).unwrap_err().code(), 2);
}

#[test]
fn a_workload_without_a_namespace_is_one_of_the_namespace_that_is_looked_at() {
    assert_eq!(qualified("web", Some("shop")), Ok("shop/web".into()));
    assert_eq!(qualified("payments/web", Some("shop")), Ok("payments/web".into()));
    assert_eq!(qualified("payments/web", None), Ok("payments/web".into()));
    for wrong in ["", "/web", "shop/", "a/b/c"] {
        assert_eq!(qualified(wrong, Some("shop")).unwrap_err().code(), 2, "{wrong}");
    }
    assert!(qualified("web", None).unwrap_err().to_string().contains("which namespace"));
}

#[test]
fn a_time_that_the_operator_does_not_sum_is_refused() {
    assert_eq!(window(Duration::from_secs(60)), Ok("60".into()));
    assert_eq!(window(Duration::from_secs(5)).unwrap_err().code(), 2);
    assert_eq!(window(Duration::from_secs(21_601)).unwrap_err().code(), 2);
}

#[test]
fn what_the_counts_lack_is_said() {
    assert_eq!(notes(60, 60, 0), Vec::<String>::new());
    let expected = [
        "only the last 40s are known: the operator has no older counts",
        "1 report was lost on the way from sidecars: the counts are too low",
    ];
    assert_eq!(notes(60, 40, 1), expected);
}

#[test]
fn a_low_success_rate_is_coloured_and_still_a_number() {
    let colour = Output { colour: true, ..Output::default() };
    let of = |part| success(&Golden { success: part, ..Golden::default() }, &colour);
    assert_eq!(of(Some(0.5)), "\u{1b}[31m50.00%\u{1b}[0m");
    assert_eq!(of(Some(0.98)), "\u{1b}[33m98.00%\u{1b}[0m");
    assert_eq!(of(Some(1.0)), "100.00%");
    assert_eq!(of(None), "-");
}

#[test]
fn what_is_not_counted_by_pod_is_said_with_the_command_that_names_pods() {
    let note = of_pods(Some("shop"));
    assert!(note.contains("`tulle stat workload -n shop`"), "{note}");
    assert!(note.contains("`tulle tap WORKLOAD -n shop --status 5xx -o wide`"), "{note}");
    assert!(of_pods(None).contains("`tulle stat workload -A`"));
    assert_eq!(Target::read("pod/web-1", None).unwrap().kind, Some(POD));
}
