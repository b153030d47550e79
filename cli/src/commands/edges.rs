//! `tulle edges`: who talks to whom.

use tulle_mesh::query::{Edge, Edges, Party, Paths};

use super::stat::{self, Shown};
use crate::cluster::{Context, Operator};
use crate::exit::CliError;
use crate::human;
use crate::output::{Output, Table};
use crate::refresh::{self, Frame};

/// Options of `tulle edges`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    shown: Shown,
}

/// Runs `tulle edges`.
///
/// # Errors
/// The command line is wrong, or the operator gave no answer.
pub async fn run(context: &Context, args: Args) -> Result<(), CliError> {
    let (namespace, output) = (context.namespace(), &context.output);
    let window = stat::window(args.shown.window)?;
    refresh::show(context, args.shown.watch, async |operator: &Operator| {
        let edges = ask(operator, namespace, &window).await?;
        let mut notes = stat::notes(args.shown.window.as_secs(), edges.window, edges.lost);
        if edges.edges.is_empty() {
            notes.push(stat::nothing(namespace, args.shown.window));
        }
        let text = output.text(&edges, |wide| table(&edges, namespace, wide, output))?;
        Ok(Frame { text, notes })
    })
    .await
}

/// The edges of one namespace or of all.
///
/// # Errors
/// The operator gave no answer.
pub async fn ask(operator: &Operator, namespace: Option<&str>, window: &str) -> Result<Edges, CliError> {
    let mut parameters = vec![("window", window)];
    parameters.extend(namespace.map(|namespace| ("namespace", namespace)));
    operator.get(Paths::EDGES, &parameters).await
}

fn table(edges: &Edges, namespace: Option<&str>, wide: bool, output: &Output) -> Table {
    let mut headers = vec!["SRC", "DST", "PORT", "PROTO", "MTLS", "RPS", "SUCCESS", "P99", "WORST"];
    if wide {
        headers.extend(["DENIED", "CONNS", "IN", "OUT", "ZONE", "CLIENT-ID", "SERVER-ID"]);
    }
    let rows = edges.edges.iter().map(|edge| {
        let golden = &edge.golden;
        let mut cells = vec![
            party(&edge.source, namespace),
            party(&edge.destination, namespace),
            edge.port.map_or_else(|| human::UNKNOWN.to_owned(), |port| port.to_string()),
            edge.protocol.clone(),
            secured(edge.is_secured()),
            human::rate(golden.rps),
            stat::success(golden, output),
            human::millis(golden.p99_ms),
            stat::worst(golden),
        ];
        if wide {
            cells.extend([
                human::count(golden.denied),
                human::count(golden.connections),
                human::bytes_per_second(golden.bytes_up, edges.window),
                human::bytes_per_second(golden.bytes_down, edges.window),
                zones(edge),
                list(&edge.client_ids),
                list(&edge.server_ids),
            ]);
        }
        cells
    });
    Table { rows: rows.collect(), headers }
}

/// Whether mTLS secures it, as a cell.
pub fn secured(secured: Option<bool>) -> String {
    match secured {
        Some(true) => "yes",
        Some(false) => "no",
        None => human::UNKNOWN,
    }
    .to_owned()
}

/// The zones of the pods at both ends: `eu-a > eu-a,eu-b`.
fn zones(edge: &Edge) -> String {
    if edge.client_zones.is_empty() && edge.server_zones.is_empty() {
        return human::UNKNOWN.to_owned();
    }
    format!("{} > {}", list(&edge.client_zones), list(&edge.server_zones))
}

fn list(values: &[String]) -> String {
    if values.is_empty() { human::UNKNOWN.to_owned() } else { values.join(",") }
}

/// The name of a party, with its namespace where it is another than the one that is looked at: `web`, `svc/web`,
/// `payments/svc/web`, `plain` for clients without a sidecar.
pub fn party(party: &Party, namespace: Option<&str>) -> String {
    let name = match (party.kind.as_str(), party.name.as_str()) {
        ("Plain", "") => "plain".to_owned(),
        ("Plain", name) => format!("plain/{name}"),
        ("Service", name) => format!("svc/{name}"),
        (_, "") => human::UNKNOWN.to_owned(),
        (_, name) => name.to_owned(),
    };
    if party.namespace.is_empty() || Some(party.namespace.as_str()) == namespace {
        name
    } else {
        format!("{}/{name}", party.namespace)
    }
}

