//! Numbers, times, addresses and commands as text. Every view writes them the same way.

use std::fmt::Write as _;

use tulle_mesh::query::{Golden, Meshed, Party, StatRow};

/// Stands where there is no value.
pub const NONE: &str = "–";
/// Below this part of successful requests, or of successful opaque connections, a workload is called failing.
const FAILING: f64 = 0.99;
/// From this 99th percentile on a workload is called slow, in milliseconds.
const SLOW_MS: f64 = 1_000.0;

/// The time that is summed, as it can be chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Window {
    /// One minute.
    #[default]
    Minute,
    /// Ten minutes.
    TenMinutes,
    /// One hour.
    Hour,
    /// Six hours, which is all that the operator keeps.
    SixHours,
}

impl Window {
    /// All of them, the shortest first.
    pub const ALL: [Self; 4] = [Self::Minute, Self::TenMinutes, Self::Hour, Self::SixHours];

    /// As in addresses and commands.
    pub fn name(self) -> &'static str {
        match self {
            Self::Minute => "1m",
            Self::TenMinutes => "10m",
            Self::Hour => "1h",
            Self::SixHours => "6h",
        }
    }

    /// Its length.
    pub fn seconds(self) -> u64 {
        match self {
            Self::Minute => 60,
            Self::TenMinutes => 600,
            Self::Hour => 3_600,
            Self::SixHours => 21_600,
        }
    }

    /// The window of this name; any other text stands for the default.
    pub fn parse(text: Option<&str>) -> Self {
        Self::ALL.into_iter().find(|window| Some(window.name()) == text).unwrap_or_default()
    }
}

/// How a workload does, in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Too many requests or opaque connections fail.
    Failing,
    /// Its requests take long.
    Slow,
    /// Neither.
    Ok,
    /// Nothing was counted.
    Idle,
    /// None of its pods has a sidecar.
    NoSidecar,
}

impl State {
    /// The state of a row.
    pub fn of(row: &StatRow) -> Self {
        let Golden { requests, connections, failed_connections, success, p99_ms, .. } = row.golden;
        if requests == 0 && connections == 0 {
            let without = row.meshed.is_some_and(|Meshed { with, of }| with == 0 && of > 0);
            return if without { Self::NoSidecar } else { Self::Idle };
        }
        let connected = (connections > 0).then(|| 1.0 - failed_connections as f64 / connections as f64);
        if [success, connected].into_iter().flatten().any(|part| part < FAILING) {
            Self::Failing
        } else if p99_ms.is_some_and(|p99| p99 >= SLOW_MS) {
            Self::Slow
        } else {
            Self::Ok
        }
    }

    /// As it is shown.
    pub fn word(self) -> &'static str {
        match self {
            Self::Failing => "failing",
            Self::Slow => "slow",
            Self::Ok => "ok",
            Self::Idle => "idle",
            Self::NoSidecar => "no sidecar",
        }
    }

    /// The class of the style sheet. The word says the same without colours.
    pub fn class(self) -> &'static str {
        match self {
            Self::Failing => "bad",
            Self::Slow | Self::NoSidecar => "warn",
            Self::Ok => "good",
            Self::Idle => "quiet",
        }
    }
}

/// A whole number with separators of thousands.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A rate, with as many digits as it deserves.
pub fn rate(per_second: f64) -> String {
    if per_second <= 0.0 || !per_second.is_finite() {
        "0".to_owned()
    } else if per_second < 0.01 {
        "<0.01".to_owned()
    } else if per_second < 10.0 {
        format!("{per_second:.2}")
    } else if per_second < 100.0 {
        format!("{per_second:.1}")
    } else {
        count(per_second.round() as u64)
    }
}

/// Whether mTLS secures what was sent; nothing may have been.
pub fn secured(secured: Option<bool>) -> &'static str {
    match secured {
        Some(true) => "mTLS",
        Some(false) => "plain text",
        None => "nothing sent",
    }
}

/// A part as a percentage. Rounded down, so that a single failure never shows as 100 %.
pub fn percent(part: Option<f64>) -> String {
    let Some(part) = part.filter(|part| part.is_finite()) else { return NONE.to_owned() };
    if part >= 1.0 {
        return "100 %".to_owned();
    }
    // The small addend makes up for parts such as 0.29, which is 28.999999999999996 hundredths.
    let hundredths = (part.max(0.0) * 10_000.0 + 1e-6).floor() / 100.0;
    format!("{hundredths:.2} %")
}

/// A latency.
pub fn latency(ms: Option<f64>) -> String {
    let Some(ms) = ms.filter(|ms| ms.is_finite()) else { return NONE.to_owned() };
    if ms < 10.0 {
        format!("{ms:.1} ms")
    } else if ms < 1_000.0 {
        format!("{ms:.0} ms")
    } else if ms < 100_000.0 {
        format!("{:.1} s", ms / 1_000.0)
    } else {
        format!("{:.0} s", ms / 1_000.0)
    }
}

