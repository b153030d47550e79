//! HTTP/1.1, read strictly: where two readers could disagree about where a message ends, the message
//! is refused and its connection closed (RFC 9112; the cases are in `tests/smuggling.rs`).
//!
//! ```text
//!   head      a message's head: bytes in, fields and framing out
//!   body      bytes of a body, as its framing says
//!   conn      the two halves of a TCP connection with their buffers
//! ```

pub mod body;
pub mod conn;
pub mod head;

pub use body::{Decoder, Part};
pub use conn::{Reader, Writer};
pub use head::{Framing, Head, HeadError, Start};

/// The longest head, as everywhere in Tulle.
pub const MAX_HEAD: usize = 32 * 1024;
/// The most header lines.
pub const MAX_HEADERS: usize = 100;
