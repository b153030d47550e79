//! HTTP/1.1, read strictly: where two readers could disagree about where a message ends, the message
//! is refused and its connection closed (RFC 9112). What is a little off the standard and has one
//! reading only is repaired (see `tests`, a table of spellings).
//!
//! ```text
//!   scan      where a head ends, each byte looked at once
//!   parse     a head's bytes to a Head
//!   fields    what header lines mean for the connection and the body
//!   target    the request target: origin, absolute and authority form
//!   model     Head: fields and framing, and how it is written
//!   logged    what logs and spans say of a request
//!   head      what others use of these
//!   body      bytes of a body, as its framing says
//!   out       bytes that wait to be written, big pieces not copied
//!   conn      a TCP connection in two halves, and the one that reads
//!   writer    the one that writes
//! ```

pub mod body;
pub mod conn;
mod error;
mod fields;
pub mod head;
mod logged;
mod model;
mod out;
mod parse;
mod scan;
mod target;
#[cfg(test)]
mod tests;
mod writer;

pub use body::{Decoder, Part};
pub use conn::Reader;
pub use head::{Framing, Head, HeadError, Start};
pub use logged::{MAX_PATH, cut, known_method, logged_host, logged_path, version};
pub use writer::Writer;

/// The longest head that a connection may bring, in bytes.
pub const MAX_HEAD: usize = 60 * 1024;
/// The most header lines.
pub const MAX_HEADERS: usize = 200;
/// The longest head between sidecars: one that a connection has brought, written anew. Each line may
/// have gained a space, and a few lines were added. What a route adds beyond that is refused before it is
/// sent ([`Head::fits_a_stream`]).
pub const MAX_REWRITTEN_HEAD: usize = MAX_HEAD + 2 * 1024;
/// The most lines of such a head.
const MAX_LINES: usize = MAX_HEADERS + 8;
