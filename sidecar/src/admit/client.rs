//! Who connects, and to what.

use std::borrow::Cow;
use std::net::SocketAddr;

use bytes::Bytes;
use tulle_mesh::identity::WorkloadId;

use crate::claim::set_client_id;
use crate::http1::Head;

/// Who connects, and to what.
#[derive(Clone, Debug)]
pub struct Client {
    /// Whom its certificate names; `None` for plain connections.
    pub identity: Option<WorkloadId>,
    /// The same as text, made once for all requests of the connection.
    identity_text: Option<Bytes>,
    /// Its address.
    pub address: SocketAddr,
    /// The address of ours that it dialled.
    pub destination: SocketAddr,
}

impl Client {
    /// A client without a certificate.
    pub fn plain(address: SocketAddr, destination: SocketAddr) -> Self {
        Self { identity: None, identity_text: None, address, destination }
    }

    /// The same client, now that its certificate is known.
    #[must_use]
    pub fn with_identity(self, identity: WorkloadId) -> Self {
        let text = Bytes::from(identity.to_string());
        Self { identity: Some(identity), identity_text: Some(text), ..self }
    }

    /// Names the client to the application.
    pub fn introduce(&self, head: &mut Head) {
        set_client_id(head, self.identity_text.clone());
    }

    /// Whom its certificate names, as text; `None` for plain connections.
    pub fn identity_text(&self) -> Option<&str> {
        self.identity_text.as_deref().and_then(|text| std::str::from_utf8(text).ok())
    }

    /// What the client is called in logs: its identity, or its address.
    pub fn name(&self) -> Cow<'_, str> {
        match &self.identity_text {
            Some(text) => String::from_utf8_lossy(text),
            None => Cow::Owned(self.address.ip().to_string()),
        }
    }
}
