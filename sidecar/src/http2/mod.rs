//! HTTP/2 on the application's side (RFC 9113). Between sidecars the message travels as a head in HTTP/1 text and DATA,
//! with trailers.
//!
//! ```text
//!   input → frame → hpack → block    what arrives: frames, and the fields of header blocks
//!   connection                       its state, what is written to it, and what frames do to it (received)
//!   driver                           the one task that reads and writes a connection; servers and clients
//!   stream                           the two halves of a stream
//!   head, body                       fields to heads and back; a body counted against its declared length
//! ```
//!
//! As between sidecars ([`wire`](crate::wire)), streams append to one output without lock, channel or task, and the
//! connection's task writes what has gathered in one go. No task but the worker's reads this, so a stream's state is
//! shared by `Rc`.
//!
//! CONNECT passes, and 1xx responses pass both ways. Extended CONNECT (RFC 8441, WebSockets over HTTP/2)
//! is not offered: between sidecars it would have to travel as a handshake of HTTP/1.1, of which HTTP/2 has
//! neither the key nor the answer. Clients that do not see the setting use HTTP/1.1 for WebSockets.

mod block;
mod body;
mod connection;
mod driver;
mod frame;
mod head;
mod hpack;
mod input;
mod stream;

pub use block::Block;
pub use body::{Length, break_off, trailer_block};
pub use driver::{Client, ConnectionError, Incoming, Server, client};
pub use frame::ErrorCode;
pub use head::{Answered, check_request, request_head, response_head};
pub use stream::{RecvStream, SendStream, Unanswered};

use crate::http1::{MAX_HEAD, MAX_HEADERS};

/// The longest list of headers that a peer may send, as HTTP/2 counts it: 32 bytes more for each line
/// (RFC 9113 §6.5.2), the pseudo-header fields included. A client that sends more gets 431, one that sends more than four
/// times as much loses its connection.
pub const MAX_HEADER_LIST: u32 = (MAX_HEAD + 32 * (MAX_HEADERS + 5)) as u32;
/// Streams that a client may have open. Servers without a mesh allow 100 (nginx: 128) to any number
/// (gRPC); a client that has more to send waits, and some wait for ever.
pub const MAX_STREAMS: u32 = 1000;
/// Streams that we open on one connection to a server.
pub const SHARED_STREAMS: u32 = 100;
/// Bytes under way on a stream.
pub const STREAM_WINDOW: u32 = 256 * 1024;
/// Bytes under way on a connection.
pub const CONNECTION_WINDOW: u32 = 1024 * 1024;
/// Bytes under way on a stream of a server: many clients share its connection, and one that reads slowly must
/// not use up what the others need. So the connection has room for the windows of [`SHARED_STREAMS`].
const SHARED_STREAM_WINDOW: u32 = 64 * 1024;

// A window of HTTP/2 has 31 bits (RFC 9113 §6.9.1).
const _: () = assert!(SHARED_STREAM_WINDOW as u64 * (SHARED_STREAMS as u64) < 1 << 31);

#[cfg(test)]
mod tests;
