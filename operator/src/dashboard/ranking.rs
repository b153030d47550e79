//! `/`: workloads, the worst first. A plain table, because two thousand rows must show at once.

use maud::{Markup, html};
use tulle_crds::keys;
use tulle_mesh::query::{Stat, StatRow};

use super::layout::{Page, View, form, notes, page};
use super::words::{NONE, State, Window, address, count, encode, latency, percent, rate, scoped};

/// What the ranking shows.
#[derive(Clone, Debug)]
pub struct Ranking<'a> {
    /// Rows by workload.
    pub stat: &'a Stat,
    /// The time that was asked for.
    pub window: Window,
    /// Only this namespace.
    pub namespace: Option<&'a str>,
    /// Only names that contain this.
    pub name: Option<&'a str>,
    /// The namespace that the token shows; `None`: all.
    pub only: Option<&'a str>,
    /// Sidecars that are connected.
    pub sidecars: u32,
}

/// The page.
pub fn ranking(view: &Ranking<'_>) -> Markup {
    let here = match (view.namespace, view.name) {
        (None, None) => format!("/?window={}", view.window.name()),
        (namespace, name) => format!(
            "/?window={}&namespace={}&name={}",
            view.window.name(),
            encode(namespace.unwrap_or_default()),
            encode(name.unwrap_or_default())
        ),
    };
    let around = Page {
        title: "Workloads, the worst first",
        view: Some(View::Workloads),
        here: &here,
        only: view.only,
        commands: commands(view),
    };
    page(&around, &controls(view), &rows(view))
}

fn commands(view: &Ranking<'_>) -> Vec<String> {
    vec![scoped(&["tulle", "stat", "--window", view.window.name()], view.namespace.or(view.only))]
}

fn controls(view: &Ranking<'_>) -> Markup {
    let fields = html! {
        label for="namespace" { "Namespace" }
        input id="namespace" name="namespace" value=[view.namespace.or(view.only)] readonly[view.only.is_some()]
            placeholder="all" autocomplete="off" spellcheck="false";
        label for="name" { "Name contains" }
        input id="name" name="name" type="search" value=[view.name] data-filter="live" autocomplete="off"
            spellcheck="false";
        // The script says here how many rows are left while somebody types.
        span id="matching" role="status" {}
    };
    form("/", view.window, &fields)
}

fn rows(view: &Ranking<'_>) -> Markup {
    let wanted = |row: &&StatRow| {
        view.namespace.is_none_or(|namespace| row.party.namespace == namespace)
            && view.name.is_none_or(|name| row.party.name.contains(name))
    };
    let rows: Vec<&StatRow> = view.stat.rows.iter().filter(wanted).collect();
    let some = view.stat.rows.iter().any(|row| !matches!(State::of(row), State::Idle | State::NoSidecar));
    html! {
        // Without a sidecar or a request, the cause says more than how much of the window is known.
        @if some { (notes(view.window, view.stat.window, view.stat.lost)) }
        @else { p.empty { (nothing(view)) } }
        @if !rows.is_empty() {
            div.scroll tabindex="0" role="region" aria-label="Workloads" {
                table.ranking {
                    caption {
                        "Workloads in the last " (view.window.name()) ": " (count(rows.len() as u64))
                        ". Those with the most failures come first, then those with the most requests."
                    }
                    (head())
                    tbody { @for row in &rows { (workload(row, view.window)) } }
                }
            }
        } @else if !view.stat.rows.is_empty() {
            p.empty {
                "None of the " (count(view.stat.rows.len() as u64)) " workloads matches this filter. "
                a href={ "/?window=" (view.window.name()) } { "Show all of them" }
            }
        }
    }
}

/// Why there are no numbers, with the remedy.
fn nothing(view: &Ranking<'_>) -> String {
    if view.sidecars == 0 {
        return format!(
            "No sidecar is connected to the operator. Label a namespace with {}=enabled and restart its pods; `tulle check` says what is in the way.",
            keys::INJECT
        );
    }
    let place = view.namespace.or(view.only).map_or_else(String::new, |name| format!(" in namespace {name}"));
    let covered = view.stat.window;
    if covered < view.window.seconds() {
        return format!(
            "No requests{place} yet: the history of this operator began {} ago.",
            super::words::duration(covered)
        );
    }
    format!("No requests{place} in the last {}. Choose a longer window.", view.window.name())
}

fn head() -> Markup {
    html! {
        thead {
            tr {
                th scope="col" { "Namespace" }
                th scope="col" { "Name" }
                th scope="col" { "State" }
                th scope="col" { abbr title="Pods with a sidecar, of all pods" { "Meshed" } }
                th.number scope="col" { abbr title="Requests in a second" { "RPS" } }
                th.number scope="col" { "Success" }
                th.number scope="col" { "p50" }
                th.number scope="col" { "p95" }
                th.number scope="col" { "p99" }
                th scope="col" { abbr title="The most frequent reason of failures" { "Worst" } }
            }
        }
    }
}

