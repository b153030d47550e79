//! At which ports of the pod somebody listens, and which of them have connections that nobody has accepted.
//!
//! The kernel knows (`sock_diag(7)`): of a listening socket, the receive queue is the number of connections in its
//! backlog. Asking takes some 30 µs and no right beyond that of any process in the pod's network namespace.

use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use socket2::{Domain, Protocol, Socket, Type};

/// From `linux/socket.h` and `linux/netlink.h`.
const AF_NETLINK: i32 = 16;
const NETLINK_SOCK_DIAG: i32 = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST_DUMP: u16 = 0x301;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const FAMILIES: [u8; 2] = [2, 10];
const IPPROTO_TCP: u8 = 6;
const TCP_LISTEN: u32 = 1 << 10;

/// Bytes of a `struct nlmsghdr`.
const HEADER: usize = 16;
/// Bytes of a header and a `struct inet_diag_req_v2`.
const REQUEST: usize = HEADER + 56;
/// In a `struct inet_diag_msg`: where the port, the address and the receive queue are.
const PORT_AT: usize = 4;
const ADDRESS_AT: usize = 8;
const QUEUE_AT: usize = 56;

/// A listening TCP socket.
struct Listening {
    address: IpAddr,
    port: u16,
    /// Connections in its backlog.
    queue: u32,
}

/// The listening TCP ports whose backlog holds connections.
///
/// # Errors
/// When the kernel does not answer such questions here.
pub(super) fn unaccepted() -> io::Result<Vec<u16>> {
    let mut ports: Vec<u16> =
        listening()?.into_iter().filter(|socket| socket.queue > 0).map(|socket| socket.port).collect();
    ports.sort_unstable();
    ports.dedup();
    Ok(ports)
}

/// Whether a TCP socket listens at this port, whatever its address.
///
/// # Errors
/// As those of [`unaccepted`].
pub(super) fn listens(port: u16) -> io::Result<bool> {
    Ok(listening()?.iter().any(|socket| socket.port == port))
}

/// Whether connections to this address of the pod are taken: by a socket of its own, or of all addresses.
///
/// # Errors
/// As those of [`unaccepted`].
pub(super) fn takes(address: SocketAddr) -> io::Result<bool> {
    let own = address.ip().to_canonical();
    let takes = |socket: &Listening| {
        let at = socket.address.to_canonical();
        socket.port == address.port() && (at.is_unspecified() || at == own)
    };
    Ok(listening()?.iter().any(takes))
}

/// All listening TCP sockets.
fn listening() -> io::Result<Vec<Listening>> {
    let mut socket =
        Socket::new(Domain::from(AF_NETLINK), Type::RAW, Some(Protocol::from(NETLINK_SOCK_DIAG)))?;
    // The answer is there when the question has been sent.
    socket.set_nonblocking(true)?;
    let mut sockets = Vec::new();
    let mut buffer = vec![0; 16 * 1024];
    for family in FAMILIES {
        socket.send(&request(family))?;
        loop {
            let length = socket.read(&mut buffer)?;
            if read_sockets(buffer.get(..length).unwrap_or(&[]), &mut sockets)? {
                break;
            }
        }
    }
    Ok(sockets)
}

/// Asks for all listening TCP sockets of a family.
fn request(family: u8) -> [u8; REQUEST] {
    let mut message = [0; REQUEST];
    let fields: [(usize, &[u8]); 5] = [
        (0, &(REQUEST as u32).to_ne_bytes()),
        (4, &SOCK_DIAG_BY_FAMILY.to_ne_bytes()),
        (6, &NLM_F_REQUEST_DUMP.to_ne_bytes()),
        (HEADER, &[family, IPPROTO_TCP]),
        (HEADER + 4, &TCP_LISTEN.to_ne_bytes()),
    ];
    for (at, bytes) in fields {
        if let Some(room) = message.get_mut(at..at + bytes.len()) {
            room.copy_from_slice(bytes);
        }
    }
    message
}

/// Reads the messages of one datagram; whether it was the last.
fn read_sockets(mut bytes: &[u8], sockets: &mut Vec<Listening>) -> io::Result<bool> {
    let broken = || io::Error::from(io::ErrorKind::InvalidData);
    while !bytes.is_empty() {
        let length = u32::from_ne_bytes(field(bytes, 0).ok_or_else(broken)?) as usize;
        let kind = u16::from_ne_bytes(field(bytes, 4).ok_or_else(broken)?);
        if length < HEADER {
            return Err(broken());
        }
        match kind {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => return Err(io::ErrorKind::Unsupported.into()),
            _ => {}
        }
        let message = bytes.get(HEADER..length).ok_or_else(broken)?;
        let port = u16::from_be_bytes(field(message, PORT_AT).ok_or_else(broken)?);
        let queue = u32::from_ne_bytes(field(message, QUEUE_AT).ok_or_else(broken)?);
        let address = match message.first() {
            Some(2) => Ipv4Addr::from(field::<4>(message, ADDRESS_AT).ok_or_else(broken)?).into(),
            _ => Ipv6Addr::from(field::<16>(message, ADDRESS_AT).ok_or_else(broken)?).into(),
        };
        sockets.push(Listening { address, port, queue });
        // Messages begin at multiples of four.
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
    Ok(false)
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_connection_counts_until_it_is_accepted() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        assert!(!unaccepted().unwrap().contains(&address.port()));
        let _client = TcpStream::connect(address).unwrap();
        assert!(unaccepted().unwrap().contains(&address.port()));
        let _accepted = listener.accept().unwrap();
        assert!(!unaccepted().unwrap().contains(&address.port()));
    }

    #[test]
    fn a_port_is_listened_at_until_its_socket_is_closed() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(listens(port).unwrap());
        drop(listener);
        assert!(!listens(port).unwrap());
    }

    #[test]
    fn an_address_is_taken_by_a_socket_of_its_own_or_of_all_addresses() {
        for (bound, taken) in
            [("127.0.0.1:0", true), ("127.0.0.2:0", false), ("0.0.0.0:0", true), ("[::]:0", true)]
        {
            let Ok(listener) = TcpListener::bind(bound) else { continue };
            let port = listener.local_addr().unwrap().port();
            assert_eq!(takes(SocketAddr::from(([127, 0, 0, 1], port))).unwrap(), taken, "{bound}");
            drop(listener);
            assert!(!takes(SocketAddr::from(([127, 0, 0, 1], port))).unwrap(), "{bound}");
        }
    }

    #[test]
    fn garbage_is_an_error_and_not_a_panic() {
        for bytes in [&[1, 2, 3][..], &[0; 16], &[40, 0, 0, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]] {
            assert!(read_sockets(bytes, &mut Vec::new()).is_err(), "{bytes:?}");
        }
    }
}
