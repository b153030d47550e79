//! Who asks, and what they may see.
//!
//! In: the token of a request. Out: a [`Caller`], and whether it may see a namespace or all of them. The API server
//! reviews tokens and rights; [`caller_of`] and [`Scope::covers`] decide by what it says. Never logs a token, and keeps
//! only digests of them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use aws_lc_rs::digest::{SHA256, digest};
use axum::http::{HeaderMap, StatusCode, header};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::Client;
use kube::api::{Api, PostParams};
use tokio::sync::Semaphore;
use tulle_mesh::query::{AUDIENCE, VIEWER};

use super::Refused;
use super::kept::Kept;

/// How long a review that accepted a token holds.
const ACCEPTED: Duration = Duration::from_secs(60);
/// How long a review that refused a token holds.
const REJECTED: Duration = Duration::from_secs(10);
/// How long an answer about rights holds.
const RIGHTS: Duration = Duration::from_secs(10);
/// Reviews that the API server is asked for at a time.
const REVIEWS: usize = 4;
/// The longest token that is reviewed.
const MAX_TOKEN: usize = 16 * 1024;
/// The API group of the resources that rights are about.
const GROUP: &str = "tulle.dev";
/// What a caller must be allowed to `get`, in a namespace or in all. A resource that exists in rules of RBAC only.
const TELEMETRY: &str = "telemetry";

/// What a token shows by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Every namespace.
    All,
    /// One namespace.
    Namespace(String),
}

impl Scope {
    /// Whether it shows a namespace, or, with `None`, all of them.
    pub fn covers(&self, wanted: Option<&str>) -> bool {
        match self {
            Self::All => true,
            Self::Namespace(own) => wanted == Some(own.as_str()),
        }
    }
}

/// Somebody whose token was accepted.
#[derive(Clone, Debug, PartialEq)]
pub struct Caller {
    /// Who it is, as the API server says.
    pub user: UserInfo,
    /// What the token shows without a rule of RBAC; `None`: nothing.
    pub scope: Option<Scope>,
}

impl Caller {
    /// The name of the user.
    pub fn name(&self) -> &str {
        self.user.username.as_deref().unwrap_or("")
    }
}

/// A token that the API server does not know, or that is not meant for the operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the token is invalid, has expired, or lacks the audience tulle.dev/query")]
pub struct InvalidToken;

/// Who a reviewed token belongs to, and what it shows. `own` is the operator's namespace.
///
/// # Errors
/// The token is invalid, or has another audience.
pub fn caller_of(review: &TokenReview, own: &str) -> Result<Caller, InvalidToken> {
    let status = review.status.as_ref().ok_or(InvalidToken)?;
    // Without audiences the token is one for the API server, from an authenticator that does not know them.
    let ours = status.audiences.iter().flatten().any(|audience| audience == AUDIENCE);
    if status.authenticated != Some(true) || !ours {
        return Err(InvalidToken);
    }
    let user = status.user.clone().ok_or(InvalidToken)?;
    let name = user.username.as_deref().filter(|name| !name.is_empty()).ok_or(InvalidToken)?;
    let account = name.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split_once(':'));
    let scope = account.map(|(namespace, account)| match namespace == own && account == VIEWER {
        true => Scope::All,
        false => Scope::Namespace(namespace.to_owned()),
    });
    Ok(Caller { user, scope })
}

/// The token of a request, from the header `authorization`. Never from a cookie, which a browser would send whatever page
/// has made it ask.
pub fn token_of(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    let token = token.trim();
    let fits = !token.is_empty() && token.len() <= MAX_TOKEN;
    (scheme.eq_ignore_ascii_case("bearer") && fits).then_some(token)
}

/// Whether a token has the form of a JSON Web Token, as all have that the API server issues. Others are not worth a
/// review.
fn is_jwt(token: &str) -> bool {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    let is_part = |part: &str| !part.is_empty() && part.bytes().all(known);
    token.split('.').count() == 3 && token.split('.').all(is_part)
}

