//! A request as a row. Rows are printed as they come, so that columns have fixed widths; a longer cell moves what follows.

use tulle_mesh::query::TapRequest;

use crate::commands::{edges, stat};
use crate::human;
use crate::output;

/// Columns that every table has, with their widths.
const ALWAYS: [(&str, usize); 10] = [
    ("TIME", 12),
    ("DIR", 3),
    ("SRC", 20),
    ("DST", 20),
    ("METHOD", 6),
    ("HOST", 20),
    ("PATH", 24),
    ("STATUS", 6),
    ("LATENCY", 7),
    ("MTLS", 4),
];
/// The last of them.
const WHY: (&str, usize) = ("WHY", 14);
/// Columns of a wide table.
const WIDE: [(&str, usize); 4] = [("POD", 28), ("ROUTE", 20), ("REVISION", 12), ("ATTEMPTS", 8)];
/// A column of wide tables, and of all where headers are asked for.
const HEADERS: (&str, usize) = ("HEADERS", 0);

/// The columns of a table.
pub(super) struct Columns {
    /// It is a wide one.
    pub wide: bool,
    /// Headers are asked for.
    pub headers: bool,
    /// The namespace that is looked at: its name is left out.
    pub namespace: Option<String>,
}

impl Columns {
    fn columns(&self) -> Vec<(&'static str, usize)> {
        let mut columns = ALWAYS.to_vec();
        columns.push(WHY);
        if self.wide {
            columns.extend(WIDE);
        }
        if self.wide || self.headers {
            columns.push(HEADERS);
        }
        columns
    }

    /// The row of headers.
    pub(super) fn head(&self) -> String {
        let (names, widths): (Vec<_>, Vec<_>) = self.columns().into_iter().unzip();
        output::line(&names, &widths)
    }

    /// The row of a request.
    pub(super) fn row(&self, request: &TapRequest) -> String {
        let widths: Vec<usize> = self.columns().into_iter().map(|(_, width)| width).collect();
        let namespace = self.namespace.as_deref();
        let mut cells = vec![
            time(&request.time).to_owned(),
            match request.direction.as_str() {
                "inbound" => "in".to_owned(),
                "outbound" => "out".to_owned(),
                other => other.to_owned(),
            },
            edges::party(&request.source, namespace),
            edges::party(&request.destination, namespace),
            dash(&request.method),
            dash(&request.host),
            dash(&request.path),
            status(request),
            human::millis(Some(request.latency_ms)),
            edges::secured(request.is_secured()),
            dash(request.reason.as_deref().unwrap_or_default()),
        ];
        if self.wide {
            cells.extend([
                request.pod.clone(),
                stat::route(request.route.as_deref()),
                dash(request.revision.as_deref().unwrap_or_default()),
                request.attempts.to_string(),
            ]);
        }
        if self.wide || self.headers {
            let headers: Vec<String> =
                request.headers.iter().map(|(name, value)| format!("{name}={value}")).collect();
            cells.push(dash(&headers.join("; ")));
        }
        output::line(&cells, &widths)
    }
}

/// The time of day, in UTC, of a time in RFC 3339.
fn time(text: &str) -> &str {
    text.split_once('T').map_or(text, |(_, time)| time.trim_end_matches('Z'))
}

/// The status, with that of gRPC behind it: `200/14`.
fn status(request: &TapRequest) -> String {
    let status = request.status.map_or_else(|| human::UNKNOWN.to_owned(), |status| status.to_string());
    match request.grpc_status {
        Some(grpc) => format!("{status}/{grpc}"),
        None => status,
    }
}

fn dash(text: &str) -> String {
    if text.is_empty() { human::UNKNOWN.to_owned() } else { text.to_owned() }
}
