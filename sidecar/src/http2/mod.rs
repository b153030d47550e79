//! HTTP/2 on the application's side, through the `h2` crate with limits of our own. Between sidecars
//! the message travels as a head in HTTP/1 text and DATA, with trailers.
//!
//! ```text
//!   head      requests and responses to heads and back; interim responses
//!   body      DATA and trailers, counted against a declared length
//!   transport what h2 does not get to read: DATA frames without content
//! ```
//!
//! CONNECT passes, and 1xx responses pass both ways. Extended CONNECT (RFC 8441, WebSockets over HTTP/2)
//! is not offered: between sidecars it would have to travel as a handshake of HTTP/1.1, of which HTTP/2 has
//! neither the key nor the answer. Clients that do not see the setting use HTTP/1.1 for WebSockets.

mod body;
mod head;
mod transport;

pub use body::{Length, break_off, finish, next_part, send, trailer_block};
pub use head::{
    Answered, answer, interim, request_head, response_head, response_head_for, to_request, to_response,
};
pub use transport::WithoutEmptyData;

use crate::http1::{MAX_HEAD, MAX_HEADERS};

/// The longest list of headers that a peer may send, as HTTP/2 counts it: 32 bytes more for each line
/// (RFC 9113 §6.5.2), the pseudo-header fields included. h2's own default is 16 MiB. A client that sends
/// more gets 431 from h2, one that sends more than four times as much loses its connection.
pub const MAX_HEADER_LIST: u32 = (MAX_HEAD + 32 * (MAX_HEADERS + 5)) as u32;
/// Streams that a client may have open. Servers without a mesh allow 100 (nginx: 128) to any number
/// (gRPC); a client that has more to send waits, and some wait for ever.
pub const MAX_STREAMS: u32 = 1000;
/// Streams that we open on one connection to a server.
pub const SHARED_STREAMS: u32 = 100;
/// What [`h2::client::SendRequest::current_max_send_streams`] says before the server has sent its SETTINGS. No server
/// can grant as many: the setting has 32 bits.
pub const UNSETTLED: usize = usize::MAX - 1;
/// Bytes under way on a stream.
pub const STREAM_WINDOW: u32 = 256 * 1024;
/// Bytes under way on a connection.
pub const CONNECTION_WINDOW: u32 = 1024 * 1024;
/// Bytes under way on a stream of a server: many clients share its connection, and one that reads slowly must
/// not use up what the others need. So the connection has room for the windows of [`SHARED_STREAMS`].
const SHARED_STREAM_WINDOW: u32 = 64 * 1024;
/// Bytes of a stream that wait to be sent to a client. A client may grant room to all its streams and read
/// none of them.
const SEND_BUFFER: usize = 64 * 1024;
/// Resets that are remembered or waited for (CVE-2023-44487, CVE-2025-8671).
pub const MAX_RESETS: usize = 50;

/// Memory of a DATA frame that waits to be read. h2 counts as much, less the frame's content.
const FRAME_MEMORY: usize = 256;
/// What DATA frames that wait to be read may take of memory beside their content, on a client's connection. Beyond it h2
/// ends the connection with ENHANCE_YOUR_CALM, so a reader that is slow must not reach it: it would end the streams of
/// all others. h2's own default is half a window, which 50 kB of small messages exhaust. On the other hand sidecars have
/// limits of 64 MiB and less, and a few clients that send single bytes must not be able to exceed these.
const CLIENT_FRAMES: usize = 8 * 1024 * 1024;
/// The same on a connection to a server, which clients share.
const SERVER_FRAMES: usize = 16 * 1024 * 1024;

/// What frames with so much content take of that when they fill this window.
const fn filling(window: u32, content: usize) -> usize {
    window as usize / content * (FRAME_MEMORY - content)
}

