//! `/workload/{namespace}/{name}`: what somebody on call needs to know of one workload.

use maud::{Markup, html};
use tulle_mesh::query::{Denials, Evidence, Golden, Party, Sidecar, StatRow, Timeline};

use crate::telemetry::counts::Verdicts;

use super::canary::totals;
use super::chart::{Chart, Line, Unit};
use super::graph::Neighbours;
use super::layout::{Page, View, columns, form, notes, page};
use super::words::{
    NONE, State, Window, address, command, count, duration, encode, latency, left, party, percent, rate,
};

mod denials;
#[cfg(test)]
mod tests;

/// A policy that applies to the workload.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyRow {
    /// Its name.
    pub name: String,
    /// `Enforce` or `Shadow`.
    pub mode: String,
    /// Its sections.
    pub sections: Vec<&'static str>,
    /// Sidecars that enforce it, of those that it selects, such as 12/12. Empty: it has no status yet.
    pub enforced: String,
    /// The message of its condition Ready, where that does not hold.
    pub problem: Option<String>,
    /// What its access rules have decided at the workload in the window.
    pub rules: Vec<RuleRow>,
}

/// What one rule of a policy has decided.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuleRow {
    /// The rule, as in logs: `DenyRule(0)`.
    pub rule: String,
    /// How many requests and connections.
    pub verdicts: Verdicts,
}

/// Failures and denials of one caller for one reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FailureRow {
    /// The reason, as in metrics and logs.
    pub reason: String,
    /// Who called.
    pub caller: Party,
    /// How many requests and connections.
    pub count: u64,
}

/// The Canary of the workload.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CanaryLine {
    /// Its name.
    pub name: String,
    /// Its phase.
    pub phase: String,
    /// Its step, such as 2/3.
    pub step: String,
    /// The judge's sentence.
    pub sentence: String,
    /// What its judge decides by; `None`: the Canary has just been deleted.
    pub evidence: Option<Evidence>,
}

/// What the page shows.
#[derive(Clone, Debug, Default)]
pub struct Workload<'a> {
    /// The workload. Its kind is empty where it does not exist.
    pub me: Party,
    /// The time that was asked for.
    pub window: Window,
    /// Seconds of it that are known.
    pub covered: u64,
    /// Reports that are missing.
    pub lost: u64,
    /// What it has served.
    pub row: StatRow,
    /// The same over time.
    pub timeline: Timeline,
    /// What of it failed or was denied, the most frequent first.
    pub failures: Vec<FailureRow>,
    /// The last requests and connections that its sidecars refused, one by one.
    pub denials: Denials,
    /// Its neighbours.
    pub neighbours: Neighbours,
    /// Routes that lead to it.
    pub routes: Vec<StatRow>,
    /// Its pods.
    pub pods: Vec<Sidecar>,
    /// Its pods without the sidecar that they should have.
    pub without: Vec<String>,
    /// Policies that apply to it.
    pub policies: Vec<PolicyRow>,
    /// How often breakers of its clients ejected one of its endpoints.
    pub ejections: u64,
    /// Its Canary.
    pub canary: Option<CanaryLine>,
    /// The namespace that the token shows; `None`: all.
    pub only: Option<&'a str>,
    /// The present time, in Unix seconds.
    pub now: i64,
}

impl Workload<'_> {
    fn address(&self) -> String {
        address(&["workload", &self.me.namespace, &self.me.name])
    }

    /// Why there are no numbers.
    fn nothing(&self) -> String {
        if self.pods.is_empty() {
            return "No sidecar of this workload has reported: none of its pods has one, or it has no pods."
                .into();
        }
        if !self.pods.iter().any(|pod| pod.connected) {
            return "No sidecar of this workload is connected to the operator; `tulle check` says why."
                .into();
        }
        if self.covered < self.window.seconds() {
            return format!(
                "No traffic yet: the history of this operator began {} ago.",
                duration(self.covered)
            );
        }
        format!("No traffic in the last {}.", self.window.name())
    }
}

