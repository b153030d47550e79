//! Another sidecar, frame by frame: it can do what sidecars should not. `mesh/WIRE.md` describes the frames.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::BytesMut;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tulle_mesh::wire::frame::{self, Frame, Kind};
use tulle_mesh::wire::head::{Fields, Protocol};
use tulle_sidecar::tls::TlsStore;

/// A connection to a sidecar.
pub struct Peer {
    stream: TlsStream<TcpStream>,
    read: BytesMut,
}

impl Peer {
    /// Connects with these credentials.
    pub async fn connect(address: SocketAddr, credentials: &TlsStore) -> Self {
        let configs = credentials.current().unwrap();
        let stream = TcpStream::connect(address).await.unwrap();
        let name = ServerName::try_from("mesh.tulle").unwrap();
        let connector = TlsConnector::from(Arc::clone(&configs.mesh_client));
        let stream = connector.connect(name, stream).await.unwrap();
        Self { stream, read: BytesMut::new() }
    }

    /// Opens a stream with `GET /`.
    pub async fn get(&mut self, stream: u32) {
        let mut block = BytesMut::new();
        Fields { protocol: Protocol::Http1, ..Fields::default() }.encode(&mut block);
        block.extend_from_slice(super::http1::GET);
        self.write(Kind::Open, frame::END, stream, &block).await;
    }

    /// Grants so much, on this stream and on the connection, that the sidecar never waits for more.
    pub async fn grant_everything(&mut self, stream: u32) {
        let grant = (1u32 << 30).to_be_bytes();
        self.write(Kind::Credit, 0, stream, &grant).await;
        self.write(Kind::Credit, 0, 0, &grant).await;
    }

    /// Shows that this side is still there.
    pub async fn ping(&mut self) {
        self.write(Kind::Ping, 0, 0, b"harness!").await;
    }

    /// The next frame; `None`: the connection has ended.
    pub async fn read(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = frame::decode(&mut self.read).expect("bytes that are not frames") {
                return Some(frame);
            }
            if !matches!(self.stream.read_buf(&mut self.read).await, Ok(1..)) {
                return None;
            }
        }
    }

    /// A sidecar that has ended the connection is noticed when it is read.
    async fn write(&mut self, kind: Kind, flags: u8, stream: u32, payload: &[u8]) {
        let mut bytes = BytesMut::new();
        frame::encode(&mut bytes, kind, flags, stream, payload);
        let _ = self.stream.write_all(&bytes).await;
        let _ = self.stream.flush().await;
    }
}
