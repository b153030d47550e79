//! SPIFFE ids of workloads: `spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>`.

use std::fmt;
use std::str::FromStr;

/// Who a workload is. Compared by its fields, never as a concatenated string.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkloadId {
    /// The trust domain, lower case.
    pub trust_domain: String,
    /// The Kubernetes namespace.
    pub namespace: String,
    /// The Kubernetes service account.
    pub service_account: String,
}

/// Why a URI is no workload id (SPIFFE-ID §2 and our own path layout).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Not a `spiffe://` URI.
    #[error("not a spiffe:// URI")]
    Scheme,
    /// The trust domain is empty or has characters outside `[a-z0-9._-]`.
    #[error("trust domain must be lower-case letters, digits, dots, dashes and underscores")]
    TrustDomain,
    /// The path is not `/ns/<namespace>/sa/<service-account>`.
    #[error("path must be /ns/<namespace>/sa/<service-account>")]
    Path,
}

impl WorkloadId {
    /// Builds an id from parts that are already known to be valid Kubernetes names.
    pub fn new(trust_domain: &str, namespace: &str, service_account: &str) -> Self {
        Self {
            trust_domain: trust_domain.to_owned(),
            namespace: namespace.to_owned(),
            service_account: service_account.to_owned(),
        }
    }
}

impl fmt::Display for WorkloadId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

impl FromStr for WorkloadId {
    type Err = IdentityError;

    fn from_str(uri: &str) -> Result<Self, IdentityError> {
        let rest = uri.strip_prefix("spiffe://").ok_or(IdentityError::Scheme)?;
        let (trust_domain, path) = rest.split_once('/').ok_or(IdentityError::Path)?;
        let domain_char = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c);
        if trust_domain.is_empty() || trust_domain.len() > 255 || !trust_domain.chars().all(domain_char) {
            return Err(IdentityError::TrustDomain);
        }
        let segments: Vec<&str> = path.split('/').collect();
        match segments.as_slice() {
            ["ns", namespace, "sa", account] if is_name(namespace) && is_name(account) => {
                Ok(Self::new(trust_domain, namespace, account))
            }
            _ => Err(IdentityError::Path),
        }
    }
}

/// A Kubernetes DNS-1123 subdomain: what namespaces and service accounts are named by.
fn is_name(segment: &str) -> bool {
    !segment.is_empty()
        && segment.len() <= 253
        && segment.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.')
        && segment != "."
        && segment != ".."
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_survives_the_round_trip() {
        let id = WorkloadId::new("cluster.local", "shop", "checkout");
        assert_eq!(id.to_string().parse(), Ok(id));
    }

    #[test]
    fn ids_outside_the_specification_are_refused() {
        for (uri, why) in [
            ("http://cluster.local/ns/a/sa/b", IdentityError::Scheme),
            ("spiffe://Cluster.local/ns/a/sa/b", IdentityError::TrustDomain),
            ("spiffe://td:80/ns/a/sa/b", IdentityError::TrustDomain),
            ("spiffe://user@td/ns/a/sa/b", IdentityError::TrustDomain),
            ("spiffe:///ns/a/sa/b", IdentityError::TrustDomain),
            ("spiffe://td", IdentityError::Path),
            ("spiffe://td/ns/a/sa/b/", IdentityError::Path),
            ("spiffe://td/ns//sa/b", IdentityError::Path),
            ("spiffe://td/ns/../sa/b", IdentityError::Path),
            ("spiffe://td/ns/a/sa/b?x=1", IdentityError::Path),
            ("spiffe://td/ns/a/sa/b#f", IdentityError::Path),
            ("spiffe://td/ns/%61/sa/b", IdentityError::Path),
            ("spiffe://td/sa/a/ns/b", IdentityError::Path),
        ] {
            assert_eq!(uri.parse::<WorkloadId>(), Err(why), "{uri}");
        }
    }
}
