//! What the webhook tells the sidecar through its environment, read once, before a port is bound.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, bail};
use tulle_mesh::identity::WorkloadId;

/// Environment variables that the webhook writes.
pub mod env {
    /// The pod's name.
    pub const POD_NAME: &str = "TULLE_POD_NAME";
    /// The pod's namespace.
    pub const POD_NAMESPACE: &str = "TULLE_POD_NAMESPACE";
    /// The pod's uid: the identity request must name the pod of its token.
    pub const POD_UID: &str = "TULLE_POD_UID";
    /// The pod's addresses, comma separated.
    pub const POD_IPS: &str = "TULLE_POD_IPS";
    /// The trust domain.
    pub const TRUST_DOMAIN: &str = "TULLE_TRUST_DOMAIN";
    /// `host:port` of the operator.
    pub const OPERATOR: &str = "TULLE_OPERATOR";
    /// Addresses and port of the operator's Service at admission, comma separated; none unless it is set.
    pub const OPERATOR_ADDRESSES: &str = "TULLE_OPERATOR_ADDRESSES";
    /// Whom the operator's certificate must name, `namespace/service-account`.
    pub const OPERATOR_IDENTITY: &str = "TULLE_OPERATOR_IDENTITY";
    /// The projected token.
    pub const TOKEN_FILE: &str = "TULLE_TOKEN_FILE";
    /// The trust bundle.
    pub const TRUST_FILE: &str = "TULLE_TRUST_FILE";
    /// Rewritten probes, JSON.
    pub const PROBES: &str = "TULLE_PROBES";
    /// Data threads; 1 unless a pod needs more.
    pub const WORKERS: &str = "TULLE_WORKERS";
    /// Whose address the application sees, `preserve` or `sidecar`; the latter unless it is set.
    pub const SOURCE_ADDRESS: &str = "TULLE_SOURCE_ADDRESS";
    /// Not written by the webhook: features to have, comma separated, instead of all that this build has. What
    /// a sidecar without the others would refuse, this one refuses too: a way to try an upgrade.
    pub const FEATURES: &str = "TULLE_FEATURES";
    /// Not written by the webhook: `on` or `off`, whether requests and connections are counted; `on` unless it is set.
    /// For measurements of what counting costs.
    pub const TELEMETRY: &str = "TULLE_TELEMETRY";
}

/// Whose address the application sees as that of its client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SourceAddress {
    /// The pod's own: the sidecar's connections come from it.
    #[default]
    Sidecar,
    /// The client's.
    Preserve,
}

/// The sidecar's settings.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The pod's name.
    pub pod_name: String,
    /// The pod's namespace.
    pub pod_namespace: String,
    /// The pod's uid.
    pub pod_uid: String,
    /// The pod's addresses.
    pub pod_ips: Vec<IpAddr>,
    /// The trust domain.
    pub trust_domain: String,
    /// `host:port` of the operator.
    pub operator: String,
    /// The operator where `operator` cannot be resolved or does not lead to it.
    pub operator_addresses: Vec<SocketAddr>,
    /// Whom the operator's certificate must name.
    pub operator_identity: WorkloadId,
    /// Path of the projected token.
    pub token_file: String,
    /// Path of the trust bundle.
    pub trust_file: String,
    /// Rewritten probes.
    pub probes: Vec<crate::probe::Probe>,
    /// Data threads.
    pub workers: usize,
    /// Whose address the application sees.
    pub source_address: SourceAddress,
    /// What resources may require of this sidecar.
    pub features: Vec<&'static str>,
    /// Whether requests and connections are counted.
    pub telemetry: bool,
}

