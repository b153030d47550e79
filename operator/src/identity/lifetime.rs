//! Lifetime of leaf certificates: the setting of the MeshConfig, within bounds.

use std::time::Duration;

use tulle_crds::parse_duration;

/// The shortest lifetime. Sidecars renew after half of it. Admission rejects shorter ones.
pub const SHORTEST: Duration = Duration::from_secs(20);
/// The longest lifetime, because a stolen key can be used for that long.
pub const LONGEST: Duration = Duration::from_secs(7 * 86_400);
/// The lifetime in use if the setting is invalid.
const DEFAULT: Duration = Duration::from_secs(86_400);

/// A lifetime within the bounds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lifetime {
    /// Lifetime of leaf certificates. None outlives the root.
    pub leaf: Duration,
    /// The setting, if it is not in use.
    pub clamped: Option<String>,
}

impl Lifetime {
    /// The lifetime for a setting.
    pub fn of(setting: &str) -> Self {
        let asked = parse_duration(setting).ok();
        let leaf = asked.unwrap_or(DEFAULT).clamp(SHORTEST, LONGEST);
        Self { leaf, clamped: (asked != Some(leaf)).then(|| setting.to_owned()) }
    }

    /// Message of condition LeafLifetime.
    pub fn message(&self) -> String {
        let seconds = self.leaf.as_secs();
        match &self.clamped {
            None => format!("certificates are valid for {seconds} s, and never longer than the root"),
            Some(setting) => {
                let setting: String = setting.chars().take(40).collect();
                format!(
                    "leafLifetime: {setting} is not in use; certificates are valid for {seconds} s. Set a duration from 20s to 168h, for example 24h"
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lifetime_within_the_bounds_is_in_use_as_it_is_written() {
        for (setting, seconds) in [("20s", 20), ("24h", 86_400), ("7d", 604_800)] {
            let lifetime = Lifetime::of(setting);
            assert_eq!((lifetime.leaf.as_secs(), lifetime.clamped), (seconds, None));
        }
    }

    #[test]
    fn a_lifetime_beyond_the_bounds_is_clamped_and_named() {
        for (setting, seconds) in [("1s", 20), ("0s", 20), ("8d", 604_800), ("soon", 86_400)] {
            let lifetime = Lifetime::of(setting);
            assert_eq!(lifetime.leaf.as_secs(), seconds);
            assert!(lifetime.message().contains(&format!("leafLifetime: {setting} is not in use")));
        }
    }
}