/// The page.
pub fn workload(view: &Workload<'_>) -> Markup {
    let Party { namespace, kind, name } = &view.me;
    let title = format!("{kind} {namespace}/{name}");
    let here = format!("{}?window={}&kind={}", view.address(), view.window.name(), encode(kind));
    let kind = kind.to_lowercase();
    let kind_word = if kind.is_empty() { "workload" } else { kind.as_str() };
    let target = format!("{kind_word}/{name}");
    let whole = format!("{namespace}/{name}");
    let window = view.window.name();
    let around = Page {
        title: title.trim(),
        view: Some(View::Workloads),
        here: &here,
        only: view.only,
        commands: vec![
            command(&["tulle", "stat", &target, "-n", namespace, "--window", window]),
            command(&["tulle", "stat", "routes", "-n", namespace, "--to", &whole, "--window", window]),
            command(&["tulle", "edges", "-n", namespace, "--window", window]),
            command(&["tulle", "pods", "-n", namespace]),
            command(&["tulle", "denials", name, "-n", namespace]),
        ],
    };
    let kind = html! { input type="hidden" name="kind" value=(view.me.kind); };
    page(&around, &form(&view.address(), view.window, &kind), &live(view))
}

fn live(view: &Workload<'_>) -> Markup {
    let nothing = view.nothing();
    html! {
        (notes(view.window, view.covered, view.lost))
        (tiles(&view.row, view.ejections))
        @if let Some(canary) = &view.canary { (rollout(&view.me.namespace, canary)) }
        section aria-labelledby="over-time" {
            h2 id="over-time" { "Over time" }
            div.charts { @for chart in charts(&view.timeline) { (chart.render(&nothing)) } }
        }
        section aria-labelledby="failures" {
            h2 id="failures" { "Recent failures and denials" }
            (failures(view))
        }
        section aria-labelledby="denials" {
            h2 id="denials" { "Recent denials" }
            (denials::recent(view))
        }
        section aria-labelledby="around" {
            h2 id="around" { "Callers and callees" }
            (view.neighbours.render(&view.me, &nothing))
        }
        section aria-labelledby="routes" {
            h2 id="routes" { "Routes" }
            (routes(&view.routes))
        }
        section aria-labelledby="pods" {
            h2 id="pods" { "Pods" }
            (pods(&view.pods, &view.without, view.now))
        }
        section aria-labelledby="policies" {
            h2 id="policies" { "Policies" }
            (policies(&view.policies))
        }
    }
}

fn tiles(row: &StatRow, ejections: u64) -> Markup {
    let golden = &row.golden;
    let state = State::of(row);
    html! {
        dl.tiles {
            div { dt { "State" } dd { span class={ "state " (state.class()) } { (state.word()) } } }
            div { dt { "Requests/s" } dd { (rate(golden.rps)) } }
            div { dt { "Success" } dd { (percent(golden.success)) } }
            div { dt { "p50" } dd { (latency(golden.p50_ms)) } }
            div { dt { "p95" } dd { (latency(golden.p95_ms)) } }
            div { dt { "p99" } dd { (latency(golden.p99_ms)) } }
            div { dt { "4xx" } dd { (count(golden.client_errors)) } }
            div { dt { "Connections" } dd { (count(golden.connections)) } }
            @if ejections > 0 {
                div { dt { "Ejections by breakers" } dd { (count(ejections)) } }
            }
        }
    }
}

fn rollout(namespace: &str, canary: &CanaryLine) -> Markup {
    html! {
        section aria-labelledby="canary" {
            h2 id="canary" { "Canary" }
            p {
                a href=(address(&["canary", namespace, &canary.name])) { (canary.name) }
                ": " strong { (canary.phase) }
                @if !canary.step.is_empty() { ", step " (canary.step) }
                "."
            }
            @if !canary.sentence.is_empty() { p { (canary.sentence) } }
            @if let Some(evidence) = &canary.evidence { (totals(evidence)) }
        }
    }
}

/// Sidecars report at least so often, in seconds, while there is something to report.
const REPORTED_WITHIN: i64 = 6;

