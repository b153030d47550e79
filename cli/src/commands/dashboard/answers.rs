//! Answers of this command itself. All others are the operator's.

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, LOCATION};
use hyper::header::{REFERRER_POLICY, SET_COOKIE, X_CONTENT_TYPE_OPTIONS};
use hyper::{Response, StatusCode};

use super::address::Asked;
use crate::commands::canary::action::Undone;
use crate::exit::CliError;

/// The body of any answer.
pub type Body = UnsyncBoxBody<Bytes, hyper::Error>;

/// A line of text.
pub fn text(status: StatusCode, text: &str) -> Response<Body> {
    answer(
        status,
        "text/plain; charset=utf-8",
        "default-src 'none'; frame-ancestors 'none'",
        format!("{text}\n"),
    )
}

fn answer(status: StatusCode, kind: &'static str, policy: &'static str, body: String) -> Response<Body> {
    let full = Full::new(Bytes::from(body)).map_err(|never| match never {});
    let mut response = Response::new(full.boxed_unsync());
    *response.status_mut() = status;
    for (name, value) in [
        (CONTENT_TYPE, kind),
        (CONTENT_SECURITY_POLICY, policy),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        (CACHE_CONTROL, "no-store"),
    ] {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

/// Sets the cookie, and takes the key out of the address.
pub fn opened(cookie: &str) -> Response<Body> {
    let Ok(cookie) = HeaderValue::from_str(cookie) else {
        return text(StatusCode::INTERNAL_SERVER_ERROR, "The key fits into no cookie.");
    };
    let mut response = text(StatusCode::SEE_OTHER, "The page is at /.");
    response.headers_mut().insert(SET_COOKIE, cookie);
    response.headers_mut().insert(LOCATION, HeaderValue::from_static("/"));
    response
}

/// Leads to the page of the Canary, by GET: loading that page again does not act again.
pub fn done(asked: &Asked) -> Response<Body> {
    let page = asked.page();
    let mut response = text(StatusCode::SEE_OTHER, &format!("The page of the Canary is at {page}."));
    if let Ok(page) = HeaderValue::from_str(&page) {
        response.headers_mut().insert(LOCATION, page);
    }
    response
}

/// Why an action was not done, or is not known to be, with the way back.
pub fn not_done(asked: &Asked, undone: &Undone) -> Response<Body> {
    let (status, title, error) = match undone {
        Undone::Not(error) => (StatusCode::CONFLICT, "Not done", error),
        Undone::Unconfirmed(error) => {
            (StatusCode::GATEWAY_TIMEOUT, "Requested, and not confirmed yet", error)
        }
    };
    let hint = match error {
        CliError::Failed { hint: Some(hint), .. } => format!("<pre><code>{}</code></pre>\n", escaped(hint)),
        _ => String::new(),
    };
    let page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{title} · Tulle</title>\n\
         <link rel=\"icon\" href=\"data:,\">\n<link rel=\"stylesheet\" href=\"/assets/page.css\">\n</head>\n\
         <body>\n<main>\n<h1>{title}</h1>\n<p><code>{command}</code></p>\n<p>{why}</p>\n{hint}\
         <p><a href=\"{back}\">Back to Canary {namespace}/{name}</a></p>\n</main>\n</body>\n</html>\n",
        command = escaped(&asked.command()),
        why = escaped(&error.to_string()),
        back = escaped(&asked.page()),
        namespace = escaped(&asked.namespace),
        name = escaped(&asked.name),
    );
    let policy =
        "default-src 'none'; style-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'";
    answer(status, "text/html; charset=utf-8", policy, page)
}

/// Text as it stands in HTML, in an element or in a quoted attribute.
fn escaped(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut out, char| {
        match char {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            _ => out.push(char),
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pause() -> Asked {
        Asked::at("/canary/shop/web/pause").unwrap()
    }

    async fn body(response: Response<Body>) -> String {
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    #[test]
    fn the_key_is_taken_out_of_the_address() {
        let response = opened("tulle-key-1=a; HttpOnly");
        assert_eq!(response.status(), StatusCode::SEE_OTHER);
        assert_eq!(response.headers().get(LOCATION).unwrap(), "/");
        assert_eq!(response.headers().get(SET_COOKIE).unwrap(), "tulle-key-1=a; HttpOnly");
        assert_eq!(response.headers().get(CACHE_CONTROL).unwrap(), "no-store");
    }

    #[test]
    fn an_action_leads_to_the_page_of_its_canary() {
        let response = done(&pause());
        assert_eq!(response.status(), StatusCode::SEE_OTHER);
        assert_eq!(response.headers().get(LOCATION).unwrap(), "/canary/shop/web");
    }

    #[tokio::test]
    async fn a_refused_action_says_why_and_leads_back() {
        let error = CliError::failed("pause would do nothing: <b>it</b> is \"Stable\"").hint("look & see");
        let response = not_done(&pause(), &Undone::Not(error));
        assert_eq!(response.status(), StatusCode::CONFLICT);
        let policy = response.headers().get(CONTENT_SECURITY_POLICY).unwrap().to_str().unwrap();
        assert!(policy.contains("default-src 'none'") && !policy.contains("unsafe"), "{policy}");
        let body = body(response).await;
        for part in [
            "&lt;b&gt;it&lt;/b&gt; is &quot;Stable&quot;",
            "look &amp; see",
            "<a href=\"/canary/shop/web\">Back to Canary shop/web</a>",
            "<code>tulle canary pause web -n shop</code>",
            "<h1>Not done</h1>",
        ] {
            assert!(body.contains(part), "{part} in {body}");
        }
        assert!(!body.contains("<b>"), "{body}");
    }

    #[tokio::test]
    async fn an_action_that_may_be_done_yet_is_not_called_refused() {
        for error in [CliError::TimedOut("late".to_owned()), CliError::failed("late")] {
            let response = not_done(&pause(), &Undone::Unconfirmed(error));
            assert_eq!(response.status(), StatusCode::GATEWAY_TIMEOUT);
            let body = body(response).await;
            assert!(body.contains("<h1>Requested, and not confirmed yet</h1>"), "{body}");
            assert!(body.contains("<p>late</p>") && !body.contains("Not done"), "{body}");
        }
    }
}
