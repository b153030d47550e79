//! When a request is not worth an application's time any more.

use std::time::Duration;

use tokio::time::Instant;
use tulle_mesh::wire::head::Protocol as Travels;

use crate::call::Call;
use crate::grpc;

/// When the answer to a request must have begun. `left_ms`: what its client's sidecar says; without that, a gRPC client
/// says it itself.
pub fn deadline_of(call: &Call<'_>, left_ms: Option<u32>) -> Option<Instant> {
    let left = match left_ms {
        Some(left) => Duration::from_millis(u64::from(left)),
        // Only gRPC has the header, and only HTTP/2 carries gRPC.
        None if call.travels == Travels::Http2 => grpc::parse_timeout(call.head.header("grpc-timeout")?)?,
        None => return None,
    };
    call.since.checked_add(left)
}

/// Whether a deadline has passed.
pub fn has_passed(deadline: Option<Instant>) -> bool {
    deadline.is_some_and(|deadline| deadline <= Instant::now())
}