/// A timeline without the points of which counts may still come: a line that falls to nothing at its end looks like an
/// outage.
pub fn whole(mut timeline: Timeline, now: i64) -> Timeline {
    let step = i64::try_from(timeline.step).unwrap_or(i64::MAX).max(1);
    let ended = (now - REPORTED_WITHIN - timeline.start).div_euclid(step);
    timeline.points.truncate(usize::try_from(ended).unwrap_or(0));
    timeline
}

fn charts(timeline: &Timeline) -> [Chart; 3] {
    let chart =
        |id, title, unit, lines| Chart { id, title, unit, start: timeline.start, step: timeline.step, lines };
    let line = |name, value: fn(&Golden) -> Option<f64>| Line {
        name,
        values: timeline.points.iter().map(value).collect(),
    };
    // A rate of zero is a value, but a chart of nothing else is not worth its space.
    let idle = timeline.points.iter().all(|point| point.requests == 0);
    let served: fn(&Golden) -> Option<f64> =
        if idle { |_: &Golden| None } else { |point: &Golden| Some(point.rps) };
    [
        chart("rps", "Requests per second", Unit::PerSecond, vec![line("requests/s", served)]),
        chart("success", "Success", Unit::Part, vec![line("success", |point| point.success)]),
        chart(
            "latency",
            "Latency",
            Unit::Milliseconds,
            vec![
                line("p50", |point| point.p50_ms),
                line("p95", |point| point.p95_ms),
                line("p99", |point| point.p99_ms),
            ],
        ),
    ]
}

/// Rows of failures that are listed.
const MOST_FAILURES: usize = 50;

fn failures(view: &Workload<'_>) -> Markup {
    let (rows, window) = (&view.failures, view.window.name());
    // An operator that knows less than the window divides by the time that it knows.
    let minutes = view.covered.max(1) as f64 / 60.0;
    html! {
        @if rows.is_empty() {
            p.empty { "No request and no connection has failed or was denied in the last " (window) "." }
        } @else {
            table {
                caption { "Failures and denials in the last " (window) " by reason and caller" }
                thead {
                    tr {
                        th scope="col" { "Reason" }
                        th scope="col" { "Caller" }
                        th.number scope="col" { "Count" }
                        th.number scope="col" { "Per minute" }
                    }
                }
                tbody {
                    @for row in rows.iter().take(MOST_FAILURES) {
                        @let per_minute = row.count as f64 / minutes;
                        tr {
                            th scope="row" { (row.reason) }
                            td { (party(&row.caller)) }
                            td.number data-v=(row.count) { (count(row.count)) }
                            td.number data-v=(per_minute) { (rate(per_minute)) }
                        }
                    }
                }
            }
            @if rows.len() > MOST_FAILURES {
                p.note { "and " (rows.len() - MOST_FAILURES) " more rows with lower counts." }
            }
        }
        @if view.row.golden.denied > 0 { (denied(view.row.golden.denied)) }
    }
}

/// How to find the rule behind a denial that is not listed: the history has counts only.
fn denied(number: u64) -> Markup {
    html! {
        p {
            (count(number)) " of these were denied by a policy or refused by a limit, and are not failures. For a request that access rules have denied, "
            code { "tulle explain --denial ID" }
            " shows the rule: the ID is in the list below and in "
            code { "tulle denials" } ", in header " code { "tulle-denial" }
            " of the answer, in the log of the sidecar, and in "
            code { "/denials" } " of its admin port."
        }
    }
}

