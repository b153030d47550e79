//! Listeners of redirected connections, one pair per worker, and how many connections there may be.
//!
//! In: ports. Out: accepted connections. Never reads from one.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpStream};
use tulle_mesh::ports;

/// Connections that wait to be accepted; the kernel's own maximum cuts it.
const BACKLOG: i32 = 4096;

/// When a silent peer is asked whether it is still there. Well within 60 s, after which Linux forgets a half-closed
/// connection on which nothing moves (`nf_conntrack_tcp_timeout_close_wait`), and what follows on it is reset.
pub const KEEPALIVE: TcpKeepalive =
    TcpKeepalive::new().with_time(Duration::from_secs(25)).with_interval(Duration::from_secs(20));

/// The same between sidecars, whose connections carry the requests of many clients.
const MESH_KEEPALIVE: TcpKeepalive =
    TcpKeepalive::new().with_time(Duration::from_secs(10)).with_interval(Duration::from_secs(5));
/// How long bytes between sidecars may stay unacknowledged: a little longer than an answer to a ping may take where
/// streams run that nobody can repeat, so that it is not the kernel that decides. Not for other connections: it also ends
/// one whose peer reads nothing for this long, and applications may do that.
pub const MESH_UNACKNOWLEDGED: Duration = Duration::from_secs(70);

/// Shares of the descriptors that connections may take, in percent. The rest is for the sidecar's own: the operator,
/// probes, the admin port, and the second half of connections that have been accepted.
const CONNECTION_SHARE: u64 = 90;

/// How many file descriptors the process may have, and from which number on connections are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptors {
    /// The limit of the process.
    pub limit: u64,
}

impl Descriptors {
    /// Raises the limit of the process as far as the container allows. Container runtimes set the soft limit to 1,024
    /// for programs that use select(2), which this one does not.
    pub fn raise() -> Self {
        let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
        let wanted = Rlimit { current: maximum, maximum };
        let limit =
            if current == maximum || setrlimit(Resource::Nofile, wanted).is_ok() { maximum } else { current };
        Self { limit: limit.unwrap_or(u64::MAX) }
    }

    /// Whether a connection that was just accepted is one too many. The kernel gives out the lowest number that is
    /// free, so all below are taken: nothing has to be counted, and sockets to servers and pipes count too.
    pub fn are_short(&self, accepted: &impl AsRawFd) -> bool {
        self.is_beyond(u64::try_from(accepted.as_raw_fd()).unwrap_or(0))
    }

    fn is_beyond(&self, number: u64) -> bool {
        number >= self.limit / 100 * CONNECTION_SHARE + self.limit % 100 * CONNECTION_SHARE / 100
    }
}

/// Closes a connection by a reset when it is dropped: its client sees at once that it is refused.
pub fn reset_on_close(stream: &TcpStream) {
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// Watches a connection between sidecars, so that one whose other end has died ends.
///
/// # Errors
/// The connection is gone.
pub fn watch_mesh(stream: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_keepalive(&MESH_KEEPALIVE)?;
    socket.set_tcp_user_timeout(Some(MESH_UNACKNOWLEDGED))
}

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
    // So is this: an urgent byte (Telnet, ABOR of FTP) keeps its place in the stream instead of being lost.
    socket.set_out_of_band_inline(true)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_take_nine_tenths_of_the_descriptors() {
        let few = Descriptors { limit: 1_024 };
        assert!(!few.is_beyond(920));
        assert!(few.is_beyond(921));
        let unlimited = Descriptors { limit: u64::MAX };
        assert!(!unlimited.is_beyond(1 << 40));
    }

    #[tokio::test]
    async fn a_connection_with_a_low_number_is_not_refused() {
        let listener = bind_address(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let address = listener.local_addr().unwrap();
        let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (client, (accepted, _)) = (client.unwrap(), accepted.unwrap());
        assert!(!Descriptors::raise().are_short(&accepted));
        assert!(Descriptors { limit: 3 }.are_short(&accepted));
        reset_on_close(&accepted);
        drop(accepted);
        let mut byte = [0];
        let read = tokio::io::AsyncReadExt::read(&mut { client }, &mut byte).await;
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[test]
    fn the_limit_of_descriptors_is_what_the_container_allows() {
        let raised = Descriptors::raise();
        let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
        assert_eq!(current, maximum);
        assert_eq!(raised.limit, maximum.unwrap_or(u64::MAX));
    }

    #[tokio::test]
    async fn accepted_connections_keep_urgent_bytes_and_outlive_conntrack() {
        let listener = bind_address(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let address = listener.local_addr().unwrap();
        let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (client, (mut accepted, _)) = (client.unwrap(), accepted.unwrap());
        assert!(SockRef::from(&accepted).tcp_keepalive_time().unwrap() < Duration::from_secs(60));
        let socket = SockRef::from(&client);
        for (sent, urgent) in [(b"abc", false), (b"UVW", true), (b"def", false)] {
            let sent_bytes = if urgent { socket.send_out_of_band(sent) } else { socket.send(sent) };
            assert_eq!(sent_bytes.unwrap(), sent.len());
            // The last byte of what is sent as urgent is the urgent one, and a read ends before it.
            let mut seen = [0; 3];
            for byte in seen.chunks_mut(1) {
                let read = tokio::io::AsyncReadExt::read_exact(&mut accepted, byte);
                tokio::time::timeout(Duration::from_secs(5), read).await.expect("it is missing").unwrap();
            }
            assert_eq!(&seen, sent);
        }
    }

    #[tokio::test]
    async fn a_mesh_connection_is_watched() {
        let listener = bind_address(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        watch_mesh(&client).unwrap();
        let socket = SockRef::from(&client);
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(MESH_UNACKNOWLEDGED));
        assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(10));
    }
}
