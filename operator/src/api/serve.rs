//! The listeners of the query API, and what a connection may take: a client that sends nothing, sends without end, or comes
//! a thousand times must not reach what sidecars need.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use axum::Router;
use futures::future::join_all;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use super::{Api, routes};

/// How long the head of a request may take, from the end of the request before it.
const HEAD_WITHIN: Duration = Duration::from_secs(10);
/// What is buffered of a connection, in bytes: the longest head.
const MAX_BUFFER: usize = 64 * 1024;
/// Connections at a time, of all listeners together. Others wait in the backlog.
const MAX_CONNECTIONS: usize = 128;

/// Listens on the loopback addresses. The pod may have one of the two families only.
///
/// # Errors
/// The port is taken on both.
pub async fn bind(port: u16) -> Result<Vec<TcpListener>> {
    let mut listeners = Vec::new();
    let mut failure = None;
    for address in [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)] {
        match TcpListener::bind((address, port)).await {
            Ok(listener) => listeners.push(listener),
            Err(error) => {
                tracing::warn!(%address, port, %error, "cannot listen for queries on this address");
                failure = Some(error);
            }
        }
    }
    match failure {
        Some(error) if listeners.is_empty() => {
            Err(error).with_context(|| format!("cannot listen on port {port} of the loopback addresses"))
        }
        _ => Ok(listeners),
    }
}

/// Serves the API on these listeners. Does not end.
pub async fn serve(listeners: Vec<TcpListener>, api: Api) {
    let routes = routes(api);
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let accept = |listener| accept(listener, routes.clone(), Arc::clone(&connections));
    join_all(listeners.into_iter().map(accept)).await;
}

async fn accept(listener: TcpListener, routes: Router, connections: Arc<Semaphore>) {
    // The semaphore is never closed.
    while let Ok(place) = Arc::clone(&connections).acquire_owned().await {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of file descriptors, say: waiting a little lets others close.
                tracing::warn!(%error, "cannot accept a connection for queries");
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
        };
        let routes = routes.clone();
        tokio::spawn(async move {
            let _place = place;
            if let Err(error) = connection(stream, routes).await {
                tracing::debug!(%error, "a connection for queries ended");
            }
        });
    }
}

async fn connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    routes: Router,
) -> Result<(), hyper::Error> {
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(HEAD_WITHIN).max_buf_size(MAX_BUFFER);
    server.serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes)).await
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::api::tests::api;

    #[tokio::test]
    async fn a_head_that_is_too_long_is_refused_before_it_ends() {
        let (mut client, server) = tokio::io::duplex(16 * 1024);
        let served = tokio::spawn(connection(server, routes(api())));
        let (mut answer, mut head) = (Vec::new(), b"GET /api/v1/health HTTP/1.1\r\nx: ".to_vec());
        head.resize(4 * MAX_BUFFER, b'a');
        let (mut reader, mut writer) = tokio::io::split(&mut client);
        // It does not end: without a limit, the server would wait for more.
        let write = async { writer.write_all(&head).await };
        let (_, read) = tokio::join!(write, reader.read_to_end(&mut answer));
        read.unwrap();
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
        assert!(served.await.unwrap().is_err());
    }

    #[tokio::test]
    async fn a_request_is_answered_on_its_connection() {
        let (mut client, server) = tokio::io::duplex(16 * 1024);
        tokio::spawn(connection(server, routes(api())));
        client.write_all(b"GET /api/v1/health HTTP/1.1\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 401 "), "{answer}");
    }
}
