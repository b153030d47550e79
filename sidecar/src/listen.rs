//! Listeners of redirected connections, one pair per worker.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpStream};
use tulle_mesh::ports;

/// Connections that wait to be accepted; the kernel's own maximum cuts it.
const BACKLOG: i32 = 4096;

/// When a silent peer is asked whether it is still there.
pub const KEEPALIVE: TcpKeepalive =
    TcpKeepalive::new().with_time(Duration::from_secs(60)).with_interval(Duration::from_secs(20));

/// A listener on all addresses of both families, shared with the other workers.
///
/// # Errors
/// When the port cannot be bound.
pub fn bind(port: u16) -> io::Result<TcpListener> {
    // A pod without IPv6 has no dual-stack socket.
    match bind_address(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))) {
        Ok(listener) => Ok(listener),
        Err(_) => bind_address(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))),
    }
}

fn bind_address(address: SocketAddr) -> io::Result<TcpListener> {
    let domain = if address.is_ipv6() { Domain::IPV6 } else { Domain::IPV4 };
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    // Accepted connections inherit it: a peer whose node has died is noticed, and costs no call each.
    socket.set_tcp_keepalive(&KEEPALIVE)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// The address that the client dialled before the connection was redirected here; `None` when it was
/// not redirected: somebody dialled this port itself.
pub fn original_destination(stream: &TcpStream) -> Option<SocketAddr> {
    let local = stream.local_addr().ok()?;
    let socket = SockRef::from(stream);
    let original = match local.ip().to_canonical() {
        IpAddr::V4(_) => socket.original_dst_v4(),
        IpAddr::V6(_) => socket.original_dst_v6(),
    };
    let original = canonical(original.ok()?.as_socket()?);
    let ours = ports::SIDECAR.contains(&original.port()) && original.ip() == local.ip().to_canonical();
    (!ours).then_some(original)
}

/// An IPv4 address in IPv6 clothing, undressed.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
