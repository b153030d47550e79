//! What a human may ask of a Canary, by annotation [`crate::keys::ACTION`].

/// A human's verb.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Approve the canary now.
    Promote,
    /// Give it up now.
    Abort,
    /// Go on after a pause.
    Resume,
    /// Try the same revision again after a failure.
    Retry,
}

impl Verb {
    /// Reads `promote@4711`.
    pub fn parse(annotation: &str) -> Option<(Self, String)> {
        let (verb, id) = annotation.split_once('@').filter(|(_, id)| !id.is_empty())?;
        let verb = match verb {
            "promote" => Self::Promote,
            "abort" => Self::Abort,
            "resume" => Self::Resume,
            "retry" => Self::Retry,
            _ => return None,
        };
        Some((verb, id.to_owned()))
    }
}
