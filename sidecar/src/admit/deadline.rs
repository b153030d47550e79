//! When a request is not worth an application's time any more.

use std::time::Duration;

use tokio::time::Instant;
use tulle_mesh::wire::head::Protocol as Travels;

use crate::call::Call;

/// When the answer to a request must have begun. `left_ms`: what its client's sidecar says; without that, a gRPC client
/// says it itself.
pub fn deadline_of(call: &Call<'_>, left_ms: Option<u32>) -> Option<Instant> {
    let left = match left_ms {
        Some(left) => Duration::from_millis(u64::from(left)),
        // Only gRPC has the header, and only HTTP/2 carries gRPC.
        None if call.travels == Travels::Http2 => parse_grpc_timeout(call.head.header("grpc-timeout")?)?,
        None => return None,
    };
    call.since.checked_add(left)
}

/// Whether a deadline has passed.
pub fn has_passed(deadline: Option<Instant>) -> bool {
    deadline.is_some_and(|deadline| deadline <= Instant::now())
}

/// The value of `grpc-timeout`: at most eight digits and a unit ("gRPC over HTTP2", Requests).
fn parse_grpc_timeout(value: &[u8]) -> Option<Duration> {
    let (unit, digits) = value.split_last()?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grpc_timeout_is_read_in_every_unit_and_nothing_else_is() {
        for (value, expected) in [
            ("1H", Duration::from_secs(3600)),
            ("2M", Duration::from_secs(120)),
            ("99999999S", Duration::from_secs(99_999_999)),
            ("300m", Duration::from_millis(300)),
            ("5u", Duration::from_micros(5)),
            ("0n", Duration::ZERO),
        ] {
            assert_eq!(parse_grpc_timeout(value.as_bytes()), Some(expected), "{value}");
        }
        for value in ["", "m", "5", "5s", "-5m", "5 m", "1.5S", "123456789m"] {
            assert_eq!(parse_grpc_timeout(value.as_bytes()), None, "{value:?}");
        }
    }
}
