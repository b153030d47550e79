//! An application that says who it is and what it was asked, and a client that reads answers whole.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::cluster::{Pod, Port};
use super::{Application, within};

/// An HTTP/1 application; it ends with this value.
pub struct Echo {
    application: Application,
    seen: Arc<AtomicUsize>,
}

impl Echo {
    /// Starts one that answers each request with this name and, behind it, the request.
    pub fn start(pod: &Pod, name: &'static str) -> Self {
        let seen = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&seen);
        let application = Application::start(pod, move |stream| serve(stream, name, Arc::clone(&count)));
        Self { application, seen }
    }

    /// How it is reached.
    pub fn port(&self) -> &Port {
        &self.application.port
    }

    /// Requests that it has read to their end.
    pub fn seen(&self) -> usize {
        self.seen.load(Ordering::SeqCst)
    }
}

async fn serve(mut stream: TcpStream, name: &'static str, seen: Arc<AtomicUsize>) {
    let mut buffer = BytesMut::new();
    while let Some((head, body)) = read_message(&mut stream, &mut buffer).await {
        seen.fetch_add(1, Ordering::SeqCst);
        let text = format!("{name}\n{head}{body}");
        let head = format!("HTTP/1.1 200 OK\r\nx-server: plain\r\ncontent-length: {}\r\n\r\n", text.len());
        if stream.write_all(format!("{head}{text}").as_bytes()).await.is_err() {
            return;
        }
    }
}

/// An answer.
#[derive(Debug)]
pub struct Reply {
    /// Its status.
    pub status: u16,
    /// Its head as it was sent.
    pub head: String,
    /// Its body.
    pub body: String,
}

impl Reply {
    /// The name of the application that has answered.
    pub fn from(&self) -> &str {
        self.body.lines().next().unwrap_or("")
    }

    /// The values of a header, each line one.
    pub fn all(&self, name: &str) -> Vec<&str> {
        values(&self.head, name)
    }

    /// The value of a header of the request, as the application has read it.
    pub fn asked(&self, name: &str) -> Vec<&str> {
        values(&self.body, name)
    }
}

/// Sends a request and reads its answer.
pub async fn ask(stream: &mut TcpStream, request: &str) -> Reply {
    stream.write_all(request.as_bytes()).await.unwrap();
    let (head, body) = within(read_message(stream, &mut BytesMut::new())).await.expect("no answer");
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Reply { status, head, body }
}

/// A request without a body and with these lines.
pub fn get(path: &str, lines: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: shop\r\n{lines}\r\n")
}

fn values<'a>(text: &'a str, name: &str) -> Vec<&'a str> {
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs.filter(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim()).collect()
}

/// Reads a message whose length its head says; without one it has no body. `None`: the connection has ended.
async fn read_message(stream: &mut TcpStream, buffer: &mut BytesMut) -> Option<(String, String)> {
    let end = loop {
        if let Some(at) = buffer.windows(4).position(|four| four == b"\r\n\r\n") {
            break at + 4;
        }
        if !matches!(stream.read_buf(buffer).await, Ok(1..)) {
            return None;
        }
    };
    let head = String::from_utf8(buffer[..end].to_vec()).unwrap();
    buffer.advance(end);
    let length: usize = values(&head, "content-length").first().map_or(0, |text| text.parse().unwrap());
    while buffer.len() < length {
        if !matches!(stream.read_buf(buffer).await, Ok(1..)) {
            return None;
        }
    }
    let body = String::from_utf8(buffer.split_to(length).to_vec()).unwrap();
    Some((head, body))
}
