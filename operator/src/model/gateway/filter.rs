//! Filters of rules and backends, as sidecars are sent them. Values go into heads of requests and answers, so that they
//! are checked here although the schemas of newer CRDs check most of them too. Sidecars check them again and refuse the
//! rules of an address together: nothing may pass here that they refuse (`sidecar/src/config/rules.rs`).

use std::collections::HashSet;

use tulle_mesh::headers;
use tulle_mesh::proto;
use tulle_mesh::proto::filter::Kind;
use tulle_mesh::proto::path_modifier;

use super::check::{Flaw, INCOMPATIBLE_FILTERS};
use super::object::{
    BackendRef, CorsSpec, FilterSpec, HeaderSpec, HeadersSpec, MirrorSpec, PathModifierSpec, RedirectSpec,
    RewriteSpec, RouteKind,
};

/// Seconds that an answer to a preflight holds where the filter says nothing.
const CORS_MAX_AGE: i64 = 5;

/// A filter. Where a mirror leads is still a name.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum FilterTerm {
    Ready(Box<Kind>),
    Mirror { to: BackendRef, numerator: u32, denominator: u32 },
}

/// The filters of a rule or backend. `by_prefix`: all matches of the rule are path prefixes.
///
/// # Errors
/// The first that is not supported.
pub(super) fn filters(
    kind: RouteKind,
    specs: &[FilterSpec],
    by_prefix: bool,
) -> Result<Vec<FilterTerm>, Flaw> {
    let mut seen = HashSet::new();
    let mut made = Vec::with_capacity(specs.len());
    for spec in specs {
        if !seen.insert(spec.kind.as_str()) && spec.kind != "RequestMirror" {
            let what = format!("filter {} more than once", spec.kind);
            return Err(Flaw { reason: INCOMPATIBLE_FILTERS, what });
        }
        made.push(one(kind, spec, by_prefix).map_err(|flaw| flaw.at(&format!("filter {}", spec.kind)))?);
    }
    if seen.contains("URLRewrite") && seen.contains("RequestRedirect") {
        let what = "filters URLRewrite and RequestRedirect together".to_owned();
        return Err(Flaw { reason: INCOMPATIBLE_FILTERS, what });
    }
    Ok(made)
}

fn one(kind: RouteKind, spec: &FilterSpec, by_prefix: bool) -> Result<FilterTerm, Flaw> {
    let unsupported = || Flaw::unsupported(format!("not supported in {}s", kind.name()));
    let ready = match spec.kind.as_str() {
        _ if !kind.is_of_requests() => return Err(unsupported()),
        "RequestHeaderModifier" => {
            Kind::RequestHeaders(edits(given(spec.request_header_modifier.as_ref())?)?)
        }
        "ResponseHeaderModifier" => {
            Kind::ResponseHeaders(edits(given(spec.response_header_modifier.as_ref())?)?)
        }
        "RequestMirror" => return mirror(given(spec.request_mirror.as_ref())?),
        _ if kind == RouteKind::Grpc => return Err(unsupported()),
        "RequestRedirect" => Kind::Redirect(redirect(given(spec.request_redirect.as_ref())?, by_prefix)?),
        "URLRewrite" => Kind::Rewrite(rewrite(given(spec.url_rewrite.as_ref())?, by_prefix)?),
        "CORS" => Kind::Cors(cors(given(spec.cors.as_ref())?)?),
        _ => return Err(unsupported()),
    };
    Ok(FilterTerm::Ready(Box::new(ready)))
}

fn given<T>(spec: Option<&T>) -> Result<&T, Flaw> {
    spec.ok_or_else(|| Flaw::unsupported("the field of this type is missing"))
}

fn edits(spec: &HeadersSpec) -> Result<proto::HeaderEdits, Flaw> {
    let headers = |specs: &[HeaderSpec]| -> Result<Vec<proto::Header>, Flaw> {
        // Of several with the same name the first counts.
        let mut seen = HashSet::new();
        let firsts = specs.iter().filter(|header| seen.insert(header.name.to_ascii_lowercase()));
        firsts.map(header).collect()
    };
    for name in spec.add.iter().map(|header| &header.name).chain(&spec.remove) {
        check_name(name)?;
        // There is exactly one.
        if name.eq_ignore_ascii_case("host") {
            return Err(Flaw::unsupported("header Host can only be set"));
        }
    }
    Ok(proto::HeaderEdits { set: headers(&spec.set)?, add: headers(&spec.add)?, remove: spec.remove.clone() })
}

fn header(spec: &HeaderSpec) -> Result<proto::Header, Flaw> {
    check_name(&spec.name)?;
    let is_text = |byte: u8| byte == b'\t' || byte == b' ' || byte.is_ascii_graphic();
    if !spec.value.bytes().all(is_text) {
        return Err(Flaw::unsupported(format!(
            "value {:?} of header {} has a character other than visible ASCII, space and tab",
            spec.value, spec.name
        )));
    }
    Ok(proto::Header { name: spec.name.clone(), value: spec.value.trim().to_owned() })
}

/// Whether a rule may use a header of this name.
///
/// # Errors
/// Why not.
pub(super) fn check_name(name: &str) -> Result<(), Flaw> {
    if !is_token(name) {
        return Err(Flaw::unsupported(format!(
            "header name {name:?} is not of letters, digits and !#$%&'*+-.^_`|~ only"
        )));
    }
    if !headers::is_editable(name) {
        return Err(Flaw::unsupported(format!("header {name} cannot be changed")));
    }
    Ok(())
}

