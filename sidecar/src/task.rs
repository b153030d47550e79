//! Allocates the futures that serve one request: some kilobytes each.

use std::future::Future;
use std::mem::MaybeUninit;
use std::pin::Pin;

use tokio::task::spawn_local;

/// Constructs a future in its allocation, where an optimised build writes its arguments only. `Box::pin(future)`
/// constructs it on the stack and copies the whole of it, because it has to exist before the allocation, which may fail.
#[inline(always)]
pub fn boxed<F: Future>(make: impl FnOnce() -> F) -> Pin<Box<F>> {
    let allocation: Box<MaybeUninit<F>> = Box::new_uninit();
    Box::into_pin(Box::write(allocation, make()))
}

/// Runs a future as a task of this thread.
///
/// Boxed: tokio moves what it is given eight times between the start and the end of a task, the whole of it each time,
/// which for the future of a request costs more than all else that is done for it in memory.
#[inline(always)]
pub fn spawn_boxed<F: Future<Output = ()> + 'static>(make: impl FnOnce() -> F) {
    spawn_local(boxed(make));
}
