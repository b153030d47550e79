//! Whether mTLS secures what was counted. What had no endpoint to go to was never sent: nobody can say it of that.

use super::{Edge, TapRequest};
use crate::reason::Reason;

impl Edge {
    /// Whether mTLS secures it; `None`: nothing was sent.
    pub fn is_secured(&self) -> Option<bool> {
        let nowhere = self.golden.reasons.iter().filter(|reason| has_no_endpoint(&reason.name));
        let nowhere = nowhere.fold(0, |sum: u64, reason| sum.saturating_add(reason.count));
        let carried = self.golden.requests.saturating_add(self.golden.connections);
        if !self.mtls && carried > 0 && nowhere >= carried { None } else { Some(self.mtls) }
    }
}

impl TapRequest {
    /// The same of one request.
    pub fn is_secured(&self) -> Option<bool> {
        let nowhere = self.reason.as_deref().is_some_and(has_no_endpoint);
        if !self.mtls && nowhere { None } else { Some(self.mtls) }
    }
}

fn has_no_endpoint(reason: &str) -> bool {
    Reason::from_name(reason).is_some_and(Reason::has_no_endpoint)
}

#[cfg(test)]
mod tests {
    use super::super::{Golden, Reason};
    use super::*;

    #[test]
    fn an_edge_on_which_nothing_was_sent_is_neither_secured_nor_plain() {
        let edge = |mtls, requests, name: &str, count| Edge {
            mtls,
            golden: Golden {
                requests,
                reasons: vec![Reason { name: name.to_owned(), count }],
                ..Golden::default()
            },
            ..Edge::default()
        };
        assert_eq!(edge(false, 5, "UpstreamNone", 5).is_secured(), None);
        assert_eq!(edge(false, 5, "UpstreamNone", 4).is_secured(), Some(false));
        assert_eq!(edge(false, 5, "UpstreamReset", 5).is_secured(), Some(false));
        assert_eq!(edge(true, 5, "UpstreamNone", 5).is_secured(), Some(true));
        assert_eq!(edge(false, 0, "UpstreamNone", 0).is_secured(), Some(false));
    }

    #[test]
    fn a_request_that_went_nowhere_is_neither_secured_nor_plain() {
        let request =
            |reason: Option<&str>| TapRequest { reason: reason.map(str::to_owned), ..TapRequest::default() };
        assert_eq!(request(Some("RouteNone")).is_secured(), None);
        assert_eq!(request(Some("UpstreamTimeout")).is_secured(), Some(false));
        assert_eq!(request(None).is_secured(), Some(false));
    }
}
