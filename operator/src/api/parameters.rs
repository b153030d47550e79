//! Parameters of a URL's query, or of a message that asks the same, checked. A refusal says what to write.

use std::ops::RangeInclusive;

use axum::extract::{FromRequestParts, Query};
use axum::http::HeaderName;
use axum::http::request::Parts;
use tulle_mesh::policy::Glob;
use tulle_mesh::proto::series_key::Direction;
use tulle_mesh::proto::{Tap, TapFilter};
use tulle_mesh::query::By;

use super::Refused;

/// The shortest time that can be asked for: that of one slot of the history.
const MIN_WINDOW: u64 = 10;
/// The longest: that of the whole history.
pub(super) const MAX_WINDOW: u64 = 6 * 3600;

/// Requests that a sidecar shows in a second at most, unless a tap says otherwise.
const RATE: u32 = 20;
/// The most that it can be asked for.
const MAX_RATE: u32 = 100;
/// The longest latency that can be asked for, in milliseconds.
const MAX_SLOW: u64 = 3_600_000;
/// Headers that a tap shows.
const MAX_HEADERS: usize = 8;

/// Names and values in a URL's query, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parameters(Vec<(String, String)>);

impl<S: Send + Sync> FromRequestParts<S> for Parameters {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Refused> {
        match Query::try_from_uri(&parts.uri) {
            Ok(Query(pairs)) => Ok(Self(pairs)),
            Err(error) => Err(Refused::bad_request(error.body_text())),
        }
    }
}

