//! What the operator and the sidecars agree on about taps.

/// Requests in one message of a sidecar about one tap. More are counted as lost, and never decoded: an event that is empty
/// has 2 bytes on the wire and about 300 in memory.
pub const MAX_EVENTS: usize = 64;

/// What the names of headers with credentials contain, and those of what sidecars tell each other. `auth` stands for
/// `authorization` and `proxy-authorization` too, `-key` for `x-api-key`.
const SECRET: [&str; 16] = [
    "auth",
    "jwt",
    "token",
    "secret",
    "passw",
    "session",
    "cookie",
    "-key",
    "apikey",
    "signature",
    "credential",
    "csrf",
    "xsrf",
    "oidc",
    "saml",
    "tulle-",
];
/// How the names of headers end whose values are URLs or paths with a query.
const WITH_QUERY: [&str; 6] = ["referer", "referrer", "location", "-uri", "-url", "-path"];

/// Whether a header may hold a credential, going by its name in any case: no tap shows it. Better one too many than one
/// too few.
pub fn is_secret(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    SECRET.iter().any(|part| name.contains(part))
}

/// What a tap shows of a header's value: of a URL what stands before its query, which may hold a credential.
pub fn shown_value<'a>(name: &str, value: &'a str) -> &'a str {
    let name = name.to_ascii_lowercase();
    if !WITH_QUERY.iter().any(|end| name.ends_with(end)) {
        return value;
    }
    value.split(['?', '#']).next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_whose_names_speak_of_credentials_are_secret() {
        for (name, expected) in [
            ("authorization", true),
            ("Proxy-Authorization", true),
            ("x-auth-token", true),
            ("x-amz-security-token", true),
            ("x-amzn-oidc-data", true),
            ("x-goog-iap-jwt-assertion", true),
            ("X-Forwarded-Access-Token", true),
            ("cookie", true),
            ("Set-Cookie", true),
            ("x-api-key", true),
            ("ocp-apim-subscription-key", true),
            ("apikey", true),
            ("x-client-secret", true),
            ("db-password", true),
            ("x-passwd", true),
            ("session-id", true),
            ("x-hub-signature-256", true),
            ("x-vault-credential", true),
            ("x-csrf", true),
            ("X-XSRF", true),
            ("tulle-client-id", true),
            ("user-agent", false),
            ("x-request-id", false),
            ("host", false),
            ("content-type", false),
            ("x-forwarded-for", false),
            ("traceparent", false),
            ("keep-alive", false),
        ] {
            assert_eq!(is_secret(name), expected, "{name}");
        }
    }

    #[test]
    fn a_url_in_a_header_is_shown_without_its_query() {
        for (name, value, expected) in [
            ("referer", "https://shop.example/cart?token=s3cret#top", "https://shop.example/cart"),
            ("Referer", "https://shop.example/cart#access_token=s3cret", "https://shop.example/cart"),
            ("x-original-url", "/cart?token=s3cret", "/cart"),
            ("x-forwarded-uri", "/cart?token=s3cret", "/cart"),
            ("x-envoy-original-path", "/cart?token=s3cret", "/cart"),
            ("x-original-url", "?token=s3cret", ""),
            ("user-agent", "who? me#1", "who? me#1"),
        ] {
            assert_eq!(shown_value(name, value), expected, "{name}");
        }
    }
}
