//! `tulle routes`: the rules of routes that are attached to Services, and what the sidecars of clients have sent by them.

use std::collections::BTreeSet;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use tulle_mesh::check::some_of;
use tulle_mesh::query::{Golden, Party, Paths, RouteBackend, RouteRow, Routes, RuleName};

use super::explain::{destination, visible};
use super::stat::{self, Shown};
use crate::cluster::{Context, Operator};
use crate::exists;
use crate::exit::CliError;
use crate::human;
use crate::objects;
use crate::output::{Format, Output, Table};
use crate::refresh::{self, Frame};

/// The reason of requests that reached no backend.
const NO_BACKEND: &str = "RouteNoBackend";

/// Options of `tulle routes`.
#[derive(clap::Args)]
pub struct Args {
    /// The Service: NAME or NAMESPACE/NAME; all if absent
    #[arg(value_name = "SERVICE")]
    service: Option<String>,
    #[command(flatten)]
    shown: Shown,
}

/// Runs `tulle routes`.
///
/// # Errors
/// The command line is wrong, or the operator gave no answer.
pub async fn run(context: &Context, args: Args) -> Result<(), CliError> {
    let (namespace, output) = (context.namespace(), &context.output);
    let window = stat::window(args.shown.window)?;
    let service = args.service.as_deref().map(|text| Service::read(text, namespace)).transpose()?;
    if let Some(named) = service.as_ref().and_then(|service| service.namespace.as_deref()) {
        visible(context, named)?;
    }
    refresh::show(context, args.shown.watch, async |operator: &Operator| {
        let mut parameters = vec![("window", window.as_str())];
        parameters.extend(namespace.map(|namespace| ("namespace", namespace)));
        let mut routes: Routes = operator.get(Paths::ROUTES, &parameters).await?;
        routes.rows.retain(|row| service.as_ref().is_none_or(|service| service.is(&row.party)));
        if output.format == Format::Name {
            // One name for each route of a Service, and not for each of its rules.
            routes.rows.dedup_by(|a, b| (&a.party, &a.route) == (&b.party, &b.route));
        }
        let mut notes = stat::notes(args.shown.window.as_secs(), routes.window, routes.lost);
        if routes.rows.is_empty() {
            if let Some(Service { namespace: Some(namespace), name }) = &service {
                exists::named(context, &[objects::SERVICE], namespace, name).await?;
            }
            let (named, place) = match &service {
                Some(service) => (format!("Service {}", service.name), service.namespace.as_deref()),
                None => ("a Service".to_owned(), namespace),
            };
            let place = place.map_or("any namespace".to_owned(), |name| format!("namespace {name}"));
            notes.push(format!("no route is attached to {named} in {place}"));
        }
        notes.extend(unused(&routes.rows));
        notes.extend(astray(&routes.rows));
        let shared = Shared { namespace: namespace.is_some(), service: service.is_some() };
        let now = Timestamp::now().as_second();
        let text = output.text(&routes, |wide| table(&routes, shared, wide, now, output))?;
        Ok(Frame { text, notes })
    })
    .await
}

/// The Service that is looked at.
#[derive(Debug, PartialEq, Eq)]
struct Service {
    /// `None`: those of this name in every namespace.
    namespace: Option<String>,
    name: String,
}

impl Service {
    /// Reads what [`destination`] reads, and with `-A` also a name alone. A port is left out, because sidecars do not
    /// count by port.
    fn read(text: &str, namespace: Option<&str>) -> Result<Self, CliError> {
        let (namespace, name) = destination(text, Some(namespace.unwrap_or_default()))?.service()?;
        let namespace = Some(namespace).filter(|namespace| !namespace.is_empty());
        Ok(Self { namespace, name })
    }

    fn is(&self, party: &Party) -> bool {
        party.name == self.name && self.namespace.as_ref().is_none_or(|own| *own == party.namespace)
    }
}