/// 401, and how to get a token.
fn unauthenticated(error: &str, own: &str) -> Refused {
    Refused::new(StatusCode::UNAUTHORIZED, error).with_hint(format!(
        "send `authorization: Bearer TOKEN`; a token for every namespace: kubectl create token {VIEWER} --namespace={own} --audience={AUDIENCE}; for one namespace: kubectl create token default --namespace=NAMESPACE --audience={AUDIENCE}"
    ))
}

/// 403, and the rules to add. The namespace was checked to be a name, since people paste the hint into a shell.
fn forbidden(caller: &Caller, wanted: Option<&str>, own: &str) -> Refused {
    let who = caller.name();
    let (what, hint) = match wanted {
        Some(namespace) => (
            format!("namespace {namespace}"),
            format!(
                "use a token of namespace {namespace} (`tulle -n {namespace}`), or of service account {VIEWER} (`tulle -A`). To let a user create the former: kubectl create role tulle-viewer --namespace={namespace} --verb=create --resource=serviceaccounts/token --resource-name=default && kubectl create rolebinding tulle-viewer --namespace={namespace} --role=tulle-viewer --user=USER"
            ),
        ),
        None => (
            "all namespaces".to_owned(),
            format!(
                "name a namespace, or use a token of service account {VIEWER} (`tulle -A`). To let a user create one: kubectl create rolebinding tulle-viewer --namespace={own} --role=tulle-viewer --user=USER, whose rule is: kubectl create role tulle-viewer --verb=create --resource=serviceaccounts/token --resource-name={VIEWER}"
            ),
        ),
    };
    let binding = match wanted {
        Some(namespace) => format!("a RoleBinding in namespace {namespace}"),
        None => "a ClusterRoleBinding".to_owned(),
    };
    Refused::new(StatusCode::FORBIDDEN, format!("{who} may not see {what}")).with_hint(format!(
        "{hint}. Or allow {who} itself by {binding} to ClusterRole tulle-telemetry, whose rule is: {{apiGroups: [{GROUP}], resources: [{TELEMETRY}], verbs: [get]}}"
    ))
}

/// 503: the API server has not answered. Why is for the log: the caller may be nobody.
fn unavailable(what: &str, error: &kube::Error) -> Refused {
    tracing::warn!(%error, "cannot review {what} of a request to the query API");
    Refused::new(StatusCode::SERVICE_UNAVAILABLE, format!("cannot review {what}; see the operator's log"))
        .with_hint("the API server does not answer, or the ClusterRole tulle-operator of this version is not applied; try again")
}

/// Asks the API server who callers are, and what they may do.
pub struct Authenticator {
    client: Client,
    /// The operator's namespace.
    own: String,
    /// By the digest of the token.
    reviews: Mutex<Kept<Outcome>>,
    /// By the digest of what was asked.
    rights: Mutex<Kept<bool>>,
    /// Turns of reviews.
    reviewing: Semaphore,
}

/// What a review has found.
type Outcome = Result<Arc<Caller>, InvalidToken>;

