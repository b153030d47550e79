//! An HTTP/2 client, and a server of frames: it can do what servers should not.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use h2::client::SendRequest;
use http::Request;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc::UnboundedSender;
use tokio::task::JoinHandle;

use super::script::{Ending, Script};
use super::{Event, Outcome};

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
/// On DATA and HEADERS; on SETTINGS and PING it is the acknowledgement.
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;
const INTERNAL_ERROR: u32 = 2;
const REFUSED_STREAM: u32 = 7;
/// `:status: 200` (RFC 7541, appendix A).
const STATUS_200: &[u8] = &[0x88];
/// What every connection begins with (RFC 9113 §3.4).
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A client's connection; it ends with this value.
pub struct Client {
    send: SendRequest<Bytes>,
    driving: JoinHandle<()>,
}

impl Client {
    /// Begins to speak HTTP/2.
    pub async fn new(stream: TcpStream) -> Self {
        let (send, connection) = h2::client::handshake(stream).await.unwrap();
        let driving = tokio::spawn(async move {
            let _ = connection.await;
        });
        Self { send, driving }
    }

    /// Another user of the same connection.
    pub fn send(&self) -> SendRequest<Bytes> {
        self.send.clone()
    }

    /// Sends a request and reads its answer. `on_head` is called when there is a head.
    pub async fn ask(&self, method: &str, body: usize, on_head: impl FnOnce()) -> Outcome {
        let Ok(mut send) = self.send().ready().await else { return Outcome::Broken };
        let Ok((answer, mut upload)) = send.send_request(request(method), body == 0) else {
            return Outcome::Broken;
        };
        if body > 0 {
            // A server may have answered, or left, before.
            let _ = upload.send_data(vec![b'x'; body].into(), true);
        }
        let Ok(answer) = answer.await else { return Outcome::Broken };
        on_head();
        let status = answer.status().as_u16();
        let mut download = answer.into_body();
        while let Some(piece) = download.data().await {
            let Ok(piece) = piece else { return Outcome::CutShort(status) };
            let _ = download.flow_control().release_capacity(piece.len());
        }
        match download.trailers().await {
            Ok(_) => Outcome::Whole(status),
            Err(_) => Outcome::CutShort(status),
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.driving.abort();
    }
}

/// A request without anything special.
pub fn request(method: &str) -> Request<()> {
    Request::builder().method(method).uri("http://shop/").body(()).unwrap()
}

/// One frame.
pub struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
}

/// Reads a frame; its payload is of no interest. `None`: the connection has ended.
pub async fn read_frame(stream: &mut TcpStream) -> Option<Frame> {
    let mut head = [0; 9];
    stream.read_exact(&mut head).await.ok()?;
    let [l0, l1, l2, kind, flags, s0, s1, s2, s3] = head;
    let mut payload = vec![0; u32::from_be_bytes([0, l0, l1, l2]) as usize];
    stream.read_exact(&mut payload).await.ok()?;
    if kind == PING && flags & ACK == 0 {
        write_frame(stream, PING, ACK, 0, &payload).await?;
    }
    if kind == SETTINGS && flags & ACK == 0 {
        write_frame(stream, SETTINGS, ACK, 0, &[]).await?;
    }
    Some(Frame { kind, flags, stream: u32::from_be_bytes([s0, s1, s2, s3]) })
}

async fn write_frame(stream: &mut TcpStream, kind: u8, flags: u8, id: u32, payload: &[u8]) -> Option<()> {
    let [_, l0, l1, l2] = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = vec![l0, l1, l2, kind, flags];
    frame.extend_from_slice(&id.to_be_bytes());
    frame.extend_from_slice(payload);
    stream.write_all(&frame).await.ok()
}

/// Grants the peer so much, on every stream and on the connection, that it never waits.
pub async fn grant_everything(stream: &mut TcpStream) -> Option<()> {
    const GRANT: u32 = 1 << 30;
    let [g0, g1, g2, g3] = GRANT.to_be_bytes();
    // SETTINGS_INITIAL_WINDOW_SIZE
    write_frame(stream, SETTINGS, 0, 0, &[0, 4, g0, g1, g2, g3]).await?;
    write_frame(stream, WINDOW_UPDATE, 0, 0, &[g0, g1, g2, g3]).await
}