/// A note about routes by which nothing was sent: nobody may have called, or they are not in force, which the dashes of
/// their rows do not tell.
fn unused(rows: &[RouteRow]) -> Option<String> {
    let is_used = |row: &RouteRow| row.golden.is_some() || row.last_seen.is_some();
    let used: BTreeSet<&str> = rows.iter().filter(|row| is_used(row)).map(|row| row.route.as_str()).collect();
    let all: BTreeSet<&str> = rows.iter().map(|row| row.route.as_str()).collect();
    let unused: Vec<&str> = all.difference(&used).copied().collect();
    let first: Vec<&str> = unused.first()?.splitn(3, '/').collect();
    let [kind, namespace, name] = first.as_slice() else { return None };
    Some(format!(
        "nothing was counted for {}; `kubectl -n {namespace} describe {} {name}` shows whether it is accepted, and \
         `tulle explain` whether another route takes its requests",
        some_of(&unused),
        kind.to_ascii_lowercase()
    ))
}

/// A note about requests of a route that reached no backend. Their row has none.
fn astray(rows: &[RouteRow]) -> Option<String> {
    let lost = rows.iter().filter_map(|row| {
        let reasons = row.golden.as_ref()?.reasons.iter();
        let count: u64 = reasons.filter(|reason| reason.name == NO_BACKEND).map(|reason| reason.count).sum();
        (count > 0).then_some((row, count))
    });
    let lost: Vec<(&RouteRow, u64)> = lost.collect();
    let (first, _) = lost.first()?;
    let requests: u64 = lost.iter().map(|(_, count)| count).sum();
    let mut routes: Vec<&str> = lost.iter().map(|(row, _)| row.route.as_str()).collect();
    routes.dedup();
    let parts: Vec<&str> = first.route.splitn(3, '/').collect();
    let [kind, namespace, name] = parts.as_slice() else { return None };
    let what = if requests == 1 { "1 request".to_owned() } else { format!("{requests} requests") };
    Some(format!(
        "{what} of {} reached no backend ({NO_BACKEND}), in the rows with a dash as BACKEND; \
         `kubectl -n {namespace} describe {} {name}` shows in condition ResolvedRefs which backend does not exist",
        some_of(&routes),
        kind.to_ascii_lowercase()
    ))
}

/// What is left out of a table because all rows share it.
#[derive(Clone, Copy)]
struct Shared {
    namespace: bool,
    service: bool,
}

/// `now` in Unix seconds.
fn table(routes: &Routes, shared: Shared, wide: bool, now: i64, output: &Output) -> Table {
    let mut headers = Vec::new();
    if !shared.namespace {
        headers.push("NAMESPACE");
    }
    headers.push("ROUTE");
    if !shared.service {
        headers.push("SERVICE");
    }
    headers.extend(["RULE", "BACKEND", "SET", "SEEN", "RPS", "ASKED-OK", "ATTEMPT-OK", "P99", "RETRIES"]);
    if wide {
        headers.extend(["REVISION", "P50", "P95", "WORST", "TIMEOUTS", "4XX", "ABANDONED", "CONNS"]);
    }
    let rows = routes.rows.iter().map(|row| {
        let mut cells = Vec::with_capacity(headers.len());
        if !shared.namespace {
            cells.push(row.party.namespace.clone());
        }
        cells.push(stat::route_of(Some(&row.route), &row.party.namespace));
        if !shared.service {
            cells.push(row.party.name.clone());
        }
        cells.extend([rules(row), backend(row), set(row), seen(row, now)]);
        cells.extend(figures(row.golden.as_ref(), output));
        if wide {
            cells.push(row.revision.clone().unwrap_or_else(unknown));
            cells.extend(more(row.golden.as_ref()));
        }
        cells
    });
    Table { rows: rows.collect(), headers }
}

fn unknown() -> String {
    human::UNKNOWN.to_owned()
}

/// Names of the rules, or their places in the route from 0 where they have none.
fn rules(row: &RouteRow) -> String {
    let name = |rule: &RuleName| match rule.name.as_str() {
        "" => rule.index.to_string(),
        name => name.to_owned(),
    };
    if row.rules.is_empty() {
        return unknown();
    }
    row.rules.iter().map(name).collect::<Vec<_>>().join(",")
}

/// `api:80`, `payments/api:80` in another namespace than the Service of the route.
fn backend(row: &RouteRow) -> String {
    let Some(RouteBackend { party, port }) = &row.backend else { return unknown() };
    let name = match party.namespace == row.party.namespace {
        true => party.name.clone(),
        false => format!("{}/{}", party.namespace, party.name),
    };
    port.map_or_else(|| name.clone(), |port| format!("{name}:{port}"))
}

/// The side of a rollout; the revision where there is none.
fn set(row: &RouteRow) -> String {
    match row.set.as_str() {
        "" => row.revision.clone().unwrap_or_else(unknown),
        set => set.to_owned(),
    }
}