impl Parameters {
    /// Parameters that have come otherwise than in a URL; those without a value are left out.
    pub fn of<'a>(given: impl IntoIterator<Item = (&'a str, Option<String>)>) -> Self {
        let given = given.into_iter();
        Self(given.filter_map(|(name, value)| value.map(|value| (name.to_owned(), value))).collect())
    }

    /// Refuses parameters that the path does not have: one that is misspelt would be ignored, and more be answered than
    /// was asked for.
    ///
    /// # Errors
    /// 400.
    pub fn only(self, known: &[&str]) -> Result<Self, Refused> {
        let Some((name, _)) = self.0.iter().find(|(name, _)| !known.contains(&name.as_str())) else {
            return Ok(self);
        };
        let remedy = match known {
            [] => "this path has none".to_owned(),
            _ => format!("there are {}", known.join(", ")),
        };
        Err(Refused::bad_request(format!("unknown parameter {name:?}; {remedy}")))
    }

    /// All values of a parameter that may be repeated.
    pub fn all(&self, name: &str) -> impl Iterator<Item = &str> {
        self.0.iter().filter(move |(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// Whether a parameter is there.
    pub fn has(&self, name: &str) -> bool {
        self.all(name).next().is_some()
    }

    /// The value of a parameter.
    ///
    /// # Errors
    /// 400 where it is repeated or empty.
    pub fn one(&self, name: &str) -> Result<Option<&str>, Refused> {
        let mut values = self.all(name);
        let Some(value) = values.next() else { return Ok(None) };
        if values.next().is_some() {
            return Err(Refused::bad_request(format!("parameter {name} is repeated; write it once")));
        }
        if value.is_empty() {
            return Err(Refused::bad_request(format!(
                "parameter {name} is empty; leave it out or give it a value"
            )));
        }
        Ok(Some(value))
    }

    /// The value of a parameter that must be there.
    ///
    /// # Errors
    /// 400 where it is missing, repeated or empty.
    pub fn required(&self, name: &str, example: &str) -> Result<&str, Refused> {
        let missing = || Refused::bad_request(format!("parameter {name} is missing; write {name}={example}"));
        self.one(name)?.ok_or_else(missing)
    }

    /// A Kubernetes name, such as that of a namespace.
    ///
    /// # Errors
    /// 400 where it is repeated or not a name.
    pub fn name(&self, parameter: &str) -> Result<Option<String>, Refused> {
        let value = self.one(parameter)?;
        value.map(|value| valid_name(parameter, value).map(str::to_owned)).transpose()
    }

    /// A Kubernetes name that must be there.
    ///
    /// # Errors
    /// 400 where it is missing, repeated or not a name.
    pub fn required_name(&self, parameter: &str, example: &str) -> Result<String, Refused> {
        valid_name(parameter, self.required(parameter, example)?).map(str::to_owned)
    }

    /// A workload as `namespace/name`.
    ///
    /// # Errors
    /// 400 where it is repeated or has another form.
    pub fn namespaced(&self, parameter: &str) -> Result<Option<(String, String)>, Refused> {
        self.one(parameter)?.map(|value| namespaced(parameter, value)).transpose()
    }

    /// The seconds that are summed.
    ///
    /// # Errors
    /// 400 where it is not a number within bounds.
    pub fn window(&self, default: u64) -> Result<u64, Refused> {
        let Some(text) = self.one("window")? else { return Ok(default) };
        let window = text.parse().ok().filter(|seconds| (MIN_WINDOW..=MAX_WINDOW).contains(seconds));
        window.ok_or_else(|| {
            Refused::bad_request(format!(
                "window is {text:?}; write a number of seconds from {MIN_WINDOW} to {MAX_WINDOW}, such as window=60"
            ))
        })
    }

    /// What rows are about.
    ///
    /// # Errors
    /// 400 for an unknown value.
    pub fn by(&self) -> Result<By, Refused> {
        match self.one("by")? {
            None | Some("workload") => Ok(By::Workload),
            Some("service") => Ok(By::Service),
            Some("route") => Ok(By::Route),
            Some("revision") => Ok(By::Revision),
            Some(other) => Err(Refused::bad_request(format!(
                "by is {other:?}; write workload, service, route or revision"
            ))),
        }
    }

    /// Headers, each as `name:value`.
    ///
    /// # Errors
    /// 400 where one has no colon or no name.
    pub fn headers(&self) -> Result<Vec<(String, String)>, Refused> {
        let headers = self.all("header").map(|header| match header.split_once(':') {
            Some((name, value)) if !name.trim().is_empty() => {
                Ok((name.trim().to_ascii_lowercase(), value.trim().to_owned()))
            }
            _ => Err(Refused::bad_request(format!(
                "header is {header:?}; write header=NAME:VALUE, such as header=x-user:beta"
            ))),
        });
        headers.collect()
    }
}

/// Parameters of a tap.
impl Parameters {
    /// What sidecars are asked to show, but for the `id`.
    ///
    /// # Errors
    /// 400 for a value that no request could have, or that may not be shown.
    pub fn tap(&self) -> Result<Tap, Refused> {
        let (peer_namespace, peer) = self.namespaced("peer")?.unwrap_or_default();
        let (status_from, status_to) = self.status()?;
        let filter = TapFilter {
            peer_namespace,
            peer,
            method: self.method()?,
            path: self.glob()?,
            status_from,
            status_to,
            denied: self.flag("denied")?,
            slow_micros: self.number("slow", 1..=MAX_SLOW)?.unwrap_or(0) * 1_000,
            direction: self.direction()?.into(),
        };
        let rate = self.number("rate", 1..=u64::from(MAX_RATE))?;
        let rate = rate.and_then(|rate| u32::try_from(rate).ok()).unwrap_or(RATE);
        Ok(Tap { id: 0, filter: Some(filter), rate, headers: self.header_names()? })
    }

    fn direction(&self) -> Result<Direction, Refused> {
        match self.one("direction")? {
            None => Ok(Direction::Unspecified),
            Some("inbound") => Ok(Direction::Inbound),
            Some("outbound") => Ok(Direction::Outbound),
            Some(other) => {
                Err(Refused::bad_request(format!("direction is {other:?}; write inbound or outbound")))
            }
        }
    }

    fn method(&self) -> Result<String, Refused> {
        let method = self.one("method")?.unwrap_or("");
        // Methods are tokens. Those that people look for have letters only.
        match method.len() <= 32 && method.bytes().all(|byte| byte.is_ascii_alphabetic() || byte == b'-') {
            true => Ok(method.to_ascii_uppercase()),
            false => Err(Refused::bad_request(format!("method is {method:?}; write one such as GET"))),
        }
    }

    fn glob(&self) -> Result<String, Refused> {
        let Some(pattern) = self.one("path")? else { return Ok(String::new()) };
        match Glob::compile(pattern) {
            Ok(_) => Ok(pattern.to_owned()),
            Err(error) => Err(Refused::bad_request(format!(
                "path is {pattern:?}, which is not a glob ({error}); write one such as /cart/* or /api/**"
            ))),
        }
    }

    /// The first and the last status; 0 and 0: any.
    fn status(&self) -> Result<(u32, u32), Refused> {
        let Some(text) = self.one("status")? else { return Ok((0, 0)) };
        let class = text.strip_suffix("xx").or_else(|| text.strip_suffix("XX"));
        let class = class.and_then(|class| class.parse::<u32>().ok()).filter(|class| (1..=5).contains(class));
        let one = text.parse::<u32>().ok().filter(|status| (100..=599).contains(status));
        match (class, one) {
            (Some(class), _) => Ok((class * 100, class * 100 + 99)),
            (None, Some(status)) => Ok((status, status)),
            (None, None) => {
                Err(Refused::bad_request(format!("status is {text:?}; write one such as 503 or 5xx")))
            }
        }
    }

    fn flag(&self, name: &str) -> Result<bool, Refused> {
        match self.one(name)? {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(other) => Err(Refused::bad_request(format!("{name} is {other:?}; write {name}=true"))),
        }
    }

    fn number(&self, name: &str, range: RangeInclusive<u64>) -> Result<Option<u64>, Refused> {
        let Some(text) = self.one(name)? else { return Ok(None) };
        let number = text.parse().ok().filter(|number| range.contains(number));
        number.map(Some).ok_or_else(|| {
            let (least, most) = range.into_inner();
            Refused::bad_request(format!("{name} is {text:?}; write a number from {least} to {most}"))
        })
    }

    /// Names of headers, in small letters and each once.
    fn header_names(&self) -> Result<Vec<String>, Refused> {
        let mut names: Vec<String> = Vec::new();
        for text in self.all("header") {
            let name = HeaderName::from_bytes(text.as_bytes()).map_err(|_| {
                Refused::bad_request(format!(
                    "header is {text:?}, which is not the name of a header; write one such as user-agent"
                ))
            })?;
            if tulle_mesh::tap::is_secret(name.as_str()) {
                return Err(Refused::bad_request(format!("header {name} may hold credentials"))
                    .with_hint("no tap shows them, whoever asks: leave it out"));
            }
            if !names.iter().any(|known| known == name.as_str()) {
                names.push(name.as_str().to_owned());
            }
        }
        match names.len() <= MAX_HEADERS {
            true => Ok(names),
            false => Err(Refused::bad_request(format!("a tap shows at most {MAX_HEADERS} headers"))),
        }
    }
}

/// Whether a text can be the name of an object in Kubernetes. Names stand in hints that people paste into a shell, so
/// nothing else gets there.
pub fn is_name(text: &str) -> bool {
    let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-');
    let ends = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    bytes.len() <= 253 && bytes.iter().copied().all(allowed) && ends(bytes.first()) && ends(bytes.last())
}

/// Checks a name.
pub(super) fn valid_name<'a>(parameter: &str, value: &'a str) -> Result<&'a str, Refused> {
    is_name(value).then_some(value).ok_or_else(|| {
        Refused::bad_request(format!(
            "{parameter} is {value:?}, which is not a name: expected a-z, 0-9, - and ., as in shop"
        ))
    })
}

