//! `/canary/{namespace}/{name}/{action}`: what an action on a Canary would do, and the form that asks for it.
//!
//! Only `tulle dashboard --allow-actions` takes the form: it has the rights of its user. The operator has no right to
//! write to Canaries, and no route for the form. Whether there is one depends on headers that `tulle dashboard` adds to
//! the requests of users who may change Canaries, and takes off those of a browser. They are hints for rendering and give
//! no right: whoever has a token and forges them sees a form that nobody takes.

use axum::http::{HeaderMap, HeaderValue};
use maud::{Markup, html};
use tulle_crds::{Canary, CanaryAction, CanaryStatus, CanaryVerdict, Phase};
use tulle_mesh::page as agreed;

use super::canary::{name, namespace, or_none, phase, verdict};
use super::layout::{Page, View, page};
use super::words::{address, command};

/// The longest token that a form takes over, in bytes.
const LONGEST_TOKEN: usize = 128;

/// What `tulle dashboard` says about its user: actions on Canaries may be offered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    token: String,
}

impl Offer {
    /// Reads the headers. `None`: pages have no forms.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        let text = |name: &str| headers.get(name).map(HeaderValue::to_str).and_then(Result::ok);
        let token = text(agreed::FORM_TOKEN).filter(|token| is_token(token))?;
        let may = text(agreed::MAY) == Some(agreed::CANARY_ACTIONS);
        may.then(|| Self { token: token.to_owned() })
    }
}

fn is_token(text: &str) -> bool {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    (1..=LONGEST_TOKEN).contains(&text.len()) && text.bytes().all(known)
}

/// The actions that have an effect in this phase.
pub fn possible(status: &CanaryStatus) -> &'static [CanaryAction] {
    use CanaryAction::{Abort, Pause, Promote, Resume, Retry};
    match status.phase {
        Phase::Progressing => &[Promote, Pause, Abort],
        Phase::Paused => &[Resume, Promote, Abort],
        Phase::Promoting => &[Abort],
        Phase::Failed => &[Retry, Promote],
        Phase::Waiting | Phase::Stable => &[],
    }
}

/// An action as a heading or a button begins with it.
fn title(action: CanaryAction) -> &'static str {
    match action {
        CanaryAction::Promote => "Promote",
        CanaryAction::Pause => "Pause",
        CanaryAction::Resume => "Resume",
        CanaryAction::Abort => "Abort",
        CanaryAction::Retry => "Retry",
    }
}

/// Why an action has no effect, as the end of a sentence.
fn refusal(status: &CanaryStatus) -> &'static str {
    match status.phase {
        Phase::Waiting => "the target does not exist or has no revision yet",
        Phase::Stable => "no rollout is in progress",
        Phase::Progressing => "the rollout is in progress already",
        Phase::Paused => "the rollout is paused already",
        Phase::Promoting => "the revision is approved already, and its pods replace the others",
        Phase::Failed => "the rollout has failed, and its revision gets no traffic",
    }
}

/// What an action would do.
fn effect(action: CanaryAction, status: &CanaryStatus) -> String {
    let (revision, weight) = (&status.canary_revision, status.weight);
    match action {
        CanaryAction::Promote => format!(
            "Revision {revision} is approved now: the steps that are left and the judge are skipped, and its pods replace the others."
        ),
        CanaryAction::Pause => {
            format!("The rollout of revision {revision} stays at {weight} % until somebody resumes it.")
        }
        CanaryAction::Resume => {
            format!("The rollout of revision {revision} goes on from its present weight of {weight} %.")
        }
        CanaryAction::Abort => format!(
            "Revision {revision} is treated as failed and gets no traffic. Its pods stay until the pod template is restored."
        ),
        CanaryAction::Retry => {
            format!("Revision {revision} goes through the steps again, from the first one.")
        }
    }
}

/// Links to the pages that ask, on the page of the Canary.
pub fn buttons(canary: &Canary, status: &CanaryStatus) -> Markup {
    let possible = possible(status);
    let to = |action: CanaryAction| address(&["canary", namespace(canary), name(canary), action.name()]);
    html! {
        section aria-labelledby="actions" {
            h2 id="actions" { "Actions" }
            @if possible.is_empty() {
                p.empty { "There is nothing to promote, pause or abort: " (refusal(status)) "." }
            } @else {
                ul.actions {
                    @for &action in possible {
                        li { a.button href=(to(action)) { (title(action)) } }
                    }
                }
            }
        }
    }
}

