//! Values as users write them: `1h30m`, `99%`, names of headers.

use std::num::ParseFloatError;
use std::time::Duration;

use jiff::SpanRelativeTo;
use jiff::fmt::friendly::SpanParser;

/// The schema's pattern of a duration: whole numbers with units, the largest unit first.
pub(crate) const DURATION_PATTERN: &str = "^([0-9]+d)?([0-9]+h)?([0-9]+m)?([0-9]+s)?([0-9]+ms)?$";
/// The schema's pattern of the name of a header or cookie: a token of RFC 9110.
pub(crate) const TOKEN_PATTERN: &str = "^[A-Za-z0-9!#$%&'*+.^_`|~-]+$";

/// Why a value is invalid, and what to write instead.
#[derive(Debug, thiserror::Error)]
pub enum QuantityError {
    /// Not a duration.
    #[error(
        "invalid duration {value:?}: write whole numbers with the units d, h, m, s or ms, the largest unit first, for example 90s, 5m or 1h30m"
    )]
    Duration {
        /// The value.
        value: String,
        /// What jiff reported; absent if the value was not given to it.
        #[source]
        cause: Option<jiff::Error>,
    },
    /// A duration that is longer than jiff can represent.
    #[error("duration {value:?} is too long: write a shorter one, for example 90s, 5m or 1h30m")]
    TooLong {
        /// The value.
        value: String,
        /// What jiff reported.
        #[source]
        cause: jiff::Error,
    },
    /// Not a percentage.
    #[error(
        "invalid percentage {value:?}: write a number from 0 to 100 and a percent sign, for example 99% or 99.5%"
    )]
    Percent {
        /// The value.
        value: String,
        /// Why the part before the percent sign is not a number; absent if it is one.
        #[source]
        cause: Option<ParseFloatError>,
    },
}

/// Parses a duration: `500ms`, `90s`, `5m`, `1h30m`, `1d`. A day has 24 hours.
///
/// # Errors
/// [`QuantityError::Duration`] unless the text is whole numbers with units, the largest unit first;
/// [`QuantityError::TooLong`] if it is more than jiff can represent (about 20,000 years).
pub fn parse_duration(text: &str) -> Result<Duration, QuantityError> {
    let invalid = |cause| QuantityError::Duration { value: text.to_owned(), cause };
    // jiff also accepts words, spaces, signs, fractions, months and years. The schema does not.
    if !text.bytes().all(|byte| byte.is_ascii_digit() || b"dhms".contains(&byte)) {
        return Err(invalid(None));
    }
    SpanParser::new()
        .parse_span(text)
        .and_then(|span| span.to_duration(SpanRelativeTo::days_are_24_hours()))
        .and_then(Duration::try_from)
        .map_err(|cause| match is_well_formed(text) {
            true => QuantityError::TooLong { value: text.to_owned(), cause },
            false => invalid(Some(cause)),
        })
}

/// Whether the text is whole numbers with units, the largest unit first, however large the numbers are.
fn is_well_formed(text: &str) -> bool {
    let mut rest = text;
    for unit in ["d", "h", "m", "s", "ms"] {
        let after_number = rest.trim_start_matches(|c: char| c.is_ascii_digit());
        let has_number = after_number.len() < rest.len();
        let after = after_number.strip_prefix(unit).filter(|_| has_number);
        // The `m` of `ms` is not minutes.
        if let Some(after) = after.filter(|after| unit != "m" || !after.starts_with('s')) {
            rest = after;
        }
    }
    !text.is_empty() && rest.is_empty()
}

/// Parses a percentage, such as `99%` or `0.5%`, as a fraction of 1.
///
/// # Errors
/// [`QuantityError::Percent`] unless the text is a number from 0 to 100 with a percent sign.
pub fn parse_percent(text: &str) -> Result<f64, QuantityError> {
    let invalid = |cause| QuantityError::Percent { value: text.to_owned(), cause };
    let number = text.strip_suffix('%').ok_or_else(|| invalid(None))?;
    let number: f64 = number.parse().map_err(|error| invalid(Some(error)))?;
    if (0.0..=100.0).contains(&number) { Ok(number / 100.0) } else { Err(invalid(None)) }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    #[test]
    fn a_duration_is_whole_numbers_with_units_from_days_to_milliseconds() {
        for (text, millis) in [
            ("500ms", 500),
            ("0s", 0),
            ("90s", 90_000),
            ("5m", 300_000),
            ("2h", 7_200_000),
            ("1h30m", 5_400_000),
            ("1h30m5s", 5_405_000),
            ("5m500ms", 300_500),
            ("1d", 86_400_000),
            ("1d1h1m1s1ms", 90_061_001),
        ] {
            assert_eq!(parse_duration(text).unwrap(), Duration::from_millis(millis), "{text}");
        }
    }

    #[test]
    fn other_ways_to_write_a_duration_are_rejected_with_what_to_write() {
        for text in [
            "",
            "5",
            "m",
            "hms",
            "5 m",
            " 5m",
            "-5m",
            "+5m",
            "5m ago",
            "1.5h",
            "5min",
            "5M",
            "1w",
            "1mo",
            "1y",
            "PT5M",
            "00:05:00",
            "30m1h",
            "5m5m",
            "5hs",
            "99999999999999999999h5",
        ] {
            let error = parse_duration(text).unwrap_err();
            assert!(error.to_string().starts_with("invalid duration"), "{text}: {error}");
            assert!(error.to_string().contains("for example 90s, 5m or 1h30m"), "{text}: {error}");
        }
        assert!(parse_duration("30m1h").unwrap_err().source().is_some());
    }

    #[test]
    fn a_duration_that_is_too_long_is_not_called_malformed() {
        for text in ["9999999999999h", "99999999999999999999h", "9999999999d", "1d9999999999999h5m1s500ms"] {
            let error = parse_duration(text).unwrap_err();
            assert!(matches!(error, QuantityError::TooLong { .. }), "{text}: {error}");
            assert_eq!(
                error.to_string(),
                format!("duration {text:?} is too long: write a shorter one, for example 90s, 5m or 1h30m")
            );
        }
    }

    #[test]
    fn a_percentage_is_a_number_from_0_to_100_with_a_percent_sign() {
        assert_eq!(parse_percent("99.5%").unwrap(), 0.995);
        for text in ["", "99", "101%", "-1%", "x%", "NaN%"] {
            let error = parse_percent(text).unwrap_err();
            assert!(error.to_string().contains("for example 99% or 99.5%"), "{text}: {error}");
        }
    }
}
