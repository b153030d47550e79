//! YAML for kubectl, which reads YAML 1.1: `on` without quotes is `true` there, also as the name of a field.

use serde::Serialize;
use serde_yaml::{Error, Mapping, Value};

/// Text that takes the place of a quotation mark until the YAML has been written. It contains nothing that would need one.
const MARK: &str = "TULLE-QUOTE-9f41c7";

/// A value as YAML that readers of YAML 1.1 and 1.2 understand alike.
///
/// # Errors
/// The value cannot be written as YAML.
pub fn to_string(value: &impl Serialize) -> Result<String, Error> {
    let marked = marked(serde_yaml::to_value(value)?);
    Ok(serde_yaml::to_string(&marked)?.replace(MARK, "\""))
}

/// The value with marks around each text that YAML 1.1 takes for something else.
fn marked(value: Value) -> Value {
    match value {
        Value::String(text) if is_ambiguous(&text) => Value::String(format!("{MARK}{text}{MARK}")),
        Value::Sequence(items) => items.into_iter().map(marked).collect::<Vec<_>>().into(),
        Value::Mapping(fields) => {
            let fields = fields.into_iter().map(|(name, value)| (marked(name), marked(value)));
            Value::Mapping(fields.collect::<Mapping>())
        }
        other => other,
    }
}

/// Whether YAML 1.1 reads a boolean (<https://yaml.org/type/bool.html>) or an integer with `_` between its digits.
fn is_ambiguous(text: &str) -> bool {
    let words = ["y", "n", "yes", "no", "on", "off"];
    let digits = text.trim_start_matches(['-', '+']);
    let is_number = digits.contains('_')
        && digits.starts_with(|first: char| first.is_ascii_digit())
        && digits.bytes().all(|byte| byte.is_ascii_hexdigit() || matches!(byte, b'_' | b'x' | b'o' | b'.'));
    is_number || words.iter().any(|word| word.eq_ignore_ascii_case(text))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_yaml_1_1_reads_as_something_else_is_quoted() {
        let value =
            json!({"on": ["off", "Yes", "only", "n", "1_000", "a_b"], "text": "on: yes\noff\n", "is": true});
        let text = to_string(&value).unwrap();
        for part in
            ["\"on\":\n", "- \"off\"\n", "- \"Yes\"\n", "- only\n", "- \"n\"\n", "- \"1_000\"\n", "- a_b\n"]
        {
            assert!(text.contains(part), "{part:?}: {text}");
        }
        assert!(text.contains("  on: yes\n  off\n"), "a block of text stays as it is: {text}");
        assert_eq!(serde_yaml::from_str::<serde_json::Value>(&text).unwrap(), value);
    }
}
