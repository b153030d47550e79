//! The sidecar's `/config` as tables. Pure: JSON in, rows out. What a newer sidecar adds is not shown, and nothing fails.

use serde_json::{Map, Value, json};

use crate::commands::pods::left;
use crate::output::Table;

/// A destination that the pod has called.
fn destinations(config: &Value) -> impl Iterator<Item = &Value> {
    config.get("destinations").and_then(Value::as_array).into_iter().flatten()
}

/// What leads to a Service, as it is dialled; none for pods and what is outside.
fn dialled(config: &Value) -> impl Iterator<Item = &Value> {
    let services = destinations(config).filter_map(|destination| destination.get("leadsTo"));
    services.filter(|leads_to| leads_to.get("service").is_some())
}

fn text(value: &Value, field: &str) -> String {
    match value.get(field) {
        Some(Value::String(text)) if !text.is_empty() => text.clone(),
        Some(Value::Number(number)) => number.to_string(),
        _ => "-".to_owned(),
    }
}

fn list<'a>(value: &'a Value, field: &str) -> &'a [Value] {
    value.get(field).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

/// Addresses, and what each leads to.
pub(super) fn services(config: &Value) -> Table {
    let row = |destination: &Value| {
        let leads_to = destination.get("leadsTo").unwrap_or(&Value::Null);
        let target = match (leads_to, leads_to.get("service"), leads_to.get("pod")) {
            (Value::String(outside), _, _) => outside.clone(),
            (_, Some(_), _) => text(leads_to, "service"),
            (_, _, Some(pod)) => format!("pod {}", text(pod, "address")),
            _ => "-".to_owned(),
        };
        let split: Vec<String> = list(leads_to, "split")
            .iter()
            .map(|part| {
                let permille = part.get("permille").and_then(Value::as_f64).unwrap_or(0.0);
                format!("{} {}%", text(part, "revision"), permille / 10.0)
            })
            .collect();
        let count = |field: &str| match leads_to.get(field) {
            Some(Value::Array(items)) => items.len().to_string(),
            _ => "-".to_owned(),
        };
        vec![
            text(destination, "address"),
            target,
            text(leads_to, "protocol"),
            count("endpoints"),
            count("ejected"),
            if split.is_empty() { "-".to_owned() } else { split.join(", ") },
            text(leads_to, "canary"),
        ]
    };
    let headers = vec!["ADDRESS", "LEADS-TO", "PROTOCOL", "ENDPOINTS", "EJECTED", "SPLIT", "CANARY"];
    Table { headers, rows: destinations(config).map(row).collect() }
}

/// Rules of routes.
pub(super) fn routes(config: &Value) -> Table {
    let rows = dialled(config).flat_map(|service| {
        list(service, "rules").iter().map(|rule| {
            vec![
                text(service, "service"),
                text(rule, "route"),
                text(rule, "rule"),
                compact(rule.get("timeout")),
                compact(rule.get("retry")),
            ]
        })
    });
    Table { headers: vec!["SERVICE", "ROUTE", "RULE", "TIMEOUT", "RETRY"], rows: rows.collect() }
}

