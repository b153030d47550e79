//! Why a head or a body was refused.

/// Why a head was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct HeadError(pub &'static str);

impl HeadError {
    /// More bytes than [`super::MAX_HEAD`].
    pub const TOO_LONG: Self = Self("a head or trailers of more than 60 KiB");
    /// More lines than [`super::MAX_HEADERS`].
    pub const TOO_MANY: Self = Self("more than 200 header lines");

    /// Whether the head was too long or had too many lines: 431 for a client.
    pub fn is_too_large(&self) -> bool {
        *self == Self::TOO_LONG || *self == Self::TOO_MANY
    }
}

/// Why a body broke off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyError {
    /// Its bytes are malformed.
    Malformed(&'static str),
    /// The connection ended first.
    Gone,
}
