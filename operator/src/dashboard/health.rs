//! `/health`: what is not well, by the checks of `tulle check`; the operator, its sidecars and their certificates. What
//! needs attention comes first.

use maud::{Markup, html};
use tulle_mesh::check::{Finding, Outcome};
use tulle_mesh::query::{Health, Sidecars};

use super::findings::{COMMAND_ONLY, Judged};
use super::layout::{Page, View, page};
use super::words::{NONE, count, duration, left, scoped};
use super::workload::sidecars;

/// Findings, sidecars and pods that are listed.
const MOST: usize = 200;

/// What the page shows.
#[derive(Clone, Debug)]
pub struct MeshHealth<'a> {
    /// The operator.
    pub health: &'a Health,
    /// The sidecars that the token shows.
    pub sidecars: &'a Sidecars,
    /// What is not well.
    pub judged: &'a Judged,
    /// The namespace that the token shows; `None`: all.
    pub only: Option<&'a str>,
    /// The present time, in Unix seconds.
    pub now: i64,
}

/// The page.
pub fn health(view: &MeshHealth<'_>) -> Markup {
    let around = Page {
        title: "Mesh health",
        view: Some(View::Health),
        here: "/health",
        only: view.only,
        commands: vec![scoped(&["tulle", "check"], view.only), scoped(&["tulle", "pods"], view.only)],
    };
    page(&around, &html! {}, &live(view))
}

fn live(view: &MeshHealth<'_>) -> Markup {
    let attention = view.judged.sidecars.as_slice();
    html! {
        section aria-labelledby="findings" {
            h2 id="findings" { "Findings" }
            (findings(&view.judged.findings))
            (command_only(view.only))
        }
        section aria-labelledby="sidecars" {
            h2 id="sidecars" { "Sidecars" }
            @if view.sidecars.sidecars.is_empty() {
                p.empty { "No pod that this page may show has a sidecar." }
            } @else if attention.is_empty() {
                p.empty { "None of the " (count(view.sidecars.sidecars.len() as u64)) " sidecars needs attention." }
            } @else {
                (sidecars("Sidecars that need attention", attention.get(..MOST).unwrap_or(attention), view.now))
                (rest(attention.len()))
            }
        }
        section aria-labelledby="without" {
            h2 id="without" { "Pods without a sidecar" }
            @if view.sidecars.without.is_empty() {
                p.empty { "Every pod whose namespace asks for a sidecar has one." }
            } @else {
                ul { @for pod in view.sidecars.without.iter().take(MOST) { li { (pod) } } }
                (rest(view.sidecars.without.len()))
                p { "They were created before their namespace was labelled, or while the webhook did not answer. Recreate them." }
            }
        }
        section aria-labelledby="operator" {
            h2 id="operator" { "Operator" }
            (operator(view.health, view.now))
        }
    }
}

fn rest(all: usize) -> Markup {
    html! {
        @if all > MOST { p.note { "and " (all - MOST) " more; the commands below list all of them." } }
    }
}

fn findings(found: &[Finding]) -> Markup {
    html! {
        @if found.is_empty() {
            p { span.state.good { "ok" } " A replica leads, every sidecar is connected, up to date and certified, and every MeshPolicy is enforced." }
        } @else {
            ul.findings {
                @for finding in found.iter().take(MOST) {
                    li {
                        @if finding.result == Outcome::Error { span.state.bad { "error" } } @else { span.state.warn { "warning" } }
                        " " strong { (finding.id) } " " (finding.found)
                        @if !finding.hint.is_empty() { div { "Hint: " (finding.hint) "." } }
                        div { code { (finding.fix) } }
                    }
                }
            }
            (rest(found.len()))
        }
    }
}

/// What a reader must not take for well because it is not among the findings.
fn command_only(only: Option<&str>) -> Markup {
    html! {
        p {
            "Only " code { (scoped(&["tulle", "check"], only)) }
            " makes these checks, most of which need rights in the cluster that the operator does not have: "
            @for (at, (what, ids)) in COMMAND_ONLY.iter().enumerate() {
                @if at > 0 { ", " }
                (what) " (" (ids.join(", ")) ")"
            }
            "."
        }
    }
}

