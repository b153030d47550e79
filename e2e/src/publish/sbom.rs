//! Software bills of materials: the crates of a program, as SPDX 2.3 in JSON.
//!
//! In: what cargo prints about the workspace, and Cargo.lock. Out: a package and every crate that is linked into its
//! program, with version, licence, purl and the checksum of its source. Procedural macros and build scripts are left out,
//! because they run in the compiler. So are Rust's standard library and the C library, which cargo does not know.
//!
//! The document contains no time and no path of this machine: the same sources give the same bytes.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::build;
use crate::host;

/// What SPDX documents write where nothing is claimed.
const NO_ASSERTION: &str = "NOASSERTION";
/// The document's own identifier, which the specification fixes.
const DOCUMENT: &str = "SPDXRef-DOCUMENT";

/// What cargo knows about a build of packages of the workspace.
#[derive(Clone)]
pub struct Sources {
    /// Output of `cargo metadata`: every package, and what it depends on with the features of the whole workspace.
    metadata: Value,
    /// Output of `cargo tree`: a line `NAME vVERSION` for each crate that is linked in with the features of this build.
    /// The metadata has optional dependencies besides that nothing enables.
    tree: String,
    /// Text of Cargo.lock.
    lock: String,
}

impl Sources {
    /// Reads what belongs to a build of these packages for these targets.
    ///
    /// # Errors
    /// cargo's error, for example because Cargo.lock is stale.
    pub fn read(packages: &[String], triples: &[String]) -> Result<Self> {
        let mut metadata = vec!["metadata", "--locked", "--format-version", "1"];
        let mut tree = vec!["tree", "--locked", "--edges", "normal,no-proc-macro", "--prefix", "none"];
        tree.extend(["--format", "{p}"]);
        for triple in triples {
            metadata.extend(["--filter-platform", triple]);
            tree.extend(["--target", triple]);
        }
        packages.iter().for_each(|package| tree.extend(["--package", package]));
        let metadata = build::cargo("reading the metadata of the dependencies", &metadata)?;
        let lock = host::workspace().join("Cargo.lock");
        Ok(Self {
            metadata: serde_json::from_str(&metadata).context("cargo metadata does not print JSON")?,
            tree: build::cargo("reading the tree of the dependencies", &tree)?,
            lock: std::fs::read_to_string(&lock)
                .with_context(|| format!("cannot read {}", lock.display()))?,
        })
    }

    /// The document of a package of the workspace.
    ///
    /// # Errors
    /// There is no such package.
    pub fn document(&self, package: &str) -> Result<Value> {
        let graph = Graph::of(&self.metadata, linked_in(&self.tree));
        let root = graph.member(package);
        let root = root.with_context(|| format!("the workspace has no package {package}"))?;
        let checksums = checksums(&self.lock);
        // By name and version, because the identifiers of cargo contain paths of this machine.
        let (mut packages, mut edges) = (BTreeMap::new(), BTreeSet::new());
        for (id, dependencies) in graph.linked(root) {
            let Some(package) = graph.packages.get(id) else { continue };
            let release = Release::of(package);
            packages.insert(release, described(package, id == root, checksums.get(&release).copied()));
            let others = dependencies.into_iter().filter_map(|other| graph.packages.get(other));
            edges.extend(others.map(|other| (release, Release::of(other))));
        }
        let root = graph.packages.get(root).map(|package| Release::of(package));
        Ok(assembled(
            root.context("a package is in its own graph")?,
            &packages.into_values().collect::<Vec<Value>>(),
            edges.into_iter(),
        ))
    }
}

