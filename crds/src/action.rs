//! Actions that a user requests on a Canary with the annotation [`crate::keys::ACTION`].

/// An action requested by a user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CanaryAction {
    /// Promote the new revision now.
    Promote,
    /// Stop the rollout now and treat the new revision as failed.
    Abort,
    /// Continue after a pause.
    Resume,
    /// Try a failed revision again.
    Retry,
}

impl CanaryAction {
    /// Parses an annotation such as `promote@4711` into the action and its request id.
    pub fn parse(annotation: &str) -> Option<(Self, String)> {
        let (action, id) = annotation.split_once('@').filter(|(_, id)| !id.is_empty())?;
        let action = match action {
            "promote" => Self::Promote,
            "abort" => Self::Abort,
            "resume" => Self::Resume,
            "retry" => Self::Retry,
            _ => return None,
        };
        Some((action, id.to_owned()))
    }
}
