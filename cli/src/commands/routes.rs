//! `tulle routes`: the routes of Services, as the sidecars of clients have seen them.

use tulle_mesh::query::{By, Paths, Stat, StatRow};

use super::stat::{self, Shown};
use crate::cluster::{Context, Operator};
use crate::exit::CliError;
use crate::human;
use crate::output::{Output, Table};
use crate::refresh::{self, Frame};

/// Options of `tulle routes`.
#[derive(clap::Args)]
pub struct Args {
    /// The Service; all if absent
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
    let service = args.service.as_deref().map(service);
    refresh::show(context, args.shown.watch, async |operator: &Operator| {
        let mut parameters = vec![("by", stat::word(By::Route)), ("window", window.as_str())];
        parameters.extend(namespace.map(|namespace| ("namespace", namespace)));
        let mut routes: Stat = operator.get(Paths::STAT, &parameters).await?;
        routes.rows.retain(|row| service.is_none_or(|service| row.party.name == service));
        let mut notes = stat::notes(args.shown.window.as_secs(), routes.window, routes.lost);
        if routes.rows.is_empty() {
            notes.push(format!(
                "no request has matched a route in the last {}",
                human::age(args.shown.window)
            ));
        }
        let text = output.text(&routes, |wide| table(&routes, namespace.is_none(), wide, output))?;
        Ok(Frame { text, notes })
    })
    .await
}

/// The name of a Service that may be written as `svc/web`.
fn service(name: &str) -> &str {
    ["svc/", "service/", "services/"].iter().find_map(|kind| name.strip_prefix(kind)).unwrap_or(name)
}

fn table(routes: &Stat, with_namespace: bool, wide: bool, output: &Output) -> Table {
    let mut headers = Vec::new();
    if with_namespace {
        headers.push("NAMESPACE");
    }
    headers.extend(["ROUTE", "SERVICE", "RPS", "SUCCESS", "P50", "P95", "P99", "WORST"]);
    if wide {
        headers.extend(["RETRIES", "4XX", "ABANDONED"]);
    }
    let rows = routes.rows.iter().map(|StatRow { party, route, golden, .. }| {
        let mut cells = Vec::with_capacity(headers.len());
        if with_namespace {
            cells.push(party.namespace.clone());
        }
        cells.extend([stat::route(route.as_deref()), party.name.clone()]);
        cells.extend(stat::signals(golden, output));
        if wide {
            cells.extend([golden.retries, golden.client_errors, golden.abandoned].map(human::count));
        }
        cells
    });
    Table { rows: rows.collect(), headers }
}

#[cfg(test)]
mod tests {
    use tulle_mesh::query::{Golden, Party};

    use super::*;

    #[test]
    fn a_route_is_shown_with_its_service() {
        let party = Party { namespace: "shop".into(), kind: "Service".into(), name: "web".into() };
        let golden =
            Golden { rps: 3.42, success: Some(1.0), p50_ms: Some(1.0), retries: 5, ..Golden::default() };
        let route = Some("GRPCRoute/shop/orders".to_owned());
        let routes =
            Stat { window: 60, lost: 0, rows: vec![StatRow { party, route, golden, ..StatRow::default() }] };
        let expected = "\
NAMESPACE   ROUTE              SERVICE   RPS   SUCCESS   P50     P95   P99   WORST   RETRIES   4XX   ABANDONED
shop        grpcroute/orders   web       3.4   100.00%   1.0ms   -     -     -       5         0     0
";
        assert_eq!(table(&routes, true, true, &Output::default()).to_string(), expected);
    }

    #[test]
    fn a_service_may_be_written_with_its_kind() {
        assert_eq!(service("svc/web"), "web");
        assert_eq!(service("service/web"), "web");
        assert_eq!(service("web"), "web");
    }
}
