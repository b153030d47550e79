//! Rules of a route, checked once when the route is applied: as sidecars are sent them, except that backends are still
//! names. Knows nothing of Services.
//!
//! What this build cannot do is never skipped. A rule with an unsupported filter keeps its matches and answers them
//! with an error, because the request was not meant to go on without the filter. A rule whose matches cannot be decided
//! is dropped.

use tulle_mesh::event_reason::EventReason;
use tulle_mesh::proto;

use super::filter::{self, FilterTerm};
use super::matching;
use super::object::{
    BackendRef, FilterSpec, MatchSpec, MatchType, MethodSpec, RetrySpec, RouteObject, RuleSpec, SessionSpec,
};

/// A value that this build does not support, or that nothing supports (`Accepted`, `PartiallyInvalid`).
pub(super) const UNSUPPORTED_VALUE: &str = EventReason::UnsupportedValue.name();
/// Filters that exclude each other.
pub(super) const INCOMPATIBLE_FILTERS: &str = EventReason::IncompatibleFilters.name();
/// Retries where a rule asks for some and does not say how many; the same as of a MeshPolicy.
const RETRIES: i64 = 2;
/// Regular expressions of one route: one for each match that the schema allows. Its matches may have 33 each, and what
/// they cost is paid by the operator, where it compiles them while nobody is answered, and by the sidecars of all clients
/// of the Service, for each request.
const MAX_REGEXES: usize = 128;

/// What is wrong with something, and the reason of the condition that says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Flaw {
    pub(super) reason: &'static str,
    pub(super) what: String,
}

impl Flaw {
    pub(super) fn unsupported(what: impl Into<String>) -> Self {
        Self { reason: UNSUPPORTED_VALUE, what: what.into() }
    }

    /// The same, with where it was found.
    pub(super) fn at(self, place: &str) -> Self {
        Self { what: format!("{place}: {}", self.what), ..self }
    }
}

/// A rule that was checked.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct CheckedRule {
    pub(super) name: String,
    /// Each leads to the rule; their index of a rule is not set. None: the rule is dropped.
    pub(super) matches: Vec<proto::Match>,
    /// What happens to a request that matches. `None`: it is answered with an error.
    pub(super) terms: Option<Terms>,
    /// Why the rule is not in force as it is written.
    pub(super) flaw: Option<Flaw>,
}

/// What happens to a request that matches.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Terms {
    pub(super) filters: Vec<FilterTerm>,
    pub(super) backends: Vec<BackendTerm>,
    pub(super) request_timeout_ms: Option<u32>,
    pub(super) attempt_timeout_ms: Option<u32>,
    pub(super) retry: Option<proto::RouteRetry>,
    pub(super) session: Option<proto::SessionPersistence>,
}

impl Terms {
    /// The backends and mirrors that a request may go to.
    pub(super) fn references(&self) -> impl Iterator<Item = &BackendRef> {
        let of_backends = self.backends.iter().flat_map(|backend| &backend.filters);
        let mirrors = self.filters.iter().chain(of_backends).filter_map(|filter| match filter {
            FilterTerm::Mirror { to, .. } => Some(to),
            FilterTerm::Ready(_) => None,
        });
        self.backends.iter().map(|backend| &backend.to).chain(mirrors)
    }
}

/// A backend, by name.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct BackendTerm {
    pub(super) to: BackendRef,
    pub(super) weight: u32,
    pub(super) filters: Vec<FilterTerm>,
}

/// The rules of a route, each checked by itself.
pub(super) fn rules(route: &RouteObject) -> Vec<CheckedRule> {
    let mut left = MAX_REGEXES;
    let check = |(index, rule): (usize, &RuleSpec)| match left.checked_sub(regexes(rule)) {
        Some(fewer) => {
            left = fewer;
            checked(route, index, rule)
        }
        None => {
            let what = format!("more than {MAX_REGEXES} regular expressions in one route");
            let name = rule.name.clone().unwrap_or_default();
            CheckedRule { name, matches: Vec::new(), terms: None, flaw: Some(Flaw::unsupported(what)) }
        }
    };
    route.rules.iter().enumerate().map(check).collect()
}