/// `data-v`: what the script sorts by where the text is not a plain number.
fn workload(row: &StatRow, window: Window) -> Markup {
    let golden = &row.golden;
    let state = State::of(row);
    let to = address(&["workload", &row.party.namespace, &row.party.name]);
    html! {
        tr {
            td { (row.party.namespace) }
            th scope="row" {
                a href={ (to) "?window=" (window.name()) "&kind=" (encode(&row.party.kind)) } { (row.party.name) }
                @if row.party.kind != "Deployment" { " " small { (row.party.kind) } }
            }
            td { span class={ "state " (state.class()) } { (state.word()) } }
            td {
                @match row.meshed {
                    Some(meshed) => { (meshed.with) "/" (meshed.of) }
                    None => { (NONE) }
                }
            }
            td.number data-v=(golden.rps) { (rate(golden.rps)) }
            td.number data-v=[golden.success] { (percent(golden.success)) }
            td.number data-v=[golden.p50_ms] { (latency(golden.p50_ms)) }
            td.number data-v=[golden.p95_ms] { (latency(golden.p95_ms)) }
            td.number data-v=[golden.p99_ms] { (latency(golden.p99_ms)) }
            td {
                @if let Some(worst) = golden.reasons.first() {
                    (worst.name) " (" (count(worst.count)) ")"
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tulle_mesh::query::{Golden, Meshed, Party, Reason};

    fn row(name: &str, requests: u64) -> StatRow {
        StatRow {
            party: Party { namespace: "shop".into(), kind: "Deployment".into(), name: name.into() },
            meshed: Some(Meshed { with: 2, of: 2 }),
            golden: Golden {
                requests,
                rps: requests as f64 / 60.0,
                success: (requests > 0).then_some(0.5),
                reasons: vec![Reason { name: "UpstreamReset".into(), count: 3 }],
                ..Golden::default()
            },
            ..StatRow::default()
        }
    }

    fn shown(stat: &Stat, change: impl FnOnce(&mut Ranking<'_>)) -> String {
        let mut view =
            Ranking { stat, window: Window::Minute, namespace: None, name: None, only: None, sidecars: 3 };
        change(&mut view);
        ranking(&view).into_string()
    }

    #[test]
    fn a_row_has_the_numbers_and_says_its_state_in_a_word() {
        let text = shown(&Stat { window: 60, lost: 0, rows: vec![row("web", 120)] }, |_| {});
        assert!(text.contains("href=\"/workload/shop/web?window=1m&amp;kind=Deployment\""), "{text}");
        for part in [">failing<", ">2.00<", ">50.00 %<", "UpstreamReset (3)", "2/2"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(text.contains("<code>tulle stat --window 1m -A</code>"), "{text}");
    }

    #[test]
    fn names_cannot_bring_markup_or_attributes_with_them() {
        let name = "\"><script>alert(1)</script>";
        let stat = Stat { window: 60, lost: 0, rows: vec![row(name, 1)] };
        let text = shown(&stat, |view| view.name = Some("\"><script>"));
        assert!(!text.contains("<script>"), "{text}");
        assert!(text.contains("value=\"&quot;&gt;&lt;script&gt;\""), "{text}");
        assert!(!text.contains(" style=") && !text.contains(" onclick="), "the CSP forbids both");
    }

    #[test]
    fn an_empty_page_names_its_cause() {
        let none = Stat { window: 60, ..Stat::default() };
        assert!(shown(&none, |view| view.sidecars = 0).contains("No sidecar is connected"));
        assert!(shown(&none, |_| {}).contains("No requests in the last 1m"));
        let young = Stat { window: 20, ..Stat::default() };
        assert!(shown(&young, |_| {}).contains("began 20s ago"));
        let stat = Stat { window: 60, lost: 0, rows: vec![row("web", 1)] };
        let text = shown(&stat, |view| view.name = Some("api"));
        assert!(text.contains("None of the 1 workloads matches this filter"), "{text}");
    }

    #[test]
    fn a_token_of_a_namespace_says_that_it_shows_no_other() {
        let stat = Stat { window: 60, lost: 2, rows: vec![row("web", 1)] };
        let text = shown(&stat, |view| view.only = Some("shop"));
        assert!(text.contains("This page shows namespace <strong>shop</strong>"), "{text}");
        assert!(text.contains("tulle stat --window 1m -n shop"), "{text}");
        assert!(text.contains("2 reports of sidecars in this window are lost"), "{text}");
    }

    #[test]
    fn a_workload_whose_pods_have_no_sidecar_says_so() {
        let meshed = Some(Meshed { with: 0, of: 1 });
        let rows = vec![StatRow { meshed, golden: Golden::default(), ..row("api", 0) }];
        let text = shown(&Stat { window: 60, lost: 0, rows }, |_| {});
        assert!(text.contains(">no sidecar<") && text.contains("0/1"), "{text}");
    }
}
