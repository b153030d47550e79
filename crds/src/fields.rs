//! The page of the documentation that lists every field, generated from the schemas and compared with what is checked
//! in.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

/// Where a version's schema is in a CustomResourceDefinition.
const SCHEMA: &str = "/spec/versions/0/schema/openAPIV3Schema";

const INTRODUCTION: &str = "\
# Fields

Every field of the three kinds of `tulle.dev/v1alpha1`. `[]` stands for the items of a list. In a cluster,
`kubectl explain meshpolicy.spec.access` shows the same. Generated from the types in [crds/src](../../../crds/src):
`TULLE_UPDATE=1 cargo test -p tulle-crds`.
";

/// The whole page.
fn page() -> String {
    let mut page = INTRODUCTION.to_owned();
    for (_, definition) in super::manifests() {
        let kind = definition["spec"]["names"]["kind"].as_str().unwrap();
        let schema = definition.pointer(SCHEMA).unwrap();
        write!(page, "\n## {kind}\n\n{}\n", text(schema)).unwrap();
        for part in ["spec", "status"] {
            let mut rows = Vec::new();
            fields(part, &schema["properties"][part], &mut rows);
            write!(page, "\n### {kind} {part}\n\n| field | type | default | |\n|---|---|---|---|\n").unwrap();
            for row in rows {
                writeln!(page, "{row}").unwrap();
            }
        }
    }
    page
}

/// The rows of an object's fields, in the order of their names, each before the fields below it.
fn fields(path: &str, schema: &Value, rows: &mut Vec<String>) {
    let none = Map::new();
    let properties = schema["properties"].as_object().unwrap_or(&none);
    let required = schema["required"].as_array().cloned().unwrap_or_default();
    let mut names: Vec<&String> = properties.keys().collect();
    names.sort();
    for name in names {
        let field = &properties[name];
        let path = format!("{path}.{name}");
        let mut kind = kind_of(field);
        if required.contains(&Value::from(name.as_str())) {
            kind.push_str(", required");
        }
        let default = match &field["default"] {
            Value::Null => String::new(),
            Value::String(text) if text.is_empty() => String::new(),
            default => format!("`{}`", flow(default)),
        };
        rows.push(format!("| `{path}` | {kind} | {default} | {} |", text(field)));
        match field["type"].as_str() {
            Some("array") => fields(&format!("{path}[]"), &field["items"], rows),
            _ => fields(&path, field, rows),
        }
    }
}

/// The type in words.
fn kind_of(schema: &Value) -> String {
    if let Some(values) = schema["enum"].as_array() {
        let values = values.iter().filter(|value| !value.is_null()).map(|value| match flow(value) {
            text if text.is_empty() => "empty".to_owned(),
            text => format!("`{text}`"),
        });
        return values.collect::<Vec<_>>().join(", ");
    }
    let range = match (number(&schema["minimum"]), number(&schema["maximum"])) {
        (Some(least), Some(most)) => format!(", {least} to {most}"),
        (Some(least), None) => format!(", at least {least}"),
        (None, Some(most)) => format!(", at most {most}"),
        (None, None) => String::new(),
    };
    match schema["type"].as_str().unwrap_or("any") {
        "array" => format!("list of {}", kind_of(&schema["items"])),
        "object" if schema["additionalProperties"].is_object() => {
            format!("map of {}", kind_of(&schema["additionalProperties"]))
        }
        "string" if schema["format"] == "date-time" => "time".to_owned(),
        kind => format!("{kind}{range}"),
    }
}

fn number(value: &Value) -> Option<f64> {
    value.as_f64()
}

/// The description as the text of a table's cell.
fn text(schema: &Value) -> String {
    let description = schema["description"].as_str().unwrap_or_default();
    let words: Vec<&str> = description.split_whitespace().collect();
    let text = words.join(" ").replace('|', "\\|").replace('<', "&lt;");
    // An asterisk between backticks is one; elsewhere it begins emphasis.
    let parts = text.split('`').enumerate();
    let escaped =
        parts.map(|(index, part)| if index % 2 == 0 { part.replace('*', "\\*") } else { part.into() });
    escaped.collect::<Vec<_>>().join("`")
}

/// A value as YAML in one line, with fields in the order of their names.
fn flow(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(items) => format!("[{}]", items.iter().map(flow).collect::<Vec<_>>().join(", ")),
        Value::Object(fields) => {
            let mut fields: Vec<String> =
                fields.iter().map(|(name, value)| format!("{name}: {}", flow(value))).collect();
            fields.sort();
            format!("{{{}}}", fields.join(", "))
        }
        Value::Number(number) => number.as_f64().map(|number| number.to_string()).unwrap_or_default(),
        other => other.to_string(),
    }
}

#[test]
fn the_page_of_fields_is_what_the_types_generate() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/src/reference/fields.md");
    let generated = page();
    if std::env::var_os("TULLE_UPDATE").is_some() {
        fs::write(&path, &generated).unwrap();
    }
    let checked_in = fs::read_to_string(&path).unwrap_or_default();
    assert!(checked_in == generated, "fields.md is stale: TULLE_UPDATE=1 cargo test -p tulle-crds");
}

#[test]
fn every_field_that_a_user_writes_has_a_description() {
    for line in page().lines().filter(|line| line.starts_with("| `spec.")) {
        assert!(!line.ends_with("|  |"), "{line}");
    }
}