// One slow reader of small gRPC messages has no effect on others (their prefix alone has five bytes), nor have ten of
// them that share a server's connection.
const _: () = assert!(CLIENT_FRAMES > filling(STREAM_WINDOW, 10));
const _: () = assert!(SERVER_FRAMES > 10 * filling(SHARED_STREAM_WINDOW, 15));
// A window of HTTP/2 has 31 bits (RFC 9113 §6.9.1).
const _: () = assert!(SHARED_STREAM_WINDOW as u64 * (SHARED_STREAMS as u64) < 1 << 31);

/// Streams of one connection that are reset because of something that the client did, before the connection ends
/// (CVE-2025-8671). A client that has not read our settings yet may open twice as many as it is granted, and loses
/// those beyond, not the connection.
const MAX_REFUSED: usize = MAX_STREAMS as usize;

/// A server's settings.
pub fn server() -> h2::server::Builder {
    let mut builder = h2::server::Builder::new();
    builder
        .max_header_list_size(MAX_HEADER_LIST)
        .max_concurrent_streams(MAX_STREAMS)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .data_frame_budget(CLIENT_FRAMES)
        .max_concurrent_reset_streams(MAX_RESETS)
        .max_pending_accept_reset_streams(MAX_RESETS)
        .max_local_error_reset_streams(Some(MAX_REFUSED))
        .max_send_buffer_size(SEND_BUFFER);
    builder
}

/// A client's settings.
pub fn client() -> h2::client::Builder {
    let mut builder = h2::client::Builder::new();
    builder
        .max_header_list_size(MAX_HEADER_LIST)
        .initial_max_send_streams(UNSETTLED)
        .initial_window_size(SHARED_STREAM_WINDOW)
        .initial_connection_window_size(SHARED_STREAM_WINDOW * SHARED_STREAMS)
        .data_frame_budget(SERVER_FRAMES)
        .max_concurrent_reset_streams(MAX_RESETS)
        .max_local_error_reset_streams(Some(MAX_RESETS))
        .max_send_buffer_size(STREAM_WINDOW as usize)
        .enable_push(false);
    builder
}

#[cfg(test)]
mod tests {
    use std::future::{pending, poll_fn};

    use bytes::Bytes;
    use tokio::io::{AsyncWriteExt as _, DuplexStream, duplex};

    use super::*;

    type Connected = (h2::client::SendRequest<Bytes>, h2::server::Connection<DuplexStream, Bytes>);

    /// The two ends of a connection, whose client's end is driven.
    async fn connected() -> Connected {
        let (near, far) = duplex(64 * 1024);
        let (near, far) =
            tokio::join!(client().handshake::<_, Bytes>(near), server().handshake::<_, Bytes>(far));
        let (send, connection) = near.unwrap();
        tokio::spawn(connection);
        (send, far.unwrap())
    }

    /// Sends frames of this content until the peer grants no more, or has ended the connection. Returns how many bytes they
    /// have.
    async fn fill(stream: &mut h2::SendStream<Bytes>, content: &'static [u8], window: u32) -> usize {
        let mut sent = 0;
        while sent + content.len() <= window as usize {
            stream.reserve_capacity(content.len());
            while stream.capacity() < content.len() {
                if !matches!(poll_fn(|cx| stream.poll_capacity(cx)).await, Some(Ok(_))) {
                    return sent;
                }
            }
            if stream.send_data(Bytes::from_static(content), false).is_err() {
                return sent;
            }
            sent += content.len();
        }
        sent
    }

    #[tokio::test]
    async fn a_slow_reader_of_small_messages_does_not_end_the_streams_of_others() {
        let (mut send, mut serving) = connected().await;
        let request = || http::Request::post("http://shop/").body(()).unwrap();
        let (slow, mut upload) = send.send_request(request(), false).unwrap();
        let filling = tokio::spawn(async move {
            let sent = fill(&mut upload, b"0123456789abcde", STREAM_WINDOW).await;
            (upload, sent)
        });
        // The server drives its connection and reads nothing of this one.
        let (unread, _respond) = serving.accept().await.unwrap().unwrap();
        send = send.ready().await.unwrap();
        let other = send.send_request(request(), true).unwrap().0;
        let serving = tokio::spawn(async move {
            while let Some(Ok((_, mut respond))) = serving.accept().await {
                respond.send_response(http::Response::new(()), true).unwrap();
            }
        });
        assert_eq!(other.await.unwrap().status(), 200);
        let (_upload, sent) = filling.await.unwrap();
        assert!(sent > STREAM_WINDOW as usize - 15, "{sent}");
        let (mut body, mut read) = (unread.into_body(), 0);
        while read < sent {
            read += body.data().await.unwrap().unwrap().len();
        }
        drop(slow);
        serving.abort();
    }

