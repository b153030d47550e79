//! Links and anchors in Markdown and HTML. Pure: texts in, names out.

use std::collections::{BTreeMap, BTreeSet};

/// A link to a place in this clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// The path, relative to the page's folder; empty for a place on the same page.
    pub path: String,
    /// The heading, without `#`.
    pub anchor: Option<String>,
}

/// Reads a target. Nothing for one on another host.
fn link(target: &str) -> Option<Link> {
    let is_elsewhere = target.contains("://") || target.starts_with("mailto:");
    let (path, anchor) = match target.split_once('#') {
        Some((path, anchor)) => (path, Some(anchor.to_owned())),
        None => (target, None),
    };
    (!is_elsewhere).then(|| Link { path: path.to_owned(), anchor })
}

/// The links of a Markdown text, outside code.
pub fn links(text: &str) -> Vec<Link> {
    let prose = without_blocks(text);
    // Whatever is between two backticks of a paragraph is code.
    let prose = prose.split("\n\n").flat_map(|paragraph| paragraph.split('`').step_by(2));
    // A link's text may be code, so that the bracket stands in the next piece.
    let prose: String = prose.collect();
    let targets = prose.split("](").skip(1).filter_map(|rest| rest.split([')', ' ', '\n']).next());
    targets.filter_map(link).collect()
}

/// The names by which links reach the headings of a Markdown text, as GitHub and mdBook make them.
pub fn anchors(text: &str) -> BTreeSet<String> {
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    let mut anchors = BTreeSet::new();
    for line in without_blocks(text).lines() {
        let Some(heading) = line.strip_prefix('#') else { continue };
        let Some(heading) = heading.trim_start_matches('#').strip_prefix(' ') else { continue };
        let name = anchor(heading);
        let count = seen.entry(name.clone()).or_default();
        anchors.insert(if *count == 0 { name } else { format!("{name}-{count}") });
        *count += 1;
    }
    anchors
}

fn anchor(heading: &str) -> String {
    let letters = heading.trim().chars().filter_map(|letter| match letter {
        letter if letter.is_alphanumeric() || letter == '_' || letter == '-' => Some(letter),
        letter if letter.is_whitespace() => Some('-'),
        _ => None,
    });
    letters.flat_map(char::to_lowercase).collect()
}

/// The first heading of a Markdown text.
pub fn title(text: &str) -> &str {
    text.lines().find_map(|line| line.strip_prefix("# ")).unwrap_or_default().trim()
}

/// The section below a heading of the second level, up to the next one.
#[cfg(test)]
pub fn section<'a>(text: &'a str, heading: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(&format!("\n## {heading}\n"))?;
    Some(rest.split("\n## ").next().unwrap_or(rest).trim())
}

/// A Markdown text without its fenced blocks of code.
fn without_blocks(text: &str) -> String {
    let mut is_code = false;
    let mut prose = String::new();
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            is_code = !is_code;
        } else if !is_code {
            prose.push_str(line);
            prose.push('\n');
        }
    }
    prose
}

/// The links in the main part of a page of HTML.
pub fn references(html: &str) -> Vec<Link> {
    let main = html.split_once("<main").and_then(|(_, rest)| rest.split_once("</main>"));
    let text = main.map_or(html, |(main, _)| main);
    let targets = text.split("href=\"").skip(1).filter_map(|rest| rest.split('"').next());
    targets.filter_map(link).collect()
}

/// The path that a target means on a page; both are relative to the same folder. Nothing for one outside that folder.
pub fn resolve(page: &str, target: &str) -> Option<String> {
    if target.is_empty() {
        return Some(page.to_owned());
    }
    let mut parts: Vec<&str> = page.split('/').collect();
    parts.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}
