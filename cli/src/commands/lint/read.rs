//! Manifests from files, directories and standard input.

use std::fs;
use std::io::{ErrorKind, Read as _};
use std::path::{Path, PathBuf};

use serde::Deserialize as _;
use serde_json::Value;

use super::unique::{TWICE, Unique};
use crate::exit::{CliError, note};

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

/// A file, or a document in it, that is not text or not valid YAML, or has a key twice.
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
    /// Files below directories that only a tool like Helm makes YAML of.
    pub(crate) templates: Vec<String>,
}

impl Input {
    fn unreadable(&mut self, file: &str, why: impl Into<String>) {
        self.unreadable.push(Unreadable { file: file.to_owned(), why: why.into() });
    }

    /// All that was read, for a command that needs all of it. Templates are warned of.
    ///
    /// # Errors
    /// Something could not be read.
    pub(crate) fn whole(self) -> Result<Self, CliError> {
        if let Some(bad) = self.unreadable.first() {
            return Err(CliError::failed(format!("{}: {}", bad.file, bad.why))
                .hint("`tulle lint` lists everything that is wrong in files"));
        }
        for file in &self.templates {
            note(&format!("warning: {file} is a template, and was not looked at"));
        }
        Ok(self)
    }

    /// Takes what was read of a file below a directory. People name directories that have more than manifests in them.
    fn take_found(&mut self, file: &str, text: &str) {
        let mut found = Self::default();
        documents(file, text, &mut found);
        let is_json = Path::new(file).extension().is_some_and(|end| end == "json");
        if is_json && found.documents.is_empty() && is_other_json(text) {
            return;
        }
        if !found.unreadable.is_empty() && text.contains("{{") {
            self.templates.push(file.to_owned());
            return;
        }
        self.documents.append(&mut found.documents);
        self.unreadable.append(&mut found.unreadable);
    }
}

/// JSON that is not an object, such as a list of settings of some tool.
fn is_other_json(text: &str) -> bool {
    serde_json::from_str::<Value>(without_mark(text)).is_ok_and(|value| !value.is_object())
}

/// The text without the byte order mark with which some editors begin a file.
fn without_mark(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
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
        if !path.is_dir() {
            let file = path.display().to_string();
            match fs::read_to_string(path) {
                Ok(text) => documents(&file, &text, &mut input),
                Err(error) if error.kind() == ErrorKind::InvalidData => {
                    input.unreadable(&file, format!("cannot be read: {error}"));
                }
                Err(error) => return Err(unreadable(path, &error)),
            }
            continue;
        }
        let mut found = Vec::new();
        let entries = entries(path).map_err(|error| unreadable(path, &error))?;
        manifests(entries, &mut found, &mut input);
        for path in found {
            let file = path.display().to_string();
            match fs::read_to_string(&path) {
                Ok(text) => input.take_found(&file, &text),
                Err(error) => input.unreadable(&file, format!("cannot be read: {error}")),
            }
        }
    }
    Ok(input)
}

fn unreadable(path: &Path, error: &std::io::Error) -> CliError {
    CliError::failed(format!("cannot read {}: {error}", path.display()))
}

/// What a directory holds, by name.
fn entries(directory: &Path) -> std::io::Result<Vec<fs::DirEntry>> {
    let mut entries = fs::read_dir(directory)?.collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    Ok(entries)
}

/// What is called as a manifest, here and below. A directory that cannot be read does not hide the others.
fn manifests(entries: Vec<fs::DirEntry>, found: &mut Vec<PathBuf>, input: &mut Input) {
    for entry in entries {
        let name = entry.file_name();
        if name.to_string_lossy().starts_with('.') {
            continue;
        }
        let path = entry.path();
        // A link may lead to a directory above it.
        if path.is_dir() && !path.is_symlink() {
            match self::entries(&path) {
                Ok(below) => manifests(below, found, input),
                Err(error) => {
                    input.unreadable(&path.display().to_string(), format!("cannot be read: {error}"));
                }
            }
        // A link that leads nowhere is reported; a pipe is not waited for.
        } else if (path.is_file() || !path.exists())
            && path.extension().is_some_and(|end| end == "yaml" || end == "yml" || end == "json")
        {
            found.push(path);
        }
    }
}

/// The documents of a text. JSON is YAML too.
pub(crate) fn documents(file: &str, text: &str, input: &mut Input) {
    for document in serde_yaml::Deserializer::from_str(without_mark(text)) {
        match Unique::deserialize(document) {
            Ok(Unique(Value::Null)) => {}
            Ok(Unique(value)) => objects(file, value, input),
            Err(error) => {
                let why = error.to_string();
                let is_valid = why.contains(TWICE);
                input.unreadable(file, why);
                // After an error of the syntax the reader's place in the file is not known.
                if !is_valid {
                    return;
                }
            }
        }
    }
}

/// Takes lists apart, as kubectl does. Items of a list of one kind may leave out what the list says.
fn objects(file: &str, value: Value, input: &mut Input) {
    let kind = value.get("kind").and_then(Value::as_str).and_then(|kind| kind.strip_suffix("List"));
    match (value.get("items").and_then(Value::as_array), kind) {
        (Some(items), Some(kind)) => {
            for item in items {
                objects(file, inherited(item, kind, value.get("apiVersion")), input);
            }
        }
        _ if value.is_object() => input.documents.push(Document { file: file.to_owned(), value }),
        _ => input.unreadable(file, "a document is not an object with apiVersion and kind"),
    }
}

/// An item with the kind and the apiVersion of its list. A `List` has items of any kind.
fn inherited(item: &Value, kind: &str, api_version: Option<&Value>) -> Value {
    let mut item = item.clone();
    if let Some(fields) = item.as_object_mut().filter(|_| !kind.is_empty()) {
        fields.entry("kind").or_insert_with(|| kind.into());
        if let Some(api_version) = api_version {
            fields.entry("apiVersion").or_insert_with(|| api_version.clone());
        }
    }
    item
}