/// The document of a program with these entries and dependencies.
fn assembled<'a>(
    root: Release<'a>,
    packages: &[Value],
    edges: impl Iterator<Item = (Release<'a>, Release<'a>)>,
) -> Value {
    let mut relationships = vec![relationship(DOCUMENT, "DESCRIBES", &root.id())];
    relationships.extend(edges.map(|(this, other)| relationship(&this.id(), "DEPENDS_ON", &other.id())));
    let name = format!("{}-{}", root.name, root.version);
    let content = json!([packages, relationships]).to_string();
    let hash: String = Sha256::digest(content).iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    json!({
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": DOCUMENT,
        "name": name,
        // Unique, as the specification demands; it does not have to lead anywhere.
        "documentNamespace": format!("https://tulle.dev/spdx/{name}-{hash}"),
        "creationInfo": {
            "created": "1970-01-01T00:00:00Z",
            "creators": [concat!("Tool: cargo-xtask-", env!("CARGO_PKG_VERSION"))],
        },
        "packages": packages,
        "relationships": relationships,
    })
}

fn relationship(from: &str, kind: &str, to: &str) -> Value {
    json!({"spdxElementId": from, "relationshipType": kind, "relatedSpdxElement": to})
}

/// An entry of the document's packages.
fn described(package: &Value, is_program: bool, checksum: Option<&str>) -> Value {
    let release = Release::of(package);
    let mut entry = json!({
        "SPDXID": release.id(),
        "name": release.name,
        "versionInfo": release.version,
        "supplier": NO_ASSERTION,
        "downloadLocation": NO_ASSERTION,
        "filesAnalyzed": false,
        "licenseConcluded": NO_ASSERTION,
        "licenseDeclared": package["license"].as_str().map_or_else(|| NO_ASSERTION.to_owned(), licence),
        "copyrightText": NO_ASSERTION,
        "primaryPackagePurpose": if is_program { "APPLICATION" } else { "LIBRARY" },
    });
    if let Some(checksum) = checksum {
        entry["checksums"] = json!([{"algorithm": "SHA256", "checksumValue": checksum}]);
    }
    // Packages of the workspace are in no registry that a purl could refer to.
    if !package["source"].is_null() {
        let category = json!("PACKAGE-MANAGER");
        entry["externalRefs"] = json!([{"referenceCategory": category, "referenceType": "purl", "referenceLocator": release.purl()}]);
    }
    entry
}

/// A licence as an SPDX expression. Some crates still write `MIT/Apache-2.0`, as cargo once asked for.
fn licence(declared: &str) -> String {
    declared.split('/').map(str::trim).collect::<Vec<_>>().join(" OR ")
}

/// The dependencies between packages, by the identifiers of cargo.
struct Graph<'a> {
    packages: BTreeMap<&'a str, &'a Value>,
    nodes: BTreeMap<&'a str, &'a Value>,
    linked_in: BTreeSet<Release<'a>>,
}

impl<'a> Graph<'a> {
    fn of(metadata: &'a Value, linked_in: BTreeSet<Release<'a>>) -> Self {
        let (packages, nodes) = (&metadata["packages"], &metadata["resolve"]["nodes"]);
        Self { packages: by_id(packages), nodes: by_id(nodes), linked_in }
    }

    /// The identifier of a package of the workspace.
    fn member(&self, name: &str) -> Option<&'a str> {
        let is_member = |package: &Value| package["name"] == name && package["source"].is_null();
        self.packages.iter().find(|(_, package)| is_member(package)).map(|(id, _)| *id)
    }

    fn is_linked_in(&self, id: &str) -> bool {
        self.packages.get(id).is_some_and(|package| self.linked_in.contains(&Release::of(package)))
    }

    /// What a package is linked with directly.
    fn dependencies(&self, id: &str) -> Vec<&'a str> {
        let node: Option<&'a Value> = self.nodes.get(id).copied();
        let dependencies = node.and_then(|node| node["deps"].as_array()).into_iter().flatten();
        let normal = dependencies.filter(|dependency| is_normal(dependency));
        let ids = normal.filter_map(|dependency| dependency["pkg"].as_str());
        ids.filter(|id| self.is_linked_in(id)).collect()
    }

    /// A package with all that it is linked with, each with its own direct dependencies.
    fn linked(&self, root: &'a str) -> BTreeMap<&'a str, Vec<&'a str>> {
        let mut found = BTreeMap::new();
        let mut open = vec![root];
        while let Some(id) = open.pop() {
            if found.contains_key(id) {
                continue;
            }
            let dependencies = self.dependencies(id);
            open.extend(dependencies.iter().copied());
            found.insert(id, dependencies);
        }
        found
    }
}