fn locked<T>(kept: &Mutex<Kept<T>>) -> MutexGuard<'_, Kept<T>> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Authenticator {
    /// For an operator in this namespace.
    pub fn new(client: Client, namespace: &str) -> Self {
        Self {
            client,
            own: namespace.to_owned(),
            reviews: Mutex::default(),
            rights: Mutex::default(),
            reviewing: Semaphore::new(REVIEWS),
        }
    }

    /// Who sends a request.
    ///
    /// # Errors
    /// 401 without a valid token, 503 where the API server does not answer.
    pub async fn caller(&self, headers: &HeaderMap) -> Result<Arc<Caller>, Refused> {
        let token = token_of(headers).ok_or_else(|| unauthenticated("no token", &self.own))?;
        if !is_jwt(token) {
            return Err(unauthenticated("the token is not a JSON Web Token", &self.own));
        }
        let hash = digest(&SHA256, token.as_bytes());
        let outcome = match self.reviewed(hash.as_ref()) {
            Some(outcome) => outcome,
            None => self.review_once(token, hash.as_ref()).await?,
        };
        outcome.map_err(|error| unauthenticated(&error.to_string(), &self.own))
    }

    fn reviewed(&self, hash: &[u8]) -> Option<Outcome> {
        locked(&self.reviews).get(hash, Instant::now())
    }

    /// Reviews a token when a turn is free, unless another request with it has had it reviewed by then.
    async fn review_once(&self, token: &str, hash: &[u8]) -> Result<Outcome, Refused> {
        let _turn = self.reviewing.acquire().await;
        if let Some(outcome) = self.reviewed(hash) {
            return Ok(outcome);
        }
        let outcome = self.review(token).await?.map(Arc::new);
        let holds = if outcome.is_ok() { ACCEPTED } else { REJECTED };
        locked(&self.reviews).keep(hash.into(), outcome.clone(), holds, Instant::now());
        Ok(outcome)
    }

    async fn review(&self, token: &str) -> Result<Result<Caller, InvalidToken>, Refused> {
        let spec =
            TokenReviewSpec { audiences: Some(vec![AUDIENCE.to_owned()]), token: Some(token.to_owned()) };
        let review = TokenReview { spec, ..TokenReview::default() };
        let review =
            Api::<TokenReview>::all(self.client.clone()).create(&PostParams::default(), &review).await;
        let review = review.map_err(|error| unavailable("the token", &error))?;
        Ok(caller_of(&review, &self.own))
    }

    /// Whether a caller may see a namespace, or, with `None`, all of them.
    ///
    /// # Errors
    /// 403 with the rule to add, 503 where the API server does not answer.
    pub async fn sees(&self, caller: &Caller, wanted: Option<&str>) -> Result<(), Refused> {
        if caller.scope.as_ref().is_some_and(|scope| scope.covers(wanted)) {
            return Ok(());
        }
        // No namespace in a review means all of them.
        let allowed = self.is_allowed(&caller.user, "get", TELEMETRY, wanted.unwrap_or("")).await;
        match allowed.map_err(|error| unavailable("the rights", &error))? {
            true => Ok(()),
            false => Err(forbidden(caller, wanted, &self.own)),
        }
    }

    async fn is_allowed(
        &self,
        user: &UserInfo,
        verb: &str,
        resource: &str,
        namespace: &str,
    ) -> Result<bool, kube::Error> {
        let spec = SubjectAccessReviewSpec {
            user: user.username.clone(),
            uid: user.uid.clone(),
            groups: user.groups.clone(),
            extra: user.extra.clone(),
            resource_attributes: Some(ResourceAttributes {
                verb: Some(verb.to_owned()),
                group: Some(GROUP.to_owned()),
                resource: Some(resource.to_owned()),
                namespace: Some(namespace.to_owned()),
                ..ResourceAttributes::default()
            }),
            ..SubjectAccessReviewSpec::default()
        };
        let asked = serde_json::to_vec(&spec).map_err(kube::Error::SerdeError)?;
        let asked = digest(&SHA256, &asked);
        let asked: &[u8] = asked.as_ref();
        if let Some(allowed) = locked(&self.rights).get(asked, Instant::now()) {
            return Ok(allowed);
        }
        let _turn = self.reviewing.acquire().await;
        let review = SubjectAccessReview { spec, ..SubjectAccessReview::default() };
        let reviews = Api::<SubjectAccessReview>::all(self.client.clone());
        let review = reviews.create(&PostParams::default(), &review).await?;
        let allowed = review.status.is_some_and(|status| status.allowed);
        locked(&self.rights).keep(asked.into(), allowed, RIGHTS, Instant::now());
        Ok(allowed)
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;
    use serde_json::{Value, json};

    use super::*;

    fn review(status: &Value) -> TokenReview {
        serde_json::from_value(json!({"spec": {}, "status": status})).unwrap()
    }

    fn of_user(name: &str) -> Result<Caller, InvalidToken> {
        caller_of(
            &review(&json!({"authenticated": true, "audiences": [AUDIENCE], "user": {"username": name}})),
            "tulle-system",
        )
    }

    fn scope_of(name: &str) -> Option<Scope> {
        of_user(name).unwrap().scope
    }

    #[test]
    fn a_token_shows_its_own_namespace_and_that_of_the_viewer_shows_all() {
        let shop = scope_of("system:serviceaccount:shop:web").unwrap();
        assert_eq!(shop, Scope::Namespace("shop".to_owned()));
        assert!(shop.covers(Some("shop")));
        assert!(!shop.covers(Some("payments")));
        assert!(!shop.covers(None), "all namespaces");
        let viewer = scope_of("system:serviceaccount:tulle-system:tulle-viewer").unwrap();
        assert_eq!(viewer, Scope::All);
        assert!(viewer.covers(None) && viewer.covers(Some("shop")));
    }

    #[test]
    fn an_account_of_the_viewers_name_in_another_namespace_shows_that_namespace_only() {
        let scope = scope_of("system:serviceaccount:shop:tulle-viewer");
        assert_eq!(scope, Some(Scope::Namespace("shop".to_owned())));
        let scope = scope_of("system:serviceaccount:tulle-system:tulle-operator");
        assert_eq!(scope, Some(Scope::Namespace("tulle-system".to_owned())));
    }

    #[test]
    fn a_person_sees_nothing_without_a_rule() {
        assert_eq!(scope_of("anna@corp.example"), None);
    }

    #[test]
    fn a_token_without_our_audience_is_refused() {
        for status in [
            json!({"authenticated": false, "audiences": [AUDIENCE], "user": {"username": "anna"}}),
            json!({"authenticated": true, "audiences": ["tulle"], "user": {"username": "anna"}}),
            json!({"authenticated": true, "user": {"username": "anna"}}),
            json!({"authenticated": true, "audiences": [AUDIENCE], "user": {"username": ""}}),
            json!({"authenticated": true, "audiences": [AUDIENCE]}),
        ] {
            assert_eq!(caller_of(&review(&status), "tulle-system"), Err(InvalidToken), "{status}");
        }
    }

    fn headers(pairs: &[(header::HeaderName, &'static str)]) -> HeaderMap {
        let pairs = pairs.iter().map(|(name, value)| (name.clone(), HeaderValue::from_static(value)));
        pairs.collect()
    }

    #[test]
    fn the_token_is_in_the_header_and_never_in_a_cookie() {
        assert_eq!(token_of(&headers(&[(header::AUTHORIZATION, "Bearer b")])), Some("b"));
        assert_eq!(token_of(&headers(&[(header::AUTHORIZATION, "bearer  b ")])), Some("b"));
        for (name, value) in [
            (header::AUTHORIZATION, "Basic b"),
            (header::AUTHORIZATION, "Bearer "),
            (header::AUTHORIZATION, "b"),
            (header::COOKIE, "tulle-session=c"),
        ] {
            assert_eq!(token_of(&headers(&[(name, value)])), None, "{value}");
        }
    }

    #[test]
    fn a_token_has_three_parts_of_base64url() {
        assert!(is_jwt("eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhIn0.c2ln_-0"));
        for bad in ["", "abc", "a.b", "a.b.c.d", "a..c", ".b.c", "a.b.", "a.b.c=", "a.b.c;"] {
            assert!(!is_jwt(bad), "{bad}");
        }
    }

    #[test]
    fn a_caller_without_a_token_does_not_read_the_words_of_the_api_server() {
        let error = kube::Error::LinesCodecMaxLineLengthExceeded;
        let refused = unavailable("the token", &error);
        assert_eq!(refused.status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(!refused.refusal.error.contains(&error.to_string()), "{refused:?}");
    }

    #[test]
    fn a_refusal_names_the_rule_to_add() {
        let caller = of_user("system:serviceaccount:shop:web").unwrap();
        let one = forbidden(&caller, Some("payments"), "tulle-system");
        assert_eq!(one.status, StatusCode::FORBIDDEN);
        assert_eq!(one.refusal.error, "system:serviceaccount:shop:web may not see namespace payments");
        let hint = one.refusal.hint.unwrap();
        let rule = "kubectl create role tulle-viewer --namespace=payments --verb=create --resource=serviceaccounts/token --resource-name=default";
        assert!(hint.contains(rule), "{hint}");
        assert!(hint.contains("{apiGroups: [tulle.dev], resources: [telemetry], verbs: [get]}"), "{hint}");
        let all = forbidden(&caller, None, "mesh").refusal.hint.unwrap();
        assert!(all.contains("--namespace=mesh --role=tulle-viewer"), "{all}");
    }
}
