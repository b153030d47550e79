//! `/workload/{namespace}/{name}`: what somebody on call needs to know of one workload.

use maud::{Markup, html};
use tulle_mesh::query::{Evidence, Golden, Party, Sidecar, StatRow, Timeline};

use crate::telemetry::counts::Verdicts;

use super::canary::totals;
use super::chart::{Chart, Line, Unit};
use super::graph::Neighbours;
use super::layout::{Page, View, columns, form, notes, page};
use super::words::{
    NONE, State, Window, address, command, count, duration, encode, latency, left, party, percent, rate,
};

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

/// How to find the rule behind a denial: the history has counts only.
fn denied(number: u64) -> Markup {
    html! {
        p {
            (count(number)) " of these were denied by a policy or refused by a limit, and are not failures. For a request that access rules have denied, "
            code { "tulle explain --denial ID" }
            " shows the rule: the ID is in header " code { "tulle-denial" }
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use tulle_mesh::query::VersionAttempts;

    use super::*;

    fn view() -> Workload<'static> {
        let golden =
            Golden { requests: 60, rps: 1.0, success: Some(0.75), p99_ms: Some(12.0), ..Golden::default() };
        Workload {
            me: Party { namespace: "shop".into(), kind: "Deployment".into(), name: "web".into() },
            covered: 60,
            row: StatRow { golden: golden.clone(), ..StatRow::default() },
            timeline: Timeline { step: 10, start: 0, points: vec![golden.clone(), golden] },
            pods: vec![Sidecar {
                namespace: "shop".into(),
                pod: "web-0".into(),
                connected: true,
                ..Sidecar::default()
            }],
            ..Workload::default()
        }
    }

    #[test]
    fn a_chart_ends_with_the_last_point_whose_counts_have_come() {
        let points = vec![Golden::default(); 6];
        let timeline = Timeline { step: 10, start: 100, points };
        let length = |now| whole(timeline.clone(), now).points.len();
        assert_eq!([length(155), length(156), length(150), length(146), length(100)], [4, 5, 4, 4, 0]);
    }

    #[test]
    fn a_page_has_a_table_for_every_chart_and_the_commands() {
        let text = workload(&view()).into_string();
        assert_eq!(text.matches("<figure").count(), 3);
        assert_eq!(text.matches("<details").count(), 3, "no neighbours here, so only the charts have tables");
        assert!(text.contains("tulle stat deployment/web -n shop --window 1m"), "{text}");
        assert!(text.contains("<h1>Deployment shop/web</h1>"), "{text}");
        assert!(!text.contains(" style=") && !text.contains("<style"), "the CSP forbids it");
    }

    /// The ids of a page, in order.
    fn ids(text: &str) -> Vec<&str> {
        text.split(" id=\"").skip(1).filter_map(|rest| rest.split('"').next()).collect()
    }

    #[test]
    fn the_canary_shows_its_evidence_as_a_picture_with_a_table() {
        let of = |attempts, failures| VersionAttempts { attempts, failures, ..VersionAttempts::default() };
        let evidence =
            Evidence { leader: true, canary: of(400, 12), stable: of(8_000, 8), ..Evidence::default() };
        let canary = CanaryLine {
            name: "web".into(),
            sentence: "12 of 400 failed".into(),
            evidence: Some(evidence),
            ..CanaryLine::default()
        };
        let text = workload(&Workload { canary: Some(canary), ..view() }).into_string();
        let places =
            ["12 of 400 failed", "400, failed 12", ">8,000</td>", "3.00 %"].map(|part| text.find(part));
        assert!(places.iter().all(Option::is_some), "{places:?} in {text}");
        assert!(places[0] < places[1] && places[1] < places[2], "{places:?} in {text}");
        assert_eq!(text.matches("<figure").count(), 4, "three charts, and the evidence");
        let ids = ids(&text);
        let unique: BTreeSet<&str> = ids.iter().copied().collect();
        assert!(unique.contains("evidence-title") && unique.contains("rps-title"), "{ids:?}");
        assert_eq!(unique.len(), ids.len(), "{ids:?}");
        assert!(!text.contains(" style="), "the CSP forbids it");
    }

    #[test]
    fn a_canary_without_attempts_says_why_it_has_no_picture() {
        let evidence = Some(Evidence { leader: true, ..Evidence::default() });
        let canary = CanaryLine { name: "web".into(), evidence, ..CanaryLine::default() };
        let text = workload(&Workload { canary: Some(canary), ..view() }).into_string();
        assert!(text.contains("No attempt has been counted") && !text.contains("evidence-title"), "{text}");
    }

    #[test]
    fn a_denial_is_listed_by_caller_and_the_way_to_its_rule_is_shown() {
        let caller = Party { namespace: "shop".into(), kind: "ServiceAccount".into(), name: "cart".into() };
        let row = |count| FailureRow { reason: "PolicyDenied".into(), caller: caller.clone(), count };
        let mut view = Workload { covered: 120, failures: vec![row(30)], ..view() };
        view.row.golden.denied = 30;
        let text = workload(&view).into_string();
        for part in [
            "<th scope=\"row\">PolicyDenied</th><td>ServiceAccount shop/cart</td>",
            "data-v=\"30\">30</td>",
            "data-v=\"15\">15.0</td>",
            "tulle explain --denial ID",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        view.row.golden.denied = 0;
        assert!(!workload(&view).into_string().contains("--denial"), "only where something was denied");
        view.failures = (1..=60).map(row).collect();
        assert!(workload(&view).into_string().contains("and 10 more rows with lower counts"));
    }

    #[test]
    fn an_empty_page_names_its_cause() {
        let quiet = Workload { timeline: Timeline::default(), row: StatRow::default(), ..view() };
        assert!(workload(&quiet).into_string().contains("No traffic in the last 1m."));
        let young = Workload { covered: 20, ..quiet.clone() };
        assert!(workload(&young).into_string().contains("began 20s ago"));
        let lost =
            Workload { pods: vec![Sidecar { connected: false, ..Sidecar::default() }], ..quiet.clone() };
        assert!(workload(&lost).into_string().contains("No sidecar of this workload is connected"));
        let none = Workload { pods: Vec::new(), ..quiet };
        assert!(workload(&none).into_string().contains("none of its pods has one"));
    }

    #[test]
    fn names_from_the_cluster_are_escaped_wherever_they_stand() {
        let evil = "<img src=x onerror=alert(1)>";
        let mut view = view();
        let caller = Party { kind: "ServiceAccount".into(), namespace: evil.into(), name: evil.into() };
        view.failures = vec![FailureRow { reason: evil.into(), caller, count: 1 }];
        view.policies =
            vec![PolicyRow { name: evil.into(), problem: Some(evil.into()), ..PolicyRow::default() }];
        view.canary = Some(CanaryLine { name: evil.into(), sentence: evil.into(), ..CanaryLine::default() });
        view.routes = vec![StatRow { route: Some(evil.into()), ..StatRow::default() }];
        view.without = vec![evil.into()];
        view.me.name = evil.into();
        let text = workload(&view).into_string();
        assert!(!text.contains("<img") && text.contains("&lt;img"), "{text}");
        assert!(text.contains("'deployment/&lt;img"), "quoted for the shell: {text}");
    }

    #[test]
    fn a_sidecar_that_is_behind_says_so_in_words() {
        let pod = Sidecar {
            behind_seconds: Some(65),
            refused: vec!["MeshPolicy/shop/web: invalid cidr".into()],
            certificate_not_after: Some(3_700),
            ..Sidecar::default()
        };
        let text = sidecars("Pods", &[pod], 100).into_string();
        for part in ["behind for 1m 5s", "invalid cidr", "1h 0m left", ">no</strong>"] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }
}
