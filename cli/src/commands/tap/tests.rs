//! What is asked for, and what is printed.

use tulle_mesh::query::Party;

use super::*;
use crate::args::Global;

fn context(namespace: Option<&str>) -> Context {
    Context::new(&Global {
        namespace: namespace.map(str::to_owned),
        all_namespaces: namespace.is_none(),
        kubeconfig: Some("/does/not/exist".into()),
        ..Global::default()
    })
}

/// The parameters as one text.
fn asked(namespace: Option<&str>, args: Args) -> Result<String, CliError> {
    let parameters = parameters(&context(namespace), &Args { rate: 20, ..args })?;
    let parameters: Vec<String> = parameters.iter().map(|(name, value)| format!("{name}={value}")).collect();
    Ok(parameters.join("&"))
}

fn some(text: &str) -> Option<String> {
    Some(text.to_owned())
}

#[test]
fn options_become_parameters() {
    let args = Args {
        workload: some("deploy/web"),
        to: some("db"),
        method: some("GET"),
        path: some("/cart/**"),
        status: some("5xx"),
        denied: true,
        slow: Some(Duration::from_millis(200)),
        headers: vec!["user-agent".into(), "x-id".into()],
        ..Args::default()
    };
    let expected = "namespace=shop&name=web&direction=outbound&peer=shop/db&method=GET&path=/cart/**&status=5xx\
                    &denied=true&slow=200&header=user-agent&header=x-id&rate=20";
    assert_eq!(asked(Some("shop"), args).as_deref(), Ok(expected));
}

#[test]
fn without_a_workload_all_of_the_namespace_is_asked_for_or_all_of_the_mesh() {
    assert_eq!(asked(Some("shop"), Args::default()).as_deref(), Ok("namespace=shop&rate=20"));
    assert_eq!(asked(None, Args::default()).as_deref(), Ok("rate=20"));
    let from = Args { workload: some("shop/web"), from: some("payments/batch"), ..Args::default() };
    let expected = "namespace=shop&name=web&direction=inbound&peer=payments/batch&rate=20";
    assert_eq!(asked(None, from).as_deref(), Ok(expected));
}

#[test]
fn what_cannot_be_asked_for_is_a_wrong_command_line() {
    let workload = |text: &str| Args { workload: some(text), ..Args::default() };
    let from = |text: &str| Args { from: some(text), ..Args::default() };
    for (namespace, args) in [
        (Some("shop"), workload("payments/web")),
        (None, workload("web")),
        (None, from("batch")),
        (Some("shop"), from("a/b/c")),
        (Some("shop"), from("/batch")),
        (Some("shop"), Args { slow: Some(Duration::ZERO), ..Args::default() }),
    ] {
        let error = asked(namespace, args.clone()).unwrap_err();
        assert_eq!(error.code(), 2, "{args:?}: {error}");
    }
}

#[test]
fn what_the_operator_would_refuse_is_a_wrong_command_line_before_anything_is_printed() {
    let status = |text: &str| Args { status: some(text), ..Args::default() };
    let header = |text: &str| Args { headers: vec![text.into()], ..Args::default() };
    let wrong = [
        status("abc"),
        status("99"),
        status("6xx"),
        header("cookie"),
        header("Authorization"),
        header("a b"),
    ];
    for args in wrong {
        let error = asked(Some("shop"), args.clone()).unwrap_err();
        assert_eq!(error.code(), 2, "{args:?}: {error}");
    }
    for args in [status("503"), status("5xx"), status("4XX"), header("User-Agent")] {
        assert!(asked(Some("shop"), args.clone()).is_ok(), "{args:?}");
    }
}

#[test]
fn what_is_sent_to_is_a_service_or_the_account_of_pods_that_are_dialled() {
    let of = |args: Args| -> Vec<&'static str> { peers(&args).iter().map(|kind| kind.kind).collect() };
    assert_eq!(of(Args { to: some("db"), ..Args::default() }), ["Service", "ServiceAccount"]);
    assert_eq!(of(Args { from: some("batch"), ..Args::default() }), ["ServiceAccount"]);
}

fn request() -> TapRequest {
    let of =
        |kind: &str, name: &str| Party { namespace: "shop".into(), kind: kind.into(), name: name.into() };
    TapRequest {
        time: "2026-03-01T10:20:30.456Z".into(),
        direction: "inbound".into(),
        pod: "shop/web-1".into(),
        source: of("ServiceAccount", "load"),
        destination: of("Deployment", "web"),
        method: "GET".into(),
        host: "web".into(),
        path: "/cart".into(),
        status: Some(403),
        latency_ms: 0.42,
        mtls: true,
        reason: some("PolicyDenied"),
        protocol: "http1".into(),
        attempts: 1,
        ..TapRequest::default()
    }
}

