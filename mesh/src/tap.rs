//! What the operator and the sidecars agree on about taps.

/// Requests in one message of a sidecar about one tap. More are counted as lost, and never decoded: an event that is empty
/// has 2 bytes on the wire and about 300 in memory.
pub const MAX_EVENTS: usize = 64;
