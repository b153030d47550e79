//! The section that limits how much at once reaches the application.

use std::sync::Arc;

use tulle_mesh::proto;

use super::resource::Refused;
use crate::gate::Gate;

/// The section as it was sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LimitsSection {
    /// What is enforced.
    pub enforced: LimitSet,
    /// What is only tried: what it would refuse is counted, and let through.
    pub shadow: LimitSet,
}

/// Limits of one pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LimitSet {
    /// Requests in the application.
    pub concurrency: Option<Limit>,
    /// Connections of clients: those without a sidecar, and opaque ones of clients that have one.
    pub connections: Option<Limit>,
}

/// A limit and where it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limit {
    /// So many at once; at least 1.
    pub max: u32,
    /// `namespace/name` of the policy.
    pub policy: Arc<str>,
}

/// The section, and what it limits.
#[derive(Clone, Debug)]
pub struct InboundLimits {
    /// The limits.
    pub section: LimitsSection,
    /// What is in use.
    pub in_use: InUse,
}

/// What is in use of what may be limited, counted over all data threads. Only what began while there was a limit or a
/// trial is counted: without one nothing is added to a request.
#[derive(Clone, Debug, Default)]
pub struct InUse {
    /// Requests in the application, and those that wait to be.
    pub requests: Arc<Gate>,
    /// Connections of clients.
    pub connections: Arc<Gate>,
}

impl LimitsSection {
    /// Whether it limits nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Decodes the section.
///
/// # Errors
/// [`Refused`] for a limit of 0, which would let nothing through for ever.
pub fn decode(limits: &proto::Limits) -> Result<LimitsSection, Refused> {
    Ok(LimitsSection {
        enforced: decode_set(limits.enforced.as_ref())?,
        shadow: decode_set(limits.shadow.as_ref())?,
    })
}

fn decode_set(set: Option<&proto::LimitSet>) -> Result<LimitSet, Refused> {
    let limit = |name, limit: Option<&proto::Limit>| -> Result<Option<Limit>, Refused> {
        let Some(limit) = limit else { return Ok(None) };
        if limit.max == 0 {
            return Err(Refused(format!("limits.{name} is 0: it must be at least 1")));
        }
        let policy = limit.policy.as_ref();
        let policy =
            policy.map_or_else(String::new, |policy| format!("{}/{}", policy.namespace, policy.name));
        Ok(Some(Limit { max: limit.max, policy: policy.into() }))
    };
    let Some(set) = set else { return Ok(LimitSet::default()) };
    Ok(LimitSet {
        concurrency: limit("concurrency", set.concurrency.as_ref())?,
        connections: limit("connections", set.connections.as_ref())?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(max: u32) -> Option<proto::Limit> {
        let policy = proto::ObjectRef { namespace: "shop".into(), name: "calm".into(), ..Default::default() };
        Some(proto::Limit { policy: Some(policy), max })
    }

    #[test]
    fn limits_are_read_with_the_policies_that_set_them() {
        let enforced = proto::LimitSet { concurrency: limit(3), connections: None };
        let shadow = proto::LimitSet { concurrency: None, connections: limit(9) };
        let section = decode(&proto::Limits { enforced: Some(enforced), shadow: Some(shadow) }).unwrap();
        let concurrency = section.enforced.concurrency.clone().unwrap();
        assert_eq!((concurrency.max, &*concurrency.policy), (3, "shop/calm"));
        assert_eq!(section.shadow.connections.as_ref().map(|limit| limit.max), Some(9));
        assert!(!section.is_empty() && section.enforced.connections.is_none());
        assert!(decode(&proto::Limits::default()).unwrap().is_empty());
    }

    #[test]
    fn a_limit_that_lets_nothing_through_is_refused() {
        let set = proto::LimitSet { concurrency: None, connections: limit(0) };
        let Refused(reason) = decode(&proto::Limits { enforced: None, shadow: Some(set) }).unwrap_err();
        assert!(reason.contains("connections"), "{reason}");
    }
}
