//! Who talks to a workload and to whom it talks, one hop around it: callers left, the workload in the middle, callees
//! right. Never more, because a picture of a whole mesh shows nothing.

use maud::{Markup, html};
use tulle_mesh::query::{Edge, Party};

use super::words::{address_of, latency, party, percent, rate, secured};

/// Boxes on one side. The table has the rest.
const MOST: usize = 12;
/// Characters of a box.
const CHARACTERS: usize = 30;

const WIDTH: f64 = 1_000.0;
const BOX_WIDTH: f64 = 230.0;
const BOX_HEIGHT: f64 = 30.0;
const ROW: f64 = 44.0;
const TOP: f64 = 26.0;

/// Callers and callees of a workload.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Neighbours {
    /// Edges that lead to it.
    pub callers: Vec<Edge>,
    /// Edges that leave it.
    pub callees: Vec<Edge>,
}

impl Neighbours {
    /// The edges around a workload. Clients call a Service: `services` are those that select it, in its namespace.
    pub fn of(edges: Vec<Edge>, me: &Party, services: &[String]) -> Self {
        let mut around = Self::default();
        for edge in edges {
            let to = &edge.destination;
            let through = to.kind == "Service" && to.namespace == me.namespace && services.contains(&to.name);
            if through || *to == *me {
                around.callers.push(edge.clone());
            }
            if edge.source == *me {
                around.callees.push(edge);
            }
        }
        around
    }

    /// The picture and its tables. `empty` says why there is nothing to show, if so.
    pub fn render(&self, me: &Party, empty: &str) -> Markup {
        html! {
            @if self.callers.is_empty() && self.callees.is_empty() {
                p.empty { (empty) }
            } @else {
                div.scroll tabindex="0" role="region" aria-label="Graph of callers and callees" {
                    (self.picture(me))
                }
                details id="edges" {
                    summary { "Table: callers and callees" }
                    (table("Callers", &self.callers, |edge| &edge.source))
                    (table("Callees", &self.callees, |edge| &edge.destination))
                }
            }
        }
    }

    fn picture(&self, me: &Party) -> Markup {
        let lines = |edges: &[Edge]| edges.len().min(MOST) + usize::from(edges.len() > MOST);
        let rows = lines(&self.callers).max(lines(&self.callees)).max(1);
        let height = TOP + ROW * rows as f64;
        let middle = TOP + (height - TOP) / 2.0 - ROW / 2.0;
        let centre = (WIDTH - BOX_WIDTH) / 2.0;
        let right = WIDTH - BOX_WIDTH;
        html! {
            // A group and not an image: the boxes are links.
            svg.graph viewBox={ "0 0 " (WIDTH) " " (height) } role="group"
                aria-label={
                    "Callers: " (self.callers.len()) ", callees: " (self.callees.len())
                    ". The table below has every edge."
                } {
                text.heading x="0" y="14" { "Callers" }
                text.heading x=(right) y="14" { "Callees" }
                @for (at, edge) in self.callers.iter().take(MOST).enumerate() {
                    @let y = TOP + ROW * at as f64;
                    (link(edge, (BOX_WIDTH, y), (centre, middle)))
                    (node(&edge.source, 0.0, y, "node"))
                }
                @for (at, edge) in self.callees.iter().take(MOST).enumerate() {
                    @let y = TOP + ROW * at as f64;
                    (link(edge, (centre + BOX_WIDTH, middle), (right, y)))
                    (node(&edge.destination, right, y, "node"))
                }
                (more(self.callers.len(), 0.0))
                (more(self.callees.len(), right))
                (node(me, centre, middle, "node me"))
            }
        }
    }
}

/// A line from the right side of a box to the left side of another, and what flows along it.
fn link(edge: &Edge, from: (f64, f64), to: (f64, f64)) -> Markup {
    let (x1, y1) = (from.0, from.1 + BOX_HEIGHT / 2.0);
    let (x2, y2) = (to.0, to.1 + BOX_HEIGHT / 2.0);
    let bend = (x1 + x2) / 2.0;
    let path = format!("M{x1:.1} {y1:.1}C{bend:.1} {y1:.1} {bend:.1} {y2:.1} {x2:.1} {y2:.1}");
    // At the box that stands in a column: at the other end all lines meet.
    let label_y = if from.0 <= BOX_WIDTH { y1 } else { y2 } - 5.0;
    let (label_x, anchor) = if from.0 <= BOX_WIDTH { (x1 + 4.0, "start") } else { (x2 - 4.0, "end") };
    let class = if edge.is_secured() == Some(false) { "edge plain" } else { "edge" };
    html! {
        path class=(class) d=(path) {}
        text.label x=(format!("{label_x:.1}")) y=(format!("{label_y:.1}")) text-anchor=(anchor) { (flow(edge)) }
    }
}

/// The text at a line. Where a lock would say it by a picture, this says it by a word.
fn flow(edge: &Edge) -> String {
    let how = match edge.is_secured() {
        Some(true) => " mTLS",
        Some(false) => " plain",
        None => "",
    };
    match edge.golden.success {
        Some(success) if success < 1.0 => {
            let failed = percent(Some(1.0 - success));
            format!("{}/s{how}, {failed} fail", rate(edge.golden.rps))
        }
        _ => format!("{}/s{how}", rate(edge.golden.rps)),
    }
}

