//! `/health`: the operator, its sidecars and their certificates. What needs attention comes first.

use maud::{Markup, html};
use tulle_mesh::query::{Health, Sidecar, Sidecars};

use super::layout::{Page, View, page};
use super::words::{NONE, count, duration, left, scoped};
use super::workload::sidecars;

/// A certificate that ends sooner has missed several renewals, in seconds.
const ENDS_SOON: i64 = 3_600;
/// A root that ends sooner must be replaced now, in seconds.
const ROOT_ENDS_SOON: i64 = 90 * 86_400;
/// Series beyond this part of the limit are reported.
const NEARLY_FULL: f64 = 0.9;
/// Sidecars and pods that are listed.
const MOST: usize = 200;

/// What the page shows.
#[derive(Clone, Debug)]
pub struct MeshHealth<'a> {
    /// The operator.
    pub health: &'a Health,
    /// The sidecars that the token shows.
    pub sidecars: &'a Sidecars,
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
    let attention: Vec<&Sidecar> =
        view.sidecars.sidecars.iter().filter(|sidecar| needs_attention(sidecar, view.now)).collect();
    let findings = findings(view, attention.len());
    html! {
        section aria-labelledby="findings" {
            h2 id="findings" { "Findings" }
            @if findings.is_empty() {
                p { span.state.good { "ok" } " The operator leads, and every sidecar is connected, up to date and certified." }
            } @else {
                ul.findings {
                    @for finding in &findings { li { span.state.warn { "attention" } " " (finding) } }
                }
            }
        }
        section aria-labelledby="sidecars" {
            h2 id="sidecars" { "Sidecars" }
            @if view.sidecars.sidecars.is_empty() {
                p.empty { "No pod that this page may show has a sidecar." }
            } @else if attention.is_empty() {
                p.empty { "None of the " (count(view.sidecars.sidecars.len() as u64)) " sidecars needs attention." }
            } @else {
                @let shown: Vec<Sidecar> = attention.iter().take(MOST).map(|s| (*s).clone()).collect();
                (sidecars("Sidecars that need attention", &shown, view.now))
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

fn needs_attention(sidecar: &Sidecar, now: i64) -> bool {
    let ends = sidecar.certificate_not_after.is_some_and(|end| end.saturating_sub(now) < ENDS_SOON);
    !sidecar.connected || sidecar.behind_seconds.is_some() || !sidecar.refused.is_empty() || ends
}

/// What is wrong, as sentences.
fn findings(view: &MeshHealth<'_>, attention: usize) -> Vec<String> {
    let Health { leader, pod, root_not_after, series, max_series, .. } = view.health;
    let mut found = Vec::new();
    if !leader {
        found.push(format!(
            "Replica {pod} does not lead: reports of sidecars reach it through the leader. `tulle dashboard` opens the page at the leader."
        ));
    }
    if let Some(end) = root_not_after.filter(|end| end.saturating_sub(view.now) < ROOT_ENDS_SOON) {
        found.push(format!(
            "The root certificate: {}. Every certificate of the mesh ends with it.",
            left(end, view.now)
        ));
    }
    if *max_series > 0 && f64::from(*series) >= NEARLY_FULL * f64::from(*max_series) {
        found.push(format!(
            "The history holds {series} of at most {max_series} series; counts of further series are summed up as _OTHER."
        ));
    }
    if attention > 0 {
        found.push(format!(
            "Sidecars that are disconnected or behind, refuse a resource, or have a certificate that ends soon: {attention}."
        ));
    }
    if !view.sidecars.without.is_empty() {
        found.push(format!(
            "Pods without a sidecar although their namespace asks for one: {}.",
            view.sidecars.without.len()
        ));
    }
    found
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
    use super::*;

    fn shown(health: &Health, sidecars: &Sidecars, only: Option<&str>) -> String {
        super::health(&MeshHealth { health, sidecars, only, now: 1_000 }).into_string()
    }

    fn leader() -> Health {
        Health { leader: true, pod: "tulle-operator-0".into(), ..Health::default() }
    }

    fn sidecar() -> Sidecar {
        let end = Some(1_000 + 86_400);
        Sidecar { pod: "web-0".into(), connected: true, certificate_not_after: end, ..Sidecar::default() }
    }

    #[test]
    fn a_healthy_mesh_says_so_and_lists_no_sidecar() {
        let sidecars = Sidecars { sidecars: vec![sidecar()], without: Vec::new() };
        let text = shown(&leader(), &sidecars, None);
        assert!(text.contains("every sidecar is connected") && !text.contains("web-0"), "{text}");
        assert!(text.contains("<code>tulle check -A</code>"), "{text}");
    }

    #[test]
    fn whatever_needs_attention_is_a_sentence_and_a_row() {
        let sidecars = Sidecars {
            sidecars: vec![Sidecar { connected: false, ..sidecar() }],
            without: vec!["shop/<b>old</b>".into()],
        };
        let health = Health { root_not_after: Some(1_000 + 86_400), leader: false, ..leader() };
        let text = shown(&health, &sidecars, Some("shop"));
        for part in [
            "does not lead",
            "1d 0h left",
            "certificate that ends soon: 1.",
            "although their namespace asks for one: 1.",
            "web-0",
            "shop/&lt;b&gt;old",
            "tulle pods -n shop",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn a_certificate_is_reported_before_it_ends() {
        assert!(!needs_attention(&sidecar(), 1_000));
        assert!(needs_attention(&sidecar(), 1_000 + 86_400 - ENDS_SOON + 1));
    }

    #[test]
    fn a_mesh_without_sidecars_is_not_called_broken() {
        let text = shown(&leader(), &Sidecars::default(), None);
        assert!(text.contains("No pod that this page may show has a sidecar"), "{text}");
    }
}
