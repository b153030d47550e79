//! What `tulle dashboard` and the operator's page agree on: headers that the one adds to the requests of a browser and
//! the other reads, and the form that the other renders and the one takes.
//!
//! The headers are hints for rendering and give no right. The operator takes no form, and `tulle dashboard` removes every
//! header that begins with [`HEADERS`] from what a browser sends.

/// What the headers of this module begin with.
pub const HEADERS: &str = "tulle-";

/// Header: what the user of the page may do. Its only value is [`CANARY_ACTIONS`].
pub const MAY: &str = "tulle-may";

/// Value of [`MAY`]: to act on the Canaries of the namespace that the page is about.
pub const CANARY_ACTIONS: &str = "canary-actions";

/// Header: the token that a form must bring, which the page puts into field [`TOKEN`].
pub const FORM_TOKEN: &str = "tulle-form-token";

/// Field of a form: the value of [`FORM_TOKEN`].
pub const TOKEN: &str = "token";

/// Field of a form: the revision that its reader has seen.
pub const REVISION: &str = "revision";

/// Field of a form: where its reader has seen the rollout, as [`seen`] writes it.
pub const SEEN: &str = "seen";

/// Where a rollout is: its phase, and the index of its step. A revision alone does not tell a failed rollout from the one
/// that somebody looked at, nor its second pause from the first.
pub fn seen(phase: &str, step: u32) -> String {
    format!("{phase}/{step}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_phase_and_another_step_are_another_place() {
        assert_eq!(seen("Paused", 1), "Paused/1");
        assert_ne!(seen("Paused", 1), seen("Paused", 2));
        assert_ne!(seen("Paused", 1), seen("Failed", 1));
    }
}
