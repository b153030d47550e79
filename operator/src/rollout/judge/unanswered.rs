//! Attempts at the stable version that have ended since the last one at the canary has.
//!
//! A block in which no attempt at the canary has ended is not compared, and counts for neither version. A canary whose
//! connections never get an answer, or whose requests do not end, has no other blocks: that it is silent while the stable
//! version is not shows here alone. No verdict follows from it. Whether the canary should have had requests depends on its
//! weight, which the judge does not know.

use tulle_crds::{Evidence, EvidenceWindow, TestEvidence};

use super::{PodBlock, Side};

/// The name under which it is stored.
const NAME: &str = "unanswered";

/// What the stable version has had since the last attempt at the canary ended, under the present weight.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Unanswered {
    /// Blocks of ten seconds.
    pub blocks: u32,
    /// Attempts at the stable version.
    pub stable: f64,
}

impl Unanswered {
    /// As stored.
    pub fn stored(evidence: &Evidence) -> Self {
        let test = evidence.tests.iter().find(|test| test.name == NAME);
        let Some(window) = test.and_then(|test| test.windows.first()) else { return Self::default() };
        Self { blocks: window.blocks, stable: window.log_evidence.first().copied().unwrap_or(0.0) }
    }

    /// Begins anew, as with another weight.
    pub fn forget(evidence: &mut Evidence) {
        evidence.tests.retain(|test| test.name != NAME);
    }

    /// With one more block.
    pub fn fold(self, block: &[PodBlock]) -> Self {
        if block.iter().any(|pod| pod.side == Side::Canary && pod.totals.attempts > 0) {
            return Self::default();
        }
        let stable =
            block.iter().filter(|pod| pod.side == Side::Stable).map(|pod| pod.totals.attempts as f64);
        Self { blocks: self.blocks.saturating_add(1), stable: self.stable + stable.sum::<f64>() }
    }

    /// To be stored; `None`: the canary's attempts end.
    pub(super) fn store(self) -> Option<TestEvidence> {
        let window = EvidenceWindow { number: 0, blocks: self.blocks, log_evidence: vec![self.stable] };
        let test = TestEvidence { name: NAME.to_owned(), reference: None, windows: vec![window] };
        (self.blocks > 0).then_some(test)
    }
}

#[cfg(test)]
mod tests {
    use tulle_crds::AttemptTotals;

    use super::super::{Rules, fold};
    use super::*;

    fn pod(side: Side, attempts: u64) -> PodBlock {
        PodBlock { side, totals: AttemptTotals { attempts, ..Default::default() }, ..Default::default() }
    }

    #[test]
    fn what_the_stable_version_answers_meanwhile_is_counted_until_the_canary_answers() {
        let rules = Rules::of(&tulle_crds::Judge::default());
        let silent = [pod(Side::Stable, 100), pod(Side::Stable, 82)];
        let mut evidence = fold(&Evidence::default(), &silent, &rules, false);
        evidence = fold(&evidence, &[], &rules, false);
        assert_eq!(Unanswered::stored(&evidence), Unanswered { blocks: 2, stable: 182.0 });
        assert_eq!(evidence.stable, AttemptTotals::default(), "it is not compared");
        let answered = fold(&evidence, &[pod(Side::Canary, 1), pod(Side::Stable, 50)], &rules, false);
        assert_eq!(Unanswered::stored(&answered), Unanswered::default());
        Unanswered::forget(&mut evidence);
        assert_eq!(Unanswered::stored(&evidence), Unanswered::default());
    }
}
