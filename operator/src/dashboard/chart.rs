//! Line charts as SVG, each with a table of the same numbers.
//!
//! In: values by point of time. Out: markup without style or script. Lines are told apart by their dashes and by the
//! name at their end, not by colour alone.

use std::fmt::Write as _;

use maud::{Markup, html};

use super::words::{clock, clock_with_seconds, latency, percent, rate};

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 190.0;
/// Room for the labels of the vertical axis.
const LEFT: f64 = 64.0;
/// Room for the names at the ends of the lines.
const RIGHT: f64 = 76.0;
const TOP: f64 = 14.0;
/// Room for the labels of the horizontal axis.
const BOTTOM: f64 = 28.0;
/// Distance of two names at the ends of lines.
const LINE_HEIGHT: f64 = 14.0;
/// Labels of the horizontal axis.
const TIMES: usize = 4;

/// What the values are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Requests in a second.
    PerSecond,
    /// Parts of one.
    Part,
    /// Milliseconds.
    Milliseconds,
}

impl Unit {
    fn text(self, value: Option<f64>) -> String {
        match self {
            Self::PerSecond => value.map_or_else(|| super::words::NONE.to_owned(), rate),
            Self::Part => percent(value),
            Self::Milliseconds => latency(value),
        }
    }
}

/// A line. `None`: there is no value at this point.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// Its name.
    pub name: &'static str,
    /// Its values.
    pub values: Vec<Option<f64>>,
}

/// A chart.
#[derive(Clone, Debug, PartialEq)]
pub struct Chart {
    /// Its id in the page.
    pub id: &'static str,
    /// Its heading.
    pub title: &'static str,
    /// What the values are.
    pub unit: Unit,
    /// The start of the first point, in Unix seconds.
    pub start: i64,
    /// The length of a point in seconds.
    pub step: u64,
    /// The lines.
    pub lines: Vec<Line>,
}

impl Chart {
    /// The chart and its table. `empty` says why there is nothing to show, if so.
    pub fn render(&self, empty: &str) -> Markup {
        let drawn = self.values().next().is_some();
        html! {
            figure.chart {
                figcaption { (self.title) }
                @if drawn {
                    (self.picture())
                    details id={ (self.id) "-table" } {
                        summary { "Table: " (self.title) }
                        (self.table())
                    }
                } @else {
                    p.empty { (empty) }
                }
            }
        }
    }

    fn values(&self) -> impl Iterator<Item = f64> {
        self.lines.iter().flat_map(|line| line.values.iter().copied().flatten()).filter(|v| v.is_finite())
    }

    fn points(&self) -> usize {
        self.lines.iter().map(|line| line.values.len()).max().unwrap_or_default()
    }

    /// The value at the top of the vertical axis.
    fn top(&self) -> f64 {
        match self.unit {
            Unit::Part => 1.0,
            Unit::PerSecond | Unit::Milliseconds => nice(self.values().fold(0.0, f64::max)),
        }
    }

    fn x(&self, point: usize) -> f64 {
        let last = self.points().saturating_sub(1).max(1) as f64;
        LEFT + (WIDTH - LEFT - RIGHT) * point as f64 / last
    }

    fn y(value: f64, top: f64) -> f64 {
        TOP + (HEIGHT - TOP - BOTTOM) * (1.0 - (value / top).clamp(0.0, 1.0))
    }

    fn time(&self, point: usize) -> i64 {
        let offset = (point as u64).saturating_mul(self.step);
        self.start.saturating_add(i64::try_from(offset).unwrap_or(i64::MAX))
    }

    /// What a reader who does not see the picture should know first.
    fn summary(&self) -> String {
        let mut text = String::new();
        for line in &self.lines {
            let values = || line.values.iter().copied().flatten().filter(|value| value.is_finite());
            if values().next().is_none() {
                continue;
            }
            let (low, high) = (values().fold(f64::INFINITY, f64::min), values().fold(0.0, f64::max));
            let name = line.name;
            let (low, high) = (self.unit.text(Some(low)), self.unit.text(Some(high)));
            let last = self.unit.text(line.values.last().copied().flatten());
            let _ = write!(text, "{name}: now {last}, lowest {low}, highest {high}. ");
        }
        text.push_str("The table below has every value.");
        text
    }

    fn picture(&self) -> Markup {
        let top = self.top();
        let bottom = HEIGHT - BOTTOM;
        let right = WIDTH - RIGHT;
        let marks = [0.0, 0.5, 1.0].map(|part| (part * top, Self::y(part * top, top)));
        html! {
            svg viewBox={ "0 0 " (WIDTH) " " (HEIGHT) } role="img"
                aria-labelledby={ (self.id) "-title " (self.id) "-summary" } {
                title id={ (self.id) "-title" } { (self.title) }
                desc id={ (self.id) "-summary" } { (self.summary()) }
                @for (value, y) in marks {
                    line.grid x1=(LEFT) x2=(right) y1=(fixed(y)) y2=(fixed(y)) {}
                    text x=(LEFT - 6.0) y=(fixed(y + 4.0)) text-anchor="end" { (self.unit.text(Some(value))) }
                }
                line.axis x1=(LEFT) x2=(LEFT) y1=(TOP) y2=(bottom) {}
                @for point in self.labelled() {
                    text x=(fixed(self.x(point))) y=(HEIGHT - 8.0) text-anchor="middle" {
                        (clock(self.time(point)))
                    }
                }
                text x=(WIDTH - 4.0) y=(HEIGHT - 8.0) text-anchor="end" { "UTC" }
                @for (at, line) in self.lines.iter().enumerate() {
                    path class={ "line line-" (at) } d=(self.path(line, top)) {}
                }
                @for (name, y) in self.names(top) {
                    text x=(right + 6.0) y=(fixed(y)) { (name) }
                }
            }
        }
    }

