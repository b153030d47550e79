//! The `tulle/1` protocol between two sidecars, as bytes: frames ([`frame`]) and the typed fields of
//! a stream's head ([`head`]). WIRE.md beside this crate's manifest describes it as a public
//! protocol. Nothing here reads a socket.

pub mod frame;
pub mod head;

/// What TLS negotiates (ALPN).
pub const ALPN: &[u8] = b"tulle/1";
/// The largest frame, header included: it fits one TLS record.
pub const MAX_FRAME: usize = 16 * 1024;
/// The largest payload of one frame.
pub const MAX_PAYLOAD: usize = MAX_FRAME - frame::HEADER;
/// The largest message head (fields and HTTP head together): an HTTP head of 60 KiB, and the fields.
pub const MAX_HEAD: usize = 64 * 1024;
/// Streams that a peer may have open on one connection.
pub const MAX_STREAMS: usize = 128;
/// Bytes of DATA that may be under way on one stream before the receiver grants more. It is also what a
/// client keeps of a request to send it elsewhere: no application can have taken more unasked.
pub const STREAM_CREDIT: u32 = 64 * 1024;
/// What a receiver lets a stream's credit grow to while its bytes are taken as they come.
pub const MAX_STREAM_CREDIT: u32 = 512 * 1024;
/// Growth that a receiver gives to all streams of a connection together.
pub const CONNECTION_GROWTH: u32 = 4 * 1024 * 1024;
/// Bytes of DATA that may be under way on a whole connection.
pub const CONNECTION_CREDIT: u32 = 16 * 1024 * 1024;

// However many streams are stalled, with whatever they have grown to, the others still have credit.
const _: () = assert!(
    MAX_STREAMS as u32 * STREAM_CREDIT + CONNECTION_GROWTH + CONNECTION_CREDIT / 4 <= CONNECTION_CREDIT
);
