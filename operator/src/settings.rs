//! Arguments of the operator.

use clap::Parser;

/// Tulle's control plane.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub struct Settings {
    /// The namespace that Tulle runs in.
    #[arg(long, env = "TULLE_NAMESPACE")]
    pub namespace: String,
    /// This pod's name: who holds the Lease.
    #[arg(long, env = "TULLE_POD_NAME")]
    pub pod_name: String,
    /// This pod's address: where another replica forwards to.
    #[arg(long, env = "TULLE_POD_IP")]
    pub pod_ip: String,
    /// The service account of the operator, as its certificate names it.
    #[arg(long, env = "TULLE_SERVICE_ACCOUNT", default_value = "tulle-operator")]
    pub service_account: String,
    /// Whether a sidecar must come from an address of its pod. `false` is for networks that rewrite the source address
    /// of connections to a Service; certificates are checked in any case.
    #[arg(long, env = "TULLE_CHECK_ADDRESSES", default_value_t = true, action = clap::ArgAction::Set)]
    pub check_addresses: bool,
    /// The trust domain of a new mesh. It has no effect once Secret tulle-root or MeshConfig mesh exists.
    #[arg(long, env = "TULLE_TRUST_DOMAIN", default_value_t = tulle_crds::trust_domain(), value_parser = parse_trust_domain)]
    pub trust_domain: String,
}

/// Why a trust domain was rejected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid trust domain: expected 1 to 253 of the characters a-z 0-9 . _ -, as in cluster.local")]
pub struct InvalidTrustDomain;

/// A trust domain, as the schema of MeshConfig accepts it.
fn parse_trust_domain(text: &str) -> Result<String, InvalidTrustDomain> {
    let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-');
    let valid = (1..=253).contains(&text.len()) && text.bytes().all(allowed);
    valid.then(|| text.to_owned()).ok_or(InvalidTrustDomain)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEEDED: [&str; 4] =
        ["tulle-operator", "--namespace=mesh", "--pod-name=operator-0", "--pod-ip=10.0.0.1"];

    #[test]
    fn the_trust_domain_is_cluster_local_unless_it_is_set() {
        let default = Settings::try_parse_from(NEEDED).unwrap();
        assert_eq!(default.trust_domain, "cluster.local");
        let set = Settings::try_parse_from(NEEDED.into_iter().chain(["--trust-domain=corp.example"]));
        assert_eq!(set.unwrap().trust_domain, "corp.example");
    }

    #[test]
    fn a_trust_domain_that_meshconfig_would_reject_is_rejected_and_named() {
        for wrong in ["", "Corp.example", "a b", "spiffe://x", "ä", "a".repeat(254).as_str()] {
            let argument = format!("--trust-domain={wrong}");
            let error = Settings::try_parse_from(NEEDED.into_iter().chain([argument.as_str()])).unwrap_err();
            let text = error.to_string();
            assert!(text.contains("trust-domain") && text.contains(wrong), "{text}");
        }
        assert_eq!(parse_trust_domain(&"a".repeat(253)).map(|ok| ok.len()), Ok(253));
    }
}
