//! A discovery stream as a sidecar has it: TLS with a certificate of the mesh, HTTP/2, and the messages in both
//! directions. Nothing of the sidecar is in it, so that the operator is measured and tested by what it sends.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::ClientConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;
use tulle_mesh::proto::discovery_client::DiscoveryClient;
use tulle_mesh::proto::{
    Ack, Hello, OperatorMessage, Resource, ResourceName, ResourceType, SidecarMessage, Subscribe,
    operator_message, sidecar_message,
};
use tulle_mesh::svid::SvidVerifier;

/// The certificate of a workload, and its root, in DER.
pub struct Certificate {
    pub root: Vec<u8>,
    pub leaf: Vec<u8>,
    pub key: Vec<u8>,
}

impl Certificate {
    /// What a sidecar with this certificate connects with.
    pub fn tls(self) -> ClientConfig {
        let verifier = SvidVerifier::new("cluster.local", &[CertificateDer::from(self.root)]);
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key));
        let mut config = ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_auth_cert(vec![CertificateDer::from(self.leaf)], key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.enable_sni = false;
        config
    }
}

/// A connection to the operator, as tonic wants it.
#[derive(Clone)]
pub struct Connection(SendRequest<tonic::body::Body>);

impl tower::Service<http::Request<tonic::body::Body>> for Connection {
    type Response = http::Response<hyper::body::Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

/// A stream that is up. It ends when this is dropped.
pub struct Stream {
    up: mpsc::Sender<SidecarMessage>,
    down: tonic::Streaming<OperatorMessage>,
    _client: DiscoveryClient<Connection>,
}

impl Stream {
    /// The stream of a pod's sidecar. Its first words are the hello and these subscriptions.
    pub async fn open(
        operator: SocketAddr,
        tls: Arc<ClientConfig>,
        pod_uid: &str,
        names: Vec<ResourceName>,
    ) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(operator).await?;
        stream.set_nodelay(true)?;
        let name = ServerName::try_from("operator.tulle")?;
        let stream = TlsConnector::from(tls).connect(name, stream).await?;
        let (send, connection) = Builder::new(TokioExecutor::new()).handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let origin = http::Uri::from_static("http://operator.tulle");
        let mut client = DiscoveryClient::with_origin(Connection(send), origin);
        let (up, messages) = mpsc::channel(names.len() + 64);
        let hello = Hello { pod_uid: pod_uid.to_owned(), ..Hello::default() };
        up.send(say(sidecar_message::Message::Hello(hello))).await?;
        for name in names {
            up.send(say(sidecar_message::Message::Subscribe(Subscribe { name: Some(name) }))).await?;
        }
        let down = client.stream(ReceiverStream::new(messages)).await?.into_inner();
        Ok(Self { up, down, _client: client })
    }

    /// The next resource, acknowledged; `None`: the operator has closed the stream.
    pub async fn next(&mut self) -> anyhow::Result<Option<Resource>> {
        while let Some(message) = self.down.message().await? {
            let Some(operator_message::Message::Resource(resource)) = message.message else { continue };
            let ack = Ack { name: resource.name.clone(), version: resource.version.clone() };
            self.up.send(say(sidecar_message::Message::Ack(ack))).await?;
            return Ok(Some(resource));
        }
        Ok(None)
    }

    /// Subscribes to one resource more.
    pub async fn subscribe(&mut self, name: ResourceName) -> anyhow::Result<()> {
        Ok(self.up.send(say(sidecar_message::Message::Subscribe(Subscribe { name: Some(name) }))).await?)
    }
}

/// The name of a resource.
pub fn name(kind: ResourceType, name: impl Into<String>) -> ResourceName {
    ResourceName { r#type: kind.into(), cluster: String::new(), name: name.into() }
}

fn say(message: sidecar_message::Message) -> SidecarMessage {
    SidecarMessage { message: Some(message) }
}