/// Whether a text can be the name of a header or cookie (RFC 9110 §5.6.2).
fn is_token(text: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    !text.is_empty() && text.bytes().all(is_allowed)
}

/// Whether a text can stand in the first line of a request or in a `Location`.
fn is_visible(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_graphic())
}

fn mirror(spec: &MirrorSpec) -> Result<FilterTerm, Flaw> {
    let (numerator, denominator) = match (&spec.fraction, spec.percent) {
        (Some(fraction), _) => (fraction.numerator, fraction.denominator.unwrap_or(100)),
        (None, percent) => (percent.unwrap_or(100), 100),
    };
    let invalid = || Flaw::unsupported(format!("fraction {numerator}/{denominator} is not from 0 to 1"));
    let part = |number: i64| u32::try_from(number).map_err(|_| invalid());
    let (numerator, denominator) = (part(numerator)?, part(denominator)?);
    if denominator == 0 || numerator > denominator {
        return Err(invalid());
    }
    let to = BackendRef { filters: Vec::new(), weight: None, ..spec.backend_ref.clone() };
    Ok(FilterTerm::Mirror { to, numerator, denominator })
}

fn redirect(spec: &RedirectSpec, by_prefix: bool) -> Result<proto::Redirect, Flaw> {
    let scheme = spec.scheme.clone().unwrap_or_default();
    if !matches!(scheme.as_str(), "" | "http" | "https") {
        return Err(Flaw::unsupported(format!("scheme {scheme:?} is neither http nor https")));
    }
    let written = spec.status_code.unwrap_or(302);
    let status = u32::try_from(written).ok().filter(|status| matches!(status, 301 | 302 | 303 | 307 | 308));
    let status = status.ok_or_else(|| {
        Flaw::unsupported(format!("status code {written} is not one of 301, 302, 303, 307 and 308"))
    })?;
    let port = spec.port.map(|port| u16::try_from(port).map_err(|_| port)).transpose();
    let port = port.map_err(|port| Flaw::unsupported(format!("port {port} is not from 1 to 65535")))?;
    Ok(proto::Redirect {
        scheme,
        hostname: hostname(spec.hostname.as_deref())?,
        path: path(spec.path.as_ref(), by_prefix)?,
        port: port.map_or(0, u32::from),
        status,
    })
}

fn rewrite(spec: &RewriteSpec, by_prefix: bool) -> Result<proto::Rewrite, Flaw> {
    Ok(proto::Rewrite {
        hostname: hostname(spec.hostname.as_deref())?,
        path: path(spec.path.as_ref(), by_prefix)?,
    })
}

fn hostname(name: Option<&str>) -> Result<String, Flaw> {
    let name = name.unwrap_or_default();
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.';
    if name.bytes().all(is_allowed) {
        Ok(name.to_owned())
    } else {
        Err(Flaw::unsupported(format!(
            "hostname {name:?} has a character other than letters, digits, - and ."
        )))
    }
}

fn path(spec: Option<&PathModifierSpec>, by_prefix: bool) -> Result<Option<proto::PathModifier>, Flaw> {
    let Some(spec) = spec else { return Ok(None) };
    let (kind, value): (fn(String) -> path_modifier::Kind, _) = match spec.kind.as_str() {
        "ReplaceFullPath" => (path_modifier::Kind::Full, &spec.replace_full_path),
        "ReplacePrefixMatch" if !by_prefix => {
            return Err(Flaw::unsupported("ReplacePrefixMatch needs a match of type PathPrefix"));
        }
        "ReplacePrefixMatch" => (path_modifier::Kind::Prefix, &spec.replace_prefix_match),
        other => return Err(Flaw::unsupported(format!("path modifier of type {other} is not supported"))),
    };
    let value = value.clone().unwrap_or_default();
    if !is_visible(&value) {
        return Err(Flaw::unsupported(format!(
            "path {value:?} has a character outside of visible ASCII: write it percent-encoded, such as %20"
        )));
    }
    if value.contains(['?', '#']) {
        return Err(Flaw::unsupported(format!(
            "path {value:?} contains ? or #: only the path can be replaced, and the query of the request stays"
        )));
    }
    Ok(Some(proto::PathModifier { kind: Some(kind(value)) }))
}

fn cors(spec: &CorsSpec) -> Result<proto::Cors, Flaw> {
    let lists = [&spec.allow_origins, &spec.allow_methods, &spec.allow_headers, &spec.expose_headers];
    if let Some(value) = lists.into_iter().flatten().find(|value| !is_visible(value)) {
        return Err(Flaw::unsupported(format!("value {value:?} has a character outside of visible ASCII")));
    }
    Ok(proto::Cors {
        allow_origins: spec.allow_origins.clone(),
        allow_credentials: spec.allow_credentials.unwrap_or(false),
        allow_methods: spec.allow_methods.clone(),
        allow_headers: spec.allow_headers.clone(),
        expose_headers: spec.expose_headers.clone(),
        max_age_seconds: u32::try_from(spec.max_age.unwrap_or(CORS_MAX_AGE)).unwrap_or_default(),
    })
}