/// Opens a stream with `GET http://shop/`, in HPACK's static table and literals (RFC 7541 §6).
pub async fn write_get(stream: &mut TcpStream, id: u32) -> Option<()> {
    // :method GET, :scheme http, :path /, and a literal :authority.
    let block = [0x82, 0x86, 0x84, 0x01, 4, b's', b'h', b'o', b'p'];
    write_frame(stream, HEADERS, END_HEADERS | END_STREAM, id, &block).await
}

/// Answers nothing, and reports what happens to each request, and that the connection has ended.
pub async fn hold(mut stream: TcpStream, events: UnboundedSender<Event>) {
    let report = |event| {
        // A test that has ended does not listen.
        let _ = events.send(event);
    };
    if begin(&mut stream).await.is_some() {
        while let Some(frame) = read_frame(&mut stream).await {
            match frame.kind {
                HEADERS => report(Event::Begun),
                RST_STREAM => report(Event::GivenUp),
                _ => {}
            }
        }
    }
    report(Event::GivenUp);
}

/// Sends settings without waiting for the client's preface, as gRPC-Go does.
async fn begin(stream: &mut TcpStream) -> Option<()> {
    grant_everything(stream).await?;
    let mut preface = [0; PREFACE.len()];
    stream.read_exact(&mut preface).await.ok()?;
    assert_eq!(preface, PREFACE);
    Some(())
}

/// Serves a connection as the script says.
pub async fn serve(mut stream: TcpStream, script: Arc<Script>) {
    // A connection that breaks off is the end of it.
    let _ = serve_streams(&mut stream, &script).await;
}

async fn serve_streams(stream: &mut TcpStream, script: &Script) -> Option<()> {
    begin(stream).await?;
    let mut open = HashMap::new();
    let mut last = 0;
    loop {
        let frame = read_frame(stream).await?;
        if frame.kind == HEADERS {
            let ending = script.next(last > 0);
            match ending {
                Ending::RefusesStream => {
                    write_frame(stream, RST_STREAM, 0, frame.stream, &REFUSED_STREAM.to_be_bytes()).await?;
                    continue;
                }
                Ending::GoesAway => {
                    let [a, b, c, d] = u32::to_be_bytes(last);
                    write_frame(stream, GOAWAY, 0, 0, &[a, b, c, d, 0, 0, 0, 0]).await?;
                    // Closed with bytes unread it would be a reset.
                    while read_frame(stream).await.is_some() {}
                    return None;
                }
                _ => {}
            }
            last = frame.stream;
            open.insert(frame.stream, ending);
        }
        let ends = matches!(frame.kind, HEADERS | DATA) && frame.flags & END_STREAM != 0;
        if ends && let Some(ending) = open.remove(&frame.stream) {
            script.read_whole();
            end(stream, script, frame.stream, ending).await?;
        }
    }
}

/// Ends a request that was read; `None`: and the connection.
async fn end(stream: &mut TcpStream, script: &Script, id: u32, ending: Ending) -> Option<()> {
    let broken = INTERNAL_ERROR.to_be_bytes();
    match ending {
        Ending::Answers => write_frame(stream, HEADERS, END_HEADERS | END_STREAM, id, STATUS_200).await,
        Ending::ClosesRead => None,
        Ending::ResetsStream => write_frame(stream, RST_STREAM, 0, id, &broken).await,
        Ending::HalfAnswer => {
            write_frame(stream, HEADERS, END_HEADERS, id, STATUS_200).await?;
            write_frame(stream, DATA, 0, id, b"half.").await?;
            script.head_arrived.notified().await;
            write_frame(stream, RST_STREAM, 0, id, &broken).await
        }
        other => panic!("{other:?} is not an ending of HTTP/2"),
    }
}
