//! The book: the pages of `docs/` and the documents beside the code, as HTML, with every link checked.
//!
//! In: Markdown of the workspace. Out: `target/book/html`. A document that a page links to becomes a chapter of its own,
//! so that no page has to repeat it; what is not Markdown and is linked to is copied beside the chapters. All keep their
//! paths, so a link works in the clone and in the book.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::build::tool;
use crate::host;

mod markdown;
#[cfg(test)]
mod tests;

use markdown::{Link, anchors, links, resolve, title};

/// The release of mdBook.
const MDBOOK: &str = "0.5.4";
/// The first chapter of the book.
const README: &str = "README.md";
/// The pages of `docs/`, in order.
const SUMMARY: &str = "docs/src/SUMMARY.md";
/// The part of the table of contents with what is not below `docs/`.
const BESIDE: &str = "# Documents beside the code";

/// The documents by their paths in the workspace, with their texts.
type Documents = BTreeMap<String, String>;

/// Builds the book, and prints where it is.
///
/// # Errors
/// As [`build`].
pub fn run() -> Result<()> {
    println!("{}", build()?.join("index.html").display());
    Ok(())
}

/// Builds the book and returns its folder.
///
/// # Errors
/// Links that lead nowhere, or what mdBook reports.
pub fn build() -> Result<PathBuf> {
    let documents = documents()?;
    complain(broken(&documents))?;
    let folder = host::workspace().join("target/book");
    let (source, html) = (folder.join("source"), folder.join("html"));
    for old in [&source, &html] {
        if old.exists() {
            fs::remove_dir_all(old).with_context(|| format!("cannot empty {}", old.display()))?;
        }
    }
    host::write(&source.join("book.toml"), read("docs/book.toml")?)?;
    for (path, text) in documents.iter().filter(|(path, _)| *path != SUMMARY) {
        host::write(&source.join("src").join(path), text)?;
    }
    host::write(&source.join("src/SUMMARY.md"), summary(&documents))?;
    let program = tool("mdbook", MDBOOK, &["--no-default-features"])?;
    host::output(Command::new(program).arg("build").arg(&source).arg("--dest-dir").arg(&html))?;
    for path in others(&documents) {
        copy(&path, &html)?;
    }
    complain(broken_in_html(&html)?)?;
    Ok(html)
}

fn complain(broken: Vec<String>) -> Result<()> {
    if !broken.is_empty() {
        bail!("links that lead nowhere:\n{}", broken.join("\n"));
    }
    Ok(())
}

/// A file of the workspace.
fn read(path: &str) -> Result<String> {
    fs::read_to_string(host::workspace().join(path)).with_context(|| format!("cannot read {path}"))
}

fn is_document(path: &str) -> bool {
    path.ends_with(".md") && host::workspace().join(path).is_file()
}

/// Every Markdown file that links lead to, from the README and from the table of contents on.
fn documents() -> Result<Documents> {
    let mut found = Documents::new();
    let mut waiting = vec![README.to_owned(), SUMMARY.to_owned()];
    while let Some(path) = waiting.pop() {
        if found.contains_key(&path) {
            continue;
        }
        let text = read(&path)?;
        let linked = links(&text).into_iter().filter_map(|link| resolve(&path, &link.path));
        waiting.extend(linked.filter(|path| is_document(path)));
        found.insert(path, text);
    }
    Ok(found)
}

/// A sentence for each link whose target or anchor does not exist.
fn broken(documents: &Documents) -> Vec<String> {
    let anchors: BTreeMap<&str, BTreeSet<String>> =
        documents.iter().map(|(path, text)| (path.as_str(), anchors(text))).collect();
    let mut broken = Vec::new();
    for (path, text) in documents {
        for Link { path: target, anchor } in links(text) {
            let found = resolve(path, &target).filter(|found| host::workspace().join(found).exists());
            let Some(found) = found else {
                broken.push(format!("{path}: {target} does not exist"));
                continue;
            };
            let has = |anchor: &String| anchors.get(found.as_str()).is_none_or(|all| all.contains(anchor));
            if anchor.as_ref().is_some_and(|anchor| !has(anchor)) {
                let anchor = anchor.unwrap_or_default();
                broken.push(format!("{path}: {found} has no heading #{anchor}"));
            }
        }
    }
    broken
}

/// The files and folders that documents link to and that are not documents.
fn others(documents: &Documents) -> BTreeSet<String> {
    let mut others = BTreeSet::new();
    for (path, text) in documents {
        let linked = links(text).into_iter().filter_map(|link| resolve(path, &link.path));
        others.extend(linked.filter(|path| !path.is_empty() && !is_document(path)));
    }
    others
}

/// The table of contents of the whole book.
fn summary(documents: &Documents) -> String {
    let own = documents.get(SUMMARY).map(String::as_str).unwrap_or_default();
    let own = own.trim_start_matches("# Summary").replace("](", "](docs/src/");
    let beside = documents.iter().filter(|(path, _)| *path != README && !path.starts_with("docs/src/"));
    let beside: String = beside.map(|(path, text)| format!("- [{}]({path})\n", title(text))).collect();
    format!("# Summary\n\n[Tulle]({README})\n\n{}\n\n{BESIDE}\n\n{beside}", own.trim())
}

/// Copies a file, or the files of a folder, to the same path below `html`.
fn copy(path: &str, html: &Path) -> Result<()> {
    let from = host::workspace().join(path);
    if from.is_dir() {
        fs::create_dir_all(html.join(path)).with_context(|| format!("cannot create {path}"))?;
        for entry in fs::read_dir(&from).with_context(|| format!("cannot list {path}"))? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if from.join(&name).is_file() {
                copy(&format!("{path}/{name}"), html)?;
            }
        }
        return Ok(());
    }
    let content = fs::read(&from).with_context(|| format!("cannot read {path}"))?;
    host::write(&html.join(path), content)
}

/// The links of a built book that lead nowhere.
fn broken_in_html(html: &Path) -> Result<Vec<String>> {
    let mut pages = BTreeMap::new();
    pages_below(html, "", &mut pages)?;
    if !pages.contains_key("index.html") {
        bail!("{} has no index.html", html.display());
    }
    let mut broken = Vec::new();
    for (path, text) in &pages {
        for Link { path: target, anchor } in markdown::references(text) {
            let found = resolve(path, &target).filter(|found| html.join(found).exists());
            let Some(found) = found else {
                broken.push(format!("{path}: {target} does not exist"));
                continue;
            };
            let lacks = |anchor: &String| {
                pages.get(&found).is_some_and(|text| !text.contains(&format!("id=\"{anchor}\"")))
            };
            if anchor.as_ref().is_some_and(lacks) {
                broken.push(format!("{path}: {found} has no #{}", anchor.unwrap_or_default()));
            }
        }
    }
    Ok(broken)
}

/// The pages in a folder of the book and below it. The page for addresses that do not exist has links from the root.
fn pages_below(html: &Path, folder: &str, pages: &mut Documents) -> Result<()> {
    for entry in fs::read_dir(html.join(folder)).with_context(|| format!("cannot list {folder}"))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let path = if folder.is_empty() { name } else { format!("{folder}/{name}") };
        if html.join(&path).is_dir() {
            pages_below(html, &path, pages)?;
        } else if path.ends_with(".html") && path != "404.html" {
            let text = fs::read_to_string(html.join(&path)).with_context(|| format!("cannot read {path}"))?;
            pages.insert(path, text);
        }
    }
    Ok(())
}