/// How many regular expressions a rule has.
fn regexes(rule: &RuleSpec) -> usize {
    let is_regex = |kind: Option<&MatchType>| kind == Some(&MatchType::RegularExpression);
    let of = |one: &MatchSpec| {
        let path = one.path.iter().filter(|path| is_regex(path.kind.as_ref())).count();
        let values = one.headers.iter().chain(&one.query_params);
        let method = match &one.method {
            Some(MethodSpec::Grpc { kind, service, method }) if is_regex(kind.as_ref()) => {
                [service, method].into_iter().flatten().count()
            }
            _ => 0,
        };
        path + values.filter(|value| is_regex(value.kind.as_ref())).count() + method
    };
    rule.matches.iter().map(of).sum()
}

fn checked(route: &RouteObject, index: usize, rule: &RuleSpec) -> CheckedRule {
    let name = rule.name.clone().unwrap_or_default();
    let matches = match matching::matches(route, rule) {
        Ok(matches) => matches,
        Err(flaw) => return CheckedRule { name, matches: Vec::new(), terms: None, flaw: Some(flaw) },
    };
    match terms(route, index, rule, &matches) {
        Ok(terms) => CheckedRule { name, matches, terms: Some(terms), flaw: None },
        Err(flaw) => CheckedRule { name, matches, terms: None, flaw: Some(flaw) },
    }
}

fn terms(
    route: &RouteObject,
    index: usize,
    rule: &RuleSpec,
    matches: &[proto::Match],
) -> Result<Terms, Flaw> {
    let is_prefix = |path: &proto::ValueMatch| path.r#type() == proto::value_match::Type::Prefix;
    let by_prefix = matches.iter().all(|one| one.path.as_ref().is_some_and(is_prefix));
    let filters = |specs: &[FilterSpec]| filter::filters(route.kind, specs, by_prefix);
    let mut backends = Vec::with_capacity(rule.backend_refs.len());
    for (number, backend) in rule.backend_refs.iter().enumerate() {
        backends.push(BackendTerm {
            weight: u32::try_from(backend.weight.unwrap_or(1)).unwrap_or_default(),
            filters: filters(&backend.filters).map_err(|flaw| flaw.at(&format!("backendRefs[{number}]")))?,
            to: BackendRef { filters: Vec::new(), ..backend.clone() },
        });
    }
    let timeouts = rule.timeouts.as_ref();
    let timeout = |text: Option<&String>| text.map(|text| millis(text)).transpose();
    Ok(Terms {
        filters: filters(&rule.filters)?,
        backends,
        request_timeout_ms: timeout(timeouts.and_then(|timeouts| timeouts.request.as_ref()))?,
        attempt_timeout_ms: timeout(timeouts.and_then(|timeouts| timeouts.backend_request.as_ref()))?,
        retry: rule.retry.as_ref().map(retry).transpose()?,
        session: match &rule.session_persistence {
            Some(spec) => Some(session(spec, &format!("tulle-{}-{index}", route.name))?),
            None => None,
        },
    })
}

fn retry(spec: &RetrySpec) -> Result<proto::RouteRetry, Flaw> {
    let mut codes = Vec::with_capacity(spec.codes.len());
    for code in &spec.codes {
        let valid = u32::try_from(*code).ok().filter(|code| (400..=599).contains(code));
        codes.push(valid.ok_or_else(|| {
            Flaw::unsupported(format!("retry of status code {code}, which is not from 400 to 599"))
        })?);
    }
    Ok(proto::RouteRetry {
        codes,
        attempts: u32::try_from(spec.attempts.unwrap_or(RETRIES)).unwrap_or_default(),
        backoff_ms: spec.backoff.as_deref().map(millis).transpose()?.unwrap_or_default(),
    })
}

