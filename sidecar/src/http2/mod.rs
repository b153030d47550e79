//! HTTP/2 on the application's side, through the `h2` crate with limits of our own. Between sidecars
//! the message travels as a head in HTTP/1 text and DATA, with trailers.
//!
//! ```text
//!   head      requests and responses to heads and back; interim responses
//!   body      DATA and trailers, counted against a declared length
//! ```
//!
//! CONNECT passes, and 1xx responses pass both ways. Extended CONNECT (RFC 8441, WebSockets over HTTP/2)
//! is not offered: between sidecars it would have to travel as a handshake of HTTP/1.1, of which HTTP/2 has
//! neither the key nor the answer. Clients that do not see the setting use HTTP/1.1 for WebSockets.

mod body;
mod head;

pub use body::{Length, break_off, finish, next_part, send, trailer_block};
pub use head::{
    Answered, answer, interim, request_head, response_head, response_head_for, to_request, to_response,
};

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
        .max_concurrent_reset_streams(MAX_RESETS)
        .max_local_error_reset_streams(Some(MAX_RESETS))
        .max_send_buffer_size(STREAM_WINDOW as usize)
        .enable_push(false);
    builder
}
