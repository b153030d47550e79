//! Spans as a collector takes them.

use tulle_mesh::otlp::any_value::Value as AnyValueKind;
use tulle_mesh::otlp::span::SpanKind;
use tulle_mesh::otlp::status::StatusCode;
use tulle_mesh::otlp::{self, ExportTraceServiceRequest, KeyValue, ResourceSpans, ScopeSpans};

use super::span::{Kind, Span, Value};
use crate::config::{Place, Tracing};
use crate::settings::Settings;

/// In `Span.flags`: it is known whether the parent is of another process.
const REMOTE_IS_KNOWN: u32 = 0x100;
/// In `Span.flags`: it is.
const IS_REMOTE: u32 = 0x200;

/// Spans of this pod as one request.
pub(super) fn request(
    settings: &Settings,
    tracing: &Tracing,
    place: &Place,
    spans: Vec<Span>,
) -> ExportTraceServiceRequest {
    let scope = otlp::InstrumentationScope {
        name: "tulle-sidecar".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let spans = ScopeSpans {
        scope: Some(scope),
        spans: spans.into_iter().map(span).collect(),
        schema_url: String::new(),
    };
    let resource = otlp::Resource { attributes: resource(settings, tracing, place) };
    let of_pod =
        ResourceSpans { resource: Some(resource), scope_spans: vec![spans], schema_url: String::new() };
    ExportTraceServiceRequest { resource_spans: vec![of_pod] }
}

/// Who the pod is. What is unknown is left out.
fn resource(settings: &Settings, tracing: &Tracing, place: &Place) -> Vec<KeyValue> {
    // A pod that belongs to no workload is its own.
    let service = if tracing.workload.is_empty() { &settings.pod_name } else { &tracing.workload };
    let of_kind = match tracing.kind.as_str() {
        "Deployment" => Some("k8s.deployment.name"),
        "StatefulSet" => Some("k8s.statefulset.name"),
        "DaemonSet" => Some("k8s.daemonset.name"),
        _ => None,
    };
    let attributes: [(&str, &str); 9] = [
        ("service.name", service.as_str()),
        ("service.namespace", &settings.pod_namespace),
        ("service.version", &tracing.revision),
        ("service.instance.id", &settings.pod_uid),
        ("k8s.namespace.name", &settings.pod_namespace),
        ("k8s.pod.name", &settings.pod_name),
        ("k8s.pod.uid", &settings.pod_uid),
        ("k8s.node.name", &place.node),
        (of_kind.unwrap_or_default(), &tracing.workload),
    ];
    let known = attributes.into_iter().filter(|(name, value)| !name.is_empty() && !value.is_empty());
    known.map(|(name, text)| attribute(name, AnyValueKind::StringValue(text.to_owned()))).collect()
}

fn span(span: Span) -> otlp::Span {
    let kind = match span.kind {
        Kind::Server => SpanKind::Server,
        Kind::Client => SpanKind::Client,
    };
    let mut flags = u32::from(span.flags) | REMOTE_IS_KNOWN;
    if span.parent_id.is_some() {
        flags |= IS_REMOTE;
    }
    // Without an error the status is left to whoever reads the trace.
    let status = span.failed.then(|| otlp::Status { message: String::new(), code: StatusCode::Error.into() });
    otlp::Span {
        trace_id: span.trace_id.to_vec(),
        span_id: span.span_id.to_vec(),
        trace_state: span.state.into(),
        parent_span_id: span.parent_id.map(|id| id.to_vec()).unwrap_or_default(),
        name: span.name.into(),
        kind: kind.into(),
        start_time_unix_nano: span.start_unix_nano,
        end_time_unix_nano: span.end_unix_nano,
        attributes: span.attributes.into_iter().map(|(name, told)| attribute(name, value(told))).collect(),
        status,
        flags,
    }
}

fn value(value: Value) -> AnyValueKind {
    match value {
        Value::Word(word) => AnyValueKind::StringValue(word.to_owned()),
        Value::Text(text) => AnyValueKind::StringValue(text.into()),
        Value::Number(number) => AnyValueKind::IntValue(number),
    }
}

fn attribute(name: &str, value: AnyValueKind) -> KeyValue {
    KeyValue { key: name.to_owned(), value: Some(otlp::AnyValue { value: Some(value) }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_kind_status_and_attributes_are_those_of_the_span() {
        let made = Span {
            trace_id: [1; 16],
            span_id: [2; 8],
            parent_id: Some([3; 8]),
            state: "a=1".into(),
            flags: 3,
            kind: Kind::Client,
            name: "GET".into(),
            start_unix_nano: 5,
            end_unix_nano: 7,
            attributes: vec![("error.type", Value::Text("503".into())), ("server.port", Value::Number(80))],
            failed: true,
        };
        let sent = span(made.clone());
        assert_eq!((sent.trace_id, sent.span_id, sent.parent_span_id), (vec![1; 16], vec![2; 8], vec![3; 8]));
        assert_eq!((sent.kind, sent.flags, sent.trace_state.as_str()), (3, 0x303, "a=1"));
        assert_eq!((sent.start_time_unix_nano, sent.end_time_unix_nano), (5, 7));
        assert_eq!(sent.status.unwrap().code, 2);
        let expected = [
            attribute("error.type", AnyValueKind::StringValue("503".into())),
            attribute("server.port", AnyValueKind::IntValue(80)),
        ];
        assert_eq!(sent.attributes, expected);
        let root = span(Span { parent_id: None, failed: false, kind: Kind::Server, ..made });
        assert_eq!((root.parent_span_id.len(), root.kind, root.flags, root.status), (0, 2, 0x103, None));
    }
}
