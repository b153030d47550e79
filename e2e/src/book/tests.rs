//! The documents of this clone, and how links are read.

use super::*;
use crate::book::markdown::{references, section};

fn link(path: &str, anchor: Option<&str>) -> Link {
    Link { path: path.to_owned(), anchor: anchor.map(str::to_owned) }
}

#[test]
fn every_link_in_the_documentation_leads_somewhere() {
    assert_eq!(broken(&documents().unwrap()), Vec::<String>::new());
}

#[test]
fn every_page_is_in_the_table_of_contents() {
    let documents = documents().unwrap();
    let listed: BTreeSet<String> = links(&documents[SUMMARY])
        .into_iter()
        .filter_map(|link| resolve(SUMMARY, &link.path))
        .chain([SUMMARY.to_owned()])
        .collect();
    let mut pages = BTreeSet::new();
    let mut waiting = vec!["docs/src".to_owned()];
    while let Some(folder) = waiting.pop() {
        for entry in fs::read_dir(host::workspace().join(&folder)).unwrap() {
            let path = format!("{folder}/{}", entry.unwrap().file_name().to_string_lossy());
            if host::workspace().join(&path).is_dir() {
                waiting.push(path);
            } else if path.ends_with(".md") {
                pages.insert(path);
            }
        }
    }
    assert_eq!(pages, listed);
}

/// A section of a document with its links as a page of the reference needs them.
fn moved(document: &str, heading: &str) -> String {
    let text = read(document).unwrap();
    let mut section = section(&text, heading).unwrap().to_owned();
    for Link { path, anchor } in links(&section.clone()) {
        let anchor = anchor.map(|anchor| format!("#{anchor}")).unwrap_or_default();
        let target = resolve(document, &path).unwrap();
        let (old, new) = (format!("]({path}{anchor})"), format!("](../../../{target}{anchor})"));
        section = section.replace(&old, &new);
    }
    section
}

#[test]
fn the_page_of_metrics_is_what_the_documents_beside_the_code_say() {
    let generated = format!(
        "\
# Metrics

What [the sidecar](../../../sidecar/README.md) and [the operator](../../../config/README.md) count. Generated from the
sections of these two documents: `TULLE_UPDATE=1 cargo test -p tulle-e2e book`.

## Sidecar

Port 26152 of each meshed pod, `/metrics`.

{}

## Operator

{}
",
        moved("sidecar/README.md", "Metrics"),
        moved("config/README.md", "Metrics")
    );
    let path = host::workspace().join("docs/src/reference/metrics.md");
    if std::env::var_os("TULLE_UPDATE").is_some() {
        host::write(&path, &generated).unwrap();
    }
    let checked_in = fs::read_to_string(&path).unwrap_or_default();
    assert!(checked_in == generated, "metrics.md is stale: TULLE_UPDATE=1 cargo test -p tulle-e2e book");
}

#[test]
fn links_are_read_outside_code_only() {
    let text = "[a](x.md) and [`b`](../y.rs#z), `[c](no)`\n\n```\n[d](no)\n```\n[e](https://h/x) [f](#g \"title\")\n";
    let expected = [link("x.md", None), link("../y.rs", Some("z")), link("", Some("g"))];
    assert_eq!(links(text), expected);
}

#[test]
fn anchors_are_those_of_github() {
    let text = "# A `b_c`, d/e\n## Same\n```\n# code\n```\n### Same\n#no\n";
    assert_eq!(anchors(text), BTreeSet::from(["a-b_c-de", "same", "same-1"].map(str::to_owned)));
    assert_eq!(title(text), "A `b_c`, d/e");
}

#[test]
fn a_target_is_resolved_from_the_folder_of_its_page() {
    assert_eq!(resolve("docs/src/a.md", "../../config/README.md").as_deref(), Some("config/README.md"));
    assert_eq!(resolve("a/b.md", "./c.md").as_deref(), Some("a/c.md"));
    assert_eq!(resolve("a/b.md", "").as_deref(), Some("a/b.md"));
    assert_eq!(resolve("a/b.md", "../../c.md"), None);
}

#[test]
fn a_target_or_heading_that_is_missing_is_reported() {
    let text = "# Tulle\n[a](absent.md) [b](#tulle) [c](#no) [d](Cargo.toml)\n";
    let documents = Documents::from([(README.to_owned(), text.to_owned())]);
    let expected = ["README.md: absent.md does not exist", "README.md: README.md has no heading #no"];
    assert_eq!(broken(&documents), expected);
    assert_eq!(others(&documents), BTreeSet::from(["absent.md", "Cargo.toml"].map(str::to_owned)));
}

#[test]
fn the_table_of_contents_has_the_documents_beside_the_code_last() {
    let own = "# Summary\n\n[Introduction](introduction.md)\n\n# Tasks\n\n- [Install](tasks/install.md)\n";
    let documents = [(SUMMARY, own), (README, "# Tulle"), ("sidecar/README.md", "# The sidecar")];
    let documents = Documents::from(documents.map(|(path, text)| (path.to_owned(), text.to_owned())));
    let expected = format!(
        "# Summary\n\n[Tulle](README.md)\n\n[Introduction](docs/src/introduction.md)\n\n# Tasks\n\n- [Install](docs/src/tasks/install.md)\n\n{BESIDE}\n\n- [The sidecar](sidecar/README.md)\n"
    );
    assert_eq!(summary(&documents), expected);
}

#[test]
fn only_the_main_part_of_a_page_is_looked_at() {
    let html = r##"<a href="no.html"></a><main id="x"><a href="a.html#b">t</a><a href="#c"></a></main>"##;
    assert_eq!(references(html), [link("a.html", Some("b")), link("", Some("c"))]);
}

#[test]
fn a_built_book_is_checked_for_pages_and_places() {
    let folder = std::env::temp_dir().join(format!("tulle-book-{}", std::process::id()));
    host::write(
        &folder.join("index.html"),
        r#"<main><a href="a/b.html#c"></a><a href="a/d.html"></a></main>"#,
    )
    .unwrap();
    host::write(&folder.join("a/b.html"), r#"<main><h1 id="x"></h1><a href="../index.html"></a></main>"#)
        .unwrap();
    let found = broken_in_html(&folder).unwrap();
    fs::remove_dir_all(&folder).unwrap();
    assert_eq!(found, ["index.html: a/b.html has no #c", "index.html: a/d.html does not exist"]);
}