    /// Points whose time stands at the horizontal axis.
    fn labelled(&self) -> Vec<usize> {
        let last = self.points().saturating_sub(1);
        let mut points: Vec<usize> = (0..TIMES).map(|n| last * n / (TIMES - 1)).collect();
        points.dedup();
        points
    }

    /// The names at the ends of the lines, moved apart where they would lie on each other.
    fn names(&self, top: f64) -> Vec<(&'static str, f64)> {
        if self.lines.len() < 2 {
            return Vec::new();
        }
        let end = |line: &Line| line.values.iter().rev().copied().flatten().next();
        let ends = self.lines.iter().filter_map(|line| Some((line.name, Self::y(end(line)?, top) + 4.0)));
        let mut names: Vec<(&'static str, f64)> = ends.collect();
        names.sort_by(|a, b| b.1.total_cmp(&a.1));
        // From the lowest upwards, so that none slips under the axis.
        let mut free = f64::INFINITY;
        for (_, y) in &mut names {
            *y = y.min(free);
            free = *y - LINE_HEIGHT;
        }
        names
    }

    fn path(&self, line: &Line, top: f64) -> String {
        let mut path = String::new();
        let mut drawing = false;
        for (point, value) in line.values.iter().enumerate() {
            let Some(value) = value.filter(|value| value.is_finite()) else {
                drawing = false;
                continue;
            };
            let (x, y) = (self.x(point), Self::y(value, top));
            // A line of no length: a point between two gaps is a dot instead of nothing.
            let _ = match drawing {
                true => write!(path, "L{x:.1} {y:.1}"),
                false => write!(path, "M{x:.1} {y:.1}h0"),
            };
            drawing = true;
        }
        path
    }

    fn table(&self) -> Markup {
        html! {
            div.scroll tabindex="0" role="region" aria-label={ (self.title) ", as a table" } {
                table {
                    caption { (self.title) ", the newest first; times are the start of a point, UTC" }
                    thead {
                        tr {
                            th scope="col" { "Time" }
                            @for line in &self.lines { th.number scope="col" { (line.name) } }
                        }
                    }
                    tbody {
                        @for point in (0..self.points()).rev() {
                            tr {
                                th scope="row" { (clock_with_seconds(self.time(point))) }
                                @for line in &self.lines {
                                    @let value = line.values.get(point).copied().flatten();
                                    td.number data-v=[value] { (self.unit.text(value)) }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The next larger number with one digit of 1, 2 or 5.
fn nice(largest: f64) -> f64 {
    if largest <= 0.0 || !largest.is_finite() {
        return 1.0;
    }
    let magnitude = 10f64.powf(largest.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|step| step * magnitude);
    steps.into_iter().find(|step| *step >= largest).unwrap_or(largest)
}

/// A coordinate.
fn fixed(value: f64) -> String {
    format!("{value:.1}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(lines: Vec<Line>) -> Chart {
        Chart { id: "rps", title: "Requests per second", unit: Unit::PerSecond, start: 0, step: 60, lines }
    }

    #[test]
    fn a_gap_interrupts_the_line_and_a_lonely_point_is_a_dot() {
        let line = Line { name: "requests", values: vec![Some(1.0), Some(2.0), None, Some(0.0)] };
        let chart = chart(vec![line.clone()]);
        assert_eq!(chart.path(&line, chart.top()), "M64.0 88.0h0L230.7 14.0M564.0 162.0h0");
    }

    #[test]
    fn every_value_of_the_picture_stands_in_its_table() {
        let values = vec![Some(1.5), None, Some(30.0)];
        let text = chart(vec![Line { name: "requests", values }]).render("nothing").into_string();
        assert!(text.contains("role=\"img\"") && text.contains("<caption>"), "{text}");
        for cell in
            ["<td class=\"number\" data-v=\"1.5\">1.50</td>", "<td class=\"number\">–</td>", ">30.0</td>"]
        {
            assert!(text.contains(cell), "{cell} in {text}");
        }
        assert!(text.contains("requests: now 30.0, lowest 1.50, highest 30.0."), "{text}");
        assert!(!text.contains("style="), "the page's CSP forbids it");
    }

    #[test]
    fn a_chart_without_values_says_why() {
        let line = Line { name: "requests", values: vec![None, None] };
        let text = chart(vec![line]).render("No request ended here.").into_string();
        assert!(text.contains("No request ended here.") && !text.contains("<svg"), "{text}");
    }

    #[test]
    fn the_axis_ends_at_a_round_number() {
        assert_eq!([0.0, 0.3, 1.0, 12.0, 4_001.0].map(nice), [1.0, 0.5, 1.0, 20.0, 5_000.0]);
    }

    #[test]
    fn names_at_the_ends_of_lines_do_not_overlap() {
        let line = |name, value| Line { name, values: vec![Some(value)] };
        let names = chart(vec![line("p50", 1.0), line("p95", 1.01), line("p99", 9.0)]).names(10.0);
        let gaps: Vec<f64> = names.windows(2).map(|pair| pair[0].1 - pair[1].1).collect();
        assert!(gaps.iter().all(|gap| *gap >= LINE_HEIGHT - 1e-9), "{names:?}");
    }
}
