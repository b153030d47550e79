//! The session: a token in a cookie, put there by the link that `tulle dashboard` opens.
//!
//! The cookie is sent by this page only (`SameSite=Strict`) and no script can read it (`HttpOnly`). There is no session
//! besides it: when the token expires, the page says so. The page has no route that changes anything.

use axum::http::{HeaderMap, HeaderName, HeaderValue, header};

use crate::api::COOKIE;

/// The longest token that fits into a cookie, with its name and attributes.
const MAX_TOKEN: usize = 3_800;

/// `connect-src` is for the script, which loads the page again.
const CSP: &str = "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'";

/// Sets the headers that every page has.
pub fn protect(headers: &mut HeaderMap) {
    let all = [
        (header::CONTENT_SECURITY_POLICY, CSP),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        // The link of the login has a token in it, and addresses have names of workloads.
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    ];
    for (name, value) in all {
        headers.insert(name, HeaderValue::from_static(value));
    }
}

/// The headers of a request with this token instead of whatever it brought; `None`: it cannot be a token.
pub fn with_token(token: &str) -> Option<HeaderMap> {
    let fits = !token.is_empty() && token.len() <= MAX_TOKEN;
    // Those of a JSON Web Token: none of them has a meaning in a cookie.
    let safe = token.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if !fits || !safe {
        return None;
    }
    let value = HeaderValue::try_from(format!("Bearer {token}")).ok()?;
    Some(HeaderMap::from_iter([(header::AUTHORIZATION, value)]))
}

/// The cookie with a token that [`with_token`] has accepted.
pub fn cookie(token: &str) -> String {
    format!("{COOKIE}={token}; Path=/; HttpOnly; SameSite=Strict")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cookie_is_kept_from_scripts_and_other_sites() {
        assert_eq!(cookie("a.b"), "tulle-session=a.b; Path=/; HttpOnly; SameSite=Strict");
    }

    #[test]
    fn what_could_break_out_of_a_cookie_is_not_a_token() {
        let long = "a".repeat(MAX_TOKEN + 1);
        for bad in ["", "a; Domain=evil", "a\r\nb", "a b", long.as_str()] {
            assert_eq!(with_token(bad), None, "{bad:?}");
        }
        assert!(with_token("eyJ.a-b_c.d").is_some());
    }

    #[test]
    fn no_page_may_run_or_style_what_is_written_in_it() {
        assert!(CSP.starts_with("default-src 'none'") && !CSP.contains("unsafe"));
    }
}
