//! Manifests from files, directories and standard input.

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use serde::Deserialize as _;
use serde_json::Value;

use crate::exit::CliError;

/// An object of a manifest.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Document {
    /// Where it stands.
    pub(crate) file: String,
    /// The object.
    pub(crate) value: Value,
}

impl Document {
    fn text(&self, pointer: &str) -> &str {
        self.value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
    }

    pub(crate) fn kind(&self) -> &str {
        self.text("/kind")
    }

    pub(crate) fn api_version(&self) -> &str {
        self.text("/apiVersion")
    }

    pub(crate) fn name(&self) -> &str {
        self.text("/metadata/name")
    }

    /// Its namespace, or the one that it would be applied to.
    pub(crate) fn namespace<'a>(&'a self, default: &'a str) -> &'a str {
        match self.text("/metadata/namespace") {
            "" => default,
            namespace => namespace,
        }
    }

    /// Whether it is of Tulle's group.
    pub(crate) fn is_tulle(&self) -> bool {
        self.api_version().split_once('/').is_some_and(|(group, _)| group == "tulle.dev")
    }

    /// As `MeshPolicy shop/payments`. MeshConfig has no namespace.
    pub(crate) fn label(&self, default: &str) -> String {
        let name = if self.name().is_empty() { "(no name)" } else { self.name() };
        match self.kind() {
            "MeshConfig" => format!("MeshConfig {name}"),
            kind => format!("{kind} {}/{name}", self.namespace(default)),
        }
    }
}

/// A file, or a document in it, that is not valid YAML.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unreadable {
    /// Which.
    pub(crate) file: String,
    /// Why.
    pub(crate) why: String,
}

/// What was read.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Input {
    /// The objects, lists taken apart.
    pub(crate) documents: Vec<Document>,
    /// What could not be read.
    pub(crate) unreadable: Vec<Unreadable>,
}

/// Reads files, all manifests below directories, and standard input for `-`.
///
/// # Errors
/// A file or directory that was named cannot be opened.
pub(crate) fn files(paths: &[PathBuf]) -> Result<Input, CliError> {
    let mut input = Input::default();
    for path in paths {
        if path.as_os_str() == "-" {
            let mut text = String::new();
            let read = std::io::stdin().read_to_string(&mut text);
            read.map_err(|error| CliError::failed(format!("cannot read standard input: {error}")))?;
            documents("standard input", &text, &mut input);
            continue;
        }
        let mut found = Vec::new();
        manifests(path, &mut found)?;
        for file in found {
            let text = fs::read_to_string(&file).map_err(|error| unreadable(&file, &error))?;
            documents(&file.display().to_string(), &text, &mut input);
        }
    }
    Ok(input)
}

fn unreadable(path: &Path, error: &std::io::Error) -> CliError {
    CliError::failed(format!("cannot read {}: {error}", path.display()))
}

/// A file that was named, whatever it is called; below a directory only what is called as a manifest, by name.
fn manifests(path: &Path, found: &mut Vec<PathBuf>) -> Result<(), CliError> {
    if !path.is_dir() {
        found.push(path.to_owned());
        return Ok(());
    }
    let entries = fs::read_dir(path).and_then(|entries| entries.collect::<Result<Vec<_>, _>>());
    let mut entries = entries.map_err(|error| unreadable(path, &error))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let name = entry.file_name();
        let is_hidden = name.to_string_lossy().starts_with('.');
        let entry = entry.path();
        let is_manifest = entry.extension().is_some_and(|end| end == "yaml" || end == "yml" || end == "json");
        // A link may lead to a directory above it.
        let is_directory = entry.is_dir() && !entry.is_symlink();
        if !is_hidden && (is_directory || (is_manifest && entry.is_file())) {
            manifests(&entry, found)?;
        }
    }
    Ok(())
}

/// The documents of a text. JSON is YAML too.
pub(crate) fn documents(file: &str, text: &str, input: &mut Input) {
    for document in serde_yaml::Deserializer::from_str(text) {
        match Value::deserialize(document) {
            Ok(Value::Null) => {}
            Ok(value) => objects(file, value, input),
            Err(error) => {
                input.unreadable.push(Unreadable { file: file.to_owned(), why: error.to_string() });
                // After an error the reader's place in the file is not known.
                return;
            }
        }
    }
}

/// Takes lists apart, as kubectl does.
fn objects(file: &str, value: Value, input: &mut Input) {
    let is_list = value.get("kind").and_then(Value::as_str).is_some_and(|kind| kind.ends_with("List"));
    match value.get("items").and_then(Value::as_array) {
        Some(items) if is_list => items.iter().for_each(|item| objects(file, item.clone(), input)),
        _ if value.is_object() => input.documents.push(Document { file: file.to_owned(), value }),
        _ => {
            let why = "a document is not an object with apiVersion and kind".to_owned();
            input.unreadable.push(Unreadable { file: file.to_owned(), why });
        }
    }
}
