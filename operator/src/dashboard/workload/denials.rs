//! The table of single denials. Counts of all denials are in the table of failures.

use maud::{Markup, html};
use tulle_mesh::query::{DenialRow, Denials};

use crate::telemetry::denials::OF_WORKLOAD;

use super::super::layout::columns;
use super::super::words::{NONE, clock_with_seconds, command, count, party};
use super::Workload;

/// The last denials, or why there are none.
pub(super) fn recent(view: &Workload<'_>) -> Markup {
    let Denials { leader, dropped, rows } = &view.denials;
    html! {
        @if rows.is_empty() {
            p.empty { (nothing(view)) }
        } @else {
            table {
                caption {
                    "Refused by access rules or Strict mTLS: the last " (OF_WORKLOAD)
                    " that sidecars reported, of six hours at most, whatever the window"
                }
                (columns(&["Time (UTC)", "Caller", "Request", "MeshPolicy", "Rule", "Replay"]))
                tbody { @for one in rows { (row(&view.me.namespace, one)) } }
            }
            @if !leader {
                p.note {
                    "This replica of the operator does not lead: denials of the last seconds may be missing."
                }
            }
            @if *dropped > 0 {
                p.note {
                    (count(*dropped))
                    " more were refused and are not listed: a sidecar reports the last 5 of five seconds."
                }
            }
        }
    }
}

fn row(namespace: &str, denied: &DenialRow) -> Markup {
    let hidden = || "a client of another namespace".to_owned();
    html! {
        tr {
            th scope="row" { (clock_with_seconds(denied.at_unix_ms.div_euclid(1_000))) }
            td { (denied.caller.as_ref().map_or_else(hidden, party)) }
            td {
                @if denied.method.is_empty() { "opaque connection" }
                @else { (denied.method) " " (denied.path) @if denied.cut { " (cut)" } }
            }
            td { @if denied.policy.is_empty() { (NONE) } @else { (denied.policy) } }
            td { (denied.rule) }
            td { code { (command(&["tulle", "explain", "--denial", &denied.id, "-n", namespace])) } }
        }
    }
}

/// Why no denial is listed.
fn nothing(view: &Workload<'_>) -> String {
    if !view.pods.iter().any(|pod| pod.connected) {
        return view.nothing();
    }
    if view.row.golden.denied > 0 {
        return format!(
            "Something was denied in the last {}, but no single one is known: what a limit refuses has no id, a sidecar of \
             an earlier version reports counts only, and a leader that crashes loses those of its last seconds.",
            view.window.name()
        );
    }
    "Access rules and Strict mTLS have refused nothing here since this operator leads, or in the last six hours."
        .into()
}