/// `default_name` differs from rule to rule: with one name for all, the cookie of one would undo that of another.
fn session(spec: &SessionSpec, default_name: &str) -> Result<proto::SessionPersistence, Flaw> {
    use proto::session_persistence::Type;
    let kind = match spec.kind.as_deref() {
        None | Some("Cookie") => Type::Cookie,
        Some("Header") => Type::Header,
        Some(other) => {
            return Err(Flaw::unsupported(format!(
                "session persistence of type {other}, which is neither Cookie nor Header"
            )));
        }
    };
    let lifetime = spec.cookie_config.as_ref().and_then(|config| config.lifetime_type.as_deref());
    let permanent = match lifetime {
        None | Some("Session") => false,
        Some("Permanent") => true,
        Some(other) => {
            return Err(Flaw::unsupported(format!(
                "cookie lifetime {other} is neither Session nor Permanent"
            )));
        }
    };
    let name = spec.session_name.as_deref().filter(|name| !name.is_empty()).unwrap_or(default_name);
    filter::check_name(name).map_err(|flaw| flaw.at("session"))?;
    let seconds = |text: Option<&String>| -> Result<u32, Flaw> {
        Ok(text.map(|text| millis(text)).transpose()?.unwrap_or_default().div_ceil(1000))
    };
    Ok(proto::SessionPersistence {
        r#type: kind.into(),
        name: name.to_owned(),
        absolute_seconds: seconds(spec.absolute_timeout.as_ref())?,
        idle_seconds: seconds(spec.idle_timeout.as_ref())?,
        permanent,
    })
}

/// A duration of GEP-2257 in milliseconds: one to four whole numbers of at most five digits with a unit each, which
/// are added. At most 49 days, which is what the number can say.
fn millis(text: &str) -> Result<u32, Flaw> {
    let invalid = || Flaw::unsupported(format!("duration {text:?} is not as in 500ms, 10s or 1h30m"));
    let (mut rest, mut total, mut parts) = (text, 0_u64, 0);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(invalid)?;
        let (number, tail) = rest.split_at_checked(digits).ok_or_else(invalid)?;
        let units = [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000)];
        let unit = units.into_iter().find_map(|(unit, factor)| Some((tail.strip_prefix(unit)?, factor)));
        let (after, factor) = unit.ok_or_else(invalid)?;
        let number: u64 = number.parse().map_err(|_| invalid())?;
        (rest, total, parts) = (after, total + number.min(99_999) * factor, parts + 1);
        if digits > 5 || parts > 4 {
            return Err(invalid());
        }
    }
    if parts == 0 { Err(invalid()) } else { Ok(u32::try_from(total).unwrap_or(u32::MAX)) }
}

/// The filters of a rule and of its backends.
fn all_filters(rule: &RuleSpec) -> impl Iterator<Item = &FilterSpec> {
    rule.filters.iter().chain(rule.backend_refs.iter().flat_map(|backend| &backend.filters))
}

/// All backends that a route names, also as mirrors and in rules that are dropped.
pub(super) fn references(route: &RouteObject) -> impl Iterator<Item = &BackendRef> {
    route.rules.iter().flat_map(|rule| {
        let mirrors = all_filters(rule).filter_map(|filter| filter.request_mirror.as_ref());
        rule.backend_refs.iter().chain(mirrors.map(|mirror| &mirror.backend_ref))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_what_gep_2257_says() {
        for (text, expected) in [
            ("0s", 0),
            ("500ms", 500),
            ("1m", 60_000),
            ("1h30m", 5_400_000),
            ("1s500ms", 1500),
            ("30m1h", 5_400_000),
            ("99999h", u32::MAX),
        ] {
            assert_eq!(millis(text).ok(), Some(expected), "{text}");
        }
        for text in ["", "5", "s", "1d", "1.5s", "-1s", "100000s", "1s1s1s1s1s", "1 s", "ä"] {
            assert!(millis(text).is_err(), "{text}");
        }
    }
}