/// The page that asks whether an action is meant.
///
/// The script loads no part of it again: the revision, the phase and the step that are sent are those that were read, and
/// `tulle dashboard` refuses the action if the rollout is elsewhere by then.
pub fn confirmation(canary: &Canary, action: CanaryAction, offer: &Offer, only: Option<&str>) -> Markup {
    let (namespace, name) = (namespace(canary), name(canary));
    let status = canary.status.clone().unwrap_or_default();
    let revision = status.canary_revision.as_str();
    let is_possible = possible(&status).contains(&action);
    let title_of_page = format!("{} Canary {namespace}/{name}?", title(action));
    let here = address(&["canary", namespace, name, action.name()]);
    let mut words = vec!["tulle", "canary", action.name(), name, "-n", namespace];
    if !revision.is_empty() {
        words.extend(["--revision", revision]);
    }
    let commands = if is_possible { vec![command(&words)] } else { Vec::new() };
    let around = Page { title: &title_of_page, view: Some(View::Canaries), here: &here, only, commands };
    let back = address(&["canary", namespace, name]);
    let controls = html! {
        @if is_possible {
            p.sentence { (effect(action, &status)) }
            (situation(&status))
            form.controls method="post" action=(here) {
                input type="hidden" name=(agreed::TOKEN) value=(offer.token);
                input type="hidden" name=(agreed::REVISION) value=(revision);
                input type="hidden" name=(agreed::SEEN) value=(seen(&status));
                button id="confirm" type="submit" { (title(action)) " revision " (or_none(revision)) }
                a.button href=(back) { "Cancel" }
            }
        } @else {
            p.sentence { "This would do nothing: " (refusal(&status)) "." }
            p { a href=(back) { "Back to Canary " (namespace) "/" (name) } }
        }
    };
    page(&around, &controls, &html! {})
}

/// Where the rollout is, as the form sends it.
fn seen(status: &CanaryStatus) -> String {
    agreed::seen(&format!("{:?}", status.phase), status.step)
}

/// What somebody must know who decides.
fn situation(status: &CanaryStatus) -> Markup {
    html! {
        dl.facts {
            dt { "Revision rolled out" } dd { (or_none(&status.canary_revision)) }
            dt { "Approved revision" } dd { (or_none(&status.approved_revision)) }
            dt { "Phase" } dd { (phase(status.phase)) }
            dt { "Weight" } dd { (status.weight) " %" }
            dt { "The judge" } dd { (judged(status)) }
        }
    }
}

