//! One HTTP request to a port of a pod, through a port-forward of the API server.
//!
//! In: a pod, its port and a request. Out: status and body of the answer, or its lines as they come, or which part of the way has failed. What that
//! means for the user is said by those who ask.

use std::pin::pin;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client};
use tokio::io::{AsyncRead, AsyncWrite};

use super::failure::chain;

/// The longest answer that is read.
const LIMIT: usize = 64 << 20;
/// The longest line of an answer that comes line by line.
const MAX_LINE: usize = 1 << 20;
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

/// What an answer begins with.
pub enum Begun {
    /// It is good, and comes line by line.
    Lines(Lines),
    /// It is another one.
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
    pub async fn next(&mut self) -> Result<Option<Bytes>, ForwardError> {
        loop {
            if let Some(end) = self.read.iter().position(|byte| *byte == b'\n') {
                let mut line = self.read.split_to(end + 1);
                line.truncate(end);
                return Ok(Some(line.freeze()));
            }
            if self.read.len() > MAX_LINE {
                return Err(ForwardError::Unreadable("it has a line that is too long".into()));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.read.extend_from_slice(&data);
                    }
                }
                Some(Err(error)) => return Err(ForwardError::Broken(error)),
            }
        }
    }
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

/// Sends a request through a port-forward of its own, and reads the whole answer.
///
/// # Errors
/// [`ForwardError`], except for [`ForwardError::Unopened`].
pub async fn exchange(tunnel: Tunnel, request: Request<Full<Bytes>>) -> Result<Answer, ForwardError> {
    through(tunnel, |stream| async {
        let (response, _sender) = head(stream, request).await?;
        read(response).await
    })
    .await
}

/// Sends a request through a port-forward of its own, whose answer comes line by line if it is good.
///
/// # Errors
/// As [`exchange`].
pub async fn begin(tunnel: Tunnel, request: Request<Full<Bytes>>) -> Result<Begun, ForwardError> {
    through(tunnel, |stream| async {
        let (response, sender) = head(stream, request).await?;
        if response.status() != StatusCode::OK {
            return read(response).await.map(Begun::Answer);
        }
        Ok(Begun::Lines(Lines { body: response.into_body(), read: BytesMut::new(), _sender: sender }))
    })
    .await
}

async fn through<T, F>(
    Tunnel { stream, refused }: Tunnel,
    send: impl FnOnce(Box<dyn Duplex>) -> F,
) -> Result<T, ForwardError>
where
    F: Future<Output = Result<T, ForwardError>>,
{
    let mut refused = pin!(refused.fuse());
    let answer = tokio::select! {
        biased;
        Some(why) = &mut refused => return Err(ForwardError::Refused(why)),
        answer = send(stream) => answer,
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

/// One request and the head of its answer. The connection ends with the sender.
async fn head(
    stream: Box<dyn Duplex>,
    request: Request<Full<Bytes>>,
) -> Result<(Response<Incoming>, SendRequest<Full<Bytes>>), ForwardError> {
    let shaken = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = shaken.map_err(ForwardError::Broken)?;
    tokio::spawn(connection);
    let response = sender.send_request(request).await.map_err(ForwardError::Broken)?;
    Ok((response, sender))
}

/// Reads an answer to its end.
async fn read(response: Response<Incoming>) -> Result<Answer, ForwardError> {
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
