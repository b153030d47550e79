//! The operator: who leads, how much it holds, its root certificate, and its MeshConfig.

use super::words::duration;
use super::{Condition, Finding, LATE, View, list as checks};
use crate::query::Health;

/// What is known of the leader.
#[derive(Clone, Copy, Debug)]
pub enum Leadership<'a> {
    /// The Lease, from the API server.
    Lease {
        /// The pod that holds it; empty: none.
        holder: &'a str,
        /// When it was last renewed, in Unix seconds.
        renewed: Option<i64>,
    },
    /// There is no Lease.
    NoLease,
    /// A replica of the operator was asked instead of the API server.
    Replica {
        /// It leads, or knows which one does.
        knows_leader: bool,
    },
}

/// T0303: a replica leads.
pub fn leader(leadership: &Leadership<'_>, view: &View<'_>) -> Finding {
    let system = view.system;
    let logs = format!("kubectl -n {system} logs deployment/tulle-operator");
    let none = |found: &str| {
        checks::LEADER.error(found).hint("status and Canaries stand still until one does").fix(logs.as_str())
    };
    match *leadership {
        Leadership::Lease { holder, renewed: Some(renewed) } if !holder.is_empty() => {
            let age = view.now.saturating_sub(renewed);
            if age <= LATE {
                return checks::LEADER.ok(format!("pod {holder} leads"));
            }
            checks::LEADER
                .error(format!("pod {holder} has not renewed the Lease for {}", duration(age)))
                .hint(
                    "status and Canaries stand still; if the operator is well, compare this machine's clock",
                )
                .fix(logs.as_str())
        }
        Leadership::Lease { .. } => none("no replica leads"),
        Leadership::NoLease => checks::LEADER
            .error(format!("Lease {system}/tulle-operator does not exist, so no replica has ever led"))
            .hint("status and Canaries stand still until one does; the log says what it waits for")
            .fix(logs.as_str()),
        Leadership::Replica { knows_leader: true } => checks::LEADER.ok("a replica leads"),
        Leadership::Replica { knows_leader: false } => none("no replica leads, as far as this one knows"),
    }
}

/// T0306: the operator has room for all series.
pub fn series(health: &Health) -> Finding {
    let Health { series, max_series, .. } = health;
    if *max_series == 0 || series < max_series {
        return checks::SERIES.ok(format!("{series} of {max_series} series"));
    }
    checks::SERIES
        .warning(format!("the operator holds {series} series, and takes no more"))
        .hint("what is counted beyond them is not shown; Canaries are judged all the same")
        .fix("tulle top -A --once --limit 0 --window 6h")
}

/// T0401: the root certificate is valid for longer than `within` seconds.
pub fn root(health: &Health, within: i64, view: &View<'_>) -> Finding {
    let system = view.system;
    let Some(ends) = health.root_not_after else {
        return checks::ROOT
            .unknown("the root certificate", "the operator does not know when it ends")
            .hint("it cannot parse its root certificate: compare Secret tulle-root with its backup")
            .fix(format!("kubectl -n {system} logs deployment/tulle-operator"));
    };
    let left = ends.saturating_sub(view.now);
    let finding = if left <= 0 {
        let ago = duration(left);
        checks::ROOT
            .error(format!("the root certificate ended {ago} ago, so sidecars cannot connect to each other"))
    } else if left < within {
        checks::ROOT.warning(format!("the root certificate ends in {}", duration(left)))
    } else {
        return checks::ROOT.ok(format!("it ends in {}", duration(left)));
    };
    let hint = "Tulle does not rotate its root. Plan the change: save the Secret, allow a new root with annotation \
                tulle.dev/new-root of MeshConfig mesh, delete the Secret and restart the operator; sidecars reject each \
                other until all have a certificate of the new root";
    finding.hint(hint).fix(format!("kubectl -n {system} get secret tulle-root -o yaml > tulle-root.yaml"))
}

/// T0401: what the status of MeshConfig `mesh` says is wrong with Secret `tulle-root`, and which settings are not in use.
/// Empty: nothing.
///
/// A running operator has its root in memory, so that a lost Secret harms nobody until an operator starts. By then it is too
/// late for a warning.
pub fn config<'a>(conditions: impl IntoIterator<Item = Condition<'a>>) -> Vec<Finding> {
    conditions.into_iter().filter(|condition| condition.status == "False").map(false_condition).collect()
}

fn false_condition(condition: Condition<'_>) -> Finding {
    let found = format!("MeshConfig mesh: {}: {}", condition.reason, condition.message);
    match condition.type_ {
        // Deleted and created, because a backup that kubectl wrote has the version of the object that it is about: over one
        // that was changed since, the API server refuses to apply it.
        "RootValid" => checks::ROOT
            .error(found)
            .hint(match condition.reason {
                "RootReplaced" => {
                    "tulle-root.yaml is the backup of the root in use: restore it before an operator restarts. The command deletes the root that is in the Secret now: if that one is intended, back it up and restart the operators instead"
                }
                _ => "repair it before an operator restarts; tulle-root.yaml is the backup of the Secret",
            })
            .fix("kubectl replace --force -f tulle-root.yaml"),
        "LeafLifetime" => checks::ROOT
            .warning(found)
            .hint("set spec.certificates.leafLifetime to a value that is allowed")
            .fix("kubectl edit meshconfig mesh"),
        _ => checks::ROOT
            .error(found)
            .hint(
                "the setting has no effect; the message says how to change it, or how to keep what is in use",
            )
            .fix("kubectl describe meshconfig mesh"),
    }
}