/// A length of time in its two largest units.
pub fn duration(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {}s", seconds % 60),
        (0, ..) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

/// What is left until a time, or that it has passed.
pub fn left(until: i64, now: i64) -> String {
    match u64::try_from(until.saturating_sub(now)) {
        Ok(seconds) if seconds > 0 => format!("{} left", duration(seconds)),
        _ => "expired".to_owned(),
    }
}

/// Hours and minutes of a Unix time, UTC.
pub fn clock(unix: i64) -> String {
    let second = unix.rem_euclid(86_400);
    format!("{:02}:{:02}", second / 3_600, second / 60 % 60)
}

/// The same with seconds.
pub fn clock_with_seconds(unix: i64) -> String {
    format!("{}:{:02}", clock(unix), unix.rem_euclid(60))
}

/// A party with its kind, such as `Deployment shop/web`.
pub fn party(party: &Party) -> String {
    match (party.kind.as_str(), party.namespace.as_str(), party.name.as_str()) {
        ("Plain", "", _) => "clients without a sidecar".to_owned(),
        ("Plain", namespace, _) => format!("clients without a sidecar in {namespace}"),
        (kind, "", name) => format!("{kind} {name}").trim().to_owned(),
        (kind, namespace, name) => format!("{kind} {namespace}/{name}").trim().to_owned(),
    }
}

/// Where the page of a party is, if it has one: workloads do.
pub fn address_of(party: &Party) -> Option<String> {
    let workload = matches!(party.kind.as_str(), "Deployment" | "StatefulSet" | "DaemonSet" | "Job" | "Pod");
    (workload && !party.namespace.is_empty() && !party.name.is_empty())
        .then(|| address(&["workload", &party.namespace, &party.name]))
}

/// A path of these segments.
pub fn address(segments: &[&str]) -> String {
    segments.iter().fold(String::new(), |path, segment| path + "/" + &encode(segment))
}

/// A segment of a path or a value of a query, so that no character of it has a meaning there.
pub fn encode(text: &str) -> String {
    text.bytes().fold(String::with_capacity(text.len()), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
        out
    })
}

/// A command from its words. A word that a shell would not take as it stands is quoted, because people paste this.
pub fn command(words: &[&str]) -> String {
    let plain = |word: &str| {
        !word.is_empty() && word.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._/:=@%+,".contains(&b))
    };
    let quoted = words.iter().map(|word| {
        if plain(word) { (*word).to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
    });
    quoted.collect::<Vec<_>>().join(" ")
}

/// A command about the namespace that a token shows, or about all of them.
pub fn scoped(words: &[&str], only: Option<&str>) -> String {
    let mut words = words.to_vec();
    match only {
        Some(namespace) => words.extend(["-n", namespace]),
        None => words.push("-A"),
    }
    command(&words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_failure_among_many_requests_never_shows_as_complete_success() {
        assert_eq!(percent(Some(999_999.0 / 1_000_000.0)), "99.99 %");
        assert_eq!(percent(Some(1.0)), "100 %");
        assert_eq!(percent(Some(0.29)), "29.00 %");
        assert_eq!(percent(None), NONE);
    }

    #[test]
    fn numbers_have_the_digits_that_they_deserve() {
        assert_eq!([count(7), count(1_234), count(1_000_000)], ["7", "1,234", "1,000,000"]);
        assert_eq!([rate(0.0), rate(0.001), rate(1.5), rate(1_234.4)], ["0", "<0.01", "1.50", "1,234"]);
        assert_eq!(
            [latency(Some(0.84)), latency(Some(120.0)), latency(Some(2_340.0))],
            ["0.8 ms", "120 ms", "2.3 s"]
        );
        assert_eq!(
            [duration(9), duration(65), duration(7_260), duration(90_000)],
            ["9s", "1m 5s", "2h 1m", "1d 1h"]
        );
        assert_eq!([left(160, 100), left(100, 100)], ["1m 0s left", "expired"]);
        assert_eq!(clock(86_400 + 3_660), "01:01");
    }

    #[test]
    fn what_a_shell_would_run_is_quoted_in_a_command() {
        assert_eq!(command(&["tulle", "stat", "-n", "shop"]), "tulle stat -n shop");
        assert_eq!(command(&["tulle", "a$(b)'c"]), r"tulle 'a$(b)'\''c'");
    }

    #[test]
    fn a_name_cannot_leave_its_segment_of_an_address() {
        assert_eq!(address(&["workload", "shop", "../x?y#z"]), "/workload/shop/..%2Fx%3Fy%23z");
    }

    #[test]
    fn a_workload_is_called_by_its_worst_state() {
        let row = |requests, success, p99_ms| StatRow {
            golden: Golden { requests, success, p99_ms, ..Golden::default() },
            meshed: Some(Meshed { with: 1, of: 1 }),
            ..StatRow::default()
        };
        assert_eq!(State::of(&row(100, Some(0.9), Some(2_000.0))), State::Failing);
        assert_eq!(State::of(&row(100, Some(1.0), Some(2_000.0))), State::Slow);
        assert_eq!(State::of(&row(100, Some(1.0), Some(20.0))), State::Ok);
        assert_eq!(State::of(&row(0, None, None)), State::Idle);
        let opaque = |failed_connections| StatRow {
            golden: Golden { connections: 100, failed_connections, ..Golden::default() },
            ..StatRow::default()
        };
        assert_eq!([State::of(&opaque(1)), State::of(&opaque(2))], [State::Ok, State::Failing]);
        let bare = StatRow { meshed: Some(Meshed { with: 0, of: 2 }), ..row(0, None, None) };
        assert_eq!(State::of(&bare), State::NoSidecar);
    }
}
