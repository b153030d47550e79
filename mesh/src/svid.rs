//! What a peer's certificate must be (SPIFFE X509-SVID §§2–5): each failure is its own error.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, SignatureScheme};
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::identity::{IdentityError, WorkloadId};

/// Why a peer's certificate was refused. The peer, or whoever signed it, is at fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerCertificateError {
    /// The peer showed none.
    #[error("the peer showed no certificate")]
    Missing,
    /// Not an X.509 certificate.
    #[error("the peer's certificate cannot be read")]
    Unreadable,
    /// No path to a root of this trust domain.
    #[error("the peer's certificate has no path to a trusted root: {0}")]
    Untrusted(String),
    /// Outside its lifetime.
    #[error("the peer's certificate is not valid now ({now}): valid from {not_before} to {not_after}")]
    Lifetime {
        /// Now, seconds since 1970.
        now: i64,
        /// Start of its lifetime.
        not_before: i64,
        /// End of its lifetime.
        not_after: i64,
    },
    /// A leaf must not be a CA.
    #[error("the peer's certificate is that of a certificate authority")]
    IsAuthority,
    /// Key usage must be there, critical, with digitalSignature and without keyCertSign and cRLSign.
    #[error("the peer's certificate has the wrong key usage")]
    KeyUsage,
    /// Exactly one URI.
    #[error("the peer's certificate names {0} URIs instead of one")]
    UriCount(usize),
    /// The URI is no workload id.
    #[error("the peer's certificate names no workload: {0}")]
    Identity(#[from] IdentityError),
    /// Another trust domain than the one whose roots were used.
    #[error("the peer's certificate is of trust domain {0}")]
    TrustDomain(String),
}

/// Verifies peers against the roots of one trust domain.
#[derive(Debug)]
pub struct SvidVerifier {
    trust_domain: String,
    roots: Vec<TrustAnchor<'static>>,
    algorithms: WebPkiSupportedAlgorithms,
    mandatory: bool,
}

impl SvidVerifier {
    /// A verifier for a trust domain and its roots. Roots that cannot be read are left out.
    pub fn new(trust_domain: &str, roots: &[CertificateDer<'static>]) -> Arc<Self> {
        let anchors = roots.iter().filter_map(|root| webpki::anchor_from_trusted_cert(root).ok());
        Arc::new(Self {
            trust_domain: trust_domain.to_owned(),
            roots: anchors.map(|anchor| anchor.to_owned()).collect(),
            algorithms: rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms,
            mandatory: true,
        })
    }

    /// The same for a server whose clients may show no certificate; one that they show must be good.
    pub fn optional(&self) -> Arc<Self> {
        Arc::new(Self {
            trust_domain: self.trust_domain.clone(),
            roots: self.roots.clone(),
            algorithms: self.algorithms,
            mandatory: false,
        })
    }

    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        usage: KeyUsage,
    ) -> Result<WorkloadId, PeerCertificateError> {
        check_lifetime(leaf, now)?;
        let certificate = EndEntityCert::try_from(leaf).map_err(|_| PeerCertificateError::Unreadable)?;
        let path = certificate.verify_for_usage(
            self.algorithms.all,
            &self.roots,
            intermediates,
            now,
            usage,
            None,
            None,
        );
        path.map_err(|error| match error {
            webpki::Error::CaUsedAsEndEntity => PeerCertificateError::IsAuthority,
            other => PeerCertificateError::Untrusted(other.to_string()),
        })?;
        let id = peer_identity(leaf)?;
        if id.trust_domain == self.trust_domain {
            Ok(id)
        } else {
            Err(PeerCertificateError::TrustDomain(id.trust_domain))
        }
    }
}

fn check_lifetime(leaf: &CertificateDer<'_>, now: UnixTime) -> Result<(), PeerCertificateError> {
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|_| PeerCertificateError::Unreadable)?;
    let (not_before, not_after) =
        (parsed.validity().not_before.timestamp(), parsed.validity().not_after.timestamp());
    let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    if (not_before..=not_after).contains(&now) {
        Ok(())
    } else {
        Err(PeerCertificateError::Lifetime { now, not_before, not_after })
    }
}

/// Whom a leaf names, after the checks that need no roots.
///
/// # Errors
/// [`PeerCertificateError`].
pub fn peer_identity(leaf: &CertificateDer<'_>) -> Result<WorkloadId, PeerCertificateError> {
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|_| PeerCertificateError::Unreadable)?;
    if parsed.is_ca() {
        return Err(PeerCertificateError::IsAuthority);
    }
    let usage = parsed.extensions().iter().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::KeyUsage(usage) => Some((extension.critical, usage)),
        _ => None,
    });
    match usage {
        Some((true, usage)) if usage.digital_signature() && !usage.key_cert_sign() && !usage.crl_sign() => {}
        _ => return Err(PeerCertificateError::KeyUsage),
    }
    let uris = uris(&parsed)?;
    match uris.as_slice() {
        [uri] => Ok(uri.parse()?),
        _ => Err(PeerCertificateError::UriCount(uris.len())),
    }
}

/// The trust domain that a root names, if it names one (X509-SVID §2: a signing certificate's id has no path).
pub fn trust_domain_of(root: &CertificateDer<'_>) -> Option<String> {
    let (_, parsed) = X509Certificate::from_der(root).ok()?;
    match uris(&parsed).ok()?.as_slice() {
        [uri] => uri.strip_prefix("spiffe://").filter(|domain| !domain.contains('/')).map(str::to_owned),
        _ => None,
    }
}