fn operator(health: &Health, now: i64) -> Markup {
    let root = health.root_not_after.map_or_else(|| NONE.to_owned(), |end| left(end, now));
    html! {
        dl.facts {
            dt { "Version" } dd { (health.version) }
            dt { "Pod" } dd { (health.pod) }
            dt { "Leader" } dd { @if health.leader { "yes, this replica" } @else { "another replica" } }
            dt { "Trust domain" } dd { (health.trust_domain) }
            dt { "Root certificate" } dd { (root) }
            dt { "Connected sidecars" } dd { (count(u64::from(health.sidecars))) }
            dt { "History" } dd { (duration(health.history)) }
            dt { "Series" } dd { (count(u64::from(health.series))) " of at most " (count(u64::from(health.max_series))) }
        }
    }
}

#[cfg(test)]
mod tests {
    use tulle_mesh::check::list as checks;
    use tulle_mesh::query::Sidecar;

    use super::*;

    fn shown(sidecars: &Sidecars, judged: &Judged, only: Option<&str>) -> String {
        let health = Health { leader: true, pod: "tulle-operator-0".into(), ..Health::default() };
        super::health(&MeshHealth { health: &health, sidecars, judged, only, now: 1_000 }).into_string()
    }

    fn sidecar() -> Sidecar {
        let end = Some(1_000 + 86_400);
        Sidecar { pod: "web-0".into(), connected: true, certificate_not_after: end, ..Sidecar::default() }
    }

    #[test]
    fn a_healthy_mesh_says_so_and_lists_no_sidecar() {
        let sidecars = Sidecars { sidecars: vec![sidecar()], without: Vec::new() };
        let text = shown(&sidecars, &Judged::default(), None);
        assert!(text.contains("every sidecar is connected") && !text.contains("web-0"), "{text}");
        assert!(text.contains("<code>tulle check -A</code>"), "{text}");
    }

    #[test]
    fn a_finding_has_its_number_its_hint_and_its_command() {
        let lost = Sidecar { connected: false, ..sidecar() };
        let sidecars = Sidecars { sidecars: vec![lost.clone()], without: vec!["shop/<b>old</b>".into()] };
        let with_remedy = |found: Finding| found.hint("look at their logs").fix("tulle pods -n shop");
        let findings = [checks::BEHIND.warning("<b>one</b> waits"), checks::BEHIND.error("two")];
        let findings = findings.map(with_remedy).to_vec();
        let text = shown(&sidecars, &Judged { findings, sidecars: vec![lost] }, Some("shop"));
        for part in [
            "warning</span> <strong>T0703</strong> &lt;b&gt;one&lt;/b&gt; waits",
            "error</span> <strong>T0703</strong> two",
            "Hint: look at their logs.",
            "<div><code>tulle pods -n shop</code></div>",
            "Sidecars that need attention",
            "web-0",
            "shop/&lt;b&gt;old",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(!text.contains("every sidecar is connected"), "{text}");
    }

    #[test]
    fn the_page_says_which_checks_only_the_command_makes() {
        let text = shown(&Sidecars::default(), &Judged::default(), Some("shop"));
        assert!(text.contains("Only <code>tulle check -n shop</code> makes these checks"), "{text}");
        assert!(text.contains("the webhook (T0501, T0502, T0503, T0504), "), "{text}");
    }

    #[test]
    fn more_findings_than_a_page_lists_are_counted() {
        let finding = checks::REFUSED.error("no").fix("tulle check");
        let judged = Judged { findings: vec![finding; MOST + 3], sidecars: Vec::new() };
        let text = shown(&Sidecars::default(), &judged, None);
        assert_eq!(text.matches("T0702").count(), MOST);
        assert!(text.contains("and 3 more"), "{text}");
    }

    #[test]
    fn a_mesh_without_sidecars_is_not_called_broken() {
        let text = shown(&Sidecars::default(), &Judged::default(), None);
        assert!(text.contains("No pod that this page may show has a sidecar"), "{text}");
    }
}
