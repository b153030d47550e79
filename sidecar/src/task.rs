//! Tasks that serve one request.

use std::future::Future;

use tokio::task::spawn_local;

/// Runs a future of some kilobytes as a task of this thread.
///
/// In a place of its own: tokio moves what it is given eight times between the start and the end of a task, the whole of it
/// each time, which for the future of a request costs more than all else that is done for it in memory.
pub fn spawn_boxed(future: impl Future<Output = ()> + 'static) {
    spawn_local(Box::pin(future));
}
