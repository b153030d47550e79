//! Headers that a proxy does not forward as they are, and what a route may therefore do with a header.

/// Names of headers that concern one connection (RFC 9110 §7.6.1) or say where a body ends. A sidecar takes them off and
/// writes its own.
pub const PER_CONNECTION: [&str; 9] = [
    "connection",
    "content-length",
    "expect",
    "http2-settings",
    "keep-alive",
    "proxy-connection",
    "te",
    "transfer-encoding",
    "upgrade",
];

/// Whether a route may set, add or remove this header: `trailer` describes the framing, and `tulle-client-id` names the
/// client to the application. Names are compared without case.
pub fn is_editable(name: &str) -> bool {
    let fixed = PER_CONNECTION.iter().chain(&["trailer", "tulle-client-id"]);
    !fixed.into_iter().any(|fixed| fixed.eq_ignore_ascii_case(name))
}

/// Whether a match of this header can ever hold: sidecars see `upgrade` of HTTP/1 requests and none of the others. Names
/// are compared without case.
pub fn is_matchable(name: &str) -> bool {
    name.eq_ignore_ascii_case("upgrade") || !PER_CONNECTION.iter().any(|own| own.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_frames_a_message_is_neither_edited_nor_matched_and_other_headers_are_both() {
        for name in ["Connection", "content-length", "TE"] {
            assert!(!is_editable(name) && !is_matchable(name), "{name}");
        }
        assert!(is_editable("x-group") && is_matchable("x-group"));
        assert!(!is_editable("Tulle-Client-Id") && is_matchable("tulle-client-id"));
        assert!(!is_editable("upgrade") && is_matchable("Upgrade"));
    }
}
