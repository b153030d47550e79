//! What the page changes with `--allow-actions`: it acts on a Canary as `tulle canary` does.
//!
//! In: the namespace that a page is about, and forms that the door has let in. Out: whether the user may act there, and
//! the action, requested with the user's own rights. The operator has no right to write to a Canary and no part in this
//! but to carry out what the Canary then says.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use kube::api::PostParams;
use kube::{Api, Client, Resource as _};
use tulle_crds::Canary;

use super::address::Asked;
use super::door::Form;
use crate::cluster::within;
use crate::commands::canary::action::{self, Done, Undone};
use crate::exit::CliError;

/// How long an answer about the user's rights is used.
const REVIEW_HOLDS: Duration = Duration::from_secs(60);
/// How long a browser waits until the operator has taken an action.
const TAKEN_WITHIN: Duration = Duration::from_secs(20);

/// Acts on Canaries with the rights of the user.
pub struct Actions {
    client: Client,
    /// For watches.
    streams: Client,
    reviews: Mutex<Reviews>,
}

impl Actions {
    pub fn new(client: Client, streams: Client) -> Self {
        Self { client, streams, reviews: Mutex::default() }
    }

    /// Whether the user may act on the Canaries of a namespace. Decides only what the page offers: the API server decides
    /// again about each action.
    ///
    /// # Errors
    /// The API server does not say.
    pub async fn may_act(&self, namespace: &str) -> Result<bool, CliError> {
        let known = self.reviews().get(namespace, Instant::now());
        if let Some(allowed) = known {
            return Ok(allowed);
        }
        let allowed = within("asking whether you may act on Canaries", self.review(namespace)).await?;
        self.reviews().put(namespace, allowed, Instant::now());
        Ok(allowed)
    }

    /// Does what a form asks for, provided that the rollout is still where its sender has seen it. Returns what was done.
    ///
    /// # Errors
    /// As [`action::act`].
    pub async fn act(&self, asked: &Asked, form: Form) -> Result<String, Undone> {
        let Asked { namespace, name, verb } = asked;
        let args = action::Args::of_page(name, form.revision, form.seen, TAKEN_WITHIN);
        let acted = action::act(&self.client, self.streams.clone(), namespace, *verb, &args).await;
        acted.map(|Done { sentence, .. }| sentence)
    }

    fn reviews(&self) -> MutexGuard<'_, Reviews> {
        self.reviews.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn review(&self, namespace: &str) -> Result<bool, CliError> {
        let attributes = ResourceAttributes {
            group: Some(Canary::group(&()).into_owned()),
            namespace: Some(namespace.to_owned()),
            resource: Some(Canary::plural(&()).into_owned()),
            // An action is an annotation.
            verb: Some("patch".to_owned()),
            ..ResourceAttributes::default()
        };
        let spec = SelfSubjectAccessReviewSpec {
            resource_attributes: Some(attributes),
            ..SelfSubjectAccessReviewSpec::default()
        };
        let review = SelfSubjectAccessReview { spec, ..SelfSubjectAccessReview::default() };
        let api = Api::<SelfSubjectAccessReview>::all(self.client.clone());
        let answer = api.create(&PostParams::default(), &review).await?;
        Ok(answer.status.is_some_and(|status| status.allowed))
    }
}

/// What the API server has answered about namespaces.
#[derive(Default)]
struct Reviews(HashMap<String, Review>);

struct Review {
    allowed: bool,
    at: Instant,
}

impl Review {
    fn holds(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.at) < REVIEW_HOLDS
    }
}

impl Reviews {
    fn get(&self, namespace: &str, now: Instant) -> Option<bool> {
        self.0.get(namespace).filter(|review| review.holds(now)).map(|review| review.allowed)
    }

    /// Forgets the old ones, too: the map has no more namespaces than were looked at in a minute.
    fn put(&mut self, namespace: &str, allowed: bool, now: Instant) {
        self.0.retain(|_, review| review.holds(now));
        self.0.insert(namespace.to_owned(), Review { allowed, at: now });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_about_rights_holds_for_a_minute_and_for_its_namespace() {
        let start = Instant::now();
        let mut reviews = Reviews::default();
        reviews.put("shop", true, start);
        reviews.put("payments", false, start);
        let later = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(reviews.get("shop", later(59)), Some(true));
        assert_eq!(reviews.get("payments", later(59)), Some(false));
        assert_eq!(reviews.get("other", start), None);
        assert_eq!(reviews.get("shop", later(60)), None);
        reviews.put("other", true, later(60));
        assert_eq!(reviews.0.len(), 1, "what does not hold any more is forgotten");
    }
}