impl Settings {
    /// Reads the environment.
    ///
    /// # Errors
    /// The first variable that is missing or malformed, by name.
    pub fn from_env() -> Result<Self> {
        let read = |name: &str| {
            std::env::var(name)
                .with_context(|| format!("{name} is not set: was this pod injected by the webhook?"))
        };
        let trust_domain = read(env::TRUST_DOMAIN)?;
        let operator = read(env::OPERATOR_IDENTITY)?;
        let Some((namespace, account)) = operator.split_once('/') else {
            bail!("{} must be namespace/service-account, not {operator:?}", env::OPERATOR_IDENTITY);
        };
        let ips = read(env::POD_IPS)?;
        let ips = ips.split(',').filter(|ip| !ip.is_empty()).map(str::parse).collect::<Result<_, _>>();
        let probes = match std::env::var(env::PROBES) {
            Ok(text) => {
                serde_json::from_str(&text).with_context(|| format!("{} cannot be read", env::PROBES))?
            }
            Err(_) => Vec::new(),
        };
        let workers = match std::env::var(env::WORKERS) {
            Ok(text) => text.parse().with_context(|| format!("{} must be a number", env::WORKERS))?,
            Err(_) => 1,
        };
        let features = match std::env::var(env::FEATURES) {
            Ok(text) => features(&text)?,
            Err(_) => tulle_mesh::features::ALL.to_vec(),
        };
        let operator_addresses = match std::env::var(env::OPERATOR_ADDRESSES) {
            Ok(text) => operator_addresses(&text)?,
            Err(_) => Vec::new(),
        };
        let source_address = match std::env::var(env::SOURCE_ADDRESS) {
            Ok(text) => source_address(&text)?,
            Err(_) => SourceAddress::default(),
        };
        let telemetry = match std::env::var(env::TELEMETRY) {
            Ok(text) => telemetry(&text)?,
            Err(_) => true,
        };
        Ok(Self {
            features,
            telemetry,
            source_address,
            pod_name: read(env::POD_NAME)?,
            pod_namespace: read(env::POD_NAMESPACE)?,
            pod_uid: read(env::POD_UID)?,
            pod_ips: ips.with_context(|| format!("{} must be addresses", env::POD_IPS))?,
            operator_identity: WorkloadId::new(&trust_domain, namespace, account),
            trust_domain,
            operator: read(env::OPERATOR)?,
            operator_addresses,
            token_file: read(env::TOKEN_FILE)?,
            trust_file: read(env::TRUST_FILE)?,
            probes,
            workers,
        })
    }
}

fn features(text: &str) -> Result<Vec<&'static str>> {
    let names = text.split(',').filter(|name| !name.is_empty());
    let known = |name| {
        let all = tulle_mesh::features::ALL;
        let found = all.iter().copied().find(|feature| *feature == name);
        found.with_context(|| format!("{} may hold {}, not {name:?}", env::FEATURES, all.join(", ")))
    };
    names.map(known).collect()
}

fn operator_addresses(text: &str) -> Result<Vec<SocketAddr>> {
    let addresses = text.split(',').filter(|address| !address.is_empty());
    let parsed = addresses.map(str::parse).collect::<Result<_, _>>();
    parsed.with_context(|| format!("{} must be addresses with ports, not {text:?}", env::OPERATOR_ADDRESSES))
}

fn source_address(text: &str) -> Result<SourceAddress> {
    match text {
        "sidecar" => Ok(SourceAddress::Sidecar),
        "preserve" => Ok(SourceAddress::Preserve),
        _ => bail!("{} must be preserve or sidecar, not {text:?}", env::SOURCE_ADDRESS),
    }
}

fn telemetry(text: &str) -> Result<bool> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => bail!("{} must be on or off, not {text:?}", env::TELEMETRY),
    }
}

#[cfg(test)]
impl Settings {
    /// The settings of a pod in namespace `shop` whose uid is its name.
    pub(crate) fn of_test_pod(name: &str) -> Self {
        Self {
            pod_name: name.to_owned(),
            pod_namespace: "shop".to_owned(),
            pod_uid: name.to_owned(),
            pod_ips: Vec::new(),
            trust_domain: "cluster.local".to_owned(),
            operator: String::new(),
            operator_addresses: Vec::new(),
            operator_identity: WorkloadId::new("cluster.local", "tulle", "operator"),
            token_file: String::new(),
            trust_file: String::new(),
            probes: Vec::new(),
            workers: 1,
            source_address: SourceAddress::Sidecar,
            features: Vec::new(),
            telemetry: true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_address_that_is_not_known_stops_the_sidecar_instead_of_hiding_the_client() {
        assert_eq!(source_address("preserve").unwrap(), SourceAddress::Preserve);
        assert_eq!(source_address("sidecar").unwrap(), SourceAddress::default());
        assert!(source_address("Preserve").unwrap_err().to_string().contains("TULLE_SOURCE_ADDRESS"));
    }

    #[test]
    fn the_operators_addresses_are_of_both_families_and_have_a_port() {
        let found = operator_addresses("10.96.7.9:26160,[fd00::7]:26160").unwrap();
        let wanted = [
            SocketAddr::from(([10, 96, 7, 9], 26160)),
            SocketAddr::from(([0xfd00, 0, 0, 0, 0, 0, 0, 7], 26160)),
        ];
        assert_eq!(found, wanted);
        assert!(operator_addresses("").unwrap().is_empty());
        let error = operator_addresses("10.96.7.9").unwrap_err().to_string();
        assert!(error.contains("TULLE_OPERATOR_ADDRESSES"), "{error}");
    }

    #[test]
    fn a_misspelled_off_stops_the_sidecar_instead_of_measuring_what_should_be_off() {
        assert!(telemetry("on").unwrap());
        assert!(!telemetry("off").unwrap());
        for text in ["", "Off", "false", "0"] {
            assert!(telemetry(text).unwrap_err().to_string().contains("TULLE_TELEMETRY"), "{text:?}");
        }
    }
}
