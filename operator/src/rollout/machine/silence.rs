//! A version of which nothing is known although its weight should have brought it requests: they get no answer and do not
//! end, or none reaches it.

use k8s_openapi::jiff::SignedDuration;

use super::Evaluation;
use super::steps::duration;
use crate::rollout::exposure::is_exposed;
use crate::rollout::judge::{Judgement, Unanswered, Verdict};

/// Requests to the new version, by its weight, of which none has ended: that is not chance.
const EXPECTED: f64 = 20.0;

/// What the stable version has answered while no request to the new version has ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Silence {
    /// Attempts at the stable version.
    stable: f64,
    /// Seconds that it has lasted.
    seconds: u32,
    /// Chance, or the warm-up of its pods, is not why.
    pub(super) is_long: bool,
}

impl Silence {
    /// In a few words. `ever`: a request to the new version has ended earlier.
    pub(super) fn sentence(self, ever: bool) -> String {
        let Self { stable, seconds, .. } = self;
        let none = match ever {
            true => format!(
                "no request to the new version has ended for {seconds} s, and {stable:.0} to the stable version have"
            ),
            false => format!(
                "no request to the new version has ended yet, and {stable:.0} to the stable version have"
            ),
        };
        format!(
            "{none}: they get no answer, or none reaches it; requests, streams and connections count when they end"
        )
    }
}

impl Evaluation<'_> {
    /// `None`: requests to the new version end, the stable version gets none either, or the weight sends none.
    pub(super) fn silence(&self) -> Option<Silence> {
        let stored = Unanswered::stored(&self.status.evidence);
        let counts = is_exposed(&self.status) && !self.closed;
        let Unanswered { blocks, stable } = if counts { stored.fold(&self.seen.block) } else { stored };
        let weight = self.status.weight;
        if weight == 0 || weight >= 100 || stable <= 0.0 {
            return None;
        }
        // The running block may have just begun.
        let seconds = blocks.saturating_sub(1).saturating_mul(10);
        let warm = SignedDuration::from_secs(i64::from(seconds)) > duration(&self.spec.judge.warm_up);
        let expected = stable * f64::from(weight) / f64::from(100 - weight);
        Some(Silence { stable, seconds, is_long: warm && expected >= EXPECTED })
    }

    /// What it answered earlier does not let a version pass that has fallen silent.
    pub(super) fn judge_unless_silent(&self) -> Judgement {
        let judged = self.judge();
        match judged.verdict {
            Verdict::Pass if self.silence().is_some_and(|silence| silence.is_long) => {
                Judgement { verdict: Verdict::Inconclusive, ..judged }
            }
            _ => judged,
        }
    }

    /// The judgement by which a silent version is reported: at once where the stable version has had as many requests as the new
    /// one needs, and otherwise like any doubt.
    pub(super) fn of_silence(&self, judged: &Judgement) -> Option<Judgement> {
        let silence = self.silence().filter(|silence| silence.is_long)?;
        let enough = silence.stable >= self.rules.min_requests.max(1) as f64;
        (judged.verdict == Verdict::Inconclusive && !judged.held).then(|| Judgement {
            held: enough,
            doubted: true,
            because: silence.sentence(self.evidence().canary.attempts > 0),
            ..judged.clone()
        })
    }
}
