//! Compares an object with the generated schema of its kind: unknown fields, types, required fields, ranges.
//!
//! Patterns and CEL rules are left to the checks of the values themselves, whose messages say what to write.

use k8s_openapi::jiff::Timestamp;
use serde_json::{Map, Value};

/// The schemas of Tulle's kinds.
pub(super) struct Schemas(Vec<Schema>);

struct Schema {
    kind: String,
    api_version: String,
    schema: Value,
}

impl Schemas {
    /// Those of this build.
    pub(super) fn generated() -> Self {
        let schemas = tulle_crds::manifests().into_iter().filter_map(|(_, definition)| {
            let text = |pointer: &str| definition.pointer(pointer).and_then(Value::as_str).map(str::to_owned);
            Some(Schema {
                kind: text("/spec/names/kind")?,
                api_version: format!("{}/{}", text("/spec/group")?, text("/spec/versions/0/name")?),
                schema: definition.pointer("/spec/versions/0/schema/openAPIV3Schema")?.clone(),
            })
        });
        Self(schemas.collect())
    }

    pub(super) fn of(&self, kind: &str, api_version: &str) -> Option<&Value> {
        let found = self.0.iter().find(|schema| schema.kind == kind && schema.api_version == api_version);
        found.map(|schema| &schema.schema)
    }

    /// The group and version of a kind of Tulle.
    pub(super) fn version_of(&self, kind: &str) -> Option<&str> {
        self.0.iter().find(|schema| schema.kind == kind).map(|schema| schema.api_version.as_str())
    }

    /// All kinds and versions, for a hint.
    pub(super) fn known(&self) -> String {
        let known: Vec<String> =
            self.0.iter().map(|schema| format!("{} in {}", schema.kind, schema.api_version)).collect();
        format!("there are {}", known.join(", "))
    }
}

/// What kind of problem it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// A field that the kind does not have.
    Unknown,
    /// A missing field, or a value of another type.
    Shape,
    /// A value that is not allowed.
    Value,
}

/// The field that a message begins with: `spec.limits.concurrency` of `spec.limits.concurrency: 0 must be…`.
pub(super) fn field(message: &str) -> &str {
    message.split([':', ' ']).next().unwrap_or_default()
}

/// A place where an object differs from its schema.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) what: What,
    pub(super) message: String,
    pub(super) hint: Option<String>,
}

/// Everything in which an object differs from its kind's schema. `status` is not looked at: nobody applies it.
pub(super) fn check(schema: &Value, object: &Value) -> Vec<Problem> {
    let mut found = Found(Vec::new());
    let top = ["apiVersion", "kind", "metadata", "spec", "status"];
    for field in object.as_object().into_iter().flat_map(Map::keys).filter(|field| !top.contains(&&***field))
    {
        found.unknown(field, nearest(field, top.into_iter()));
    }
    match (schema.pointer("/properties/spec"), object.get("spec")) {
        (Some(schema), Some(spec)) => found.walk(schema, spec, "spec"),
        (Some(_), None) => found.add(What::Shape, "spec is missing".to_owned()),
        (None, _) => {}
    }
    found.0
}

struct Found(Vec<Problem>);

impl Found {
    fn add(&mut self, what: What, message: String) {
        self.0.push(Problem { what, message, hint: None });
    }

    fn unknown(&mut self, path: &str, nearest: Option<String>) {
        let message = format!("{path} is not a field of this kind");
        let hint = nearest.map(|name| format!("write {name}?"));
        self.0.push(Problem { what: What::Unknown, message, hint });
    }

    fn walk(&mut self, schema: &Value, value: &Value, path: &str) {
        if value.is_null() && schema.get("nullable") == Some(&Value::Bool(true)) {
            return;
        }
        let wanted = schema.get("type").and_then(Value::as_str).unwrap_or_default();
        if !has_type(wanted, value) {
            let message = format!("{path} must be {}, and is {}", article(wanted), describe(value));
            return self.add(What::Shape, message);
        }
        match value {
            Value::Object(fields) => self.object(schema, fields, path),
            Value::Array(items) => self.array(schema, items, path),
            Value::String(text) => self.string(schema, text, path),
            Value::Number(number) => self.number(schema, number.as_f64().unwrap_or(f64::NAN), path),
            Value::Bool(_) | Value::Null => {}
        }
    }