fn by_id(list: &Value) -> BTreeMap<&str, &Value> {
    let items = list.as_array().into_iter().flatten();
    items.filter_map(|item| Some((item["id"].as_str()?, item))).collect()
}

/// Whether a dependency is neither one of tests nor one of a build script.
fn is_normal(dependency: &Value) -> bool {
    let mut kinds = dependency["dep_kinds"].as_array().into_iter().flatten();
    kinds.any(|kind| kind["kind"].is_null())
}

/// The crates of `cargo tree`.
fn linked_in(tree: &str) -> BTreeSet<Release<'_>> {
    let release = |line| {
        let mut words = str::split_whitespace(line);
        Some(Release { name: words.next()?, version: words.next()?.strip_prefix('v')? })
    };
    tree.lines().filter_map(release).collect()
}

/// Name and version of a crate.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Release<'a> {
    name: &'a str,
    version: &'a str,
}

impl<'a> Release<'a> {
    fn of(package: &'a Value) -> Self {
        let text = |field: &str| package[field].as_str().unwrap_or_default();
        Self { name: text("name"), version: text("version") }
    }

    /// Its identifier in the document, in which only letters, digits, `.` and `-` are allowed.
    fn id(self) -> String {
        let text = format!("SPDXRef-Package-{}-{}", self.name, self.version);
        text.replace(|character: char| !character.is_ascii_alphanumeric() && character != '.', "-")
    }

    fn purl(self) -> String {
        format!("pkg:cargo/{}@{}", self.name, self.version.replace('+', "%2B"))
    }
}

