//! HTTP servers of the sidecar itself: the admin port and the probes, on a thread of their own.
//!
//! In: connections from anybody who reaches the pod. Out: one answer each. Strangers can neither keep descriptors nor
//! keep kubelet out: a connection carries one request, its head has ten seconds, and beyond [`CONNECTIONS`] the oldest
//! one is ended, first among those that have not sent a request.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::task::AbortHandle;
use tokio::time::timeout;

/// Connections at once, per port. Kubelet and Prometheus need a handful.
const CONNECTIONS: usize = 128;
/// How long the head of a request may take.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection may last besides the time that its answer takes.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// Who sends a request: an extension of it.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub SocketAddr);

/// Answers requests for as long as the sidecar runs; each connection for at most `limit`.
pub async fn http<A, F>(listener: TcpListener, limit: Duration, answer: A)
where
    A: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
    F: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    let mut open = Open::default();
    loop {
        let Ok((stream, peer)) = listener.accept().await else {
            // Out of file descriptors, say: waiting a little lets others close.
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let answer = answer.clone();
        let asked = Arc::new(AtomicBool::new(false));
        let asks = Arc::clone(&asked);
        let task = tokio::spawn(async move {
            let service = service_fn(move |mut request: Request<Incoming>| {
                asks.store(true, Ordering::Relaxed);
                request.extensions_mut().insert(Peer(peer));
                let answer = answer(request);
                async move { Ok::<_, Infallible>(answer.await) }
            });
            let mut server = http1::Builder::new();
            // Kubelet asks for it anyway, and Prometheus connects again.
            server.keep_alive(false).timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
            let _ = timeout(limit, server.serve_connection(TokioIo::new(stream), service)).await;
        });
        open.add(Connection { task: task.abort_handle(), asked });
    }
}

/// A connection that is open.
struct Connection {
    task: AbortHandle,
    /// It has sent a request: kubelet waits for the answer, which takes as long as the application's.
    asked: Arc<AtomicBool>,
}

/// The connections that are open, the oldest first.
#[derive(Default)]
struct Open(VecDeque<Connection>);

impl Open {
    /// Takes one more; beyond the limit the oldest is ended, of those without a request if there are any. Kubelet sends
    /// its request at once, so the oldest of those is a stranger's.
    fn add(&mut self, connection: Connection) {
        if self.0.len() >= CONNECTIONS {
            self.0.retain(|open| !open.task.is_finished());
        }
        if self.0.len() >= CONNECTIONS {
            let idle = self.0.iter().position(|open| !open.asked.load(Ordering::Relaxed));
            if let Some(oldest) = self.0.remove(idle.unwrap_or(0)) {
                oldest.task.abort();
            }
        }
        self.0.push_back(connection);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;

    async fn server() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(http(listener, IDLE_TIMEOUT, |_| async { Response::new(Full::new("here".into())) }));
        address
    }

    async fn get(address: SocketAddr) -> String {
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn strangers_who_hold_all_connections_do_not_keep_others_out() {
        let address = server().await;
        let mut strangers = Vec::new();
        for _ in 0..CONNECTIONS + 10 {
            strangers.push(TcpStream::connect(address).await.unwrap());
        }
        for _ in 0..20 {
            assert!(get(address).await.ends_with("here"));
        }
        let mut byte = [0];
        let first = timeout(Duration::from_secs(5), strangers[0].read(&mut byte)).await.unwrap();
        assert!(matches!(first, Ok(0) | Err(_)), "the oldest was ended");
    }

    #[tokio::test]
    async fn a_request_that_takes_long_is_answered_however_many_strangers_come() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(http(listener, IDLE_TIMEOUT, |_| async {
            tokio::time::sleep(Duration::from_millis(500)).await;
            Response::new(Full::new("here".into()))
        }));
        let probe = tokio::spawn(get(address));
        tokio::time::sleep(Duration::from_millis(100)).await;
        let mut strangers = Vec::new();
        for _ in 0..CONNECTIONS + 10 {
            strangers.push(TcpStream::connect(address).await.unwrap());
        }
        assert!(probe.await.unwrap().ends_with("here"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_sends_no_head_is_closed_after_ten_seconds() {
        let address = server().await;
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(b"GET / HT").await.unwrap();
        let before = tokio::time::Instant::now();
        let mut rest = Vec::new();
        let _ = client.read_to_end(&mut rest).await;
        let took = before.elapsed();
        assert!(took >= HEAD_TIMEOUT && took < 2 * HEAD_TIMEOUT, "{took:?}");
    }
}
