//! What `tulle explain` says of a request, beside what became of it.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::requests::{ECHO, Request, SAMPLE};

/// A share in hundredths of a percent from which a backend has to be among those that answer [`SAMPLE`] requests.
const NOTICED: u64 = 2_000;

/// The pods behind each Service, by `namespace/name`.
pub(super) type Pods = BTreeMap<String, BTreeSet<String>>;

/// What is said of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Said {
    /// It reaches an application.
    pub(super) reaches: bool,
    /// The route that decides, such as `HTTPRoute/shop/web`; empty: none does.
    pub(super) route: String,
    /// How it is answered, where it reaches no application.
    answer: Answer,
    /// Where it may go.
    backends: Vec<Backend>,
    /// The backend that the later stages are about, as `namespace/name`.
    chosen: String,
    /// The path with which it gets to that one.
    path: String,
}

/// An answer of a sidecar.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Answer {
    status: String,
    /// Why, such as `RouteNone`; empty for a redirect.
    reason: String,
    /// Empty: none.
    location: String,
}

/// A backend that an explanation names.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Backend {
    /// `namespace/name`.
    service: String,
    /// Its share, in hundredths of a percent.
    share: u64,
    /// Its share is answered 500.
    invalid: bool,
}

/// What became of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// The status of HTTP, or the name of the code of gRPC.
    pub(super) status: String,
    /// Why a sidecar has answered; empty: no sidecar gave a reason.
    pub(super) reason: String,
    pub(super) location: String,
    /// The pod whose application has answered; empty: none.
    pub(super) pod: String,
    /// The path that the application saw.
    pub(super) path: String,
    /// Why the request was not answered; empty if it was.
    pub(super) error: String,
}

impl Seen {
    pub(super) fn read(line: &Value) -> Self {
        let field = |name: &str| line[name].as_str().unwrap_or("").to_owned();
        Self {
            status: field("status"),
            reason: field("reason"),
            location: field("location"),
            pod: field("pod"),
            path: field("path"),
            error: field("error"),
        }
    }
}

impl Said {
    /// Reads the JSON of `tulle explain`.
    ///
    /// # Errors
    /// It has a form that is not known here.
    pub(super) fn read(explained: &Value, request: &Request) -> Result<Self> {
        let reaches = explained["reaches"].as_bool();
        let reaches = reaches.with_context(|| format!("an explanation without reaches: {explained}"))?;
        let stage = |name: &str| {
            let mut all = explained["stages"].as_array().into_iter().flatten();
            all.find(|stage| stage["name"] == name)
        };
        let of = |name: &str, field: &str| {
            stage(name).and_then(|stage| stage[field].as_str()).unwrap_or("").to_owned()
        };
        let mut said = Self { reaches, route: of("route", "object"), ..Self::default() };
        let outcome = explained["outcome"].as_str().unwrap_or("");
        if !reaches {
            let (_, answer) = outcome
                .split_once(&format!(" does not reach {}: ", request.destination()))
                .with_context(|| format!("an outcome in unknown words: {outcome:?}"))?;
            said.answer = Answer::read(answer.strip_suffix('.').unwrap_or(answer));
            return Ok(said);
        }
        let because = of("backend", "because");
        said.backends = backends(&because)?;
        said.chosen = match because.split_once("what follows is about ") {
            Some((_, rest)) => service(rest.split([';', ',']).next().unwrap_or("")),
            None => said.backends.first().map(|first| first.service.clone()).unwrap_or_default(),
        };
        let rewritten = because.split_once(", with the path ").map(|(_, rest)| rest);
        let rewritten = rewritten.and_then(|rest| rest.split("; ").next());
        said.path = rewritten.unwrap_or(&request.path).to_owned();
        ensure!(
            outcome.contains(&format!(" reaches {}:", said.chosen)),
            "the backends are {:?}, but the outcome is {outcome:?}",
            said.backends
        );
        Ok(said)
    }
}

impl Answer {
    /// Reads the end of an outcome, such as `its sidecar answers 404 (RouteNone)`.
    fn read(text: &str) -> Self {
        let Some((_, rest)) = text.split_once(" answers ") else {
            // Without an answer, the connection ends.
            return Self { status: "000".to_owned(), ..Self::default() };
        };
        let status = rest.chars().take_while(char::is_ascii_digit).collect();
        let location = rest.split_once(" with Location ").map_or("", |(_, location)| location).to_owned();
        let reason = rest.split_once(" (").and_then(|(_, reason)| reason.strip_suffix(')')).unwrap_or("");
        Self { status, reason: reason.to_owned(), location }
    }
}

