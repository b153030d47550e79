//! The operator's query API: HTTP/1 over a port-forward.

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode};
use kube::Client;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tulle_mesh::{ports, query};

pub use super::forward::Tunnel;
use super::forward::{self, Answer, Begun, ForwardError};
use super::{Located, failure, within};
use crate::exit::CliError;

/// The query API of one replica of the operator.
pub struct Operator {
    client: Client,
    at: Located,
    token: String,
}

/// What becomes of the question for a stream.
pub enum Opened {
    /// The stream.
    Lines(Lines),
    /// The operator has answered, and why it refuses.
    Refused(CliError),
}

/// An answer of the operator that comes line by line.
pub struct Lines {
    lines: forward::Lines,
    at: Located,
}

impl Lines {
    /// The next line, without its end. `None`: the answer has ended.
    ///
    /// # Errors
    /// The connection broke, or the line is too long.
    pub async fn next(&mut self) -> Result<Option<Bytes>, CliError> {
        self.lines.next().await.map_err(|error| unanswered(error, &self.at))
    }
}

/// Opens a port-forward to the query API of a replica.
///
/// # Errors
/// The API server does not open it.
pub async fn tunnel(client: &Client, at: &Located) -> Result<Tunnel, CliError> {
    let opened = forward::open(client, &at.namespace, &at.pod, ports::QUERY).await;
    opened.map_err(|error| unanswered(error, at))
}

impl Operator {
    /// The API of a replica, which takes the token.
    pub fn new(client: Client, at: Located, token: String) -> Self {
        Self { client, at, token }
    }

    /// The replica.
    pub fn at(&self) -> &Located {
        &self.at
    }

    /// Asks: `path` is one of [`query::Paths`].
    ///
    /// # Errors
    /// The operator cannot be reached, or refuses.
    pub async fn get<T: DeserializeOwned>(
        &self,
        path: &str,
        parameters: &[(&str, &str)],
    ) -> Result<T, CliError> {
        self.ask(Method::GET, &target(path, parameters), Bytes::new()).await
    }

    /// Asks with a body.
    ///
    /// # Errors
    /// As [`Operator::get`]; or the body has no JSON form.
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        parameters: &[(&str, &str)],
        body: &impl Serialize,
    ) -> Result<T, CliError> {
        let body = serde_json::to_vec(body);
        let body =
            body.map_err(|error| CliError::failed(format!("the request has no JSON form: {error}")))?;
        self.ask(Method::POST, &target(path, parameters), Bytes::from(body)).await
    }

    /// Asks for an answer that comes line by line, and does not end by itself.
    ///
    /// # Errors
    /// The operator cannot be reached.
    pub async fn lines(&self, path: &str, parameters: &[(&str, &str)]) -> Result<Opened, CliError> {
        let target = target(path, parameters);
        let request = self.request(Method::GET, &target, Bytes::new())?;
        let begun = async {
            let tunnel = tunnel(&self.client, &self.at).await?;
            forward::begin(tunnel, request).await.map_err(|error| unanswered(error, &self.at))
        };
        Ok(match within("asking the operator", begun).await? {
            Begun::Lines(lines) => Opened::Lines(Lines { lines, at: self.at.clone() }),
            Begun::Answer(answer) => Opened::Refused(refused(&answer, &target)),
        })
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        target: &str,
        body: Bytes,
    ) -> Result<T, CliError> {
        let request = self.request(method, target, body)?;
        let answer = within("asking the operator", self.exchange(request)).await?;
        read(&answer, target)
    }

    fn request(&self, method: Method, target: &str, body: Bytes) -> Result<Request<Full<Bytes>>, CliError> {
        let request = Request::builder()
            .method(method)
            .uri(target)
            .header(HOST, format!("127.0.0.1:{}", ports::QUERY))
            .header(AUTHORIZATION, format!("Bearer {}", self.token))
            .header(ACCEPT, "application/json")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(body));
        request.map_err(|error| CliError::failed(format!("invalid request: {error}")))
    }

    /// Sends a request through a port-forward of its own.
    async fn exchange(&self, request: Request<Full<Bytes>>) -> Result<Answer, CliError> {
        let tunnel = tunnel(&self.client, &self.at).await?;
        forward::exchange(tunnel, request).await.map_err(|error| unanswered(error, &self.at))
    }
}