fn routes(rows: &[StatRow]) -> Markup {
    html! {
        @if rows.is_empty() {
            p.empty { "No request with a route came here in this window: no HTTPRoute or GRPCRoute has a Service of this workload as parent, or none was called." }
        } @else {
            table {
                caption { "Routes to this workload, as the sidecars of clients have seen them" }
                thead {
                    tr {
                        th scope="col" { "Route" }
                        th scope="col" { "Service" }
                        th.number scope="col" { "RPS" }
                        th.number scope="col" { "Success" }
                        th.number scope="col" { "p99" }
                        th.number scope="col" { "Retries" }
                    }
                }
                tbody {
                    @for row in rows {
                        tr {
                            th scope="row" { (row.route.as_deref().unwrap_or(NONE)) }
                            td { (row.party.namespace) "/" (row.party.name) }
                            td.number data-v=(row.golden.rps) { (rate(row.golden.rps)) }
                            td.number data-v=[row.golden.success] { (percent(row.golden.success)) }
                            td.number data-v=[row.golden.p99_ms] { (latency(row.golden.p99_ms)) }
                            td.number data-v=(row.golden.retries) { (count(row.golden.retries)) }
                        }
                    }
                }
            }
        }
    }
}

/// Sidecars as a table: here of a workload, on the page of the mesh's health of all that need attention.
pub fn sidecars(caption: &str, sidecars: &[Sidecar], now: i64) -> Markup {
    html! {
        table {
            caption { (caption) }
            (columns(&["Pod", "Version", "Connected", "Configuration", "Certificate", "Refused"]))
            tbody {
                @for pod in sidecars {
                    tr {
                        th scope="row" { (pod.namespace) "/" (pod.pod) }
                        td { @if pod.version.is_empty() { "not reported" } @else { (pod.version) } }
                        td { @if pod.connected { "yes" } @else { strong.bad { "no" } } }
                        td {
                            (pod.acknowledged) "/" (pod.resources) " acknowledged"
                            @if let Some(seconds) = pod.behind_seconds {
                                ", " strong.warn { "behind for " (duration(seconds)) }
                            }
                        }
                        td { (pod.certificate_not_after.map_or_else(|| NONE.to_owned(), |end| left(end, now))) }
                        td {
                            @if pod.refused.is_empty() { "none" }
                            @else { ul { @for refused in &pod.refused { li { (refused) } } } }
                        }
                    }
                }
            }
        }
    }
}

fn pods(with: &[Sidecar], without: &[String], now: i64) -> Markup {
    html! {
        @if with.is_empty() && without.is_empty() {
            p.empty { "No pod of this workload has a sidecar, or there is none." }
        }
        @if !with.is_empty() { (sidecars("Pods with a sidecar", with, now)) }
        @if !without.is_empty() {
            p { "Without a sidecar, although their namespace asks for one:" }
            ul { @for pod in without { li { (pod) } } }
        }
    }
}

fn policies(rows: &[PolicyRow]) -> Markup {
    html! {
        @if rows.is_empty() {
            p.empty { "No MeshPolicy selects a pod of this workload, so the defaults of MeshConfig hold." }
        } @else {
            table {
                caption { "Policies that apply to this workload" }
                thead {
                    tr {
                        th scope="col" { "MeshPolicy" }
                        th scope="col" { "Mode" }
                        th scope="col" { "Sections" }
                        th scope="col" { abbr title="Sidecars that enforce it, of those that it selects" { "Enforced" } }
                        th scope="col" { abbr title="Requests and connections in this window by access rule" { "Refused" } }
                        th scope="col" { "Problem" }
                    }
                }
                tbody {
                    @for policy in rows {
                        tr {
                            th scope="row" { (policy.name) }
                            td { (policy.mode) }
                            td { (policy.sections.join(", ")) }
                            td { @if policy.enforced.is_empty() { (NONE) } @else { (policy.enforced) } }
                            td { (verdicts(&policy.rules)) }
                            td { (policy.problem.as_deref().unwrap_or("none")) }
                        }
                    }
                }
            }
        }
    }
}

fn verdicts(rules: &[RuleRow]) -> Markup {
    html! {
        @if rules.is_empty() { "none" }
        @else {
            ul {
                @for row in rules {
                    @let (denied, would_deny) = (row.verdicts.denied, row.verdicts.would_deny);
                    li {
                        (row.rule) ": "
                        @if denied > 0 { (count(denied)) " denied" }
                        @if denied > 0 && would_deny > 0 { ", " }
                        @if would_deny > 0 { (count(would_deny)) " would be denied" }
                    }
                }
            }
        }
    }
}