/// How long ago something was counted. Of the open slot of ten seconds the end may not have come.
fn seen(row: &RouteRow, now: i64) -> String {
    let ago = |at: i64| Duration::from_secs(u64::try_from(now.saturating_sub(at)).unwrap_or(0));
    row.last_seen.map_or_else(unknown, |at| human::age(ago(at)))
}

/// RPS ASKED-OK ATTEMPT-OK P99 RETRIES.
fn figures(golden: Option<&Golden>, output: &Output) -> [String; 5] {
    let Some(golden) = golden else { return std::array::from_fn(|_| unknown()) };
    [
        human::rate(golden.rps),
        stat::success(golden, output),
        human::percent(golden.attempt_success),
        human::millis(golden.p99_ms),
        human::count(golden.retries),
    ]
}

/// P50 P95 WORST TIMEOUTS 4XX ABANDONED CONNS: a TCPRoute has connections, and no requests.
fn more(golden: Option<&Golden>) -> [String; 7] {
    let Some(golden) = golden else { return std::array::from_fn(|_| unknown()) };
    [
        human::millis(golden.p50_ms),
        human::millis(golden.p95_ms),
        stat::worst(golden),
        human::count(golden.timeouts),
        human::count(golden.client_errors),
        human::count(golden.abandoned),
        human::count(golden.connections),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn party(namespace: &str, name: &str) -> Party {
        Party { namespace: namespace.into(), kind: "Service".into(), name: name.into() }
    }

    fn row(index: u32, name: &str, backend: Option<(&str, &str)>) -> RouteRow {
        RouteRow {
            party: party("shop", "web"),
            route: "GRPCRoute/shop/orders".into(),
            rules: vec![RuleName { index, name: name.into() }],
            backend: backend
                .map(|(namespace, name)| RouteBackend { party: party(namespace, name), port: Some(80) }),
            ..RouteRow::default()
        }
    }

    fn routes() -> Routes {
        let golden = Golden {
            rps: 3.42,
            success: Some(1.0),
            attempt_success: Some(0.625),
            p50_ms: Some(1.0),
            p99_ms: Some(7.0),
            retries: 5,
            timeouts: 2,
            connections: 9,
            ..Golden::default()
        };
        let used = RouteRow {
            set: "canary".into(),
            revision: Some("5d8f".into()),
            last_seen: Some(995),
            golden: Some(golden.clone()),
            ..row(0, "", Some(("shop", "web")))
        };
        let shared = RouteRow {
            rules: [1, 3].map(|index| RuleName { index, name: String::new() }).into(),
            revision: Some("77aa".into()),
            last_seen: Some(1_005),
            golden: Some(golden),
            ..row(1, "", Some(("payments", "api")))
        };
        let before = RouteRow { last_seen: Some(400), ..row(2, "old", Some(("shop", "old"))) };
        let rows = vec![used, shared, before, row(4, "", None)];
        Routes { window: 60, lost: 0, rows }
    }

    #[test]
    fn every_rule_is_shown_with_dashes_where_nothing_was_counted() {
        let expected = "\
ROUTE              RULE   BACKEND           SET      SEEN   RPS   ASKED-OK   ATTEMPT-OK   P99     RETRIES
grpcroute/orders   0      web:80            canary   5s     3.4   100.00%    62.50%       7.0ms   5
grpcroute/orders   1,3    payments/api:80   77aa     0s     3.4   100.00%    62.50%       7.0ms   5
grpcroute/orders   old    old:80            -        10m    -     -          -            -       -
grpcroute/orders   4      -                 -        -      -     -          -            -       -
";
        let shared = Shared { namespace: true, service: true };
        assert_eq!(table(&routes(), shared, false, 1_000, &Output::default()).to_string(), expected);
    }

    #[test]
    fn the_wide_table_of_all_services_says_which_one_and_which_revision() {
        let shared = Shared { namespace: false, service: false };
        let table = table(&routes(), shared, true, 1_000, &Output::default());
        assert_eq!(table.headers[..3], ["NAMESPACE", "ROUTE", "SERVICE"]);
        assert_eq!(table.rows[0][..3], ["shop", "grpcroute/orders", "web"]);
        assert_eq!(
            table.headers[12..],
            ["REVISION", "P50", "P95", "WORST", "TIMEOUTS", "4XX", "ABANDONED", "CONNS"]
        );
        assert_eq!(table.rows[0][12..], ["5d8f", "1.0ms", "-", "-", "2", "0", "0", "9"]);
        assert!(table.rows[3][3..].iter().all(|cell| cell == "-" || cell == "4"), "{:?}", table.rows[3]);
        assert!(table.rows.iter().all(|row| row.len() == table.headers.len()));
    }

    #[test]
    fn json_has_the_same_under_stable_names() {
        let json = serde_json::to_value(routes()).unwrap();
        let row = &json["rows"][0];
        assert_eq!(row["rules"][0]["index"], 0);
        assert_eq!(row["backend"]["party"]["name"], "web");
        assert_eq!((&row["backend"]["port"], &row["set"]), (&80.into(), &"canary".into()));
        assert_eq!((&row["lastSeen"], &row["revision"]), (&995.into(), &"5d8f".into()));
        assert_eq!(row["golden"]["attemptSuccess"], 0.625);
        assert!(json["rows"][3].get("golden").is_none(), "nothing was counted: {json}");
    }

    #[test]
    fn routes_of_one_name_in_two_namespaces_are_told_apart() {
        let of = |route: &str| RouteRow { route: route.into(), ..row(0, "", None) };
        let rows = vec![of("HTTPRoute/client/orders"), of("HTTPRoute/shop/orders")];
        let shared = Shared { namespace: true, service: true };
        let table = table(&Routes { rows, ..Routes::default() }, shared, false, 0, &Output::default());
        assert_eq!(table.names(), "client/httproute/orders\nhttproute/orders\n");
    }

    #[test]
    fn routes_without_any_request_are_named_with_the_command_that_says_whether_they_are_accepted() {
        let of = |route: &str, last_seen| RouteRow { route: route.into(), last_seen, ..row(0, "", None) };
        let idle = of("GRPCRoute/shop/orders", None);
        let half = [of("HTTPRoute/shop/web", None), of("HTTPRoute/shop/web", Some(7))];
        let rows = [&half[..], &[idle]].concat();
        let expected = "nothing was counted for GRPCRoute/shop/orders; `kubectl -n shop describe grpcroute orders` \
                        shows whether it is accepted, and `tulle explain` whether another route takes its requests";
        assert_eq!(unused(&rows).as_deref(), Some(expected));
        assert_eq!((unused(&half), unused(&[])), (None, None));
    }

    #[test]
    fn requests_that_reached_no_backend_are_counted_with_the_command_that_says_why() {
        let of = |name: &str, count| {
            let reasons = vec![tulle_mesh::query::Reason { name: name.into(), count }];
            let golden = Some(Golden { requests: count, reasons, ..Golden::default() });
            RouteRow { route: "HTTPRoute/shop/web".into(), golden, ..row(1, "", None) }
        };
        let rows = [of("RouteNoBackend", 7), of("UpstreamNone", 3), of("RouteNoBackend", 2)];
        let expected = "9 requests of HTTPRoute/shop/web reached no backend (RouteNoBackend), in the rows with a \
                        dash as BACKEND; `kubectl -n shop describe httproute web` shows in condition ResolvedRefs \
                        which backend does not exist";
        assert_eq!(astray(&rows).as_deref(), Some(expected));
        assert_eq!(astray(&rows[1..2]), None);
    }

    #[test]
    fn a_service_is_written_as_for_other_commands() {
        let service = |namespace: Option<&str>| Service {
            namespace: namespace.map(str::to_owned),
            name: "web".to_owned(),
        };
        for text in ["web", "svc/web", "services/web", "shop/web", "web.shop", "web:80", "shop/web:80"] {
            assert_eq!(Service::read(text, Some("shop")).unwrap(), service(Some("shop")), "{text}");
        }
        assert_eq!(Service::read("web", None).unwrap(), service(None));
        assert_eq!(Service::read("shop/web", None).unwrap(), service(Some("shop")));
        assert_eq!(Service::read("a/b/c", Some("shop")).unwrap_err().code(), 2);
        assert!(service(None).is(&party("shop", "web")) && service(Some("shop")).is(&party("shop", "web")));
        assert!(!service(Some("shop")).is(&party("payments", "web")));
        assert!(!service(None).is(&party("shop", "api")));
    }
}
