//! What a pod enforces on connections that arrive, composed of three sections that the operator answers one by one.
//!
//! A section that is refused keeps its last good version. Without one the pod fails closed: an access section that
//! cannot be enforced denies all, an mTLS section that cannot be read means strict, and what decides nothing stays off.

use tulle_mesh::policy::Access;
use tulle_mesh::proto;

use super::resource::{AccessSection, Inbound, InboundAccess, Mtls, MtlsSection, Workload};

/// In logs, in place of the policy that could not be read.
const REFUSED_POLICY: &str = "(an access section that this sidecar refused)";

/// The sections as far as they were answered.
#[derive(Debug, Default)]
pub(super) struct Sections {
    pub(super) workload: Section<Workload>,
    pub(super) mtls: Section<MtlsSection>,
    pub(super) access: Section<AccessSection>,
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
    /// What is enforced; `None` until each section was answered.
    pub(super) fn compose(&self) -> Option<Inbound> {
        let revision = match &self.workload {
            Section::Unanswered => return None,
            Section::Refused => String::new(),
            Section::Good(workload) => workload.revision.clone(),
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
        Some(Inbound { mtls: mtls.mode, access, shadow, shadow_strict: mtls.shadow_strict, revision })
    }
}

/// An empty allow list. It always compiles; if it did not, nothing would be accepted either.
fn deny_all() -> Option<InboundAccess> {
    let nobody = proto::Access { has_allow: true, ..proto::Access::default() };
    Some(InboundAccess { rules: Access::compile(&nobody).ok()?, policy: REFUSED_POLICY.to_owned() })
}

#[cfg(test)]
mod tests {
    use tulle_mesh::policy::Subject;

    use super::*;

    fn good() -> Sections {
        Sections {
            workload: Section::Good(Workload { revision: "r1".into() }),
            mtls: Section::Good(MtlsSection { mode: Mtls::Permissive, shadow_strict: true }),
            access: Section::Good(AccessSection::default()),
        }
    }

    fn allows(inbound: &Inbound) -> bool {
        let subject = Subject { identity: None, address: [10u8, 0, 0, 1].into(), port: 80, http: None };
        inbound.access.as_ref().is_none_or(|access| access.rules.decide(&subject).allowed)
    }

    #[test]
    fn nothing_is_enforced_before_every_section_was_answered() {
        assert!(Sections { workload: Section::Unanswered, ..good() }.compose().is_none());
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
        let workload = Sections { workload: Section::Refused, ..good() }.compose().unwrap();
        assert_eq!((workload.mtls, workload.revision.as_str()), (Mtls::Permissive, ""));
    }

    #[test]
    fn a_section_that_is_refused_later_keeps_its_last_good_version() {
        let mut sections = good();
        sections.workload.refuse();
        sections.mtls.refuse();
        sections.access.refuse();
        let kept = sections.compose().unwrap();
        assert_eq!((kept.mtls, kept.revision.as_str(), allows(&kept)), (Mtls::Permissive, "r1", true));
    }
}
