//! Issues leaf certificates to sidecars.
//!
//! In: a service account token and a certificate request. Out: a leaf certificate for the identity in the reviewed
//! token, which must have our audience and be bound to a pod that exists. Names in the request are ignored.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use kube::api::PostParams;
use kube::{Api, Client};
use tonic::{Code, Request, Response, Status};
use tulle_mesh::identity::WorkloadId;
use tulle_mesh::proto::identity_server::Identity;
use tulle_mesh::proto::{SignRequest, SignResponse};

use super::authority::Authority;
use super::lifetime::Lifetime;
use crate::bucket::Bucket;
use crate::discovery::server::Connection;
use crate::telemetry::Aggregates;
use crate::watch::Hub;

/// Audience of the tokens that sidecars present. Tokens with any other audience are refused.
pub const AUDIENCE: &str = "tulle";

/// Requests per second that one address may make on average. A sidecar makes one per half of its leaf's lifetime.
const RATE: f64 = 1.0;
/// Requests that one address may make in a burst: a sidecar that restarts, or cannot use an answer, asks again at once.
const BURST: f64 = 10.0;
/// Addresses with a limit of their own.
const PEERS: usize = 4096;

/// The gRPC service `Identity`.
pub struct Signer {
    client: Client,
    hub: Arc<Hub>,
    authority: Arc<Authority>,
    aggregates: Arc<Aggregates>,
    /// Whether connections come from the pods' own addresses. Without that, requests cannot be limited per pod.
    pub check_addresses: bool,
    limiter: Mutex<Limiter>,
}

/// Limits the requests of each address. Each pod has its own address, and each request costs a TokenReview at the API
/// server, so one pod must not use up the capacity that all need.
#[derive(Debug, Default)]
struct Limiter(HashMap<IpAddr, Bucket>);

impl Limiter {
    /// Counts a request of an address. Returns whether it is within the limit.
    fn take(&mut self, peer: IpAddr, now: Instant) -> bool {
        let peer = peer.to_canonical();
        if self.0.len() >= PEERS && !self.0.contains_key(&peer) {
            // The bucket that was used least recently has refilled most.
            let oldest = self.0.iter().min_by_key(|(_, bucket)| bucket.last_used()).map(|(peer, _)| *peer);
            if let Some(oldest) = oldest {
                self.0.remove(&oldest);
            }
        }
        self.0.entry(peer).or_insert_with(|| Bucket::new(BURST, now)).take(RATE, BURST, now)
    }
}

/// The identity in a reviewed token.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Bearer {
    namespace: String,
    service_account: String,
    pod_uid: String,
}

impl Signer {
    /// A signer.
    pub fn new(
        client: Client,
        hub: Arc<Hub>,
        authority: Arc<Authority>,
        aggregates: Arc<Aggregates>,
    ) -> Self {
        Self { client, hub, authority, aggregates, check_addresses: true, limiter: Mutex::default() }
    }

    /// Refuses an address that is over its limit, before a TokenReview is spent on it.
    fn admit(&self, request: &Request<SignRequest>) -> Result<(), Status> {
        if !self.check_addresses {
            return Ok(());
        }
        let Some(Connection { address: peer, .. }) = request.extensions().get() else { return Ok(()) };
        let admitted =
            self.limiter.lock().unwrap_or_else(PoisonError::into_inner).take(*peer, Instant::now());
        if admitted {
            return Ok(());
        }
        self.aggregates.refused("certificate", "TooOften");
        tracing::debug!(%peer, "refused a certificate: the address is over its limit");
        Err(Status::resource_exhausted(
            "this address requests more than one certificate per second; try again in a second",
        ))
    }

    async fn review(&self, token: String) -> Result<Bearer, Status> {
        let spec = TokenReviewSpec { audiences: Some(vec![AUDIENCE.to_owned()]), token: Some(token) };
        let review = TokenReview { spec, ..TokenReview::default() };
        let review =
            Api::<TokenReview>::all(self.client.clone()).create(&PostParams::default(), &review).await;
        let review =
            review.map_err(|error| Status::unavailable(format!("cannot review the token: {error}")))?;
        bearer(&review)
    }
}

/// The identity in a reviewed token, if it has our audience and is bound to a pod.
fn bearer(review: &TokenReview) -> Result<Bearer, Status> {
    let refuse = |why: &str| Status::unauthenticated(why.to_owned());
    let status = review.status.as_ref().ok_or_else(|| refuse("the TokenReview has no status"))?;
    let ours = status.audiences.iter().flatten().any(|audience| audience == AUDIENCE);
    if status.authenticated != Some(true) || !ours {
        return Err(refuse("the token is not valid for the audience tulle"));
    }
    let user = status.user.as_ref().ok_or_else(|| refuse("the token has no user"))?;
    let name = user.username.as_deref().unwrap_or("");
    let account = name.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split_once(':'));
    let (namespace, service_account) =
        account.ok_or_else(|| refuse("the token does not belong to a service account"))?;
    let pod_uid = user.extra.as_ref().and_then(|extra| extra.get("authentication.kubernetes.io/pod-uid"));
    let pod_uid =
        pod_uid.and_then(|uids| uids.first()).ok_or_else(|| refuse("the token is not bound to a pod"))?;
    Ok(Bearer {
        namespace: namespace.to_owned(),
        service_account: service_account.to_owned(),
        pod_uid: pod_uid.clone(),
    })
}