/// The backends that stage `backend` names, such as in `70 % to a/b:80, 30 % to c/d:80; what follows is …`.
fn backends(because: &str) -> Result<Vec<Backend>> {
    let mut found: Vec<Backend> = Vec::new();
    let goes = because.split("; ").next().unwrap_or("");
    for part in goes.split(", ") {
        let (share, name) = match part.split_once(" % to ") {
            Some((share, name)) => (hundredths(share)?, name),
            None => match part.strip_prefix("to ") {
                Some(name) => (10_000, name.trim_start_matches("Service ").trim_end_matches(" itself")),
                None => {
                    if let Some(last) = found.last_mut().filter(|_| part.contains("is answered 500")) {
                        last.invalid = true;
                    }
                    continue;
                }
            },
        };
        found.push(Backend { service: service(name), share, invalid: false });
    }
    ensure!(!found.is_empty(), "stage backend in unknown words: {because:?}");
    Ok(found)
}

/// A percentage such as `70` or `33.33`, in hundredths of a percent.
fn hundredths(text: &str) -> Result<u64> {
    let percent: f64 = text.parse().with_context(|| format!("{text:?} is no percentage"))?;
    Ok((percent * 100.0).round() as u64)
}

/// A Service without its port.
fn service(text: &str) -> String {
    text.split(':').next().unwrap_or("").to_owned()
}

/// How what is said of a request and what became of it differ. `None`: they agree.
pub(super) fn difference(request: &Request, said: &Said, seen: &[Seen], pods: &Pods) -> Option<String> {
    let wrong = match said.reaches {
        true => seen.iter().find_map(|seen| misplaced(request, said, seen, pods)),
        false => seen.iter().find_map(|seen| unlike(request, &said.answer, seen)),
    };
    let short = u32::try_from(seen.len()) != Ok(request.times);
    let counted = || short.then(|| format!("{} answers to {} requests", seen.len(), request.times));
    wrong.or_else(counted).or_else(|| unheard(request, said, seen, pods))
}

/// How an answer differs from one that a sidecar gives.
fn unlike(request: &Request, answer: &Answer, seen: &Seen) -> Option<String> {
    let location = answer.location == seen.location;
    let agrees = match request.grpc {
        // A refused call has a code of gRPC in place of the status.
        true => seen.error.is_empty() && !answer.reason.is_empty() && answer.reason == seen.reason,
        false => answer.status == seen.status && answer.reason == seen.reason && location,
    };
    (!agrees || !seen.pod.is_empty()).then(|| format!("explain says {answer:?}, the client got {seen:?}"))
}

/// How an answer differs from that of the application which the request is said to reach.
fn misplaced(request: &Request, said: &Said, seen: &Seen, pods: &Pods) -> Option<String> {
    let differs = |why: &str| Some(format!("{why}: explain says {said:?}, the client got {seen:?}"));
    if seen.reason == "RouteNoBackend" && said.backends.iter().any(|backend| backend.invalid) {
        return None;
    }
    if !seen.error.is_empty() {
        return differs("there was no answer");
    }
    if !seen.reason.is_empty() {
        return differs("a sidecar answered");
    }
    if request.grpc && request.path != ECHO {
        // The application does not know the method, and does not say which pod it is in.
        return if seen.status == "UNIMPLEMENTED" { None } else { differs("another code") };
    }
    let fine = if request.grpc { "OK" } else { "200" };
    if seen.status != fine {
        return differs("another status");
    }
    let has = |service: &str| pods.get(service).is_some_and(|pods| pods.contains(&seen.pod));
    let named = || said.backends.iter().filter(|backend| !backend.invalid && backend.share > 0);
    if !named().any(|backend| has(&backend.service)) {
        return differs("another backend answered");
    }
    if !request.grpc && has(&said.chosen) && seen.path != said.path {
        return differs("another path arrived");
    }
    None
}

/// A backend that should have answered one of many requests, and has answered none.
fn unheard(request: &Request, said: &Said, seen: &[Seen], pods: &Pods) -> Option<String> {
    if request.times < SAMPLE || !said.reaches {
        return None;
    }
    let mut noticed = said.backends.iter().filter(|backend| backend.share >= NOTICED);
    let silent = noticed.find(|backend| {
        if backend.invalid {
            return !seen.iter().any(|seen| seen.reason == "RouteNoBackend");
        }
        let of = pods.get(&backend.service);
        !seen.iter().any(|seen| of.is_some_and(|pods| pods.contains(&seen.pod)))
    });
    silent.map(|backend| format!("none of {} requests was answered by {backend:?}", seen.len()))
}
