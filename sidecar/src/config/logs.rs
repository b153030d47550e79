//! The section that says which requests at this pod are logged.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};

use tulle_mesh::proto;

use super::resource::{Refused, refuse};

/// All requests, in ten-thousandths.
const WHOLE: u32 = 10_000;

/// Which requests are logged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AccessLog {
    /// None.
    #[default]
    Off,
    /// Those that failed or were denied.
    Errors,
    /// Those, and so many of 10,000 of the others: at most 10,000.
    Sampled(u32),
    /// All.
    All,
}

impl AccessLog {
    /// Whether a request is logged. `draw`: a number below 10,000 at random; asked for only where a share is logged.
    pub fn takes(self, is_error: bool, draw: impl FnOnce() -> u32) -> bool {
        match self {
            Self::Off => false,
            Self::Errors => is_error,
            Self::Sampled(permyriad) => is_error || draw() < permyriad,
            Self::All => true,
        }
    }
}

/// As policies write it.
impl fmt::Display for AccessLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("Disabled"),
            Self::Errors => f.write_str("Errors"),
            Self::Sampled(permyriad) => write!(f, "Sampled {}%", f64::from(*permyriad) / 100.0),
            Self::All => f.write_str("All"),
        }
    }
}

/// What is in force now, for every data thread: one number, so that a request that is not logged costs one load.
#[derive(Debug, Default)]
pub(super) struct CurrentAccessLog(AtomicU32);

/// The numbers beside shares, which are from 0 to [`WHOLE`] above [`SHARE`].
const OFF: u32 = 0;
const ERRORS: u32 = 1;
const ALL: u32 = 2;
const SHARE: u32 = 3;

impl CurrentAccessLog {
    pub(super) fn load(&self) -> AccessLog {
        match self.0.load(Ordering::Relaxed) {
            OFF => AccessLog::Off,
            ERRORS => AccessLog::Errors,
            ALL => AccessLog::All,
            share => AccessLog::Sampled(share - SHARE),
        }
    }

    pub(super) fn store(&self, access_log: AccessLog) {
        let number = match access_log {
            AccessLog::Off => OFF,
            AccessLog::Errors => ERRORS,
            AccessLog::All => ALL,
            AccessLog::Sampled(permyriad) => SHARE + permyriad.min(WHOLE),
        };
        self.0.store(number, Ordering::Relaxed);
    }
}

/// Decodes the section.
///
/// # Errors
/// [`Refused`] for a kind that this build does not know, and for a share above 100 %.
pub fn decode(logs: &proto::Logs) -> Result<AccessLog, Refused> {
    match proto::AccessLog::try_from(logs.access) {
        Ok(proto::AccessLog::Unspecified) => Ok(AccessLog::Off),
        Ok(proto::AccessLog::Errors) => Ok(AccessLog::Errors),
        Ok(proto::AccessLog::Sampled) if logs.sample_permyriad <= WHOLE => {
            Ok(AccessLog::Sampled(logs.sample_permyriad))
        }
        Ok(proto::AccessLog::Sampled) => refuse(format!(
            "telemetry.sample is {} of {WHOLE}: it must be at most 100%",
            logs.sample_permyriad
        )),
        Ok(proto::AccessLog::All) => Ok(AccessLog::All),
        Err(_) => refuse(format!("unknown kind of access log {}", logs.access)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EACH: [AccessLog; 6] = [
        AccessLog::Off,
        AccessLog::Errors,
        AccessLog::Sampled(0),
        AccessLog::Sampled(100),
        AccessLog::Sampled(WHOLE),
        AccessLog::All,
    ];

    #[test]
    fn errors_are_logged_by_all_but_off_and_others_by_their_share() {
        let drawn = |draw: u32| EACH.map(|access_log| access_log.takes(false, || draw));
        assert_eq!(
            EACH.map(|access_log| access_log.takes(true, || WHOLE - 1)),
            [false, true, true, true, true, true]
        );
        assert_eq!(drawn(0), [false, false, false, true, true, true]);
        assert_eq!(drawn(99), [false, false, false, true, true, true]);
        assert_eq!(drawn(100), [false, false, false, false, true, true]);
        assert_eq!(drawn(WHOLE - 1), [false, false, false, false, true, true]);
    }

    #[test]
    fn what_is_stored_is_what_is_loaded() {
        let current = CurrentAccessLog::default();
        assert_eq!(current.load(), AccessLog::Off, "before the operator has answered");
        for access_log in EACH {
            current.store(access_log);
            assert_eq!(current.load(), access_log);
        }
    }

    #[test]
    fn a_section_is_decoded_or_refused_and_never_guessed() {
        let of =
            |access: i32, sample_permyriad| decode(&proto::Logs { access, sample_permyriad, policy: None });
        assert_eq!(decode(&proto::Logs::default()), Ok(AccessLog::Off));
        assert_eq!(of(proto::AccessLog::Errors.into(), 0), Ok(AccessLog::Errors));
        assert_eq!(of(proto::AccessLog::Sampled.into(), 25), Ok(AccessLog::Sampled(25)));
        assert_eq!(of(proto::AccessLog::All.into(), 0), Ok(AccessLog::All));
        assert!(of(proto::AccessLog::Sampled.into(), WHOLE + 1).is_err());
        assert!(of(9, 0).unwrap_err().0.contains("unknown kind"));
        assert_eq!(AccessLog::Sampled(50).to_string(), "Sampled 0.5%");
    }
}
