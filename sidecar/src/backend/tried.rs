//! Where a request has been. Fixed room, so that nothing is allocated for it.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

/// Endpoints that one request may have been to.
const ROOM: usize = 4;
const NOWHERE: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0));

/// The addresses of the endpoints that a request has been to, at most four.
#[derive(Clone, Copy)]
pub struct Tried {
    addresses: [SocketAddr; ROOM],
    len: usize,
}

impl Default for Tried {
    fn default() -> Self {
        Self { addresses: [NOWHERE; ROOM], len: 0 }
    }
}

impl Tried {
    /// Adds an address. A fifth is dropped: a request goes to four endpoints at most.
    pub fn push(&mut self, address: SocketAddr) {
        if let Some(free) = self.addresses.get_mut(self.len) {
            *free = address;
            self.len += 1;
        }
    }

    /// Whether the request has been there.
    pub fn contains(&self, address: SocketAddr) -> bool {
        self.as_slice().contains(&address)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the request has been nowhere.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The addresses in the order in which they were tried.
    pub fn as_slice(&self) -> &[SocketAddr] {
        self.addresses.get(..self.len).unwrap_or_default()
    }
}

impl fmt::Debug for Tried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.as_slice()).finish()
    }
}