fn uris<'a>(certificate: &'a X509Certificate<'_>) -> Result<Vec<&'a str>, PeerCertificateError> {
    let names = certificate.subject_alternative_name().map_err(|_| PeerCertificateError::Unreadable)?;
    let names = names.map_or(&[][..], |names| &names.value.general_names);
    let uri = |name: &'a GeneralName<'_>| if let GeneralName::URI(uri) = name { Some(*uri) } else { None };
    Ok(names.iter().filter_map(uri).collect())
}

/// The end of a certificate's lifetime, seconds since 1970.
///
/// # Errors
/// [`PeerCertificateError::Unreadable`].
pub fn not_after(certificate: &CertificateDer<'_>) -> Result<i64, PeerCertificateError> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| PeerCertificateError::Unreadable)?;
    Ok(parsed.validity().not_after.timestamp())
}

fn refuse(error: &PeerCertificateError) -> rustls::Error {
    rustls::Error::General(error.to_string())
}

impl ServerCertVerifier for SvidVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match self.verify(end_entity, intermediates, now, KeyUsage::server_auth()) {
            Ok(_) => Ok(ServerCertVerified::assertion()),
            Err(error) => Err(refuse(&error)),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 only".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for SvidVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        self.mandatory
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        match self.verify(end_entity, intermediates, now, KeyUsage::client_auth()) {
            Ok(_) => Ok(ClientCertVerified::assertion()),
            Err(error) => Err(refuse(&error)),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 only".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::string::Ia5String;
    use rcgen::{
        BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, KeyUsagePurpose, SanType,
    };
    use std::time::Duration;

    struct Authority(CertifiedIssuer<'static, KeyPair>);

    impl Authority {
        fn new() -> Self {
            let mut params = CertificateParams::new(Vec::new()).unwrap();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
            Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
        }

        fn leaf(
            &self,
            uris: &[&str],
            change: impl FnOnce(&mut CertificateParams),
        ) -> CertificateDer<'static> {
            let mut params = CertificateParams::new(Vec::new()).unwrap();
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            params.subject_alt_names =
                uris.iter().map(|uri| SanType::URI(Ia5String::try_from(*uri).unwrap())).collect();
            change(&mut params);
            params.signed_by(&KeyPair::generate().unwrap(), &self.0).unwrap().der().clone()
        }

        fn check(&self, leaf: &CertificateDer<'static>) -> Result<WorkloadId, PeerCertificateError> {
            let verifier = SvidVerifier::new("cluster.local", &[self.0.der().clone()]);
            verifier.verify(leaf, &[], UnixTime::now(), KeyUsage::client_auth())
        }
    }

    const SHOP: &str = "spiffe://cluster.local/ns/shop/sa/web";

    #[test]
    fn a_proper_leaf_names_its_workload() {
        let authority = Authority::new();
        let id = authority.check(&authority.leaf(&[SHOP], |_| {}));
        assert_eq!(id, Ok(WorkloadId::new("cluster.local", "shop", "web")));
    }

    #[test]
    fn each_way_to_be_wrong_is_its_own_error() {
        let authority = Authority::new();
        let why = |leaf: &CertificateDer<'static>| authority.check(leaf).unwrap_err();
        assert_eq!(
            why(&authority.leaf(&[SHOP, "spiffe://cluster.local/ns/a/sa/b"], |_| {})),
            PeerCertificateError::UriCount(2)
        );
        assert_eq!(why(&authority.leaf(&[], |_| {})), PeerCertificateError::UriCount(0));
        assert_eq!(
            why(&authority.leaf(&["spiffe://other/ns/a/sa/b"], |_| {})),
            PeerCertificateError::TrustDomain("other".into())
        );
        assert!(matches!(why(&authority.leaf(&["https://a/b"], |_| {})), PeerCertificateError::Identity(_)));
        assert_eq!(why(&authority.leaf(&[SHOP], |p| p.key_usages.clear())), PeerCertificateError::KeyUsage);
        let signing = authority.leaf(&[SHOP], |p| p.key_usages.push(KeyUsagePurpose::KeyCertSign));
        assert_eq!(why(&signing), PeerCertificateError::KeyUsage);
        let ca = authority.leaf(&[SHOP], |p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
        assert_eq!(why(&ca), PeerCertificateError::IsAuthority);
        let expired = authority.leaf(&[SHOP], |p| {
            p.not_after = std::time::SystemTime::now().checked_sub(Duration::from_secs(60)).unwrap().into();
        });
        assert!(matches!(why(&expired), PeerCertificateError::Lifetime { .. }));
        let future = authority.leaf(&[SHOP], |p| {
            p.not_before = (std::time::SystemTime::now() + Duration::from_secs(600)).into()
        });
        assert!(matches!(why(&future), PeerCertificateError::Lifetime { .. }));
        let stranger = Authority::new().leaf(&[SHOP], |_| {});
        assert!(matches!(why(&stranger), PeerCertificateError::Untrusted(_)));
        assert_eq!(why(&CertificateDer::from(vec![1, 2, 3])), PeerCertificateError::Unreadable);
    }
}
