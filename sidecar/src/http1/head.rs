//! What a head is, and how it is read.

pub use super::error::HeadError;
pub use super::model::{Framing, Head, Start};
pub use super::parse::{parse_request, parse_response, parse_trailers};