/// The checksums of Cargo.lock, which are SHA-256 of the crates' archives.
fn checksums(lock: &str) -> BTreeMap<Release<'_>, &str> {
    let packages = lock.split("[[package]]").skip(1);
    packages
        .filter_map(|package| {
            let field = |name: &str| {
                let mut values = package.lines().filter_map(|line| line.strip_prefix(name));
                values.find_map(|value| value.strip_prefix(" = \"")?.strip_suffix('"'))
            };
            Some((Release { name: field("name")?, version: field("version")? }, field("checksum")?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What cargo knows about this workspace on this machine's target.
    fn sources() -> Sources {
        let packages = ["operator", "webhook", "sidecar"].map(|part| format!("tulle-{part}"));
        Sources::read(&packages, &[format!("{}-unknown-linux-gnu", std::env::consts::ARCH)]).unwrap()
    }

    fn names(document: &Value) -> BTreeSet<&str> {
        let packages = document["packages"].as_array().unwrap().iter();
        packages.map(|package| package["name"].as_str().unwrap()).collect()
    }

    fn package<'a>(document: &'a Value, name: &str) -> &'a Value {
        document["packages"].as_array().unwrap().iter().find(|package| package["name"] == name).unwrap()
    }

    #[test]
    fn the_document_of_the_sidecar_has_what_it_is_linked_with_and_nothing_of_its_tests() {
        let sources = sources();
        let document = sources.document("tulle-sidecar").unwrap();
        let listed = names(&document);
        for linked in ["tulle-sidecar", "tulle-mesh", "rustls", "tokio", "h2"] {
            assert!(listed.contains(linked), "{linked} is missing: {listed:?}");
        }
        let known = names(&sources.metadata);
        // Of its tests, of another program, of the compiler, and one that nothing enables.
        for other in ["proptest", "tulle-operator", "kube", "serde_derive", "syn", "ring"] {
            assert!(known.contains(other) && !listed.contains(other), "{other}");
        }
        let rustls = package(&document, "rustls");
        let checksum = &rustls["checksums"][0];
        assert_eq!(checksum["algorithm"], "SHA256");
        assert_eq!(checksum["checksumValue"].as_str().unwrap().len(), 64);
        let version = rustls["versionInfo"].as_str().unwrap();
        assert_eq!(rustls["externalRefs"][0]["referenceLocator"], format!("pkg:cargo/rustls@{version}"));
        assert_eq!(rustls["licenseDeclared"], "Apache-2.0 OR ISC OR MIT");
        assert!(package(&document, "tulle-mesh").get("externalRefs").is_none());
        assert!(sources.document("tulle-gateway").is_err());
    }

    #[test]
    fn every_field_that_spdx_requires_is_there_and_every_relationship_joins_two_elements() {
        let document = sources().document("tulle-operator").unwrap();
        for (field, value) in
            [("spdxVersion", "SPDX-2.3"), ("dataLicense", "CC0-1.0"), ("SPDXID", "SPDXRef-DOCUMENT")]
        {
            assert_eq!(document[field], value);
        }
        assert!(document["name"].is_string());
        let namespace = document["documentNamespace"].as_str().unwrap();
        assert!(namespace.starts_with("https://") && !namespace.contains('#'), "{namespace}");
        assert!(document["creationInfo"]["created"].as_str().unwrap().ends_with('Z'));
        assert!(document["creationInfo"]["creators"][0].as_str().unwrap().starts_with("Tool: "));
        let mut elements = BTreeSet::from([DOCUMENT]);
        for package in document["packages"].as_array().unwrap() {
            for field in ["name", "versionInfo", "downloadLocation", "licenseDeclared"] {
                assert!(package[field].as_str().is_some_and(|text| !text.is_empty()), "{field} of {package}");
            }
            // Otherwise the specification requires a verification code of the files.
            assert_eq!(package["filesAnalyzed"], false);
            let id = package["SPDXID"].as_str().unwrap();
            let suffix = id.strip_prefix("SPDXRef-").unwrap();
            let allowed = |character: char| character.is_ascii_alphanumeric() || ".-".contains(character);
            assert!(suffix.chars().all(allowed), "{id}");
            assert!(elements.insert(id), "{id} is there twice");
        }
        let relationships = document["relationships"].as_array().unwrap();
        assert_eq!(relationships[0]["relationshipType"], "DESCRIBES");
        assert_eq!(relationships[0]["relatedSpdxElement"], package(&document, "tulle-operator")["SPDXID"]);
        for relationship in relationships {
            for end in ["spdxElementId", "relatedSpdxElement"] {
                assert!(elements.contains(relationship[end].as_str().unwrap()), "{relationship}");
            }
        }
    }

    #[test]
    fn the_document_depends_neither_on_the_order_of_cargo_nor_on_where_the_workspace_is() {
        let sources = sources();
        let text = |sources: &Sources| sources.document("tulle-webhook").unwrap().to_string();
        let expected = text(&sources);
        let mut other = sources.clone();
        other.metadata["packages"].as_array_mut().unwrap().reverse();
        other.metadata["resolve"]["nodes"].as_array_mut().unwrap().reverse();
        assert_eq!(text(&other), expected);
        let here = host::workspace().display().to_string();
        assert!(!expected.contains(&here));
        let moved = sources.metadata.to_string().replace(&here, "/zz/elsewhere");
        other.metadata = serde_json::from_str(&moved).unwrap();
        assert_eq!(text(&other), expected);
        other.lock = other.lock.replace("checksum = \"", "checksum = \"0");
        assert_ne!(text(&other), expected);
    }

    #[test]
    fn a_licence_with_a_slash_becomes_an_expression_and_a_version_with_a_plus_is_escaped() {
        assert_eq!(licence("MIT/Apache-2.0"), "MIT OR Apache-2.0");
        assert_eq!(licence("MIT / Apache-2.0"), "MIT OR Apache-2.0");
        assert_eq!(licence("(MIT OR Apache-2.0) AND ISC"), "(MIT OR Apache-2.0) AND ISC");
        let release = Release { name: "zstd_sys", version: "2.0.1+zstd.1.5" };
        assert_eq!(release.purl(), "pkg:cargo/zstd_sys@2.0.1%2Bzstd.1.5");
        assert_eq!(release.id(), "SPDXRef-Package-zstd-sys-2.0.1-zstd.1.5");
    }
}