#[cfg(test)]
mod tests {
    use tulle_mesh::query::{Golden, Reason};

    use super::*;

    fn of(namespace: &str, kind: &str, name: &str) -> Party {
        Party { namespace: namespace.into(), kind: kind.into(), name: name.into() }
    }

    #[test]
    fn edges_say_who_talks_to_whom_and_how() {
        let requests = Golden { rps: 12.0, success: Some(1.0), p99_ms: Some(7.0), ..Golden::default() };
        let bytes = Golden { connections: 4, bytes_up: 600, bytes_down: 120_000, ..Golden::default() };
        let edges = Edges {
            window: 60,
            lost: 0,
            edges: vec![
                Edge {
                    source: of("shop", "Deployment", "web"),
                    destination: of("payments", "Service", "checkout"),
                    port: Some(8080),
                    protocol: "http2".into(),
                    mtls: true,
                    client_ids: vec!["spiffe://c/ns/shop/sa/web".into()],
                    server_ids: vec!["spiffe://c/ns/payments/sa/checkout".into()],
                    client_zones: vec!["eu-a".into()],
                    server_zones: vec!["eu-a".into(), "eu-b".into()],
                    golden: requests,
                },
                Edge {
                    source: of("", "Plain", ""),
                    destination: of("shop", "StatefulSet", "db"),
                    protocol: "opaque".into(),
                    golden: bytes,
                    ..Edge::default()
                },
            ],
        };
        let expected = "\
SRC     DST                     PORT   PROTO    MTLS   RPS   SUCCESS   P99     WORST
web     payments/svc/checkout   8080   http2    yes    12    100.00%   7.0ms   -
plain   db                      -      opaque   no     0     -         -       -
";
        let output = Output::default();
        assert_eq!(table(&edges, Some("shop"), false, &output).to_string(), expected);
        let wide = table(&edges, None, true, &output).to_string();
        assert!(wide.contains("shop/web"), "{wide}");
        assert!(wide.contains("10B/s"), "{wide}");
        assert!(wide.contains("2.0kB/s"), "{wide}");
        let ends = "   eu-a > eu-a,eu-b   spiffe://c/ns/shop/sa/web   spiffe://c/ns/payments/sa/checkout\n";
        assert!(wide.contains(ends), "{wide}");
        let unknown = wide.lines().last().unwrap().split_whitespace().rev().take(3).collect::<Vec<_>>();
        assert_eq!(unknown, ["-"; 3], "{wide}");
        let header = wide.lines().next().unwrap();
        assert!(header.ends_with("ZONE               CLIENT-ID                   SERVER-ID"), "{header}");
        let json = serde_json::to_value(&edges).unwrap();
        assert_eq!(json["edges"][0]["port"], 8080);
        assert_eq!(json["edges"][0]["serverZones"][1], "eu-b");
        assert_eq!(json["edges"][0]["clientIds"][0], "spiffe://c/ns/shop/sa/web");
    }

    #[test]
    fn an_edge_whose_requests_are_denied_says_so() {
        let denied = Golden {
            requests: 118,
            denied: 118,
            rps: 2.0,
            p99_ms: Some(2.0),
            reasons: vec![Reason { name: "PolicyDenied".into(), count: 118 }],
            ..Golden::default()
        };
        let (source, destination) = (of("tonc", "Deployment", "batch"), of("tonc", "Service", "stock"));
        let edge = Edge { source, destination, mtls: true, golden: denied, ..Edge::default() };
        let edges = Edges { window: 60, lost: 0, edges: vec![edge] };
        let last = |wide: bool| -> Vec<String> {
            let table = table(&edges, Some("tonc"), wide, &Output::default()).to_string();
            table.lines().last().unwrap().split_whitespace().map(str::to_owned).collect()
        };
        assert_eq!(last(false).last().map(String::as_str), Some("PolicyDenied"));
        let wide = last(true);
        let at = wide.iter().position(|word| word == "PolicyDenied").unwrap();
        assert_eq!(wide[at + 1], "118", "{wide:?}");
    }
}