    fn object(&mut self, schema: &Value, fields: &Map<String, Value>, path: &str) {
        let properties = schema.get("properties").and_then(Value::as_object);
        let additional = schema.get("additionalProperties").filter(|schema| schema.is_object());
        for required in schema.get("required").and_then(Value::as_array).into_iter().flatten() {
            let Some(name) = required.as_str() else { continue };
            if !fields.contains_key(name) {
                self.add(What::Shape, format!("{path}.{name} is missing"));
            }
        }
        for (name, value) in fields {
            let path = format!("{path}.{name}");
            match (properties.and_then(|known| known.get(name)), additional) {
                (Some(schema), _) | (None, Some(schema)) => self.walk(schema, value, &path),
                // A schema without properties takes any.
                (None, None) => {
                    if let Some(known) = properties {
                        self.unknown(&path, nearest(name, known.keys().map(String::as_str)));
                    }
                }
            }
        }
        self.count(schema, ["minProperties", "maxProperties"], fields.len(), path, "entries");
    }

    fn array(&mut self, schema: &Value, items: &[Value], path: &str) {
        self.count(schema, ["minItems", "maxItems"], items.len(), path, "entries");
        if let Some(schema) = schema.get("items") {
            for (index, item) in items.iter().enumerate() {
                self.walk(schema, item, &format!("{path}[{index}]"));
            }
        }
    }

    fn string(&mut self, schema: &Value, text: &str, path: &str) {
        if let Some(allowed) = schema.get("enum").and_then(Value::as_array) {
            let names: Vec<&str> = allowed.iter().filter_map(Value::as_str).collect();
            if !names.contains(&text) {
                self.add(What::Value, format!("{path}: {text:?} must be one of {}", names.join(", ")));
            }
            return;
        }
        if schema.get("format").and_then(Value::as_str) == Some("date-time")
            && text.parse::<Timestamp>().is_err()
        {
            let message = format!("{path}: invalid time {text:?}; write for example 2026-12-01T12:00:00Z");
            return self.add(What::Value, message);
        }
        self.count(schema, ["minLength", "maxLength"], text.chars().count(), path, "characters");
    }

    fn number(&mut self, schema: &Value, number: f64, path: &str) {
        let bound = |name: &str| schema.get(name).and_then(Value::as_f64);
        let (least, most) = (bound("minimum"), bound("maximum"));
        let is_low = least.is_some_and(|least| number < least);
        let is_high = most.is_some_and(|most| number > most);
        if is_low || is_high {
            let text = |bound: Option<f64>| bound.map_or_else(|| "any".to_owned(), |bound| bound.to_string());
            let message = format!("{path}: {number} must be from {} to {}", text(least), text(most));
            self.add(What::Value, message);
        }
    }

    fn count(&mut self, schema: &Value, bounds: [&str; 2], count: usize, path: &str, unit: &str) {
        let [least, most] = bounds.map(|name| schema.get(name).and_then(Value::as_u64));
        let count = count as u64;
        if let Some(least) = least.filter(|least| count < *least) {
            self.add(What::Value, format!("{path} has {count} {unit}, and needs at least {least}"));
        }
        if let Some(most) = most.filter(|most| count > *most) {
            self.add(What::Value, format!("{path} has {count} {unit}, and may have at most {most}"));
        }
    }
}

fn has_type(wanted: &str, value: &Value) -> bool {
    match wanted {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        _ => true,
    }
}

fn article(wanted: &str) -> String {
    match wanted {
        "object" | "array" | "integer" => format!("an {wanted}"),
        other => format!("a {other}"),
    }
}

fn describe(value: &Value) -> String {
    match value {
        Value::Null => "empty".to_owned(),
        Value::Bool(bool) => format!("the boolean {bool}"),
        Value::Number(number) => format!("the number {number}"),
        Value::String(text) => format!("the string {text:?}"),
        Value::Array(_) => "an array".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    }
}

/// The known name that was probably meant.
pub(super) fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<String> {
    let ranked = known.map(|known| (distance(&name.to_lowercase(), &known.to_lowercase()), known));
    // A third of the letters may differ.
    ranked
        .min()
        .filter(|(distance, _)| *distance * 3 <= name.chars().count())
        .map(|(_, known)| known.to_owned())
}

/// How many letters must be changed, added or removed (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (index, letter) in a.chars().enumerate() {
        let mut next = vec![index + 1];
        for ((other, pair), above) in b.iter().zip(row.windows(2)).zip(row.iter().skip(1)) {
            let replaced = pair.first().copied().unwrap_or(0) + usize::from(letter != *other);
            let left = next.last().copied().unwrap_or(0);
            next.push(replaced.min(above + 1).min(left + 1));
        }
        row = next;
    }
    row.last().copied().unwrap_or(0)
}
