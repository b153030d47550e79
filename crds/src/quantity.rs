//! Values with units, as users write them: `2m`, `99%`.

use std::time::Duration;

/// Why a value is invalid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuantityError {
    value: String,
    example: &'static str,
}

impl std::fmt::Display for QuantityError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} cannot be read; write for example {}", self.value, self.example)
    }
}

impl std::error::Error for QuantityError {}

/// Parses a duration: `500ms`, `30s`, `5m`, `2h`, `1d`.
///
/// # Errors
/// [`QuantityError`] with an example, unless the text is digits and one of the units above.
pub fn parse_duration(text: &str) -> Result<Duration, QuantityError> {
    let refuse = || QuantityError { value: text.to_owned(), example: "30s, 5m or 2h" };
    let unit_at = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(refuse)?;
    let (digits, unit) = text.split_at(unit_at);
    let number: u64 = digits.parse().map_err(|_| refuse())?;
    let millis = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(refuse()),
    };
    number.checked_mul(millis).map(Duration::from_millis).ok_or_else(refuse)
}

/// Parses a percentage, such as `99%` or `0.5%`, as a fraction of 1.
///
/// # Errors
/// [`QuantityError`] unless the text is a number from 0 to 100 with a percent sign.
pub fn parse_percent(text: &str) -> Result<f64, QuantityError> {
    let refuse = || QuantityError { value: text.to_owned(), example: "99% or 0.5%" };
    let number: f64 = text.strip_suffix('%').ok_or_else(refuse)?.parse().map_err(|_| refuse())?;
    if (0.0..=100.0).contains(&number) { Ok(number / 100.0) } else { Err(refuse()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_percentages_are_parsed_or_rejected_with_an_example() {
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("2h"), Ok(Duration::from_secs(7200)));
        assert_eq!(parse_percent("99.5%"), Ok(0.995));
        for bad in ["", "5", "m", "5 m", "-5m", "5m5s", "99999999999999999999h"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
        for bad in ["", "99", "101%", "-1%", "x%", "NaN%"] {
            assert!(parse_percent(bad).is_err(), "{bad}");
        }
    }
}