#[tonic::async_trait]
impl Identity for Signer {
    async fn sign(&self, request: Request<SignRequest>) -> Result<Response<SignResponse>, Status> {
        self.admit(&request)?;
        let request = request.into_inner();
        let bearer = self.review(request.token).await.inspect_err(|status| {
            let reason = if status.code() == Code::Unavailable { "NoReview" } else { "Token" };
            self.aggregates.refused("certificate", reason);
            tracing::warn!(pod_uid = request.pod_uid, reason = status.message(), "refused a certificate");
        })?;
        if bearer.pod_uid != request.pod_uid {
            self.aggregates.refused("certificate", "OtherPod");
            tracing::warn!(asked = request.pod_uid, bearer = ?bearer, "refused a certificate: the token is bound to another pod");
            return Err(Status::permission_denied("the token is bound to another pod"));
        }
        let (identity, lifetime) = {
            let model = self.hub.model();
            if model.pod(&bearer.pod_uid).is_none() {
                self.aggregates.refused("certificate", "UnknownPod");
                return Err(Status::unavailable(
                    "unknown pod: the operator has not seen it yet, or it was deleted",
                ));
            }
            let settings = model.settings();
            let identity =
                WorkloadId::new(&settings.trust_domain, &bearer.namespace, &bearer.service_account);
            (identity, Lifetime::of(&settings.leaf_lifetime).leaf)
        };
        let leaf = self.authority.sign_request(&request.csr_der, &identity, lifetime);
        let leaf = leaf.map_err(|error| {
            self.aggregates.refused("certificate", "Request");
            tracing::warn!(%identity, %error, "refused a certificate");
            Status::invalid_argument(error.to_string())
        })?;
        Ok(Response::new(SignResponse {
            chain_der: leaf.chain.iter().map(|der| der.to_vec()).collect(),
            not_after_unix: leaf.not_after_unix,
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use serde_json::json;

    #[test]
    fn one_address_that_asks_without_end_does_not_delay_the_others() {
        let (mut limiter, now) = (Limiter::default(), Instant::now());
        let (greedy, other) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let granted = (0..100).filter(|_| limiter.take(greedy, now)).count();
        assert_eq!(granted, 10);
        assert!(limiter.take(other, now));
        assert!(!limiter.take(greedy, now + Duration::from_millis(900)));
        assert!(limiter.take(greedy, now + Duration::from_millis(1100)));
    }

    #[test]
    fn an_address_is_the_same_whether_it_came_over_ipv4_or_mapped_into_ipv6() {
        let (mut limiter, now) = (Limiter::default(), Instant::now());
        let plain = std::net::Ipv4Addr::new(10, 0, 0, 1);
        (0..10).for_each(|_| assert!(limiter.take(plain.into(), now)));
        assert!(!limiter.take(plain.to_ipv6_mapped().into(), now));
    }

    #[test]
    fn addresses_are_forgotten_when_there_are_too_many() {
        let (mut limiter, start) = (Limiter::default(), Instant::now());
        for number in 0..u32::try_from(PEERS).unwrap() + 100 {
            let peer = IpAddr::from(number.to_be_bytes());
            assert!(limiter.take(peer, start + Duration::from_millis(number.into())));
        }
        assert_eq!(limiter.0.len(), PEERS);
        assert!(
            !limiter.0.contains_key(&IpAddr::from([0, 0, 0, 0])),
            "the one that asked first is forgotten"
        );
    }

    fn review(change: impl FnOnce(&mut serde_json::Value)) -> TokenReview {
        let mut review = json!({"spec": {}, "status": {
            "authenticated": true,
            "audiences": ["tulle"],
            "user": {"username": "system:serviceaccount:shop:web", "extra": {"authentication.kubernetes.io/pod-uid": ["u1"]}},
        }});
        change(&mut review["status"]);
        serde_json::from_value(review).unwrap()
    }

    #[test]
    fn only_our_audience_bound_to_a_pod_is_a_bearer() {
        let good = bearer(&review(|_| {})).unwrap();
        assert_eq!(
            (good.namespace.as_str(), good.service_account.as_str(), good.pod_uid.as_str()),
            ("shop", "web", "u1")
        );
        for change in [
            json!({"authenticated": false}),
            json!({"audiences": ["https://kubernetes.default.svc"]}),
            json!({"audiences": null}),
            json!({"user": {"username": "admin", "extra": {"authentication.kubernetes.io/pod-uid": ["u1"]}}}),
            json!({"user": {"username": "system:serviceaccount:shop:web"}}),
        ] {
            let changed =
                review(|status| status.as_object_mut().unwrap().extend(change.as_object().unwrap().clone()));
            assert!(bearer(&changed).is_err(), "{change}");
        }
    }
}
