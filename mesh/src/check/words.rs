//! Times, versions and lists of names as findings write them.

use std::time::Duration;

/// Names that a sentence lists; the others are counted.
const LISTED: usize = 5;

/// `Deployment/web, Pod/web-1 and 3 more`.
pub fn some_of(names: &[impl AsRef<str>]) -> String {
    let listed: Vec<&str> = names.iter().take(LISTED).map(AsRef::as_ref).collect();
    let listed = listed.join(", ");
    match names.len().saturating_sub(LISTED) {
        0 => listed,
        more => format!("{listed} and {more} more"),
    }
}

/// A duration as kubectl prints ages: `42s`, `5m12s`, `37m`, `3h5m`, `26h`, `12d`.
pub fn age(age: Duration) -> String {
    let seconds = age.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3_600, seconds / 86_400);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..600 if seconds.is_multiple_of(60) => format!("{minutes}m"),
        120..600 => format!("{minutes}m{}s", seconds % 60),
        600..10_800 => format!("{minutes}m"),
        10_800..28_800 if minutes % 60 == 0 => format!("{hours}h"),
        10_800..28_800 => format!("{hours}h{}m", minutes % 60),
        28_800..172_800 => format!("{hours}h"),
        _ => format!("{days}d"),
    }
}

/// How long something has held, or will hold.
pub(super) fn duration(seconds: i64) -> String {
    age(Duration::from_secs(seconds.unsigned_abs()))
}

/// Major, minor and patch.
pub type Version = (u32, u32, u32);

/// Parses a version such as `v1.31.2+k3s1` or `0.3.0`. A patch that is missing or not a number is 0.
pub fn version(text: &str) -> Option<Version> {
    let mut parts = text.trim_start_matches('v').splitn(3, '.');
    let mut next = || {
        let part = parts.next()?;
        let digits = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
        part.get(..digits)?.parse::<u32>().ok()
    };
    let (major, minor) = (next()?, next()?);
    Some((major, minor, next().unwrap_or(0)))
}
