//! Futures that serve one request: some kilobytes each.

use std::future::Future;
use std::mem::MaybeUninit;
use std::pin::Pin;

use tokio::task::spawn_local;

/// A future in a place of its own, made there: nothing but its arguments is written. `Box::pin(future)` makes it on the
/// stack and moves the whole of it, because it would have to be dropped if there were no memory.
#[inline(always)]
pub fn boxed<F: Future>(make: impl FnOnce() -> F) -> Pin<Box<F>> {
    let place: Box<MaybeUninit<F>> = Box::new_uninit();
    Box::into_pin(Box::write(place, make()))
}

/// Runs a future as a task of this thread.
///
/// In a place of its own: tokio moves what it is given eight times between the start and the end of a task, the whole of it
/// each time, which for the future of a request costs more than all else that is done for it in memory.
#[inline(always)]
pub fn spawn_boxed<F: Future<Output = ()> + 'static>(make: impl FnOnce() -> F) {
    spawn_local(boxed(make));
}
