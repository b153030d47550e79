//! An HTTP/1 client and server, byte by byte.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use httparse::{EMPTY_HEADER, Header, Status};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc::UnboundedSender;

use super::script::{Ending, Script};
use super::{Event, Outcome};

/// An answer after which the connection stays.
pub const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
/// The last answer on its connection.
pub const LAST: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok";
/// A request without a body.
pub const GET: &[u8] = b"GET / HTTP/1.1\r\nhost: shop\r\n\r\n";

/// A request with a body of this length.
pub fn request(method: &str, body: usize) -> Vec<u8> {
    let length =
        if method == "GET" && body == 0 { String::new() } else { format!("content-length: {body}\r\n") };
    let mut bytes = format!("{method} / HTTP/1.1\r\nhost: shop\r\n{length}\r\n").into_bytes();
    bytes.resize(bytes.len() + body, b'x');
    bytes
}

/// Sends a request and reads its answer. `on_head` is called when there is a head.
pub async fn ask(stream: &mut TcpStream, request: &[u8], on_head: impl FnOnce()) -> Outcome {
    let (mut input, mut output) = stream.split();
    // A server may answer, or leave, before it has read everything.
    let sending = async {
        let _ = output.write_all(request).await;
    };
    tokio::join!(read_answer(&mut input, on_head), sending).0
}

/// Reads an answer that has a length, or ends with the connection.
pub async fn read_answer(input: &mut (impl AsyncRead + Unpin), on_head: impl FnOnce()) -> Outcome {
    let mut buffer = BytesMut::new();
    let (status, head, length) = loop {
        let mut lines = [EMPTY_HEADER; 64];
        let mut answer = httparse::Response::new(&mut lines);
        if let Status::Complete(head) = answer.parse(&buffer).expect("an answer that is not HTTP") {
            break (answer.code.unwrap(), head, length_of(answer.headers));
        }
        if !read_some(input, &mut buffer).await {
            return Outcome::Broken;
        }
    };
    on_head();
    buffer.advance(head);
    while length.is_none_or(|length| buffer.len() < length) {
        if !read_some(input, &mut buffer).await {
            return if length.is_none() { Outcome::Whole(status) } else { Outcome::CutShort(status) };
        }
    }
    Outcome::Whole(status)
}

/// Reads one request; returns its first line. `None`: the connection has ended.
pub async fn read_request(stream: &mut TcpStream, buffer: &mut BytesMut) -> Option<String> {
    let (line, head, length) = loop {
        let mut lines = [EMPTY_HEADER; 64];
        let mut request = httparse::Request::new(&mut lines);
        if let Status::Complete(head) = request.parse(buffer).expect("a request that is not HTTP") {
            let line = format!("{} {}", request.method.unwrap(), request.path.unwrap());
            break (line, head, length_of(request.headers).unwrap_or(0));
        }
        if !read_some(stream, buffer).await {
            return None;
        }
    };
    while buffer.len() < head + length {
        if !read_some(stream, buffer).await {
            return None;
        }
    }
    buffer.advance(head + length);
    Some(line)
}

/// Answers every request of a connection.
pub async fn answer_all(mut stream: TcpStream) {
    let mut buffer = BytesMut::new();
    while read_request(&mut stream, &mut buffer).await.is_some() {
        if stream.write_all(OK).await.is_err() {
            return;
        }
    }
}

/// Answers the first request of a connection, and closes it.
pub async fn answer_one(mut stream: TcpStream) {
    if read_request(&mut stream, &mut BytesMut::new()).await.is_some() {
        let _ = stream.write_all(LAST).await;
    }
}

/// Answers nothing, and reports that a request has come, and then that its client has given it up.
pub async fn hold(mut stream: TcpStream, events: UnboundedSender<Event>) {
    if read_request(&mut stream, &mut BytesMut::new()).await.is_some() {
        let _ = events.send(Event::Begun);
        while matches!(stream.read(&mut [0; 64]).await, Ok(1..)) {}
        let _ = events.send(Event::GivenUp);
    }
}

/// Serves a connection as the script says.
pub async fn serve(mut stream: TcpStream, script: Arc<Script>) {
    let mut buffer = BytesMut::new();
    let mut kept = false;
    // Nothing is taken off the connection before it is known how the request ends.
    while matches!(stream.peek(&mut [0]).await, Ok(1)) {
        let ending = script.next(kept);
        match ending {
            Ending::ClosesUnread => return,
            Ending::EndsUnread => {
                let _ = stream.shutdown().await;
                tokio::time::sleep(Duration::from_millis(5)).await;
                return;
            }
            Ending::ResetsHalfRead => {
                let _ = stream.read_exact(&mut [0; 8]).await;
                let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
                return;
            }
            _ => {}
        }
        if read_request(&mut stream, &mut buffer).await.is_none() {
            return;
        }
        script.read_whole();
        match ending {
            Ending::Answers => {
                if stream.write_all(OK).await.is_err() {
                    return;
                }
            }
            Ending::ClosesRead => return,
            Ending::ResetsRead => {
                let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
                return;
            }
            Ending::HalfHead => {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-le").await;
                return;
            }
            Ending::HalfAnswer => {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf.").await;
                script.head_arrived.notified().await;
                return;
            }
            other => panic!("{other:?} is not an ending of HTTP/1"),
        }
        kept = true;
    }
}

fn length_of(lines: &[Header<'_>]) -> Option<usize> {
    let line = lines.iter().find(|line| line.name.eq_ignore_ascii_case("content-length"))?;
    Some(std::str::from_utf8(line.value).unwrap().parse().unwrap())
}

/// Whether there was something to read.
async fn read_some(input: &mut (impl AsyncRead + Unpin), buffer: &mut BytesMut) -> bool {
    matches!(input.read_buf(buffer).await, Ok(1..))
}
