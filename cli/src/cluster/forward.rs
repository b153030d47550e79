//! One HTTP request to a port of a pod, through a port-forward of the API server.
//!
//! In: a pod, its port and a request. Out: status and body of the answer, or which part of the way has failed. What that
//! means for the user is said by those who ask.

use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client};
use tokio::io::{AsyncRead, AsyncWrite};

use super::failure::chain;

/// The longest answer that is read.
const LIMIT: usize = 64 << 20;
/// How long a port-forward may take to say why it has ended.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Something to read from and write to.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// A port-forward.
pub struct Tunnel {
    /// The bytes.
    pub stream: Box<dyn Duplex>,
    /// Resolves to the reason when the port-forward is refused, and to `None` when it ends.
    pub refused: BoxFuture<'static, Option<String>>,
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// Its body.
    pub body: Bytes,
}

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// The API server does not open the port-forward.
    #[error("{}", chain(.0))]
    Unopened(kube::Error),
    /// The pod's node or the pod refuses the port-forward, for this reason.
    #[error("{0}")]
    Refused(String),
    /// The connection broke before the answer.
    #[error("the connection broke: {}", chain(.0))]
    Broken(hyper::Error),
    /// The answer is too long, or it ends too early.
    #[error("the answer cannot be read: {0}")]
    Unreadable(Box<dyn std::error::Error + Send + Sync>),
}

/// Opens a port-forward.
///
/// # Errors
/// [`ForwardError::Unopened`], or the port-forward has no stream.
pub async fn open(client: &Client, namespace: &str, pod: &str, port: u16) -> Result<Tunnel, ForwardError> {
    let pods = Api::<Pod>::namespaced(client.clone(), namespace);
    let mut forwarder = pods.portforward(pod, &[port]).await.map_err(ForwardError::Unopened)?;
    let refused = forwarder.take_error(port);
    match (forwarder.take_stream(port), refused) {
        (Some(stream), Some(refused)) => Ok(Tunnel { stream: Box::new(stream), refused: refused.boxed() }),
        _ => Err(ForwardError::Refused("it has no stream for the port".to_owned())),
    }
}

/// Sends a request through a port-forward of its own.
///
/// # Errors
/// [`ForwardError`], except for [`ForwardError::Unopened`].
pub async fn exchange(tunnel: Tunnel, request: Request<Full<Bytes>>) -> Result<Answer, ForwardError> {
    let Tunnel { stream, refused } = tunnel;
    let mut refused = pin!(refused.fuse());
    let answer = tokio::select! {
        biased;
        Some(why) = &mut refused => return Err(ForwardError::Refused(why)),
        answer = send(stream, request) => answer,
    };
    let error = match answer {
        Ok(answer) => return Ok(answer),
        Err(error) => error,
    };
    // A refusal reaches this program after the end of the bytes that it explains.
    match tokio::time::timeout(LAST_WORDS, refused).await {
        Ok(Some(why)) => Err(ForwardError::Refused(why)),
        _ => Err(error),
    }
}

/// One request and its answer.
async fn send(stream: Box<dyn Duplex>, request: Request<Full<Bytes>>) -> Result<Answer, ForwardError> {
    let shaken = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = shaken.map_err(ForwardError::Broken)?;
    // It ends with the sender, which this function owns.
    tokio::spawn(connection);
    let response = sender.send_request(request).await.map_err(ForwardError::Broken)?;
    let status = response.status();
    let body = Limited::new(response.into_body(), LIMIT).collect().await;
    let body = body.map_err(ForwardError::Unreadable)?;
    Ok(Answer { status, body: body.to_bytes() })
}

#[cfg(test)]
mod tests {
    use hyper::header::HOST;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

    use super::*;

    fn request() -> Request<Full<Bytes>> {
        Request::get("/api/v1/health?x=1").header(HOST, "127.0.0.1").body(Full::default()).unwrap()
    }

    async fn head(stream: &mut DuplexStream) -> String {
        let mut read = Vec::new();
        while !read.ends_with(b"\r\n\r\n") {
            read.push(stream.read_u8().await.unwrap());
        }
        String::from_utf8(read).unwrap()
    }

    #[tokio::test]
    async fn a_request_is_sent_over_any_stream_and_its_answer_read() {
        let (ours, mut theirs) = duplex(4096);
        let server = tokio::spawn(async move {
            let head = head(&mut theirs).await;
            theirs.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await.unwrap();
            head
        });
        let tunnel = Tunnel { stream: Box::new(ours), refused: std::future::pending().boxed() };
        let answer = exchange(tunnel, request()).await.unwrap();
        assert_eq!((answer.status, answer.body), (StatusCode::OK, Bytes::from_static(b"{}")));
        assert!(server.await.unwrap().starts_with("GET /api/v1/health?x=1 HTTP/1.1\r\n"));
    }

    #[tokio::test]
    async fn a_refusal_that_comes_after_the_end_of_the_stream_is_the_reason() {
        let (ours, mut theirs) = duplex(4096);
        let (say, said) = tokio::sync::oneshot::channel::<String>();
        tokio::spawn(async move {
            head(&mut theirs).await;
            drop(theirs);
            tokio::task::yield_now().await;
            say.send("connection refused".to_owned())
        });
        let tunnel = Tunnel { stream: Box::new(ours), refused: said.map(Result::ok).boxed() };
        let error = exchange(tunnel, request()).await.unwrap_err();
        assert!(matches!(&error, ForwardError::Refused(why) if why == "connection refused"), "{error}");
    }

    #[tokio::test]
    async fn a_stream_that_ends_without_a_reason_is_a_broken_connection() {
        let (ours, theirs) = duplex(4096);
        drop(theirs);
        let tunnel = Tunnel { stream: Box::new(ours), refused: std::future::ready(None).boxed() };
        let error = exchange(tunnel, request()).await.unwrap_err();
        assert!(matches!(error, ForwardError::Broken(_)), "{error}");
    }
}
