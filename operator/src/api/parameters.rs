//! Parameters of a URL's query, or of a message that asks the same, checked. A refusal says what to write.

use axum::extract::{FromRequestParts, Query};
use axum::http::request::Parts;
use tulle_mesh::query::By;

use super::Refused;

/// The shortest time that can be asked for: that of one slot of the history.
const MIN_WINDOW: u64 = 10;
/// The longest: that of the whole history.
const MAX_WINDOW: u64 = 6 * 3600;

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
}
