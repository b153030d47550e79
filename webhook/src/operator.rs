//! The addresses of the operator's Service.
//!
//! Injected sidecars get them beside its name, because a pod with `dnsPolicy: Default` or `None` may be unable to resolve
//! Services. They stay the same as long as the Service exists. They are read in the background, so that no review waits
//! for the API server; a sidecar that is injected before they are known has the name alone.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use k8s_openapi::api::core::v1::Service;
use kube::api::ListParams;
use kube::{Api, Client};
use tokio::time::{sleep, timeout};
use tulle_mesh::ports;

use crate::cluster::READ_TIMEOUT;
use crate::settings::Settings;

/// Interval between two reads.
const READ_EVERY: Duration = Duration::from_secs(10);

/// Addresses and port of the operator's Service, as last read.
#[derive(Debug, Default)]
pub struct OperatorAddresses(RwLock<Vec<SocketAddr>>);

impl OperatorAddresses {
    /// Reads them once, within [`READ_TIMEOUT`], and then again and again as long as the process runs.
    pub async fn follow(client: &Client, settings: &Settings) -> Arc<Self> {
        let addresses = Arc::new(Self::default());
        // The Service of this installation may be another operator's.
        if settings.operator.is_some() {
            return addresses;
        }
        let api = Api::<Service>::namespaced(client.clone(), &settings.namespace);
        addresses.read(&api).await;
        let followed = Arc::clone(&addresses);
        tokio::spawn(async move {
            loop {
                sleep(READ_EVERY).await;
                followed.read(&api).await;
            }
        });
        addresses
    }

    /// The addresses; none while they are unknown.
    pub fn known(&self) -> Vec<SocketAddr> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes what the API server has. What cannot be read changes nothing.
    async fn read(&self, api: &Api<Service>) {
        // From the API server's cache, and a list because that right exists for warnings.
        let named = ListParams::default().match_any().fields("metadata.name=tulle-operator");
        match timeout(READ_TIMEOUT, api.list(&named)).await {
            Ok(Ok(listed)) => self.take(&listed.items),
            failed => tracing::warn!(?failed, "cannot read the operator's Service; trying again"),
        }
    }

    /// Takes the addresses of the Service; one that is gone changes nothing, because it may come back with the same ones.
    fn take(&self, listed: &[Service]) {
        if let Some(service) = listed.first() {
            *self.0.write().unwrap_or_else(PoisonError::into_inner) = addresses_of(service);
        }
    }
}

/// The cluster addresses of a Service, in its order. A headless one has none: addresses of pods do not last.
fn addresses_of(service: &Service) -> Vec<SocketAddr> {
    let all = service.spec.iter().flat_map(|spec| spec.cluster_ips.iter().flatten());
    let parsed = all.filter_map(|address| address.parse::<IpAddr>().ok());
    parsed.map(|address| SocketAddr::from((address, ports::DISCOVERY))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_has_its_cluster_addresses_of_both_families_and_a_headless_one_has_none() {
        let addresses = |ips: serde_json::Value| {
            let service = serde_json::json!({"spec": {"clusterIPs": ips}});
            let found = addresses_of(&serde_json::from_value(service).unwrap());
            found.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        let both = addresses(serde_json::json!(["10.96.7.9", "fd00::7"]));
        assert_eq!(both, ["10.96.7.9:26160", "[fd00::7]:26160"]);
        assert!(addresses(serde_json::json!(["None"])).is_empty());
        assert!(addresses(serde_json::json!([])).is_empty());
    }

    #[test]
    fn a_service_that_is_made_anew_without_addresses_leaves_none_of_the_former_one() {
        let service = |ips: serde_json::Value| -> Service {
            serde_json::from_value(serde_json::json!({"spec": {"clusterIPs": ips}})).unwrap()
        };
        let operator = OperatorAddresses::default();
        operator.take(&[service(serde_json::json!(["10.96.7.9"]))]);
        operator.take(&[]);
        assert_eq!(operator.known(), [SocketAddr::from(([10, 96, 7, 9], ports::DISCOVERY))], "it is gone");
        operator.take(&[service(serde_json::json!(["10.96.7.10"]))]);
        assert_eq!(operator.known(), [SocketAddr::from(([10, 96, 7, 10], ports::DISCOVERY))]);
        operator.take(&[service(serde_json::json!(["None"]))]);
        assert!(operator.known().is_empty(), "it is headless");
    }
}
