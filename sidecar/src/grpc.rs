//! What gRPC writes into heads and trailers, for both directions ("gRPC over HTTP2").
//!
//! In: values of fields. Out: what they mean. Nothing here counts, waits or decides about a request.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use crate::http1::Head;

/// The field that says how much time a call has.
pub const TIMEOUT: &str = "grpc-timeout";
/// The most digits of a `grpc-timeout`.
const MOST_DIGITS: usize = 8;

/// The content type of a gRPC request, as it was sent; `None`: the request is not gRPC.
pub fn content_type(head: &Head) -> Option<&Bytes> {
    head.header("content-type").filter(|value| value.starts_with(b"application/grpc"))
}

/// The value of `grpc-timeout`: at most eight digits and a unit.
pub fn parse_timeout(value: &[u8]) -> Option<Duration> {
    let (unit, digits) = value.trim_ascii().split_last()?;
    if digits.is_empty() || digits.len() > MOST_DIGITS || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number = digits.iter().fold(0, |number, digit| number * 10 + u64::from(digit - b'0'));
    Some(match unit {
        b'H' => Duration::from_secs(number * 3600),
        b'M' => Duration::from_secs(number * 60),
        b'S' => Duration::from_secs(number),
        b'm' => Duration::from_millis(number),
        b'u' => Duration::from_micros(number),
        b'n' => Duration::from_nanos(number),
        _ => return None,
    })
}

/// What a `grpc-timeout` has to say for a call that ends then; `None`: it says that, to a millisecond. In milliseconds,
/// or in seconds where that is too long for eight digits.
pub fn renewed_timeout(value: &[u8], deadline: Instant) -> Option<Bytes> {
    let left = deadline.saturating_duration_since(Instant::now());
    let is_as_written = parse_timeout(value).is_some_and(|written| {
        written.checked_sub(left).is_some_and(|passed| passed < Duration::from_millis(1))
    });
    if is_as_written {
        return None;
    }
    let ms = left.as_millis().max(1);
    let text =
        if ms < 100_000_000 { format!("{ms}m") } else { format!("{}S", left.as_secs().min(99_999_999)) };
    Some(Bytes::from(text))
}

/// Writes what is left of a call's time into its `grpc-timeout`, if it has one.
pub fn renew_timeout(head: &mut Head, deadline: Instant) {
    let field = head.headers.iter_mut().find(|(name, _)| name.eq_ignore_ascii_case(TIMEOUT.as_bytes()));
    if let Some((_, value)) = field
        && let Some(renewed) = renewed_timeout(value, deadline)
    {
        *value = renewed;
    }
}

/// Whether a `grpc-status` blames the server: UNKNOWN, DEADLINE_EXCEEDED, INTERNAL, UNAVAILABLE or DATA_LOSS.
pub fn is_server_error(status: u16) -> bool {
    matches!(status, 2 | 4 | 13 | 14 | 15)
}

/// The status that a client makes of a stream that the server resets with this HTTP/2 error code ("gRPC over HTTP2",
/// "Errors").
pub fn status_of_reset(code: u8) -> u16 {
    match code {
        // REFUSED_STREAM: UNAVAILABLE.
        0x7 => 14,
        // CANCEL: CANCELLED.
        0x8 => 1,
        // ENHANCE_YOUR_CALM: RESOURCE_EXHAUSTED.
        0xb => 8,
        // INADEQUATE_SECURITY: PERMISSION_DENIED.
        0xc => 7,
        // INTERNAL.
        _ => 13,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_is_read_in_every_unit_and_nothing_else_is() {
        for (value, expected) in [
            ("1H", Duration::from_secs(3600)),
            ("2M", Duration::from_secs(120)),
            ("99999999S", Duration::from_secs(99_999_999)),
            ("300m", Duration::from_millis(300)),
            (" 250m ", Duration::from_millis(250)),
            ("5u", Duration::from_micros(5)),
            ("0n", Duration::ZERO),
            ("99999999n", Duration::from_nanos(99_999_999)),
        ] {
            assert_eq!(parse_timeout(value.as_bytes()), Some(expected), "{value}");
        }
        for value in ["", "m", "5", "5s", "-5m", "+1S", "5 m", "1.5S", "123456789m"] {
            assert_eq!(parse_timeout(value.as_bytes()), None, "{value:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_left_is_what_goes_on() {
        let mut head = Head::answer(200, "", 0);
        head.push("grpc-timeout", "5S");
        let value = |head: &Head| head.header("grpc-timeout").cloned().unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        renew_timeout(&mut head, deadline);
        assert_eq!(value(&head), "5S", "nothing has passed");
        tokio::time::advance(Duration::from_millis(1_200)).await;
        renew_timeout(&mut head, deadline);
        assert_eq!(value(&head), "3800m");
        renew_timeout(&mut head, Instant::now() + Duration::from_secs(200_000));
        assert_eq!(value(&head), "200000S");
        renew_timeout(&mut head, deadline - Duration::from_secs(60));
        assert_eq!(value(&head), "1m", "none is not a number of gRPC");
    }

    #[test]
    fn errors_of_the_client_are_not_errors_of_the_server() {
        let blamed: Vec<u16> = (0..=16).filter(|status| is_server_error(*status)).collect();
        assert_eq!(blamed, [2, 4, 13, 14, 15]);
    }
}
