//! Actions that a user requests on a Canary with the annotation [`crate::keys::ACTION`].

/// An action requested by a user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CanaryAction {
    /// Promote the new revision now.
    Promote,
    /// Stop the rollout now and treat the new revision as failed.
    Abort,
    /// Wait at the current weight until a user resumes the rollout.
    Pause,
    /// Continue after a pause.
    Resume,
    /// Try a failed revision again.
    Retry,
}

/// An action with its request id and, where the user named one, the revision that it is meant for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requested {
    /// The action.
    pub action: CanaryAction,
    /// The revision that it is meant for; `None`: whichever is rolled out.
    pub revision: Option<String>,
    /// The request id.
    pub id: String,
}

impl CanaryAction {
    /// The action as users write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Promote => "promote",
            Self::Abort => "abort",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Retry => "retry",
        }
    }

    /// The action that users write like this.
    pub fn named(name: &str) -> Option<Self> {
        let all = [Self::Promote, Self::Abort, Self::Pause, Self::Resume, Self::Retry];
        all.into_iter().find(|known| known.name() == name)
    }

    /// Parses an annotation such as `promote@4711` or `promote:5d4f8c9b7@4711`.
    pub fn parse(annotation: &str) -> Option<Requested> {
        let (what, id) = annotation.split_once('@').filter(|(_, id)| !id.is_empty())?;
        let (action, revision) = match what.split_once(':') {
            Some((_, "")) => return None,
            Some((action, revision)) => (action, Some(revision.to_owned())),
            None => (what, None),
        };
        let action = Self::named(action)?;
        Some(Requested { action, revision, id: id.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_action_may_name_the_revision_it_is_meant_for() {
        let parsed = |text| CanaryAction::parse(text).map(|r| (r.action, r.revision, r.id));
        assert_eq!(parsed("promote@1"), Some((CanaryAction::Promote, None, "1".to_owned())));
        let named = Some((CanaryAction::Abort, Some("5d4f".to_owned()), "a".to_owned()));
        assert_eq!(parsed("abort:5d4f@a"), named);
        for invalid in ["promote", "promote@", "promote:@1", "stop@1", ""] {
            assert_eq!(parsed(invalid), None, "{invalid}");
        }
    }
}
