//! What a request asks for itself: how long it may take, and how often it may be retried.
//!
//! The headers `tulle-timeout` and `tulle-retries` are for this sidecar, and do not go on to the application that is
//! called. Both only make what a policy allows narrower. `grpc-timeout` goes on, with what is left of it.

use std::time::Duration;

use bytes::Bytes;

use crate::grpc;
use crate::http1::Head;

const TIMEOUT: &[u8] = b"tulle-timeout";
const RETRIES: &[u8] = b"tulle-retries";

/// What a request asks for itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Overrides {
    /// How long it may take.
    pub(super) timeout: Option<Duration>,
    /// Retries beside the first attempt.
    pub(super) retries: Option<u8>,
    /// How long gRPC gives it.
    pub(super) grpc_timeout: Option<Duration>,
}

/// Reads what a request asks for itself, and takes off what is not for the application. A value that cannot be read asks
/// for nothing.
pub(super) fn take(head: &mut Head) -> Overrides {
    let mut found = Overrides::default();
    let mut is_ours = false;
    for (name, value) in &head.headers {
        // Most names differ in their length already.
        match name.len() {
            12 if name.eq_ignore_ascii_case(grpc::TIMEOUT.as_bytes()) => {
                found.grpc_timeout = grpc::parse_timeout(value)
            }
            13 if name.eq_ignore_ascii_case(TIMEOUT) => {
                found.timeout = duration(value);
                is_ours = true;
            }
            13 if name.eq_ignore_ascii_case(RETRIES) => {
                found.retries = text(value).and_then(|text| text.parse().ok());
                is_ours = true;
            }
            _ => {}
        }
    }
    if is_ours {
        let ours = |name: &Bytes| name.eq_ignore_ascii_case(TIMEOUT) || name.eq_ignore_ascii_case(RETRIES);
        head.headers.retain(|(name, _)| !ours(name));
    }
    found
}

fn text(value: &[u8]) -> Option<&str> {
    std::str::from_utf8(value).ok().map(str::trim)
}

/// `500ms`, `2s` or `1m`.
fn duration(value: &[u8]) -> Option<Duration> {
    let text = text(value)?;
    let (number, unit) = text.split_at_checked(text.find(|c: char| !c.is_ascii_digit())?)?;
    let number: u64 = number.parse().ok()?;
    let ms = match unit {
        "ms" => Some(number),
        "s" => number.checked_mul(1_000),
        "m" => number.checked_mul(60_000),
        _ => None,
    };
    ms.map(Duration::from_millis)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http1::{Framing, Start};

    fn head(lines: &[(&'static str, &'static str)]) -> Head {
        Head {
            start: Start::Request { method: Bytes::from_static(b"POST"), target: Bytes::from_static(b"/") },
            headers: lines.iter().map(|(name, value)| (Bytes::from(*name), Bytes::from(*value))).collect(),
            framing: Framing::None,
            keep_alive: true,
            upgrade: false,
            expects_continue: false,
            http10: false,
        }
    }

    #[test]
    fn what_a_request_asks_for_itself_does_not_go_on_to_the_application() {
        let mut head = head(&[("Tulle-Timeout", "500ms"), ("host", "a"), ("tulle-retries", "1")]);
        let timeout = Some(Duration::from_millis(500));
        assert_eq!(take(&mut head), Overrides { timeout, retries: Some(1), grpc_timeout: None });
        assert_eq!(head.headers.len(), 1);
        for bad in ["", "5", "5h", "ms", "-1s", "99999999999999999999s"] {
            let mut asks = head.clone();
            asks.push("tulle-timeout", bad);
            asks.push("tulle-retries", "many");
            assert_eq!(take(&mut asks), Overrides::default(), "{bad:?}");
            assert_eq!(asks.headers.len(), 1);
        }
    }

    #[test]
    fn a_grpc_timeout_is_read_and_goes_on() {
        for (written, expected) in [("3S", Some(Duration::from_secs(3))), ("1s", None)] {
            let mut head = head(&[("Grpc-Timeout", written)]);
            assert_eq!(take(&mut head).grpc_timeout, expected, "{written:?}");
            assert_eq!(head.headers.len(), 1, "it goes on");
        }
    }
}
