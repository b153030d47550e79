//! What the page changes with `--allow-actions`: it acts on a Canary as `tulle canary` does.
//!
//! In: the Canary that a page is about, and forms that the door has let in. Out: whether the user may act on it, and
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

    /// Whether the user may act on a Canary. Decides only what the page offers: the API server decides again about each
    /// action.
    ///
    /// # Errors
    /// The API server does not say.
    pub async fn may_act(&self, namespace: &str, name: &str) -> Result<bool, CliError> {
        let known = self.reviews().get(namespace, name, Instant::now());
        if let Some(allowed) = known {
            return Ok(allowed);
        }
        let allowed =
            within("asking whether you may act on the Canary", self.review(namespace, name)).await?;
        self.reviews().put(namespace, name, allowed, Instant::now());
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

    async fn review(&self, namespace: &str, name: &str) -> Result<bool, CliError> {
        let spec = SelfSubjectAccessReviewSpec {
            resource_attributes: Some(asked_about(namespace, name)),
            ..SelfSubjectAccessReviewSpec::default()
        };
        let review = SelfSubjectAccessReview { spec, ..SelfSubjectAccessReview::default() };
        let api = Api::<SelfSubjectAccessReview>::all(self.client.clone());
        let answer = api.create(&PostParams::default(), &review).await?;
        Ok(answer.status.is_some_and(|status| status.allowed))
    }
}

/// The right that an action needs. Rules of RBAC may name objects, so the Canary is named.
fn asked_about(namespace: &str, name: &str) -> ResourceAttributes {
    ResourceAttributes {
        group: Some(Canary::group(&()).into_owned()),
        namespace: Some(namespace.to_owned()),
        resource: Some(Canary::plural(&()).into_owned()),
        name: Some(name.to_owned()),
        // An action is an annotation.
        verb: Some("patch".to_owned()),
        ..ResourceAttributes::default()
    }
}

/// What the API server has answered about Canaries, by namespace and name.
#[derive(Default)]
struct Reviews(HashMap<(String, String), Review>);

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
    fn get(&self, namespace: &str, name: &str, now: Instant) -> Option<bool> {
        let canary = (namespace.to_owned(), name.to_owned());
        self.0.get(&canary).filter(|review| review.holds(now)).map(|review| review.allowed)
    }

    /// Forgets the old ones, too: the map has no more Canaries than were looked at in a minute.
    fn put(&mut self, namespace: &str, name: &str, allowed: bool, now: Instant) {
        self.0.retain(|_, review| review.holds(now));
        self.0.insert((namespace.to_owned(), name.to_owned()), Review { allowed, at: now });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_about_rights_holds_for_a_minute_and_for_its_canary() {
        let start = Instant::now();
        let mut reviews = Reviews::default();
        reviews.put("shop", "web", true, start);
        reviews.put("shop", "cart", false, start);
        let later = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(reviews.get("shop", "web", later(59)), Some(true));
        assert_eq!(reviews.get("shop", "cart", later(59)), Some(false));
        assert_eq!(reviews.get("other", "web", start), None);
        assert_eq!(reviews.get("shop", "web", later(60)), None);
        reviews.put("other", "web", true, later(60));
        assert_eq!(reviews.0.len(), 1, "what does not hold any more is forgotten");
    }

    #[test]
    fn the_api_server_is_asked_about_the_canary_that_is_changed() {
        let asked = asked_about("shop", "web");
        assert_eq!((asked.namespace.as_deref(), asked.name.as_deref()), (Some("shop"), Some("web")));
        assert_eq!((asked.resource.as_deref(), asked.verb.as_deref()), (Some("canaries"), Some("patch")));
        assert_eq!(asked.group.as_deref(), Some("tulle.dev"));
    }
}
