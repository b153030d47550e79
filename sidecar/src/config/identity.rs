//! Certificates: a fresh key, a request with the pod's token, the operator's answer; renewed at half
//! of its life, and kept until it expires whatever the operator does.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::time::sleep;
use tulle_mesh::proto::SignRequest;
use tulle_mesh::proto::identity_client::IdentityClient;

use super::client::connect;
use crate::settings::Settings;
use crate::tls::{Credentials, TlsStore, store};

/// How often the trust bundle is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// New roots are followed by a new certificate within this, so that pods don't ask together.
const AFTER_NEW_ROOTS: Duration = Duration::from_secs(10);
/// The longest wait before a failed request is tried again.
const MAX_BACKOFF: Duration = Duration::from_secs(30);

/// Keeps a valid certificate installed for ever.
pub async fn run(settings: Arc<Settings>, tls: Arc<TlsStore>) {
    let mut backoff = Duration::from_millis(200);
    let mut keeper =
        Keeper { settings, tls, credentials: None, roots: Vec::new(), renew_at: SystemTime::UNIX_EPOCH };
    loop {
        match keeper.look().await {
            Ok(()) => {
                backoff = Duration::from_millis(200);
                sleep(LOOK_EVERY).await;
            }
            Err(error) => {
                let left = keeper.seconds_left();
                tracing::warn!(
                    error = format!("{error:#}"),
                    seconds_left = left,
                    "no new certificate; trying again"
                );
                sleep(backoff.mul_f64(0.5 + fastrand::f64())).await;
                backoff = (backoff * 2).min(MAX_BACKOFF);
            }
        }
    }
}

struct Keeper {
    settings: Arc<Settings>,
    tls: Arc<TlsStore>,
    credentials: Option<Credentials>,
    roots: Vec<CertificateDer<'static>>,
    renew_at: SystemTime,
}

impl Keeper {
    async fn look(&mut self) -> Result<()> {
        let roots = read_roots(&self.settings.trust_file)?;
        let roots_changed = roots != self.roots;
        self.roots = roots;
        if roots_changed && self.credentials.is_some() {
            // A leaf of a root that is gone is of no use to anybody.
            let soon = SystemTime::now() + AFTER_NEW_ROOTS.mul_f64(fastrand::f64());
            self.renew_at = self.renew_at.min(soon);
        }
        if SystemTime::now() >= self.renew_at {
            let credentials = self.request().await?;
            self.renew_at = renewal(&credentials);
            tracing::info!(not_after = credentials.not_after, "a new certificate");
            self.credentials = Some(credentials);
        } else if !roots_changed {
            return Ok(());
        }
        match &self.credentials {
            Some(credentials) => self.tls.install(&self.settings.trust_domain, credentials, &self.roots),
            None => Ok(()),
        }
    }

    async fn request(&self) -> Result<Credentials> {
        let token_file = &self.settings.token_file;
        let token =
            std::fs::read_to_string(token_file).with_context(|| format!("cannot read {token_file}"))?;
        let key = KeyPair::generate()?;
        // Only the key of the request is read: names come from the token.
        let csr = CertificateParams::new(Vec::new())?.serialize_request(&key)?;
        let bootstrap = store::bootstrap(&self.settings.trust_domain, &self.roots);
        let operator = connect(&self.settings, Arc::new(bootstrap)).await?;
        let origin = http::Uri::from_static("http://operator.tulle");
        let request = SignRequest {
            token: token.trim().to_owned(),
            csr_der: csr.der().to_vec(),
            pod_uid: self.settings.pod_uid.clone(),
        };
        let answer = IdentityClient::with_origin(operator, origin).sign(request).await?.into_inner();
        Ok(Credentials {
            chain: answer.chain_der.into_iter().map(CertificateDer::from).collect(),
            key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
            not_after: answer.not_after_unix,
        })
    }

    fn seconds_left(&self) -> i64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        self.credentials.as_ref().map_or(0, |c| c.not_after - i64::try_from(now).unwrap_or(i64::MAX))
    }
}

/// Half of the life that is left, and up to a tenth less so that pods don't ask together.
fn renewal(credentials: &Credentials) -> SystemTime {
    let now = SystemTime::now();
    let end = UNIX_EPOCH + Duration::from_secs(u64::try_from(credentials.not_after).unwrap_or(0));
    let left = end.duration_since(now).unwrap_or_default();
    now + left.mul_f64(0.5 - 0.1 * fastrand::f64())
}

/// Reads the trust bundle. Not with `tokio::fs`, which would keep a thread for a read of 20 µs every two seconds.
fn read_roots(path: &str) -> Result<Vec<CertificateDer<'static>>> {
    let pem = std::fs::read(path).with_context(|| format!("cannot read the trust bundle {path}"))?;
    let mut roots = CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>()?;
    // Bundles are compared as sets: kubelet may reorder them.
    roots.sort_by(|a, b| a.as_ref().cmp(b.as_ref()));
    roots.dedup();
    anyhow::ensure!(!roots.is_empty(), "the trust bundle {path} is empty");
    Ok(roots)
}
