//! The root, and leaf certificates signed by it.
//!
//! In: PEM files, certificate requests, identities. Out: certificates. Never reads or writes a Secret.

use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, bail};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType,
};
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer, pem::PemObject as _};
use tulle_mesh::identity::WorkloadId;

/// Name of the Secret with the root.
pub const SECRET: &str = "tulle-root";
/// Lifetime of the root. A shorter one stops a mesh that nobody maintains (istio#14516).
const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 86_400);
/// Certificates are valid from this long before they are issued, because clocks of nodes differ.
const SKEW: Duration = Duration::from_secs(120);

/// A root certificate and its key.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
    root_pem: String,
    not_after: SystemTime,
}

/// A signed leaf.
#[derive(Clone, Debug)]
pub struct Leaf {
    /// The certificates, the leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf as PEM, for peers that read files.
    pub pem: String,
    /// When it expires, in seconds since 1970.
    pub not_after_unix: i64,
}

/// Why a certificate request was refused. The requester is at fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// It is not a PKCS #10 request that is signed with its own key.
    #[error("invalid certificate request, or it is not signed with its own key")]
    Unreadable,
    /// The key is not on the curve P-256.
    #[error("unsupported key in the certificate request: expected ECDSA P-256")]
    Key,
}

impl Authority {
    /// Creates a root for a trust domain. Returns its key as PEM too.
    ///
    /// # Errors
    /// The system has no randomness, or the trust domain is invalid.
    pub fn generate(trust_domain: &str) -> Result<(Self, String)> {
        let mut params = CertificateParams::new(Vec::new())?;
        let uri = Ia5String::try_from(format!("spiffe://{trust_domain}"))?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.distinguished_name.push(DnType::CommonName, "Tulle root");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let now = SystemTime::now();
        params.not_before = (now - SKEW).into();
        params.not_after = (now + ROOT_LIFETIME).into();
        let root = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let (pem, key) = (root.pem(), root.key().serialize_pem());
        Ok((Self::load(&pem, &key)?, key))
    }

    /// Loads a root from its PEM files.
    ///
    /// # Errors
    /// One of them is invalid, or the key does not match the certificate.
    pub fn load(root_pem: &str, key_pem: &str) -> Result<Self> {
        let root = CertificateDer::from_pem_slice(root_pem.as_bytes()).context("the root certificate")?;
        let key = KeyPair::from_pem(key_pem).context("the root's key")?;
        if !belongs(&key, &root)? {
            bail!("ca.key is not the key of ca.crt");
        }
        let issuer = Issuer::from_ca_cert_pem(root_pem, key).context("the root certificate")?;
        let not_after = end_of(&root)?;
        Ok(Self { issuer, root, root_pem: root_pem.to_owned(), not_after })
    }

    /// Loads the root from its Secret.
    ///
    /// # Errors
    /// A key is missing or invalid, or the private key does not match the certificate.
    pub fn from_secret(secret: &Secret) -> Result<Self> {
        let read = |name: &str| {
            let bytes = secret.data.as_ref().and_then(|data| data.get(name));
            let bytes = bytes.with_context(|| format!("Secret {SECRET} has no {name}"))?;
            String::from_utf8(bytes.0.clone())
                .with_context(|| format!("{name} of Secret {SECRET} is not PEM"))
        };
        Self::load(&read("ca.crt")?, &read("ca.key")?)
    }

    /// The Secret with this root and its key.
    pub fn to_secret(&self, key_pem: &str) -> Secret {
        let data = [("ca.crt", self.root_pem.as_str()), ("ca.key", key_pem)];
        let data = data.map(|(name, pem)| (name.to_owned(), ByteString(pem.as_bytes().to_vec())));
        Secret {
            metadata: ObjectMeta { name: Some(SECRET.to_owned()), ..ObjectMeta::default() },
            data: Some(data.into()),
            ..Secret::default()
        }
    }

    /// The root certificate as PEM, for trust bundles.
    pub fn root_pem(&self) -> &str {
        &self.root_pem
    }

    /// The trust domain in the root certificate. A root that another tool has created may have none.
    pub fn trust_domain(&self) -> Option<String> {
        tulle_mesh::svid::trust_domain_of(&self.root)
    }

    /// The root certificate.
    pub fn root(&self) -> &CertificateDer<'static> {
        &self.root
    }

    /// Issues a leaf certificate for the key in a certificate request. Ignores everything else in the request.
    ///
    /// # Errors
    /// [`RequestError`].
    pub fn sign_request(&self, csr_der: &[u8], identity: &WorkloadId, lifetime: Duration) -> Result<Leaf> {
        let csr = CertificateSigningRequestDer::from(csr_der);
        let request =
            CertificateSigningRequestParams::from_der(&csr).map_err(|_| RequestError::Unreadable)?;
        if request.public_key.algorithm() != &rcgen::PKCS_ECDSA_P256_SHA256 {
            bail!(RequestError::Key);
        }
        self.sign(&request.public_key, identity, lifetime)
    }

    /// Issues a leaf certificate for a key.
    ///
    /// # Errors
    /// The identity cannot be encoded, or signing fails.
    pub fn sign(&self, key: &impl PublicKeyData, identity: &WorkloadId, lifetime: Duration) -> Result<Leaf> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "Tulle");
        params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(identity.to_string())?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let now = SystemTime::now();
        // A leaf that outlives its root would be renewed too late.
        let not_after = (now + lifetime).min(self.not_after);
        params.not_before = (now - SKEW).into();
        params.not_after = not_after.into();
        let leaf = params.signed_by(key, &self.issuer)?;
        let not_after_unix = i64::try_from(not_after.duration_since(SystemTime::UNIX_EPOCH)?.as_secs())?;
        Ok(Leaf { chain: vec![leaf.der().clone()], pem: leaf.pem(), not_after_unix })
    }
}

