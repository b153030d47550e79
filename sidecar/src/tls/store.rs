//! The present credentials and roots, as configurations that connections take when they begin.

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use rustls::client::Resumption;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ServerConfig};
use tokio::sync::watch;
use tulle_mesh::identity::WorkloadId;
use tulle_mesh::wire::ALPN;

use tulle_mesh::svid::SvidVerifier;

/// A key and the chain that the operator signed for it.
#[derive(Debug)]
pub struct Credentials {
    /// Leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's key; it never leaves the process.
    pub key: PrivateKeyDer<'static>,
    /// End of the leaf's lifetime, seconds since 1970.
    pub not_after: i64,
}

/// Everything that a handshake needs; swapped whole.
#[derive(Debug)]
pub struct Configs {
    /// To another sidecar.
    pub mesh_client: Arc<ClientConfig>,
    /// From another sidecar.
    pub mesh_server: Arc<ServerConfig>,
    /// To the operator, over HTTP/2.
    pub operator_client: Arc<ClientConfig>,
    /// Whom the leaf names.
    pub identity: WorkloadId,
    /// End of the leaf's lifetime, seconds since 1970.
    pub not_after: i64,
}

/// The present configurations; none until the first certificate has been fetched.
#[derive(Debug)]
pub struct TlsStore {
    current: ArcSwapOption<Configs>,
    ready: watch::Sender<bool>,
}

impl Default for TlsStore {
    fn default() -> Self {
        Self { current: ArcSwapOption::empty(), ready: watch::channel(false).0 }
    }
}

impl TlsStore {
    /// The present configurations.
    pub fn current(&self) -> Option<Arc<Configs>> {
        self.current.load_full()
    }

    /// Waits until there are configurations.
    pub async fn ready(&self) {
        let mut ready = self.ready.subscribe();
        // The sender lives as long as this store.
        let _ = ready.wait_for(|ready| *ready).await;
    }

    /// Swaps in new credentials or roots. Connections that run keep what they began with.
    ///
    /// # Errors
    /// When key and chain do not fit; the present ones stay.
    pub fn install(
        &self,
        trust_domain: &str,
        credentials: &Credentials,
        roots: &[CertificateDer<'static>],
    ) -> anyhow::Result<()> {
        let leaf =
            credentials.chain.first().ok_or_else(|| anyhow::anyhow!("the operator sent an empty chain"))?;
        let identity = super::peer_identity(leaf)?;
        let verifier = SvidVerifier::new(trust_domain, roots);
        let client = |alpn: &[u8]| -> anyhow::Result<Arc<ClientConfig>> {
            let mut config = ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
                .dangerous()
                .with_custom_certificate_verifier(Arc::clone(&verifier) as Arc<_>)
                .with_client_auth_cert(credentials.chain.clone(), credentials.key.clone_key())?;
            config.alpn_protocols = vec![alpn.to_vec()];
            // A resumed session would skip what has changed in roots and identities since.
            config.resumption = Resumption::disabled();
            config.enable_sni = false;
            Ok(Arc::new(config))
        };
        let mut server = ServerConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
            .with_client_cert_verifier(Arc::clone(&verifier) as Arc<_>)
            .with_single_cert(credentials.chain.clone(), credentials.key.clone_key())?;
        server.alpn_protocols = vec![ALPN.to_vec()];
        server.send_tls13_tickets = 0;
        self.current.store(Some(Arc::new(Configs {
            mesh_client: client(ALPN)?,
            mesh_server: Arc::new(server),
            operator_client: client(b"h2")?,
            identity,
            not_after: credentials.not_after,
        })));
        self.ready.send_replace(true);
        Ok(())
    }
}

/// A configuration for the first call to the operator, before there is a certificate: the operator
/// is verified, we are not (the token in the call says who we are).
pub fn bootstrap(trust_domain: &str, roots: &[CertificateDer<'static>]) -> ClientConfig {
    let verifier = SvidVerifier::new(trust_domain, roots);
    let mut config = ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    config
}
