//! The operator's query API: HTTP/1 over a port-forward.

use std::pin::pin;

use bytes::{Bytes, BytesMut};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tulle_mesh::{ports, query};

use super::{Located, failure, within};
use crate::exit::CliError;

/// The longest answer that is read.
const LIMIT: usize = 64 << 20;
/// The longest line of a stream.
const MAX_LINE: usize = 1 << 20;
/// How long a port-forward may take to say why it has ended.
const LAST_WORDS: std::time::Duration = std::time::Duration::from_millis(500);

/// The query API of one replica of the operator.
pub struct Operator {
    client: Client,
    at: Located,
    token: String,
}

/// An answer of the API.
struct Answer {
    status: StatusCode,
    body: Bytes,
}

/// What becomes of the question for a stream.
pub enum Opened {
    /// The stream.
    Lines(Lines),
    /// The operator has answered, and why it refuses.
    Refused(CliError),
}

/// What an answer begins with.
enum Begun {
    Lines(Lines),
    Answer(Answer),
}

/// An answer that comes line by line.
pub struct Lines {
    body: Incoming,
    /// What has been read of the next lines.
    read: BytesMut,
    /// The connection ends with it.
    _sender: SendRequest<Full<Bytes>>,
}

impl Lines {
    /// The next line, without its end. `None`: the answer has ended.
    ///
    /// # Errors
    /// The connection broke, or the line is too long.
    pub async fn next(&mut self) -> Result<Option<Bytes>, CliError> {
        loop {
            if let Some(end) = self.read.iter().position(|byte| *byte == b'\n') {
                let mut line = self.read.split_to(end + 1);
                line.truncate(end);
                return Ok(Some(line.freeze()));
            }
            if self.read.len() > MAX_LINE {
                return Err(CliError::failed("the operator's answer has a line that is too long"));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.read.extend_from_slice(&data);
                    }
                }
                Some(Err(error)) => return Err(broken(&error)),
            }
        }
    }
}

/// Something to read from and write to.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// A port-forward to the query API.
pub struct Tunnel {
    /// The bytes.
    pub stream: Box<dyn Duplex>,
    /// Resolves to the reason when the port-forward is refused, and to `None` when it ends.
    pub refused: BoxFuture<'static, Option<String>>,
}

