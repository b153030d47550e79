//! The headers that every page has. The page has no session and no route that changes anything: who asks is told by the
//! token of each request, as in the API. `form-action` is for the choices of the views and for the forms that `tulle
//! dashboard` takes, at the same address.

use axum::http::{HeaderMap, HeaderName, HeaderValue, header};

/// `connect-src` is for the script, which loads the page again.
const CSP: &str = "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'";

/// Sets the headers that every page has.
pub fn protect(headers: &mut HeaderMap) {
    let all = [
        (header::CONTENT_SECURITY_POLICY, CSP),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        // Addresses have names of workloads.
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    ];
    for (name, value) in all {
        headers.insert(name, HeaderValue::from_static(value));
    }
}

/// For a page with a form that changes something. `tulle dashboard` takes it from its own origin only, and with
/// `no-referrer` browsers send `Origin: null` (Fetch, "append a request `Origin` header"). Other sites still do not get
/// the address.
pub fn name_origin(headers: &mut HeaderMap) {
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("same-origin"));
}
