//! Takes secrets out of objects and logs. Pure. What could be one is removed: a report with too little can be sent
//! again, one with too much cannot be taken back.

use serde_json::{Value, json};
use tulle_crds::keys;

/// What stands in place of a secret.
const REMOVED: &str = "[removed]";
/// Annotations that may hold a secret: a whole former object, and the proof that a sidecar is genuine.
const ANNOTATIONS: [&str; 2] = ["kubectl.kubernetes.io/last-applied-configuration", keys::SEAL];
/// Variables whose values are settings of Tulle, not secrets.
const SETTINGS: [&str; 2] = ["TULLE_", "_RJEM_"];
/// Names of fields whose values are secrets, in lower case.
const FIELDS: [&str; 6] = ["token", "password", "secret", "authorization", "cookie", "privatekey"];

/// An object without what is secret or of no use in a report.
pub fn object(mut object: Value) -> Value {
    if let Some(metadata) = object.pointer_mut("/metadata").and_then(Value::as_object_mut) {
        metadata.remove("managedFields");
        if let Some(annotations) = metadata.get_mut("annotations").and_then(Value::as_object_mut) {
            for key in ANNOTATIONS {
                if let Some(value) = annotations.get_mut(key) {
                    *value = json!(REMOVED);
                }
            }
        }
    }
    // No object of this kind is listed; one that comes here must still not leave with its data.
    if matches!(object.get("kind").and_then(Value::as_str), Some("ConfigMap" | "Secret"))
        && let Some(fields) = object.as_object_mut()
    {
        for field in ["data", "binaryData", "stringData"] {
            fields.remove(field);
        }
    }
    clean(&mut object);
    object
}

/// Removes values of variables, and of fields and headers whose name says that they are secret, at any depth.
fn clean(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            let of_secret = fields.get("name").and_then(Value::as_str).is_some_and(is_secret_header);
            for (key, field) in fields.iter_mut() {
                let is_value = of_secret && matches!(key.as_str(), "value" | "exact");
                let is_secret =
                    field.as_str().is_some_and(|text| is_value || is_secret_name(key) || has_token(text));
                if is_secret {
                    *field = json!(REMOVED);
                } else if let Some(text) = field.as_str() {
                    *field = json!(without_credentials(text));
                } else if key == "env"
                    && let Some(variables) = field.as_array_mut()
                {
                    variables.iter_mut().for_each(clean_variable);
                } else if matches!(key.as_str(), "args" | "command")
                    && let Some(words) = field.as_array_mut()
                {
                    words.iter_mut().for_each(clean_word);
                } else {
                    clean(field);
                }
            }
        }
        Value::Array(entries) => entries.iter_mut().for_each(clean),
        Value::String(text) => {
            *text = if has_token(text) { REMOVED.to_owned() } else { without_credentials(text) };
        }
        _ => {}
    }
}

/// Whether the values of a header are secret: routes and Canaries match and set them by `name` and `value`.
fn is_secret_header(name: &str) -> bool {
    let name = name.to_lowercase();
    ["auth", "token", "cookie", "secret", "password", "key", "session"].iter().any(|part| name.contains(part))
}

fn is_secret_name(key: &str) -> bool {
    FIELDS.contains(&key.to_lowercase().as_str())
}

fn clean_variable(variable: &mut Value) {
    let name = variable.get("name").and_then(Value::as_str).unwrap_or_default();
    if SETTINGS.iter().any(|prefix| name.starts_with(prefix)) {
        return;
    }
    if let Some(value) = variable.get_mut("value") {
        *value = json!(REMOVED);
    }
}

/// A word of a command line: of `--name=value` the name stays, of others only options and paths of programs.
fn clean_word(word: &mut Value) {
    let Some(text) = word.as_str() else {
        *word = json!(REMOVED);
        return;
    };
    let kept = match text.split_once('=') {
        Some((name, _)) => format!("{name}={REMOVED}"),
        // A short option may hold its value: `-psecret`.
        None if text.starts_with("--") || (text.starts_with('-') && text.len() <= 2) => text.to_owned(),
        None if is_program(text) => text.to_owned(),
        None => REMOVED.to_owned(),
    };
    *word = json!(kept);
}