/// Opens a port-forward to the query API of a replica.
///
/// # Errors
/// The API server does not open it.
pub async fn tunnel(client: &Client, at: &Located) -> Result<Tunnel, CliError> {
    let pods = Api::<Pod>::namespaced(client.clone(), &at.namespace);
    let opened = pods.portforward(&at.pod, &[ports::QUERY]).await;
    let mut forwarder = opened.map_err(|error| failure::of_forward(&error, at))?;
    let refused = forwarder.take_error(ports::QUERY);
    match (forwarder.take_stream(ports::QUERY), refused) {
        (Some(stream), Some(refused)) => Ok(Tunnel { stream: Box::new(stream), refused: refused.boxed() }),
        _ => Err(failure::refusal(at, "it has no stream for the port")),
    }
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
        let begun = self.exchange(|stream| begin(stream, request));
        Ok(match within("asking the operator", begun).await? {
            Begun::Lines(lines) => Opened::Lines(lines),
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
        let answer = within("asking the operator", self.exchange(|stream| send(stream, request))).await?;
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

    /// Sends something through a port-forward of its own, and waits for what comes back.
    async fn exchange<T, F>(&self, send: impl FnOnce(Box<dyn Duplex>) -> F) -> Result<T, CliError>
    where
        F: Future<Output = Result<T, CliError>>,
    {
        let Tunnel { stream, refused } = tunnel(&self.client, &self.at).await?;
        let mut refused = pin!(refused.fuse());
        let answer = tokio::select! {
            biased;
            Some(why) = &mut refused => return Err(failure::refusal(&self.at, &why)),
            answer = send(stream) => answer,
        };
        let error = match answer {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        // A refusal reaches this program after the end of the bytes that it explains.
        match tokio::time::timeout(LAST_WORDS, refused).await {
            Ok(Some(why)) => Err(failure::refusal(&self.at, &why)),
            _ => Err(error),
        }
    }
}

fn broken(error: &hyper::Error) -> CliError {
    let what = format!("the connection to the operator broke: {}", failure::chain(error));
    CliError::failed(what).hint("try again: another replica of the operator takes over within seconds")
}

/// One request and the head of its answer. The connection ends with the sender.
async fn head(
    stream: Box<dyn Duplex>,
    request: Request<Full<Bytes>>,
) -> Result<(Response<Incoming>, SendRequest<Full<Bytes>>), CliError> {
    let connected = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = connected.map_err(|error| broken(&error))?;
    tokio::spawn(connection);
    let response = sender.send_request(request).await.map_err(|error| broken(&error))?;
    Ok((response, sender))
}

/// One request and its answer.
async fn send(stream: Box<dyn Duplex>, request: Request<Full<Bytes>>) -> Result<Answer, CliError> {
    let (response, _sender) = head(stream, request).await?;
    answer(response).await
}

/// One request, and the lines that it is answered with.
async fn begin(stream: Box<dyn Duplex>, request: Request<Full<Bytes>>) -> Result<Begun, CliError> {
    let (response, sender) = head(stream, request).await?;
    if response.status() != StatusCode::OK {
        return answer(response).await.map(Begun::Answer);
    }
    Ok(Begun::Lines(Lines { body: response.into_body(), read: BytesMut::new(), _sender: sender }))
}

/// Reads an answer to its end.
async fn answer(response: Response<Incoming>) -> Result<Answer, CliError> {
    let status = response.status();
    let body = Limited::new(response.into_body(), LIMIT).collect().await;
    let body =
        body.map_err(|error| CliError::failed(format!("the operator's answer cannot be read: {error}")))?;
    Ok(Answer { status, body: body.to_bytes() })
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

/// Why there is no answer.
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

    #[tokio::test]
    async fn a_request_is_sent_over_any_stream_and_its_answer_read() {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let (ours, mut theirs) = tokio::io::duplex(4096);
        let server = tokio::spawn(async move {
            let mut read = Vec::new();
            while !read.ends_with(b"\r\n\r\n") {
                read.push(theirs.read_u8().await.unwrap());
            }
            theirs.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await.unwrap();
            String::from_utf8(read).unwrap()
        });
        let request =
            Request::get("/api/v1/health?x=1").header(HOST, "127.0.0.1").body(Full::default()).unwrap();
        let answer = send(Box::new(ours), request).await.unwrap();
        assert_eq!((answer.status, answer.body), (StatusCode::OK, Bytes::from_static(b"{}")));
        assert!(server.await.unwrap().starts_with("GET /api/v1/health?x=1 HTTP/1.1\r\n"));
    }

    #[tokio::test]
    async fn lines_are_read_as_they_come_whatever_the_bytes_come_in() {
        use tokio::io::AsyncWriteExt as _;
        let (ours, mut theirs) = tokio::io::duplex(4096);
        let request = Request::get("/api/v1/tap").header(HOST, "127.0.0.1").body(Full::default()).unwrap();
        let opened = tokio::spawn(begin(Box::new(ours), request));
        theirs.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await.unwrap();
        let Begun::Lines(mut lines) = opened.await.unwrap().unwrap() else { panic!("no lines") };
        theirs.write_all(b"6\r\none\ntw\r\n").await.unwrap();
        assert_eq!(lines.next().await, Ok(Some(Bytes::from_static(b"one"))));
        theirs.write_all(b"8\r\no\nthree\n\r\n0\r\n\r\n").await.unwrap();
        assert_eq!(lines.next().await, Ok(Some(Bytes::from_static(b"two"))));
        assert_eq!(lines.next().await, Ok(Some(Bytes::from_static(b"three"))));
        assert_eq!(lines.next().await, Ok(None));
    }

    #[tokio::test]
    async fn a_stream_that_is_refused_has_the_operators_words() {
        use tokio::io::AsyncWriteExt as _;
        let (ours, mut theirs) = tokio::io::duplex(4096);
        let request = Request::get("/api/v1/tap").header(HOST, "127.0.0.1").body(Full::default()).unwrap();
        let opened = tokio::spawn(begin(Box::new(ours), request));
        let answer = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 14\r\n\r\n{\"error\":\"no\"}";
        theirs.write_all(answer).await.unwrap();
        let Begun::Answer(answer) = opened.await.unwrap().unwrap() else { panic!("no answer") };
        assert_eq!(refused(&answer, "/api/v1/tap"), CliError::failed("no"));
    }
}
