//! A cluster on loopback.
//!
//! Each pod has two addresses: at the one that the cluster knows its sidecar is reached, as if connections to it were
//! redirected; at the other one its applications listen. In a real pod these are one address, from whose redirection
//! the sidecar's own connections are exempt.
//!
//! ```text
//!   operator     the control plane: the operator's own code, with a model that tests write
//!   sidecar      the proxy on a thread of its own
//!   cluster      pods, Services and policies
//!   application  what listens in a pod, and counts its connections
//!   echo         one that says who it is and what it was asked
//!   script       how a server ends what it is asked
//!   http1        an HTTP/1 client and server
//!   http2        an HTTP/2 client, and a server that can do what servers should not
//!   peer         another sidecar, which can do the same
//! ```

pub mod application;
pub mod cluster;
pub mod echo;
pub mod http1;
pub mod http2;
pub mod operator;
pub mod peer;
pub mod script;
pub mod sidecar;

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;

pub use application::Application;
pub use cluster::{Cluster, Pod};

/// What must not hang has this long. Nothing is measured.
const BOUND: Duration = Duration::from_secs(60);

/// The trust domain of every cluster.
pub const TRUST_DOMAIN: &str = "cluster.local";
/// The namespace of every pod.
pub const NAMESPACE: &str = "shop";

/// Waits for what must not hang.
pub async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(BOUND, future).await.expect("it hangs")
}

/// What a client got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A whole answer with this status.
    Whole(u16),
    /// An answer with this status that broke off.
    CutShort(u16),
    /// A connection or a stream that ended without an answer.
    Broken,
}

/// What becomes of a request that its server does not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It has come.
    Begun,
    /// Its client has given it up.
    GivenUp,
}

/// The next of these.
pub async fn next(events: &mut UnboundedReceiver<Event>) -> Event {
    within(events.recv()).await.expect("nobody reports any more")
}

/// A loopback address that nobody else uses: not in this process, nor in another one of these tests.
pub fn address() -> Ipv4Addr {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    assert!(number < 1 << 11, "no more addresses");
    let process = std::process::id() % 8_190 + 1;
    Ipv4Addr::from(0x7f00_0000 | process << 11 | number)
}
