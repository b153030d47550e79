//! Numbers and durations as people read and write them.

use std::time::Duration;

pub use tulle_mesh::check::age;

/// What is printed for a number that is not known.
pub const UNKNOWN: &str = "-";

/// A part of one as a percentage: `99.87%`. It is rounded down, so that `100.00%` means all.
pub fn percent(part: Option<f64>) -> String {
    part.map_or_else(
        || UNKNOWN.to_owned(),
        |part| format!("{:.2}%", (part * 10_000.0 + 1e-6).floor() / 100.0),
    )
}

/// A latency: `0.42ms`, `4.2ms`, `12ms`, `1.2s`, `2m5s`.
pub fn millis(ms: Option<f64>) -> String {
    match ms {
        None => UNKNOWN.to_owned(),
        Some(ms) if ms < 1.0 => format!("{ms:.2}ms"),
        Some(ms) if ms < 9.95 => format!("{ms:.1}ms"),
        Some(ms) if ms < 999.5 => format!("{ms:.0}ms"),
        Some(ms) if ms < 9_950.0 => format!("{:.1}s", ms / 1_000.0),
        Some(ms) if ms < 59_500.0 => format!("{:.0}s", ms / 1_000.0),
        Some(ms) => age(Duration::from_secs_f64((ms / 1_000.0).round().min(1e9))),
    }
}

/// Something that is counted per second: `0`, `0.05`, `3.4`, `87`, `1.2k`, `12k`, `3.4M`.
pub fn rate(per_second: f64) -> String {
    match per_second {
        rate if rate <= 0.0 => "0".to_owned(),
        rate if rate < 0.095 => format!("{rate:.2}"),
        rate if rate < 9.95 => format!("{rate:.1}"),
        rate => scaled(rate, ["", "k", "M", "G", "T"]),
    }
}

/// Something that is counted: `0`, `999`, `1.2k`.
pub fn count(count: u64) -> String {
    scaled(count as f64, ["", "k", "M", "G", "T"])
}

/// Bytes: `512B`, `9.4MB`.
pub fn bytes(bytes: u64) -> String {
    scaled(bytes as f64, ["B", "kB", "MB", "GB", "TB"])
}

/// Bytes per second: `512B/s`, `1.2kB/s`.
pub fn bytes_per_second(bytes: u64, seconds: u64) -> String {
    let rate = bytes as f64 / seconds.max(1) as f64;
    scaled(rate, ["B/s", "kB/s", "MB/s", "GB/s", "TB/s"])
}

/// A number of at most three digits with the unit that fits it. Below the second unit it is an integer.
fn scaled(number: f64, units: [&str; 5]) -> String {
    let mut number = number;
    let mut fraction = false;
    let [mut unit, larger @ ..] = units;
    for next in larger {
        if number < 999.5 {
            break;
        }
        number /= 1_000.0;
        fraction = true;
        unit = next;
    }
    if fraction && number < 9.95 { format!("{number:.1}{unit}") } else { format!("{number:.0}{unit}") }
}

/// Reads a duration with units: `500ms`, `60s`, `1h30m`, `2d`. For clap's `value_parser`.
///
/// # Errors
/// The text is not a duration.
pub fn duration(text: &str) -> Result<Duration, String> {
    let invalid =
        || format!("invalid duration `{text}`: give a number with a unit, as in 500ms, 60s, 5m, 1h30m or 2d");
    let too_long =
        || format!("duration `{text}` is too long: give a shorter one, as in 60s, 5m, 1h30m or 2d");
    let mut rest = text.trim();
    let mut total = Duration::ZERO;
    if rest.is_empty() {
        return Err(invalid());
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(invalid)?;
        let (number, after) = rest.split_at(digits);
        if number.is_empty() {
            return Err(invalid());
        }
        // Digits only: what cannot be parsed is too large.
        let number: u64 = number.parse().map_err(|_| too_long())?;
        let letters = after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len());
        let (unit, after) = after.split_at(letters);
        let milliseconds: u64 = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(invalid()),
        };
        let part = number.checked_mul(milliseconds).map(Duration::from_millis).ok_or_else(too_long)?;
        total = total.checked_add(part).ok_or_else(too_long)?;
        rest = after;
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_is_a_hundred_percent() {
        assert_eq!(percent(Some(1.0)), "100.00%");
        assert_eq!(percent(Some(0.999_999)), "99.99%");
        assert_eq!(percent(Some(0.9987)), "99.87%");
        assert_eq!(percent(Some(0.0)), "0.00%");
        assert_eq!(percent(None), "-");
    }

    #[test]
    fn latencies_have_at_most_three_digits() {
        let expected = [
            (0.42, "0.42ms"),
            (4.21, "4.2ms"),
            (12.3, "12ms"),
            (999.7, "1.0s"),
            (1_234.0, "1.2s"),
            (12_340.0, "12s"),
            (125_000.0, "2m5s"),
        ];
        for (ms, text) in expected {
            assert_eq!(millis(Some(ms)), text);
        }
        assert_eq!(millis(None), "-");
    }

    #[test]
    fn rates_and_counts_are_scaled() {
        let rates = [
            (0.0, "0"),
            (0.05, "0.05"),
            (3.42, "3.4"),
            (87.4, "87"),
            (999.9, "1.0k"),
            (1_234.0, "1.2k"),
            (12_345.0, "12k"),
            (3_400_000.0, "3.4M"),
            (1e18, "1000000T"),
        ];
        for (number, text) in rates {
            assert_eq!(rate(number), text);
        }
        assert_eq!(count(7), "7");
        assert_eq!(count(1_234), "1.2k");
        assert_eq!([bytes(512), bytes(9_437_184), bytes(31_000_000)], ["512B", "9.4MB", "31MB"]);
        assert_eq!(bytes_per_second(60 * 512, 60), "512B/s");
        assert_eq!(bytes_per_second(72_000, 60), "1.2kB/s");
        assert_eq!(bytes_per_second(10, 0), "10B/s", "a window of no length divides by nothing");
    }

    #[test]
    fn ages_are_those_of_kubectl() {
        let expected = [
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (312, "5m12s"),
            (2_220, "37m"),
            (11_100, "3h5m"),
            (93_600, "26h"),
            (1_036_800, "12d"),
        ];
        for (seconds, text) in expected {
            assert_eq!(age(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn durations_are_read_with_their_units() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("60s"), Ok(Duration::from_secs(60)));
        assert_eq!(duration("1h30m"), Ok(Duration::from_secs(5_400)));
        assert_eq!(duration("720h"), Ok(Duration::from_secs(2_592_000)));
        assert_eq!(duration("2d"), Ok(Duration::from_secs(172_800)));
    }

    #[test]
    fn a_duration_that_is_too_long_is_called_so() {
        for text in ["99999999999999999999d", "18446744073709551615d"] {
            let error = duration(text).unwrap_err();
            assert!(error.starts_with(&format!("duration `{text}` is too long")), "{error}");
        }
    }

    #[test]
    fn what_is_not_a_duration_is_refused_with_examples() {
        for text in
            ["", "60", "s", "1x", "-5s", "1.5h", "99999999999999999999d", "18446744073709551615d", "5 m"]
        {
            assert!(duration(text).unwrap_err().contains("as in"), "{text}");
        }
    }
}
