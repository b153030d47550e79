//! Connections to the pod's application that carry the client's address (annotation `tulle.dev/source-address:
//! preserve`).
//!
//! In: the client's address and the application's. Out: a connection whose source is the client's address, with a port
//! that the kernel chooses. The answers come back because `tulle-sidecar init --preserve-source-address` has set up
//! policy routing ([`crate::init`]). Never falls back to the sidecar's own address: an application that allows or
//! denies by address would be wrong, and nobody would see it.
//!
//! The kernel asks for CAP_NET_RAW (`IP_TRANSPARENT`, ip(7)), and for nothing else. The image's program has it as a
//! file capability that is permitted and not effective, so the program starts where it is not granted. Capabilities
//! belong to threads: those that connect raise it.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

/// Why the client's address cannot be preserved.
#[derive(Debug, thiserror::Error)]
pub enum TransparentError {
    /// The container runs without the capability, or its image has lost the file capability.
    #[error(
        "annotation tulle.dev/source-address is preserve, and the container tulle-proxy has no capability NET_RAW: \
         does a policy remove it or set allowPrivilegeEscalation to false, or was the image copied without its \
         extended attributes?"
    )]
    Capability,
    /// The kernel refused a system call that the capability should allow.
    #[error("annotation tulle.dev/source-address is preserve, and the kernel refused {call}: {source}")]
    Kernel {
        /// The system call.
        call: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Lets the calling thread, and threads that it starts, connect with the addresses of others.
///
/// # Errors
/// [`TransparentError`] when the process has no CAP_NET_RAW, or the kernel refuses the socket option.
pub fn allow() -> Result<(), TransparentError> {
    let kernel = |call, source| TransparentError::Kernel { call, source };
    let mut sets = capabilities(None).map_err(|error| kernel("capget", error.into()))?;
    if !sets.permitted.contains(CapabilitySet::NET_RAW) {
        return Err(TransparentError::Capability);
    }
    sets.effective |= CapabilitySet::NET_RAW;
    set_capabilities(None, sets).map_err(|error| kernel("capset", error.into()))?;
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP));
    let tried = socket.and_then(|socket| socket.set_ip_transparent_v4(true));
    tried.map_err(|error| kernel("setsockopt(IP_TRANSPARENT)", error))
}

/// Connects to `to` from the address `source`.
///
/// # Errors
/// What the kernel says; [`io::ErrorKind::TimedOut`] after `limit`; [`io::ErrorKind::InvalidInput`] for two addresses
/// of different families.
pub async fn connect(source: IpAddr, to: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
    let socket = bound_to(source, to)?;
    timeout(limit, socket.connect(to)).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

fn bound_to(source: IpAddr, to: SocketAddr) -> io::Result<TcpSocket> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    match (source, to) {
        (IpAddr::V4(_), SocketAddr::V4(_)) => socket.set_ip_transparent_v4(true)?,
        (IpAddr::V6(_), SocketAddr::V6(_)) => socket.set_ip_transparent_v6(true)?,
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    }
    socket.bind(&SocketAddr::new(source, 0).into())?;
    Ok(TcpSocket::from_std_stream(socket.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    /// Tests run as root or not: both must be right.
    fn may() -> bool {
        capabilities(None).is_ok_and(|sets| sets.permitted.contains(CapabilitySet::NET_RAW))
    }

    #[tokio::test]
    async fn the_application_sees_the_address_that_was_asked_for() {
        if !may() {
            assert!(matches!(allow(), Err(TransparentError::Capability)));
            return;
        }
        allow().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap();
        // Loopback has all of 127/8: answers come back without policy routing.
        let source: IpAddr = "127.42.7.9".parse().unwrap();
        let (ours, accepted) = tokio::join!(connect(source, to, Duration::from_secs(5)), listener.accept());
        assert_eq!(accepted.unwrap().1.ip(), source);
        assert_eq!(ours.unwrap().peer_addr().unwrap(), to);
    }

    #[tokio::test]
    async fn a_source_of_the_other_family_is_an_error_and_not_the_sidecars_address() {
        if !may() {
            return;
        }
        allow().unwrap();
        let to = "127.0.0.1:9".parse().unwrap();
        let error = connect("::1".parse().unwrap(), to, Duration::from_secs(5)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_container_without_the_capability_is_told_what_to_look_at() {
        let text = TransparentError::Capability.to_string();
        assert!(text.contains("tulle-proxy has no capability NET_RAW"), "{text}");
    }
}
