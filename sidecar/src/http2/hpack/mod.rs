//! HPACK (RFC 7541): header blocks of HTTP/2.
//!
//! ```text
//!   tables    the static table
//!   huffman   the code of strings
//!   decode    blocks to fields, with the dynamic table of a connection
//!   encode    fields to blocks
//! ```
//!
//! What is sent uses the static table alone: it costs a few bytes more on a connection within a pod, and no table that
//! would have to be kept and searched.

mod decode;
pub(super) mod encode;
mod huffman;
mod tables;

pub(super) use decode::{Decoder, Field, Kind, is_lower_token, is_value};

/// What a field costs in a table, and in a list of headers, beside its name and value (RFC 7541 §4.1).
pub(super) const FIELD_COST: usize = 32;