/// Whether a word is the path or name of a program, such as `/tulle-operator`: a value is seldom one.
fn is_program(text: &str) -> bool {
    text.starts_with('/')
        && !text.starts_with("//")
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/-_.".contains(&byte))
}

/// Text without what stands between `//` and `@` of an address: `https://user:password@host`.
fn without_credentials(text: &str) -> String {
    let mut result = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("//") {
        result.push_str(before);
        result.push_str("//");
        let end = after.find(|c: char| c == '/' || c == '?' || c == '#' || c.is_whitespace());
        let (authority, next) = after.split_at(end.unwrap_or(after.len()));
        match authority.rsplit_once('@') {
            Some((_, host)) => {
                result.push_str(REMOVED);
                result.push('@');
                result.push_str(host);
            }
            None => result.push_str(authority),
        }
        rest = next;
    }
    result.push_str(rest);
    result
}

fn has_token(text: &str) -> bool {
    text.contains("-----BEGIN") || text.split(is_separator).any(is_jwt)
}

/// Whether a word is a JSON Web Token: three parts of base64, of which the first two begin with `{"`.
fn is_jwt(word: &str) -> bool {
    let mut parts = word.split('.');
    let starts = |part: Option<&str>| part.is_some_and(|part| part.starts_with("eyJ"));
    starts(parts.next()) && starts(parts.next()) && parts.next().is_some()
}

/// What cannot be part of a token.
fn is_separator(c: char) -> bool {
    !(c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '+' | '/' | '~'))
}

/// A log without tokens and private keys.
pub fn log(text: &str) -> String {
    let mut result = String::with_capacity(text.len());
    let mut in_key = false;
    for line in text.lines() {
        if line.contains("-----BEGIN") {
            in_key = !line.contains("-----END");
            result.push_str(REMOVED);
            result.push('\n');
            continue;
        }
        if in_key {
            in_key = !line.contains("-----END");
            continue;
        }
        log_line(&without_credentials(line), &mut result);
        result.push('\n');
    }
    result
}