fn node(who: &Party, x: f64, y: f64, class: &str) -> Markup {
    let name = party(who);
    let to = address_of(who).filter(|_| class == "node");
    let inner = html! {
        title { (name) }
        rect class=(class) x=(x) y=(format!("{y:.1}")) width=(BOX_WIDTH) height=(BOX_HEIGHT) rx="4" {}
        text x=(x + 8.0) y=(format!("{:.1}", y + 20.0)) { (shortened(who)) }
    };
    html! {
        @match to {
            Some(to) => { a href=(to) { (inner) } }
            None => { g { (inner) } }
        }
    }
}

fn more(edges: usize, x: f64) -> Markup {
    html! {
        @if edges > MOST {
            a href="#edges" {
                text x=(x + 8.0) y=(TOP + ROW * MOST as f64 + 20.0) { "and " (edges - MOST) " more" }
            }
        }
    }
}

/// The name as it fits into a box: of a long one the end, where names of one application differ.
fn shortened(who: &Party) -> String {
    let name = match who.kind.as_str() {
        "Plain" => "no sidecar".to_owned(),
        _ if who.namespace.is_empty() => who.name.clone(),
        _ => format!("{}/{}", who.namespace, who.name),
    };
    match name.chars().count().checked_sub(CHARACTERS) {
        None | Some(0) => name,
        Some(over) => "…".chars().chain(name.chars().skip(over + 1)).collect(),
    }
}

fn table(title: &str, edges: &[Edge], other: fn(&Edge) -> &Party) -> Markup {
    html! {
        @if edges.is_empty() {
            p.empty { "No " (title.to_lowercase()) " in this window." }
        } @else {
            table {
                caption { (title) ", those with the most requests first" }
                thead {
                    tr {
                        th scope="col" { "Who" }
                        th scope="col" { "Protocol" }
                        th scope="col" { "Secured" }
                        th.number scope="col" { "RPS" }
                        th.number scope="col" { "Success" }
                        th.number scope="col" { "p99" }
                    }
                }
                tbody {
                    @for edge in edges {
                        tr {
                            th scope="row" {
                                @match address_of(other(edge)) {
                                    Some(to) => { a href=(to) { (party(other(edge))) } }
                                    None => { (party(other(edge))) }
                                }
                            }
                            td { (edge.protocol) }
                            td { (secured(edge.is_secured())) }
                            td.number data-v=(edge.golden.rps) { (rate(edge.golden.rps)) }
                            td.number data-v=[edge.golden.success] { (percent(edge.golden.success)) }
                            td.number data-v=[edge.golden.p99_ms] { (latency(edge.golden.p99_ms)) }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(kind: &str, name: &str) -> Party {
        Party { namespace: "shop".into(), kind: kind.into(), name: name.into() }
    }

    fn edge(source: Party, destination: Party, mtls: bool) -> Edge {
        Edge { source, destination, mtls, protocol: "http1".into(), ..Edge::default() }
    }

    #[test]
    fn callers_are_found_through_the_services_of_a_workload() {
        let me = who("Deployment", "web");
        let edges = vec![
            edge(who("Deployment", "shop"), who("Service", "front"), true),
            edge(who("Deployment", "shop"), who("Service", "other"), true),
            edge(who("Plain", ""), me.clone(), false),
            edge(me.clone(), who("Service", "db"), true),
        ];
        let around = Neighbours::of(edges, &me, &["front".into()]);
        let callers: Vec<&str> = around.callers.iter().map(|edge| edge.source.kind.as_str()).collect();
        assert_eq!(callers, ["Deployment", "Plain"]);
        assert_eq!(around.callees.len(), 1);
        let text = around.render(&me, "").into_string();
        assert!(text.contains("0/s plain") && text.contains("0/s mTLS"), "not by colour alone: {text}");
        assert!(text.contains("plain text</td>") && text.contains("href=\"/workload/shop/shop\""), "{text}");
    }

    #[test]
    fn a_side_with_many_neighbours_shows_twelve_and_links_to_the_table() {
        let me = who("Deployment", "web");
        let edges = (0..20).map(|n| edge(who("Deployment", &format!("client-{n}")), me.clone(), true));
        let text = Neighbours::of(edges.collect(), &me, &[]).render(&me, "").into_string();
        assert_eq!(text.matches("<rect").count(), 13, "{text}");
        assert!(text.contains("<a href=\"#edges\">") && text.contains("and 8 more"), "{text}");
        assert_eq!(text.matches("<tr>").count(), 21, "the table has them all");
    }

    #[test]
    fn without_neighbours_the_cause_is_named() {
        let text = Neighbours::default().render(&who("Deployment", "web"), "No traffic.").into_string();
        assert_eq!(text, "<p class=\"empty\">No traffic.</p>");
    }

    #[test]
    fn a_long_name_keeps_its_end() {
        let name = format!("{}-checkout-v2", "a".repeat(60));
        let text = shortened(&who("Deployment", &name));
        assert!(text.starts_with('…') && text.ends_with("-checkout-v2"), "{text}");
        assert_eq!(text.chars().count(), CHARACTERS);
    }
}
