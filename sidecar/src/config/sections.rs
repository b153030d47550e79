//! What a pod enforces on connections that arrive, composed of sections that the operator answers one by one.
//!
//! A section that is refused keeps its last good version. Without one the pod fails closed: an access section that
//! cannot be enforced denies all, an mTLS section that cannot be read means strict, and what decides nothing stays off.
//! Limits decide about nobody's rights: without a good version there are none, and nobody waits for them, because an
//! operator of an earlier version never answers.

use tulle_mesh::policy::Access;
use tulle_mesh::proto;

use super::limits::{InUse, InboundLimits, LimitsSection};
use super::resource::{AccessSection, Inbound, InboundAccess, Mtls, MtlsSection};

/// In logs, in place of the policy that could not be read.
const REFUSED_POLICY: &str = "(an access section that this sidecar refused)";

/// The sections as far as they were answered.
#[derive(Debug, Default)]
pub(super) struct Sections {
    /// The pod's revision, which is all of its section `Workload` that concerns what is enforced.
    pub(super) revision: Section<String>,
    pub(super) mtls: Section<MtlsSection>,
    pub(super) access: Section<AccessSection>,
    pub(super) limits: Section<LimitsSection>,
    /// Outlives every version of the limits: what is in use when they change is still in use.
    in_use: InUse,
}

/// One section.
#[derive(Debug, Default)]
pub(super) enum Section<T> {
    /// The operator has not sent it yet.
    #[default]
    Unanswered,
    /// It was refused, and there was none before.
    Refused,
    /// The last that could be enforced.
    Good(T),
}

impl<T> Section<T> {
    /// Keeps the last good version, if there is one.
    pub(super) fn refuse(&mut self) {
        if matches!(self, Self::Unanswered) {
            *self = Self::Refused;
        }
    }
}

impl Sections {
    /// What is enforced; `None` until each section was answered that decides who is let in.
    pub(super) fn compose(&self) -> Option<Inbound> {
        let revision = match &self.revision {
            Section::Unanswered => return None,
            Section::Refused => String::new(),
            Section::Good(revision) => revision.clone(),
        };
        let mtls = match self.mtls {
            Section::Unanswered => return None,
            Section::Refused => MtlsSection { mode: Mtls::Strict, shadow_strict: false },
            Section::Good(mtls) => mtls,
        };
        let AccessSection { access, shadow } = match &self.access {
            Section::Unanswered => return None,
            Section::Refused => AccessSection { access: Some(deny_all()?), shadow: None },
            Section::Good(access) => access.clone(),
        };
        let (mtls, shadow_strict) = (mtls.mode, mtls.shadow_strict);
        Some(Inbound { mtls, access, shadow, shadow_strict, revision, limits: self.limits() })
    }

    fn limits(&self) -> Option<InboundLimits> {
        let Section::Good(section) = &self.limits else { return None };
        let limits = || InboundLimits { section: section.clone(), in_use: self.in_use.clone() };
        (!section.is_empty()).then(limits)
    }
}

/// An empty allow list. It always compiles; if it did not, nothing would be accepted either.
fn deny_all() -> Option<InboundAccess> {
    let nobody = proto::Access { has_allow: true, ..proto::Access::default() };
    Some(InboundAccess::new(Access::compile(&nobody).ok()?, REFUSED_POLICY.to_owned()))
}

#[cfg(test)]
mod tests {
    use tulle_mesh::policy::Subject;

    use super::super::limits::{Limit, LimitSet};
    use super::*;

    fn good() -> Sections {
        Sections {
            revision: Section::Good("r1".into()),
            mtls: Section::Good(MtlsSection { mode: Mtls::Permissive, shadow_strict: true }),
            access: Section::Good(AccessSection::default()),
            ..Sections::default()
        }
    }

    fn allows(inbound: &Inbound) -> bool {
        let subject = Subject { identity: None, address: [10u8, 0, 0, 1].into(), port: 80, http: None };
        inbound.access.as_ref().is_none_or(|access| access.rules.decide(&subject).allowed)
    }

    #[test]
    fn nothing_is_enforced_before_every_section_was_answered() {
        assert!(Sections { revision: Section::Unanswered, ..good() }.compose().is_none());
        assert!(Sections { mtls: Section::Unanswered, ..good() }.compose().is_none());
        assert!(Sections { access: Section::Unanswered, ..good() }.compose().is_none());
        let all = good().compose().unwrap();
        assert_eq!((all.mtls, all.shadow_strict, all.revision.as_str()), (Mtls::Permissive, true, "r1"));
        assert!(allows(&all));
    }

    #[test]
    fn a_section_that_was_refused_at_first_fails_closed_and_the_others_are_enforced() {
        let access = Sections { access: Section::Refused, ..good() }.compose().unwrap();
        assert!(!allows(&access));
        assert_eq!((access.mtls, access.revision.as_str()), (Mtls::Permissive, "r1"));
        let mtls = Sections { mtls: Section::Refused, ..good() }.compose().unwrap();
        assert_eq!((mtls.mtls, mtls.shadow_strict, allows(&mtls)), (Mtls::Strict, false, true));
        let revision = Sections { revision: Section::Refused, ..good() }.compose().unwrap();
        assert_eq!((revision.mtls, revision.revision.as_str()), (Mtls::Permissive, ""));
    }

    fn at_most(max: u32) -> Section<LimitsSection> {
        let concurrency = Some(Limit { max, policy: "shop/calm".into() });
        let enforced = LimitSet { concurrency, connections: None };
        Section::Good(LimitsSection { enforced, ..LimitsSection::default() })
    }

    #[test]
    fn limits_hold_nothing_back_and_without_a_good_version_there_are_none() {
        assert!(good().compose().unwrap().limits.is_none(), "an operator that does not know them");
        let refused = Sections { limits: Section::Refused, ..good() };
        assert!(refused.compose().unwrap().limits.is_none());
        let empty = Sections { limits: Section::Good(LimitsSection::default()), ..good() };
        assert!(empty.compose().unwrap().limits.is_none());
        let mut limited = Sections { limits: at_most(3), ..good() };
        limited.limits.refuse();
        let limits = limited.compose().unwrap().limits.unwrap();
        assert_eq!(limits.section.enforced.concurrency.map(|limit| limit.max), Some(3), "the last good one");
    }

    #[test]
    fn what_is_in_use_when_limits_change_is_still_counted() {
        let mut sections = Sections { limits: at_most(1), ..good() };
        let slot = sections.compose().unwrap().limits.unwrap().in_use.requests.enter(1);
        sections.limits = at_most(2);
        assert_eq!(sections.compose().unwrap().limits.unwrap().in_use.requests.taken(), 1);
        drop(slot);
    }

    #[test]
    fn a_section_that_is_refused_later_keeps_its_last_good_version() {
        let mut sections = good();
        sections.revision.refuse();
        sections.mtls.refuse();
        sections.access.refuse();
        let kept = sections.compose().unwrap();
        assert_eq!((kept.mtls, kept.revision.as_str(), allows(&kept)), (Mtls::Permissive, "r1", true));
    }
}