/// Copies a line without its tokens: JSON Web Tokens, and what follows `Bearer` or `Basic`.
fn log_line(line: &str, result: &mut String) {
    let mut after_scheme = false;
    let mut rest = line;
    while !rest.is_empty() {
        let end = rest.find(is_separator).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        if is_jwt(word) || (after_scheme && !word.is_empty()) {
            result.push_str(REMOVED);
        } else {
            result.push_str(word);
        }
        if !word.is_empty() {
            after_scheme = word.eq_ignore_ascii_case("bearer") || word.eq_ignore_ascii_case("basic");
        }
        let separators = after.find(|c: char| !is_separator(c)).unwrap_or(after.len());
        let (between, next) = after.split_at(separators);
        result.push_str(between);
        rest = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JWT: &str = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl";

    #[test]
    fn values_of_variables_are_removed_except_tulles_own_settings() {
        let container = json!({"name": "app", "env": [
            {"name": "DB_PASSWORD", "value": "hunter2"},
            {"name": "TULLE_TRUST_DOMAIN", "value": "cluster.local"},
            {"name": "FROM", "valueFrom": {"secretKeyRef": {"name": "db", "key": "password"}}}]});
        let pod = object(json!({"kind": "Pod", "spec": {"containers": [container]}}));
        let env = &pod["spec"]["containers"][0]["env"];
        assert_eq!(env[0]["value"], REMOVED);
        assert_eq!(env[1]["value"], "cluster.local");
        assert_eq!(env[2]["valueFrom"]["secretKeyRef"]["name"], "db", "a reference is not a secret");
        assert!(!pod.to_string().contains("hunter2"));
    }

    #[test]
    fn former_objects_seals_and_field_managers_are_removed() {
        let pod =
            object(json!({"kind": "Pod", "metadata": {"name": "a", "managedFields": [{}], "annotations": {
            "kubectl.kubernetes.io/last-applied-configuration": "{\"password\":\"x\"}",
            "tulle.dev/injection": "seal", "note": "kept"}}}));
        assert_eq!(
            pod["metadata"],
            json!({"name": "a", "annotations": {"kubectl.kubernetes.io/last-applied-configuration": REMOVED,
                "tulle.dev/injection": REMOVED, "note": "kept"}})
        );
    }

    #[test]
    fn data_of_config_maps_and_secrets_never_leaves() {
        for kind in ["ConfigMap", "Secret"] {
            let found = object(json!({"kind": kind, "metadata": {"name": "a"}, "data": {"a": "b"},
                "binaryData": {"c": "ZA=="}, "stringData": {"e": "f"}}));
            assert_eq!(found, json!({"kind": kind, "metadata": {"name": "a"}}));
        }
    }

    #[test]
    fn fields_with_a_secret_name_or_a_token_as_value_are_removed_at_any_depth() {
        let found = object(
            json!({"kind": "HTTPRoute", "spec": {"a": [{"token": "x", "Password": "y", "path": "/z"}],
            "note": format!("Bearer {JWT}"), "key": "-----BEGIN PRIVATE KEY-----"}}),
        );
        assert_eq!(
            found["spec"],
            json!({"a": [{"token": REMOVED, "Password": REMOVED, "path": "/z"}], "note": REMOVED, "key": REMOVED})
        );
    }

    #[test]
    fn values_of_headers_that_carry_credentials_are_removed() {
        let found = object(json!({"kind": "HTTPRoute", "spec": {"set": [{"name": "X-Api-Key", "value": "x"},
            {"name": "x-team", "value": "shop"}], "match": {"cookie": {"name": "session", "exact": "y"}}}}));
        assert_eq!(
            found["spec"],
            json!({"set": [{"name": "X-Api-Key", "value": REMOVED}, {"name": "x-team", "value": "shop"}],
                "match": {"cookie": {"name": "session", "exact": REMOVED}}})
        );
    }

    #[test]
    fn tokens_and_keys_are_removed_from_logs_and_the_rest_stays() {
        let text = format!(
            "a {{\"token\":\"{JWT}\"}} b\nauthorization: Bearer abc.def\nversion 1.2.3 at 10.0.0.1\n"
        );
        assert_eq!(
            log(&text),
            "a {\"token\":\"[removed]\"} b\nauthorization: Bearer [removed]\nversion 1.2.3 at 10.0.0.1\n"
        );
        let key = "before\n-----BEGIN PRIVATE KEY-----\nMIIB\n-----END PRIVATE KEY-----\nafter\n";
        assert_eq!(log(key), "before\n[removed]\nafter\n");
        assert_eq!(log("-----BEGIN X-----MIIB-----END X-----\nafter\n"), "[removed]\nafter\n");
    }

    #[test]
    fn a_word_with_dots_is_not_a_token() {
        assert!(is_jwt(JWT));
        for word in ["eyJhbGciOiJSUzI1NiJ9", "eyJx.abc.def", "a.b.c", ""] {
            assert!(!is_jwt(word), "{word}");
        }
    }

    #[test]
    fn of_a_command_line_the_names_stay() {
        let pod = object(json!({"spec": {"containers": [{
            "command": ["/tulle-operator", "sh"],
            "args": ["--namespace=tulle-system", "--password", "hunter2", "--url=https://a:b@c/d", "-v", "-psecret"]}]}}));
        let container = &pod["spec"]["containers"][0];
        assert_eq!(container["command"], json!(["/tulle-operator", REMOVED]));
        assert_eq!(
            container["args"],
            json!(["--namespace=[removed]", "--password", REMOVED, "--url=[removed]", "-v", REMOVED])
        );
    }

    #[test]
    fn credentials_in_an_address_are_cut_out() {
        for (text, expected) in [
            ("get https://user:p@ss@host:1/a@b failed", "get https://[removed]@host:1/a@b failed"),
            ("http://host/a", "http://host/a"),
            ("mail a@b // c", "mail a@b // c"),
            ("x://u:p@h y://v@i?z", "x://[removed]@h y://[removed]@i?z"),
        ] {
            assert_eq!(without_credentials(text), expected);
        }
        let found = object(json!({"spec": {"url": "redis://u:p@h", "list": ["amqp://u:p@h"]}}));
        assert_eq!(found["spec"], json!({"url": "redis://[removed]@h", "list": ["amqp://[removed]@h"]}));
        assert_eq!(log("at http://u:p@h/x"), "at http://[removed]@h/x\n");
    }
}