    #[tokio::test]
    async fn a_flood_of_single_bytes_ends_its_connection_before_it_fills_a_sidecars_memory() {
        let (mut send, mut serving) = connected().await;
        let request = http::Request::post("http://shop/").body(()).unwrap();
        let (_answer, mut upload) = send.send_request(request, false).unwrap();
        tokio::spawn(async move {
            fill(&mut upload, b"x", STREAM_WINDOW).await;
            // A request that is dropped would be reset.
            pending::<()>().await;
        });
        let (unread, _respond) = serving.accept().await.unwrap().unwrap();
        let ended = serving.accept().await.unwrap().unwrap_err();
        assert_eq!(ended.reason(), Some(h2::Reason::ENHANCE_YOUR_CALM));
        let (mut body, mut waited) = (unread.into_body(), 0);
        while let Some(Ok(bytes)) = body.data().await {
            waited += bytes.len();
        }
        assert!(waited <= CLIENT_FRAMES / (FRAME_MEMORY - 1) + 1, "{waited} frames");
    }

    #[tokio::test]
    async fn a_connection_outlives_frames_without_content() {
        // As bytes: h2 has no way to send them.
        let (mut near, far) = duplex(64 * 1024);
        let serving = tokio::spawn(async move {
            let far = WithoutEmptyData::of_client(far);
            let mut connection = server().handshake::<_, Bytes>(far).await.unwrap();
            let (request, _respond) = connection.accept().await.unwrap().unwrap();
            tokio::spawn(async move { while connection.accept().await.is_some() {} });
            let mut body = request.into_body();
            let content = body.data().await;
            (content.map(Result::unwrap), body.data().await.is_none())
        });
        near.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
        // :method POST, :scheme http, :path /, and a literal :authority (RFC 7541 §6).
        near.write_all(b"\0\0\x09\x01\x04\0\0\0\x01\x83\x86\x84\x01\x04shop").await.unwrap();
        near.write_all(&b"\0\0\0\0\0\0\0\0\x01".repeat(1_000)).await.unwrap();
        near.write_all(b"\0\0\x02\0\x01\0\0\0\x01ok").await.unwrap();
        assert_eq!(serving.await.unwrap(), (Some(Bytes::from_static(b"ok")), true));
    }

    #[tokio::test]
    async fn slow_readers_of_small_answers_do_not_end_the_connection_that_they_share() {
        let (mut send, mut serving) = connected().await;
        let serving = tokio::spawn(async move {
            while let Some(Ok((_, mut respond))) = serving.accept().await {
                let mut stream = respond.send_response(http::Response::new(()), false).unwrap();
                tokio::spawn(async move {
                    fill(&mut stream, b"0123456789abcde", SHARED_STREAM_WINDOW).await;
                    // An answer that is dropped would be reset.
                    pending::<()>().await;
                });
            }
        });
        let mut unread = Vec::new();
        for _ in 0..10 {
            send = send.ready().await.unwrap();
            let request = http::Request::get("http://shop/").body(()).unwrap();
            unread.push(send.send_request(request, true).unwrap().0.await.unwrap().into_body());
        }
        // While the first is read, the others arrive.
        for body in &mut unread {
            let mut read = 0;
            while read + 15 <= SHARED_STREAM_WINDOW as usize {
                read += body.data().await.unwrap().unwrap().len();
            }
        }
        serving.abort();
    }
}