/// Splits `namespace/name`.
pub(super) fn namespaced(parameter: &str, value: &str) -> Result<(String, String), Refused> {
    let (namespace, name) = value.split_once('/').ok_or_else(|| {
        Refused::bad_request(format!(
            "{parameter} is {value:?}; write NAMESPACE/NAME, such as {parameter}=shop/web"
        ))
    })?;
    let (namespace, name) = (valid_name(parameter, namespace)?, valid_name(parameter, name)?);
    Ok((namespace.to_owned(), name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(query: &str) -> Parameters {
        let uri = format!("http://operator/api?{query}").parse().unwrap();
        let Query(pairs) = Query::try_from_uri(&uri).unwrap();
        Parameters(pairs)
    }

    fn error<T: std::fmt::Debug>(result: Result<T, Refused>) -> String {
        result.unwrap_err().refusal.error
    }

    #[test]
    fn a_window_is_a_number_of_seconds_within_the_history() {
        assert_eq!(parameters("").window(60), Ok(60));
        assert_eq!(parameters("window=10").window(60), Ok(10));
        assert_eq!(parameters("window=21600").window(60), Ok(21_600));
        for wrong in ["9", "21601", "1m", "-60", ""] {
            let message = error(parameters(&format!("window={wrong}")).window(60));
            assert!(message.starts_with("window is") || message.starts_with("parameter window"), "{message}");
        }
    }

    #[test]
    fn a_misspelt_parameter_is_named_with_those_that_exist() {
        let message = error(parameters("widnow=60").only(&["namespace", "window"]));
        assert_eq!(message, "unknown parameter \"widnow\"; there are namespace, window");
        let message = error(parameters("window=60").only(&[]));
        assert_eq!(message, "unknown parameter \"window\"; this path has none");
    }

    #[test]
    fn an_empty_namespace_is_not_all_of_them() {
        assert!(error(parameters("namespace=").name("namespace")).contains("is empty"));
        assert!(error(parameters("namespace=a&namespace=b").name("namespace")).contains("is repeated"));
        assert_eq!(parameters("").name("namespace"), Ok(None));
    }

    #[test]
    fn a_name_that_a_shell_could_run_is_refused() {
        for wrong in ["a;reboot", "$(id)", "Shop", "-n", "a/", "a b", "ä", "a".repeat(254).as_str()] {
            assert!(valid_name("namespace", wrong).is_err(), "{wrong}");
        }
        assert_eq!(valid_name("namespace", "shop-2.a"), Ok("shop-2.a"));
    }

    #[test]
    fn headers_may_be_repeated_and_their_names_are_in_lower_case() {
        let headers = parameters("header=X-User:beta&header=x-time:%2012:30").headers().unwrap();
        let wanted = [("x-user", "beta"), ("x-time", "12:30")];
        assert_eq!(headers, wanted.map(|(name, value)| (name.to_owned(), value.to_owned())));
        assert!(error(parameters("header=beta").headers()).contains("NAME:VALUE"));
    }

    #[test]
    fn a_tap_without_parameters_shows_everything_at_the_usual_rate() {
        let tap = parameters("namespace=shop").tap().unwrap();
        assert_eq!(tap, Tap { rate: 20, filter: Some(TapFilter::default()), ..Tap::default() });
    }

    #[test]
    fn parameters_of_a_tap_become_the_filter_of_the_sidecars() {
        let query = "direction=outbound&peer=shop/db&method=get&path=/a/**&status=5xx&denied=true&slow=200\
                     &header=User-Agent&header=x-id&header=user-agent&rate=100";
        let filter = TapFilter {
            peer_namespace: "shop".into(),
            peer: "db".into(),
            method: "GET".into(),
            path: "/a/**".into(),
            status_from: 500,
            status_to: 599,
            denied: true,
            slow_micros: 200_000,
            direction: Direction::Outbound.into(),
        };
        let headers = vec!["user-agent".to_owned(), "x-id".to_owned()];
        assert_eq!(parameters(query).tap().unwrap(), Tap { id: 0, filter: Some(filter), rate: 100, headers });
        let status = |text: &str| parameters(&format!("status={text}")).status();
        assert_eq!((status("503"), status("2XX")), (Ok((503, 503)), Ok((200, 299))));
    }

    #[test]
    fn what_a_tap_cannot_show_is_refused_with_what_to_write() {
        for (query, wanted) in [
            ("direction=in", "write inbound or outbound"),
            ("peer=web", "write NAMESPACE/NAME"),
            ("method=GET%20/", "write one such as GET"),
            ("path=cart", "not a glob"),
            ("status=6xx", "write one such as 503 or 5xx"),
            ("status=99", "write one such as 503 or 5xx"),
            ("status=xx", "write one such as 503 or 5xx"),
            ("denied=yes", "write denied=true"),
            ("slow=200ms", "write a number from 1 to 3600000"),
            ("slow=0", "write a number from 1 to 3600000"),
            ("rate=101", "write a number from 1 to 100"),
            ("header=a%20b", "not the name of a header"),
            ("header=Authorization", "may hold credentials"),
            ("header=cookie", "may hold credentials"),
            ("header=x-amzn-oidc-jwt", "may hold credentials"),
            ("header=Tulle-Client-Id", "may hold credentials"),
            ("header=a&header=b&header=c&header=d&header=e&header=f&header=g&header=h&header=i", "at most 8"),
        ] {
            let message = error(parameters(query).tap());
            assert!(message.contains(wanted), "{query}: {message}");
        }
    }
}