fn columns(wide: bool, headers: bool) -> Columns {
    Columns { wide, headers, namespace: some("shop") }
}

#[test]
fn rows_stand_below_their_headers() {
    let columns = columns(false, false);
    let table = columns.head() + &columns.row(&request());
    let expected = "\
TIME           DIR   SRC                    DST                    METHOD   HOST                   PATH                       STATUS   LATENCY   MTLS   WHY
10:20:30.456   in    load                   web                    GET      web                    /cart                      403      0.42ms    yes    PolicyDenied
";
    assert_eq!(table, expected);
}

#[test]
fn a_wide_row_has_the_pod_the_route_and_the_headers() {
    let outbound = TapRequest {
        direction: "outbound".into(),
        status: Some(200),
        grpc_status: Some(14),
        reason: None,
        route: some("HTTPRoute/shop/cart"),
        revision: some("r2"),
        attempts: 3,
        headers: vec![("user-agent".into(), "curl/8".into()), ("x-id".into(), "7".into())],
        ..request()
    };
    let words = |text: String| {
        text.split("   ")
            .map(str::trim)
            .filter(|word| !word.is_empty())
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let head = words(columns(true, false).head());
    assert_eq!(head[10..], ["WHY", "POD", "ROUTE", "REVISION", "ATTEMPTS", "HEADERS"]);
    let row = words(columns(true, false).row(&outbound));
    assert_eq!((row[1].as_str(), row[7].as_str()), ("out", "200/14"));
    assert_eq!(row[10..], ["-", "shop/web-1", "httproute/cart", "r2", "3", "user-agent=curl/8; x-id=7"]);
    // Headers that are asked for are shown in any table.
    assert_eq!(words(columns(false, true).row(&outbound)).last().unwrap(), "user-agent=curl/8; x-id=7");
    assert_eq!(words(columns(false, true).row(&request())).last().unwrap(), "-");
}

#[test]
fn a_row_moves_no_cursor_whatever_a_client_has_sent() {
    let evil = TapRequest { path: "/\u{1b}[2J\nfake".into(), ..request() };
    let row = columns(false, false).row(&evil);
    assert!(row.contains("/\u{fffd}[2J\u{fffd}fake") && row.lines().count() == 1, "{row}");
}

#[test]
fn a_request_is_one_line_of_json_or_one_document_of_yaml() {
    let json = text(Format::Json, &columns(false, false), &request()).unwrap();
    assert_eq!(json.lines().count(), 1);
    assert_eq!(serde_json::from_str::<TapRequest>(&json).unwrap(), request());
    let yaml = text(Format::Yaml, &columns(false, false), &request()).unwrap();
    assert!(yaml.starts_with("---\n"));
    assert_eq!(serde_yaml::from_str::<TapRequest>(&yaml).unwrap(), request());
}

fn counts(passed: u64, lost: u64) -> Tap {
    Tap::Counts { passed, lost, not_shown: None, refused: Vec::new() }
}

#[test]
fn that_some_sidecars_are_not_looked_at_is_said_once_and_each_refusal_when_it_is_heard() {
    let mut tally = Tally::default();
    assert!(tally.missing(None, &[]).is_empty());
    let lines = tally.missing(Some(3), &[]);
    assert!(lines.len() == 1 && lines[0].contains("does not look at 3 more sidecars"), "{lines:?}");
    let lines = tally.missing(Some(4), &["shop/web-1: 4 taps are open already".to_owned()]);
    assert!(lines.len() == 1 && lines[0].contains("shop/web-1: 4 taps are open already"), "{lines:?}");
}

#[test]
fn the_last_line_says_what_was_shown_and_what_was_not() {
    let mut tally = Tally::default();
    assert_eq!(tally.take(Heard::Line(Tap::Request(Box::new(request())))), Some(request()));
    assert_eq!(tally.lines(), ["1 shown, 1 passed the filter, 0 lost"], "it is not counted yet");
    assert_eq!(tally.take(Heard::Line(counts(7, 5))), None);
    assert_eq!(tally.take(Heard::Line(counts(2, 1))), None);
    assert_eq!(tally.lines(), ["1 shown, 9 passed the filter, 6 lost"]);
}

#[test]
fn where_nothing_has_passed_a_note_says_where_to_look() {
    let lines = Tally::default().lines();
    assert_eq!(lines[0], "0 shown, 0 passed the filter, 0 lost");
    assert!(lines[1].contains("`tulle pods`") && lines[1].contains("`tulle stat`"), "{lines:?}");
}

#[test]
fn pods_that_cannot_be_tapped_are_named() {
    assert_eq!(unable_line(&[]), None);
    let line = unable_line(&["shop/old-1".to_owned(), "shop/old-2".to_owned()]).unwrap();
    assert!(line.contains("shop/old-1, shop/old-2"), "{line}");
}