/// Whether a certificate contains the public part of this key. No peer would trust leaves that another key has signed.
fn belongs(key: &KeyPair, certificate: &CertificateDer<'_>) -> Result<bool> {
    let mut store = RootCertStore::empty();
    store.add(certificate.clone()).context("the root certificate")?;
    let anchor = store.roots.first().context("the root certificate")?;
    // The key is the last part of a SubjectPublicKeyInfo, and what precedes it says how long it is.
    let info: &[u8] = anchor.subject_public_key_info.as_ref();
    Ok(info.ends_with(key.public_key_raw()))
}

fn end_of(root: &CertificateDer<'_>) -> Result<SystemTime> {
    let seconds = tulle_mesh::svid::not_after(root)?;
    Ok(SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::SigningKey as _;
    use tulle_mesh::svid::peer_identity;

    const LIFE: Duration = Duration::from_secs(3600);

    fn csr(change: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        change(&mut params);
        params.serialize_request(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    #[test]
    fn names_in_a_request_are_not_read() {
        let (authority, _) = Authority::generate("cluster.local").unwrap();
        let me = WorkloadId::new("cluster.local", "shop", "web");
        let greedy = csr(|params| {
            params.subject_alt_names =
                vec![SanType::URI("spiffe://cluster.local/ns/kube-system/sa/admin".try_into().unwrap())];
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        });
        let leaf = authority.sign_request(&greedy, &me, LIFE);
        // A request that asks to be an authority may be refused; if it is signed, then for us alone.
        if let Ok(leaf) = leaf {
            assert_eq!(peer_identity(&leaf.chain[0]), Ok(me.clone()));
        }
        let plain =
            csr(|params| params.subject_alt_names = vec![SanType::DnsName("evil".try_into().unwrap())]);
        let leaf = authority.sign_request(&plain, &me, LIFE).unwrap();
        assert_eq!(peer_identity(&leaf.chain[0]), Ok(me));
    }

    #[test]
    fn requests_that_are_broken_or_of_another_kind_of_key_are_refused() {
        let (authority, _) = Authority::generate("cluster.local").unwrap();
        let me = WorkloadId::new("cluster.local", "shop", "web");
        let mut forged = csr(|_| {});
        let last = forged.len() - 1;
        forged[last] ^= 1;
        assert!(authority.sign_request(&forged, &me, LIFE).is_err());
        assert!(authority.sign_request(b"x", &me, LIFE).is_err());
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        assert!(!key.der_bytes().is_empty() && key.sign(b"x").is_ok());
        let other = CertificateParams::new(Vec::new()).unwrap().serialize_request(&key).unwrap();
        assert!(authority.sign_request(other.der(), &me, LIFE).is_err());
    }

    #[test]
    fn a_root_names_its_trust_domain() {
        let (authority, key) = Authority::generate("corp.example").unwrap();
        assert_eq!(authority.trust_domain().as_deref(), Some("corp.example"));
        let again = Authority::load(authority.root_pem(), &key).unwrap();
        assert_eq!(again.trust_domain().as_deref(), Some("corp.example"));
    }

    #[test]
    fn a_root_and_its_key_survive_the_secret() {
        let (authority, key) = Authority::generate("cluster.local").unwrap();
        let again = Authority::from_secret(&authority.to_secret(&key)).unwrap();
        assert_eq!(again.root(), authority.root());
    }

    #[test]
    fn a_key_that_is_not_that_of_the_certificate_is_noticed() {
        let ((authority, _), (_, other)) =
            (Authority::generate("cluster.local").unwrap(), Authority::generate("cluster.local").unwrap());
        let error = Authority::load(authority.root_pem(), &other).err().unwrap();
        assert_eq!(error.to_string(), "ca.key is not the key of ca.crt");
        let p384 = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap().serialize_pem();
        assert!(Authority::load(authority.root_pem(), &p384).is_err());
    }

    #[test]
    fn a_leaf_does_not_outlive_its_root() {
        let (authority, _) = Authority::generate("cluster.local").unwrap();
        let me = WorkloadId::new("cluster.local", "shop", "web");
        let leaf = authority.sign_request(&csr(|_| {}), &me, ROOT_LIFETIME * 2).unwrap();
        assert!(leaf.not_after_unix <= tulle_mesh::svid::not_after(authority.root()).unwrap());
    }
}