/// Policies: first those for what the pod serves, then those for what it calls.
pub(super) fn policies(config: &Value) -> Table {
    let mut rows = Vec::new();
    let mut add = |of: &str, mode: &str, section: &str, value: String| {
        rows.push(vec![of.to_owned(), mode.to_owned(), section.to_owned(), value]);
    };
    if let Some(inbound) = config.get("inbound").filter(|inbound| inbound.is_object()) {
        add("inbound", "Enforce", "mtls", text(inbound, "mtls"));
        for (field, mode) in [("accessPolicy", "Enforce"), ("shadowPolicy", "Shadow")] {
            if inbound.get(field).is_some_and(Value::is_string) {
                add("inbound", mode, "access", text(inbound, field));
            }
        }
        for (field, mode) in [("enforced", "Enforce"), ("shadow", "Shadow")] {
            let limits = inbound.pointer(&format!("/limits/{field}")).and_then(Value::as_object);
            for (name, limit) in limits.into_iter().flatten() {
                add("inbound", mode, &format!("limits.{name}"), compact(Some(limit)));
            }
        }
    }
    for dialled in dialled(config) {
        for service in std::iter::once(dialled).chain(list(dialled, "backends")) {
            for (field, mode) in [("policies", "Enforce"), ("shadowPolicies", "Shadow")] {
                let sections = service.get(field).and_then(Value::as_object);
                for (section, value) in sections.into_iter().flatten() {
                    add(&text(service, "service"), mode, section, compact(Some(value)));
                }
            }
        }
    }
    rows.dedup();
    Table { headers: vec!["OF", "MODE", "SECTION", "VALUE"], rows }
}

/// Endpoints of the Services that the pod has called.
pub(super) fn endpoints(config: &Value) -> Table {
    let rows = dialled(config).flat_map(|service| {
        let ejected = list(service, "ejected");
        list(service, "endpoints").iter().map(|endpoint| {
            let address = text(endpoint, "address");
            let is_ejected = ejected.iter().any(|ejected| text(ejected, "address") == address);
            let is_terminating = endpoint.get("terminating").and_then(Value::as_bool).unwrap_or(false);
            let state = match (is_terminating, is_ejected) {
                (true, _) => "terminating",
                (false, true) => "ejected",
                (false, false) => "in use",
            };
            vec![
                text(service, "service"),
                address,
                text(endpoint, "revision"),
                state.to_owned(),
                text(endpoint, "identity"),
            ]
        })
    });
    Table { headers: vec!["SERVICE", "ADDRESS", "REVISION", "STATE", "IDENTITY"], rows: rows.collect() }
}

/// The certificate. `now` in Unix seconds.
pub(super) fn certificate(config: &Value, now: i64) -> Table {
    let is_connected = config.get("operatorConnected").and_then(Value::as_bool).unwrap_or(false);
    let row = vec![
        text(config, "identity"),
        left(config.get("certificateNotAfter").and_then(Value::as_i64), now),
        if is_connected { "connected" } else { "not connected" }.to_owned(),
        text(config, "version"),
    ];
    Table { headers: vec!["IDENTITY", "CERT-LEFT", "OPERATOR", "VERSION"], rows: vec![row] }
}

/// A value in as little space as it needs: `{request: 2s, attempt: 500ms}`.
pub(super) fn compact(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => "-".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(items)) => {
            let items: Vec<String> = items.iter().map(|item| compact(Some(item))).collect();
            format!("[{}]", items.join(", "))
        }
        Some(Value::Object(fields)) => {
            let fields: Vec<String> =
                fields.iter().map(|(name, value)| format!("{name}: {}", compact(Some(value)))).collect();
            format!("{{{}}}", fields.join(", "))
        }
        Some(other) => other.to_string(),
    }
}

/// A table as JSON: an object for each row, with the headers as names.
pub(super) fn objects(table: &Table) -> Value {
    let object = |row: &Vec<String>| {
        let cells = table.headers.iter().zip(row);
        let fields = cells.map(|(header, cell)| {
            let value = if cell == "-" { Value::Null } else { json!(cell) };
            (camel(header), value)
        });
        Value::Object(fields.collect::<Map<String, Value>>())
    };
    table.rows.iter().map(object).collect()
}

/// `CERT-LEFT` as `certLeft`.
fn camel(header: &str) -> String {
    let mut name = String::new();
    for part in header.split('-') {
        let mut letters = part.chars();
        match letters.next() {
            Some(first) if !name.is_empty() => {
                name.push(first);
                name.push_str(&letters.as_str().to_lowercase());
            }
            _ => name.push_str(&part.to_lowercase()),
        }
    }
    name
}