/// What it means that a replica gave no answer.
fn unanswered(error: ForwardError, at: &Located) -> CliError {
    let another = "try again: another replica of the operator takes over within seconds";
    match error {
        ForwardError::Unopened(error) => failure::of_forward(&error, &at.namespace, &at.pod, another),
        ForwardError::Refused(why) => failure::refusal(at, &why),
        ForwardError::Broken(error) => {
            let what = format!("the connection to the operator broke: {}", failure::chain(&error));
            CliError::failed(what).hint(another)
        }
        ForwardError::Unreadable(error) => {
            CliError::failed(format!("the operator's answer cannot be read: {error}")).hint(another)
        }
    }
}

/// Path and parameters of a URL.
fn target(path: &str, parameters: &[(&str, &str)]) -> String {
    if parameters.is_empty() {
        return path.to_owned();
    }
    let mut encoded = form_urlencoded::Serializer::new(String::new());
    encoded.extend_pairs(parameters.iter().copied());
    format!("{path}?{}", encoded.finish())
}

/// Reads an answer, or why there is none.
fn read<T: DeserializeOwned>(answer: &Answer, target: &str) -> Result<T, CliError> {
    if answer.status == StatusCode::OK {
        return serde_json::from_slice(&answer.body).map_err(|error| {
            let what = format!("the operator's answer to {target} is not what this program reads: {error}");
            CliError::failed(what).hint("`tulle version` shows both versions")
        });
    }
    Err(refused(answer, target))
}

/// The error of an answer that is not 200.
fn refused(answer: &Answer, target: &str) -> CliError {
    match serde_json::from_slice::<query::Refusal>(&answer.body) {
        Ok(query::Refusal { error, hint: Some(hint) }) => CliError::failed(error).hint(hint),
        Ok(query::Refusal { error, hint: None }) => CliError::failed(error),
        Err(_) if answer.status == StatusCode::NOT_FOUND => {
            let what = format!("the operator does not know {target}: it is older than this program");
            CliError::failed(what).hint("tulle upgrade")
        }
        Err(_) => CliError::failed(format!("the operator answers {} to {target}", answer.status)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: StatusCode, body: &'static str) -> Answer {
        Answer { status, body: Bytes::from_static(body.as_bytes()) }
    }

    fn refusal(status: StatusCode, body: &'static str) -> CliError {
        read::<query::Stat>(&answer(status, body), "/api/v1/stat").unwrap_err()
    }

    #[test]
    fn parameters_are_encoded_and_may_be_repeated() {
        assert_eq!(target("/api/v1/health", &[]), "/api/v1/health");
        let parameters = [("path", "/a b?c=d&e"), ("header", "x:1"), ("header", "y:2")];
        let expected = "/api/v1/explain?path=%2Fa+b%3Fc%3Dd%26e&header=x%3A1&header=y%3A2";
        assert_eq!(target("/api/v1/explain", &parameters), expected);
    }

    #[test]
    fn an_answer_is_read_and_unknown_fields_are_ignored() {
        let answer = answer(StatusCode::OK, r#"{"window":60,"lost":2,"rows":[],"new":true}"#);
        let stat: query::Stat = read(&answer, "/api/v1/stat").unwrap();
        assert_eq!((stat.window, stat.lost), (60, 2));
    }

    #[test]
    fn a_refusal_is_passed_on_with_its_hint() {
        let body = r#"{"error":"namespace shop is not yours","hint":"add this rule"}"#;
        let expected = CliError::failed("namespace shop is not yours").hint("add this rule");
        assert_eq!(refusal(StatusCode::FORBIDDEN, body), expected);
        assert_eq!(refusal(StatusCode::BAD_REQUEST, r#"{"error":"no"}"#), CliError::failed("no"));
    }

    #[test]
    fn an_operator_that_does_not_know_the_question_is_older() {
        assert!(refusal(StatusCode::NOT_FOUND, "").to_string().contains("older than this program"));
        assert!(refusal(StatusCode::BAD_GATEWAY, "<html>").to_string().contains("answers 502"));
        assert!(refusal(StatusCode::OK, "<html>").to_string().contains("not what this program reads"));
    }
}
