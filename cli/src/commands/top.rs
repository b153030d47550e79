//! `tulle top`: the busiest connections between workloads, refreshed.

use std::io::IsTerminal as _;
use std::time::Duration;

use tulle_mesh::query::{Edge, Edges};

use super::edges::{ask, party};
use super::stat;
use crate::cluster::{Context, Operator};
use crate::exit::CliError;
use crate::human;
use crate::output::{Output, Table};
use crate::refresh::{self, Frame};

/// Options of `tulle top`.
#[derive(clap::Args)]
pub struct Args {
    /// The time that is summed, from 10s to 6h
    #[arg(long, default_value = "30s", value_parser = human::duration)]
    window: Duration,
    /// How many rows are shown at most; 0 for all
    #[arg(long, default_value_t = 20)]
    limit: usize,
    /// Print once instead of every two seconds, as where standard output is not a terminal
    #[arg(long)]
    once: bool,
}

/// Runs `tulle top`.
///
/// # Errors
/// The command line is wrong, or the operator gave no answer.
pub async fn run(context: &Context, args: Args) -> Result<(), CliError> {
    let (namespace, output) = (context.namespace(), &context.output);
    let window = stat::window(args.window)?;
    refresh::show(context, again(args.once, std::io::stdout().is_terminal()), async |operator: &Operator| {
        let edges = busiest(ask(operator, namespace, &window).await?, args.limit);
        let mut notes = stat::notes(args.window.as_secs(), edges.window, edges.lost);
        if edges.edges.is_empty() {
            notes.push(stat::nothing(namespace, args.window));
        }
        let text = output.text(&edges, |_| table(&edges, namespace, output))?;
        Ok(Frame { text, notes })
    })
    .await
}

/// Whether it is drawn again and again: a pipe without an end would keep a script waiting.
fn again(once: bool, terminal: bool) -> bool {
    terminal && !once
}

/// The edges with the most requests per second, the busiest first.
fn busiest(mut edges: Edges, limit: usize) -> Edges {
    edges.edges.sort_by(|a, b| b.golden.rps.total_cmp(&a.golden.rps));
    if limit > 0 {
        edges.edges.truncate(limit);
    }
    edges
}

fn table(edges: &Edges, namespace: Option<&str>, output: &Output) -> Table {
    let rows = edges.edges.iter().map(|Edge { source, destination, golden, .. }| {
        vec![
            party(source, namespace),
            party(destination, namespace),
            human::rate(golden.rps),
            stat::success(golden, output),
            human::millis(golden.p99_ms),
            stat::worst(golden),
        ]
    });
    Table { headers: vec!["SOURCE", "DESTINATION", "RPS", "SUCCESS", "P99", "WORST"], rows: rows.collect() }
}

#[cfg(test)]
mod tests {
    use tulle_mesh::query::{Golden, Party};

    use super::*;

    fn edge(name: &str, rps: f64) -> Edge {
        let of =
            |kind: &str, name: &str| Party { namespace: "shop".into(), kind: kind.into(), name: name.into() };
        let golden = Golden { rps, success: Some(0.5), p99_ms: Some(12.0), ..Golden::default() };
        Edge { source: of("Deployment", name), destination: of("Service", "db"), golden, ..Edge::default() }
    }

    #[test]
    fn without_a_terminal_it_prints_once() {
        assert!(again(false, true));
        assert!(!again(true, true) && !again(false, false));
    }

    #[test]
    fn the_busiest_edges_come_first_and_the_rest_is_left_out() {
        let edges =
            Edges { window: 10, lost: 0, edges: vec![edge("a", 1.0), edge("b", 3.0), edge("c", 2.0)] };
        let expected = "\
SOURCE   DESTINATION   RPS   SUCCESS   P99    WORST
b        svc/db        3.0   50.00%    12ms   -
c        svc/db        2.0   50.00%    12ms   -
";
        let shown = busiest(edges.clone(), 2);
        assert_eq!(table(&shown, Some("shop"), &Output::default()).to_string(), expected);
        assert_eq!(busiest(edges, 0).edges.len(), 3);
    }
}
