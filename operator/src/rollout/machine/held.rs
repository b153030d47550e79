//! A version that the judge does not let pass although it has had requests enough: it keeps its share of them until
//! somebody decides.

use k8s_openapi::jiff::SignedDuration;
use tulle_mesh::event_reason::EventReason;

use super::Evaluation;
use crate::rollout::exposure;
use crate::rollout::judge::Judgement;

/// The condition of a version that the judge holds.
pub(super) const HELD: &str = EventReason::HeldByJudge.name();
/// A doubt that lasts for longer is worth an event. Most end within a few blocks, by more data.
const DOUBTED_FOR: SignedDuration = SignedDuration::from_secs(300);
/// How the message ends from then on, so that a rollout has one such event.
const REPORTED: &str = "; an event of this rollout says why";

impl Evaluation<'_> {
    /// What is surely wrong is an event at once, and what looks so for minutes as well.
    pub(super) fn show_held(&mut self, judged: &Judgement) {
        if !judged.held && !judged.doubted {
            return self.no_longer_held();
        }
        let known = self.status.conditions.iter().find(|condition| condition.type_ == HELD);
        let reported = known.is_some_and(|c| c.status == "False" || c.message.ends_with(REPORTED));
        let since = known.filter(|c| c.status == "True").map(|c| &c.last_transition_time);
        let lasts = judged.held || self.elapsed(since) >= DOUBTED_FOR;
        let (revision, abort) = (&self.status.canary_revision, self.action_command("abort"));
        let traffic = exposure::summary(self.status.weight, self.status.steering.as_ref());
        let mut message = format!(
            "revision {revision} does not pass, and keeps its traffic ({traffic}) meanwhile: {abort} takes it away"
        );
        if lasts && !reported {
            self.event(EventReason::HeldByJudge, format!("{message}; {}", judged.because));
        }
        if lasts || reported {
            message.push_str(REPORTED);
        }
        self.condition(HELD, true, HELD, &message);
    }

    /// The judge has no doubt any more, or nothing to judge.
    pub(super) fn no_longer_held(&mut self) {
        let Some(known) = self.status.conditions.iter().find(|condition| condition.type_ == HELD) else {
            return;
        };
        // Where it was reported, it is remembered: a doubt that comes and goes is one event.
        if known.status == "False" || known.message.ends_with(REPORTED) {
            let message = "the judge held the revision earlier in this rollout";
            self.condition(HELD, false, "NoLongerHeld", message);
        } else {
            self.drop_condition(HELD);
        }
    }
}