/// What the judge said last.
fn judged(status: &CanaryStatus) -> String {
    match (status.verdict, status.evidence_summary.as_str()) {
        (CanaryVerdict::NotJudged, evidence) => or_none(evidence).to_owned(),
        (of, "") => verdict(of).to_owned(),
        (of, evidence) => format!("{}: {evidence}", verdict(of)),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use axum::body::{Body, to_bytes};
    use axum::http::{Method, Request, Response, StatusCode, header};
    use serde_json::{Value, from_value, json};
    use tower::ServiceExt as _;

    use super::*;
    use crate::api::tests::api;
    use crate::api::{Api, routes};
    use crate::model::tests::{pod, shop};
    use crate::watch::Hub;

    fn canary(status: &Value) -> Canary {
        from_value(json!({
            "apiVersion": "tulle.dev/v1alpha1", "kind": "Canary",
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"target": {"kind": "Deployment", "name": "web"}},
            "status": status,
        }))
        .unwrap()
    }

    fn progressing() -> Canary {
        canary(&json!({
            "phase": "Progressing", "canaryRevision": "5d4f", "approvedRevision": "7c9d", "weight": 5, "step": 2,
            "verdict": "Undecided", "evidenceSummary": "3 of 400 failed <b>here</b>",
        }))
    }

    fn offer() -> Offer {
        Offer { token: "a-B_9".to_owned() }
    }

    const HINTS: [(&str, &str); 2] = [(agreed::MAY, agreed::CANARY_ACTIONS), (agreed::FORM_TOKEN, "a-B_9")];

    /// The answer to a request with the token of namespace `shop`, whose Canary `web` is in progress.
    async fn asked(method: Method, path: &str, headers: &[(&'static str, &str)]) -> Response<Body> {
        let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
        model.apply_canary(("shop".into(), "web".into()), progressing());
        let api = Api { hub: Arc::new(Hub::complete(model)), ..api() };
        let mut request = Request::builder().method(method).uri(path);
        request = request.header(header::AUTHORIZATION, "Bearer h.shop.s");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        routes(api).oneshot(request.body(Body::empty()).unwrap()).await.unwrap()
    }

    async fn text(response: Response<Body>) -> String {
        String::from_utf8(to_bytes(response.into_body(), 1 << 20).await.unwrap().to_vec()).unwrap()
    }

    #[tokio::test]
    async fn only_with_the_headers_of_tulle_dashboard_there_are_buttons_and_a_form() {
        let plain = asked(Method::GET, "/canary/shop/web", &[]).await;
        assert_eq!(plain.status(), StatusCode::OK);
        let plain = text(plain).await;
        assert!(!plain.contains("/canary/shop/web/pause") && !plain.contains("<form"), "{plain}");
        let refused = asked(Method::GET, "/canary/shop/web/pause", &[]).await;
        assert_eq!(refused.status(), StatusCode::FORBIDDEN);
        let refused = text(refused).await;
        assert!(!refused.contains("<form"), "{refused}");
        for cause in ["tulle dashboard --allow-actions", "may change this Canary", "gave no answer"] {
            assert!(refused.contains(cause), "{cause} in {refused}");
        }

        let offered = text(asked(Method::GET, "/canary/shop/web", &HINTS).await).await;
        for action in ["promote", "pause", "abort"] {
            let link = format!("<a class=\"button\" href=\"/canary/shop/web/{action}\">");
            assert!(offered.contains(&link), "{action} in {offered}");
        }
        assert!(!offered.contains("/canary/shop/web/resume"), "it would do nothing: {offered}");
        let form = asked(Method::GET, "/canary/shop/web/pause", &HINTS).await;
        assert_eq!(form.status(), StatusCode::OK);
        assert!(text(form).await.contains("<form"));
    }

    #[tokio::test]
    async fn no_route_takes_a_form_whatever_its_headers_are() {
        for path in ["/canary/shop/web", "/canary/shop/web/pause", "/canary/shop/web/promote", "/canaries"] {
            for method in [Method::POST, Method::PUT, Method::PATCH, Method::DELETE] {
                let answer = asked(method.clone(), path, &HINTS).await;
                assert_eq!(answer.status(), StatusCode::METHOD_NOT_ALLOWED, "{method} {path}");
            }
        }
    }

    #[tokio::test]
    async fn browsers_name_the_origin_of_a_form_and_tell_its_address_to_nobody_else() {
        let form = asked(Method::GET, "/canary/shop/web/pause", &HINTS).await;
        assert_eq!(form.headers()[header::REFERRER_POLICY], "same-origin");
        let policy = form.headers()[header::CONTENT_SECURITY_POLICY].to_str().unwrap();
        assert!(policy.contains("form-action 'self'"), "{policy}");
        let other = asked(Method::GET, "/canary/shop/web", &HINTS).await;
        assert_eq!(other.headers()[header::REFERRER_POLICY], "no-referrer");
    }

    #[tokio::test]
    async fn an_action_that_does_not_exist_and_a_canary_that_is_gone_are_not_found() {
        for path in ["/canary/shop/web/undo", "/canary/shop/gone/pause"] {
            assert_eq!(asked(Method::GET, path, &HINTS).await.status(), StatusCode::NOT_FOUND, "{path}");
        }
    }

    #[test]
    fn a_form_says_what_happens_and_sends_what_was_read() {
        let text = confirmation(&progressing(), CanaryAction::Pause, &offer(), None).into_string();
        for part in [
            "<h1>Pause Canary shop/web?</h1>",
            "The rollout of revision 5d4f stays at 5 % until somebody resumes it.",
            "Undecided: 3 of 400 failed &lt;b&gt;here",
            "<form class=\"controls\" method=\"post\" action=\"/canary/shop/web/pause\">",
            "<input type=\"hidden\" name=\"token\" value=\"a-B_9\">",
            "<input type=\"hidden\" name=\"revision\" value=\"5d4f\">",
            "<input type=\"hidden\" name=\"seen\" value=\"Progressing/2\">",
            "Pause revision 5d4f</button>",
            "<a class=\"button\" href=\"/canary/shop/web\">Cancel</a>",
            "<code>tulle canary pause web -n shop --revision 5d4f</code>",
            "<div id=\"live\"></div>",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn an_action_that_would_do_nothing_has_a_reason_and_no_form() {
        for (phase, action, why) in [
            ("Stable", CanaryAction::Promote, "no rollout is in progress"),
            ("Waiting", CanaryAction::Abort, "has no revision yet"),
            ("Promoting", CanaryAction::Promote, "approved already"),
            ("Paused", CanaryAction::Pause, "paused already"),
            ("Progressing", CanaryAction::Resume, "in progress already"),
            ("Failed", CanaryAction::Abort, "gets no traffic"),
        ] {
            let canary = canary(&json!({"phase": phase, "canaryRevision": "5d4f"}));
            let text = confirmation(&canary, action, &offer(), None).into_string();
            assert!(text.contains(why) && !text.contains("<form"), "{phase}: {text}");
        }
        let stable = canary(&json!({"phase": "Stable"}));
        let text = buttons(&stable, &stable.status.clone().unwrap()).into_string();
        assert!(text.contains("no rollout is in progress") && !text.contains("<a"), "{text}");
    }

    #[test]
    fn headers_that_are_not_those_of_tulle_dashboard_offer_nothing() {
        let read = |may: &str, token: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(agreed::MAY, HeaderValue::from_str(may).unwrap());
            headers.insert(agreed::FORM_TOKEN, HeaderValue::from_str(token).unwrap());
            Offer::of(&headers)
        };
        assert_eq!(read(agreed::CANARY_ACTIONS, "a-B_9"), Some(offer()));
        let long = "a".repeat(129);
        for token in ["", "a b", "\"><script>", "a=", long.as_str()] {
            assert_eq!(read(agreed::CANARY_ACTIONS, token), None, "{token}");
        }
        for may in ["", "everything", "canary-actions, more"] {
            assert_eq!(read(may, "a-B_9"), None, "{may}");
        }
        assert_eq!(Offer::of(&HeaderMap::new()), None);
    }
}
